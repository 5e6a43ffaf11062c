"""VNN-LIB 1.0 as other tools write it, empty boxes, and decimals that no float64 is equal to."""

import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vnncomp import IDENTITY, TENT, assert_stands, box, save_network, save_property
from walking import walk

from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.verifiers.vnncomp import answer
from certtrain.verifiers.vnnlib import Case, Property
from certtrain.verifiers.vnnlib_reader import read_property

HEADER = "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
BOX = "(assert (and (>= X_0 -1) (<= X_0 1)))"


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes, inputs: int = 1, outputs: int = 2) -> Property:
        path = tmp_path / "property.vnnlib"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_property(path, inputs, outputs)

    return read


def unsafe(prop: Property, x: float, *y: float) -> bool:
    return any(
        case.contains([x], y) and all(low <= Fraction(x) <= high for low, high in case.ends) for case in prop.cases
    )


SCRIPTS = {
    "declare-fun": ("(declare-fun X_0 () Real)(declare-fun Y_0 ( ) Real)(declare-const Y_1 Real)", ""),
    "a solver's script": (
        '(set-logic QF_LRA)(set-info :source |two lines (\n; of it|)(set-info :note "a ) and a ;")'
        "(set-option :produce-models true)" + HEADER,
        '(check-sat)(get-model)(get-value (X_0))(echo "done")(exit)(assert (this is never read',
    ),
    "a byte order mark": ("\ufeff" + HEADER, ""),
    "carriage returns": (HEADER.replace(")", ")\r\n"), "\r\n"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(read, name):
    head, tail = SCRIPTS[name]
    found, plain = (read(a + BOX + "\n(assert (<= Y_0 Y_1))" + b).cases[0] for a, b in ((head, tail), (HEADER, "")))
    assert found.ends == plain.ends and torch.equal(found.rows, plain.rows) and not read(HEADER + BOX).remark


# a formula, and whether it is unsafe at (y_0, y_1)
FORMULAS = {
    "true": lambda a, b: True,
    "false": lambda a, b: False,
    "(= Y_0 Y_1)": lambda a, b: a == b,
    "(= (+ Y_0 Y_1) 1)": lambda a, b: a + b == 1,
    "(not (= Y_0 Y_1))": lambda a, b: a != b,
    "(and (not (= (+ Y_0 Y_1) 1)) (= Y_0 1))": lambda a, b: a == 1 and b != 0,
    "(not (<= Y_0 Y_1))": lambda a, b: a > b,
    "(not (>= Y_0 Y_1))": lambda a, b: a < b,
    "(not (< Y_0 Y_1))": lambda a, b: a >= b,
    "(not (> Y_0 1))": lambda a, b: a <= 1,
    "(not (not (<= Y_0 Y_1)))": lambda a, b: a <= b,
    "(not true)": lambda a, b: False,
    "(not false)": lambda a, b: True,
    "(and true (<= Y_0 Y_1))": lambda a, b: a <= b,
    "(or false (<= Y_0 Y_1))": lambda a, b: a <= b,
    "(or true (<= Y_0 Y_1))": lambda a, b: True,
    "(and false (<= Y_0 Y_1))": lambda a, b: False,
    "(not (and (<= Y_0 Y_1) (>= Y_0 1)))": lambda a, b: a > b or a < 1,
    "(not (or (<= Y_0 Y_1) (>= Y_0 1)))": lambda a, b: a > b and a < 1,
    "(not (or (and (<= Y_0 0) (<= Y_1 0)) (>= Y_0 1)))": lambda a, b: (a > 0 or b > 0) and a < 1,
    "(or (= Y_0 0) (and (= Y_0 1) (not (<= Y_1 0))))": lambda a, b: a == 0 or (a == 1 and b > 0),
    "(<= 0 1)": lambda a, b: True,
    "(<= 1 0)": lambda a, b: False,
    "(= 1 1.0)": lambda a, b: True,
}
GRID = [-1.0, 0.0, 0.5, 1.0, 2.0]


@walk("formula", FORMULAS)
def test_formulas(read, formula):
    found = read(HEADER + BOX + f"(assert {formula})")
    for a, b in itertools.product(GRID, GRID):
        assert unsafe(found, 0.25, a, b) == FORMULAS[formula](a, b), (a, b)
        assert not unsafe(found, 1.5, a, b)


def test_inputs_tied_to_outputs(read):
    """Rows read the input behind the outputs."""
    found = read(HEADER + BOX + "(assert (and (>= X_0 (- Y_1 Y_0)) (not (<= (* 2 X_0) 1))))")
    (case,) = found.cases
    assert found.terms == ((0,),) and case.rows.tolist() == [[-1.0, 1.0, -1.0]] and case.excluded == {(0, False)}
    assert case.ends == ((Fraction(1, 2), Fraction(1)),)


def test_equality_and_negation_of_inputs(read):
    found = read(HEADER + "(assert (= X_0 0.1))(assert true)")
    assert found.cases[0].ends == ((Fraction(1, 10), Fraction(1, 10)),)
    found = read(HEADER + "(assert (not (or (< X_0 -2) (> X_0 3))))")
    assert found.cases[0].ends == ((Fraction(-2), Fraction(3)),)
    with pytest.raises(InputError, match=r"X_0.*a lower and an upper end"):
        read(HEADER + "(assert (not (< X_0 -2)))")


EMPTY = {
    "crossed": "(assert (and (>= X_0 2) (<= X_0 1)))",
    "crossed by less than float64": "(assert (and (>= X_0 0.30000000000000000002) (<= X_0 0.30000000000000000001)))",
    "two points": "(assert (= X_0 1)) (assert (= X_0 2))",
    "in both disjuncts": "(assert (and (>= X_0 0) (<= X_0 1))) (assert (or (>= X_0 2) (<= X_0 -1)))",
    "false": "(assert (and (>= X_0 0) (<= X_0 1))) (assert false)",
}
ALWAYS = "(assert (<= (* 0.0 Y_0) 0.0))"


@pytest.mark.parametrize("arithmetic", ["nearest", "float32"])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_box_holds_with_a_remark(tmp_path, capsys, name, arithmetic):
    network = save_network(tmp_path / "network.onnx", IDENTITY)
    asked = save_property(tmp_path / "p.vnnlib", EMPTY[name] + ALWAYS)
    found = answer(network, asked, 20.0, arithmetic=arithmetic, results=tmp_path / "result.txt")
    assert found.word == "holds" and found.reason and (tmp_path / "result.txt").read_text() == "unsat\n"
    assert main(["verify", "--onnx", str(network), "--vnnlib", str(asked)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("holds (") and len(out.splitlines()) == 1 and found.reason in out


def test_an_empty_disjunct_takes_nothing_from_the_others(tmp_path):
    network = save_network(tmp_path / "network.onnx", IDENTITY)
    for bound, word in (("0.5", "violated"), ("-0.5", "holds")):
        text = f"(assert (or (and {box(('2', '1'))}) (and {box(('0', '1'))} (<= Y_0 {bound}))))"
        found = answer(network, save_property(tmp_path / "p.vnnlib", text), 20.0)
        assert found.word == word and (found.reason is not None) == (word == "holds")


@pytest.mark.parametrize("formula", ["", "(assert true)", "(assert (not false))", "(assert (<= 0 1))", ALWAYS])
@pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
def test_where_every_output_is_unsafe_nothing_holds(tmp_path, formula, arithmetic):
    network = save_network(tmp_path / "network.onnx", TENT)
    asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0.1', '0.2'))})){formula}")
    assert answer(network, asked, 20.0, arithmetic=arithmetic).word == "violated"


# ends of any number of digits, those among them to which no float64 is equal
LONG = [
    ("0.1234567890123456", "0.1234567890123456"), ("0.9876543210987654", "0.9876543210987655"),
    ("0.12345678901234567", "0.12345678901234567"), ("0.30000000000000001", "0.30000000000000002"),
    ("0.1000000000000000055511151231257827021181583404541015625", "0.2"),
    ("0.3333333333333333333333333333", "0.3333333333333333333333333334"),
    ("-1.000000000000000000000000000000000001", "-1.000000000000000000000000000000000001"),
    ("1e-400", "2e-400"), ("-2e-400", "-1e-400"), ("12345678901234567890.5", "12345678901234567890.6"),
    ("0." + "0" * 60 + "1" * 300, "0." + "0" * 60 + "1" * 300),
]  # fmt: skip


@pytest.mark.parametrize("ends", LONG, ids=range(len(LONG)))
def test_printed_counterexamples_lie_within_decimals_of_any_length(tmp_path, ends):
    network = save_network(tmp_path / "network.onnx", IDENTITY)
    asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(ends)})){ALWAYS}")
    found = answer(network, asked, 20.0, results=tmp_path / "result.txt")
    assert found.word == "violated" and found.inputs
    assert Fraction(ends[0]) <= Fraction(found.inputs[0]) <= Fraction(ends[1])
    assert_stands((tmp_path / "result.txt").read_text(), network)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.integers(-(10**18), 10**18), st.integers(0, 10**4), st.integers(-40, 5), st.sampled_from([-1, 0, 1, 0.5]),
)  # fmt: skip
def test_decimals_next_to_any_end(number, more, exponent, share):
    """Of floats at the ends, one beside them, and in the middle: exactly compared."""
    low, high = (Fraction(Decimal(f"{n}e{exponent}")) for n in (number, number + more))
    near = float(low + (high - low) * Fraction(share) if 0 <= share <= 1 else low)
    for value in (near, np.nextafter(near, -np.inf), np.nextafter(near, np.inf)):
        zero = torch.zeros(1, dtype=torch.float64)
        case = Case(zero, zero, ((low, high),), zero[None], zero, zero.long())
        (text,) = case.written(torch.tensor([float(value)], dtype=torch.float64))
        assert low <= Fraction(text) <= high
        if low <= Fraction(repr(float(value))) <= high:
            assert text == repr(float(value) + 0.0)


def test_an_end_that_no_decimal_is_equal_to_gives_no_counterexample(tmp_path):
    """3 x = 1: whatever would be printed lies outside."""
    network = save_network(tmp_path / "network.onnx", IDENTITY)
    asked = save_property(tmp_path / "p.vnnlib", f"(assert (= (* 3 X_0) 1)){ALWAYS}")
    found = answer(network, asked, 2.0)
    assert found.word in ("unknown", "timeout") and found.inputs is None
