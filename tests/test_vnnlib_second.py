"""VNN-LIB 2.0: what is read means what the text says, and what cannot be read is refused by its name and line."""

import gzip
import math
import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from walking import walk

from certtrain.errors import InputError
from certtrain.verifiers.vnnlib import Property
from certtrain.verifiers.vnnlib_reader import read_property
from certtrain.verifiers.vnnlib_text import DEPTH

HEADER = "(vnnlib-version <2.0>)\n"
NETWORK = "(declare-network f (declare-input X {0} [1,2]) (declare-output Y {0} [3]))\n"
BOX = "".join(f"(assert (and (>= X[0,{i}] -1.0) (<= X[0,{i}] 1.0)))\n" for i in range(2))
BEFORE = HEADER + NETWORK.format("float32") + BOX


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    path = tmp_path_factory.mktemp("vnnlib") / "property.vnnlib"

    def read(text: str | bytes, inputs: int = 2, outputs: int = 3) -> Property:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_property(path, inputs, outputs)

    return read


def violated(prop: Property, inputs, outputs) -> bool:
    """As written, in exact arithmetic."""
    free = own_inputs(prop, inputs)
    for case in prop.cases:
        exact = [Fraction(value) for value in free or ()]
        inside = free is not None and all(
            low <= value <= high
            and (value > low or (i, False) not in case.excluded)
            and (value < high or (i, True) not in case.excluded)
            for i, (value, (low, high)) in enumerate(zip(exact, case.ends, strict=True))
        )
        unsafe = case.contains(inputs, outputs)
        if unsafe and free is not None:  # the closed set that verifiers work on contains it
            terms = [math.prod([*free, *outputs][one] for one in monomial) for monomial in prop.terms]
            values = torch.tensor([*outputs, *terms], dtype=torch.float64)
            rows = case.rows @ values + case.offsets
            worst = torch.full((int(case.clauses.max()) + 1,), -math.inf, dtype=torch.float64)
            assert worst.scatter_reduce(0, case.clauses, rows, "amax").min() <= 0
        if inside and unsafe:
            return True
    return False


def own_inputs(prop: Property, inputs):
    """The free inputs of all inputs; None where these are not as the equalities ask."""
    if prop.free is None:
        return inputs
    free = [Fraction(inputs[prop.free.terms.index({(k,): Fraction(1)})]) for k in range(prop.free.count)]
    for term, value in zip(prop.free.terms, inputs, strict=True):
        if sum(factor * math.prod(free[one] for one in monomial) for monomial, factor in term.items()) != value:
            return None
    return free


# terms and formulas as trees, and both their text and their value
NAMES = ["X[0,0]", "X[0,1]", "Y[0]", "Y[1]", "Y[2]"]
HALVES = st.integers(-4, 4).map(lambda number: Fraction(number, 2))
COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq,
           "!=": operator.ne}  # fmt: skip
LEAVES = st.sampled_from(NAMES) | HALVES
TERMS = st.recursive(
    LEAVES,
    lambda parts: (
        st.tuples(st.sampled_from("+-"), st.lists(parts, min_size=1, max_size=3))
        | st.tuples(st.just("*"), st.tuples(HALVES, parts))
        | st.tuples(st.just("*"), st.tuples(HALVES, parts, HALVES))
        | st.tuples(st.just("*"), st.tuples(parts, parts))
    ),
    max_leaves=5,
)
FORMULAS = st.recursive(
    st.tuples(st.sampled_from(list(COMPARE)), st.tuples(TERMS, LEAVES)),
    lambda parts: st.tuples(st.sampled_from(["and", "or"]), st.lists(parts, min_size=1, max_size=3)),
    max_leaves=7,
)


def text_of(tree) -> str:
    if isinstance(tree, tuple):
        return f"({tree[0]} {' '.join(map(text_of, tree[1]))})"
    return tree if isinstance(tree, str) else f"{float(tree):.1f}"


def value_of(tree, values: dict[str, Fraction]):
    if isinstance(tree, str):
        return values[tree]
    if isinstance(tree, Fraction):
        return tree
    sign, parts = tree[0], [value_of(part, values) for part in tree[1]]
    if sign in COMPARE:
        return COMPARE[sign](*parts)
    if sign == "-":
        return -parts[0] if len(parts) == 1 else parts[0] - sum(parts[1:])
    return {"and": all, "or": any, "+": sum, "*": math.prod}[sign](parts)


def degree(tree) -> int:
    if not isinstance(tree, tuple):
        return int(isinstance(tree, str))
    return {"*": sum}.get(tree[0], max)(map(degree, tree[1]))


def has_variable(tree) -> bool:
    return isinstance(tree, str) or (isinstance(tree, tuple) and any(map(has_variable, tree[1])))


def comparisons(tree) -> list:
    return [tree] if tree[0] in COMPARE else [one for part in tree[1] for one in comparisons(part)]


def disjuncts(tree) -> int:
    if tree[0] in COMPARE:
        return 2 if tree[0] == "!=" else 1
    return {"and": math.prod, "or": sum}[tree[0]](map(disjuncts, tree[1]))


GRID = [Fraction(number, 2) for number in range(-3, 4)]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(FORMULAS, min_size=1, max_size=3),
    st.sampled_from(["float32", "real", "Real"]),
    st.tuples(st.booleans(), st.booleans()),
    st.lists(st.tuples(*[st.sampled_from(GRID)] * 5), min_size=8, max_size=8),
)
def test_the_property_is_what_the_assertions_say(read, formulas, kind, strict, points):
    assume(disjuncts(("and", formulas)) <= 300)
    assume(all(degree(side) <= 2 for tree in formulas for one in comparisons(tree) for side in one[1]))
    assume(all(has_variable(side) for tree in formulas for one in comparisons(tree) for side in one[1][:1]))
    ends = [(">" if strict[0] else ">=", ("X[0,0]", Fraction(-1))), ("<=", ("X[0,0]", Fraction(1))),
            (">=", ("X[0,1]", Fraction(-1))), ("<" if strict[1] else "<=", ("X[0,1]", Fraction(1)))]  # fmt: skip
    whole = ("and", [*formulas, *ends])
    prop = read(HEADER + NETWORK.format(kind) + "\n".join(f"(assert {text_of(part)})" for part in whole[1]))
    for point in points:
        expected = value_of(whole, dict(zip(NAMES, point, strict=True)))
        assert violated(prop, point[:2], point[2:]) == expected, point


def test_decimals_are_exact(read):
    text = "0.1234567890123456789"
    (case,) = read(HEADER + NETWORK.format("real") + BOX + f"(assert (== X[0,1] {text}))").cases
    assert case.ends[1] == (Fraction(text), Fraction(text))
    assert float(case.lower[1]) < Fraction(text) < float(case.upper[1])


def test_entries_are_numbered_in_row_major_order_over_all_tensors(read):
    network = (
        "(declare-network f (declare-input A real [2,3]) (declare-input s real []) (declare-input B real [2])"
        "(declare-output P real [2]) (declare-output q real []))"
    )
    names = [*(f"A[{i},{j}]" for i in range(2) for j in range(3)), "s", "B[0]", "B[1]"]
    box = "".join(f"(assert (and (>= {name} {n}.0) (<= {name} {n}.5)))" for n, name in enumerate(names))
    prop = read(HEADER + network + box + "(assert (<= (+ P[1] (* 2.0 q)) (* 3.0 B[1])))", 9, 3)
    (case,) = prop.cases
    assert case.lower.tolist() == [float(n) for n in range(9)] and prop.terms == ((8,),)
    assert case.rows.tolist() == [[0.0, 1.0, 2.0, -3.0]]
    assert [(tensor.name, tensor.kind, tensor.shape) for tensor in prop.declared.inputs] == [
        ("A", "real", (2, 3)), ("s", "real", ()), ("B", "real", (2,)),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"found 'A\[1,2\]'; accepted: an input that has a lower and an upper end"):
        read(HEADER + network + box.replace("(<= A[1,2]", "(<= A[1,1]"), 9, 3)
    with pytest.raises(InputError, match=r"found 's'; accepted: an input that has"):
        read(HEADER + network + box.replace("(<= s ", "(<= B[0] "), 9, 3)


HEADERS = {
    "comments and blank lines": "; a comment (\n\n ; (vnnlib-version <3.0>)\n(vnnlib-version <2.0>)",
    "spaces": " ( vnnlib-version\t<2.0> )",
    "a later minor version": "(vnnlib-version <2.1>)",
    "a byte order mark": "\ufeff(vnnlib-version <2.0>)",
    "without brackets": "(vnnlib-version 2.0)",
    "with one bracket": "(vnnlib-version <2.0)",
}
TAIL = NETWORK.format("float32") + BOX + "(assert (<= Y[0] Y[1])) ; ü (\n"


@walk("name", HEADERS)
def test_headers(read, name, capfd):
    prop = read(HEADERS[name] + "\n" + TAIL)
    (case,) = prop.cases
    assert case.rows.tolist() == [[1.0, -1.0, 0.0]] and prop.remark is None
    assert (prop.repaired is not None) == ("bracket" in name)
    if prop.repaired:
        assert prop.repaired.endswith(", read as (vnnlib-version <2.0>)") and "property.vnnlib, line 1" in prop.repaired
    assert capfd.readouterr() == ("", "")  # the package writes its warnings there


def test_the_header_decides_not_the_name(tmp_path):
    names = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (and (>= X_0 0) (<= X_0 1) (<= Y_0 0)))"
    second = tmp_path / "2.0"
    second.mkdir()
    for header in ("", "(vnnlib-version <1.0>)\n", "(vnnlib-version 1.0)"):
        (second / "p.vnnlib").write_text(header + names)
        assert len(read_property(second / "p.vnnlib", 1, 1).cases) == 1
    (second / "p.vnnlib.gz").write_bytes(gzip.compress((HEADER + TAIL).encode()))
    assert read_property(second / "p.vnnlib.gz", 2, 3).declared is not None


def test_lines_end_as_they_like(read):
    for end in ("\r\n", "\n\n", "\n"):
        assert len(read((HEADER + TAIL).replace("\n", end)).cases) == 1


LONG = "9" * 30


@walk(
    ("text", "line", "found"),
    [
        # what the package takes without a word
        ("(assert (<= X[0,-1] 1.0))", 5, "[0,-1]"),
        ("(assert (<= X[0,1.9] 1.0))", 5, "[0,1.9]"),
        ("(assert (<= X[0,4294967296] 1.0))", 5, "[0,4294967296]"),
        ("(assert (<= Y[0] 1.0))\0(assert (<= Y[0] nonsense))", 5, "\0"),
        ("(assert (<= Ÿ[0] 1.0))", 5, "Ÿ"),
        # its own errors
        ("(assert (<= X[0,2] 1.0))", 5, "X[0,2]"),
        ("(assert (<= X[0] 1.0))", 5, "X[0]"),
        ("(assert (<= Y[0,0] 1.0))", 5, "Y[0,0]"),
        ("(assert (<= X 1.0))", 5, "X[]"),
        ("\n(assert (<= Z[0] 1.0))", 6, "Z"),
        ("(assert (<= Y[0] 1))", 5, "1"),
        ("(assert (<= Y[0] 1e-3))", 5, "e"),
        ("(assert (<= Y[0] +1.0))", 5, "+"),
        ("(assert (<= Y[0] .5))", 5, "."),
        ("(assert (= Y[0] 0.5))", 5, "="),
        ("(assert (not (<= Y[0] 0.5)))", 5, "not"),
        ("(assert (and))", 5, ")"),
        ("(assert (<= Y[0] 0.5)", 5, "the end of the file"),
        ("(check-sat)", 5, "("),
        (f"(assert (<= 1 {LONG}))", 1, "a number at which stoll fails"),
        (f"(assert (<= Y[0] {'9' * 400}.0))", 1, "a number at which stod fails"),
        ("(assert " + "(and " * DEPTH, 5, "("),
        ("(assert (<= Y[0] " + "(- " * (DEPTH - 1), 5, "("),
        # terms of degree 3
        ("(assert (<= (* Y[0] Y[1] Y[0]) 1.0))", 5, "(* Y [0] Y [1] Y [0])"),
        (
            "\n(assert (<= (* 2.0 X[0,0] (* (+ X[0,1] 1.0) Y[0])) 1.0))",
            6,
            "(* 2.0 X [0, 0] (* (+ X [0, 1] 1.0) Y [0]))",
        ),
        ("(assert (<= (* X[0,0] (* X[0,0] X[0,0])) 1.0))", 5, "(* X [0, 0] (* X [0, 0] X [0, 0]))"),
        # too much
        ("(assert (and " + " ".join(["(or (<= Y[0] 0.0) (<= Y[1] 0.0))"] * 20) + "))", 5, "and"),
        (" ".join(["(assert (!= Y[0] 0.0))"] * 20), 5, "assert"),
    ],
)
def test_what_cannot_be_read(read, text, line, found):
    with pytest.raises(InputError) as error:
        read(BEFORE + text)
    assert f"property.vnnlib, line {line}: found {found!r}; accepted: " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


FILES = {
    "vnnlib-version <3.0>": "(vnnlib-version <3.0>)" + TAIL,
    "vnnlib-version two": "(vnnlib-version two)" + TAIL,
    "vnnlib-version": "(vnnlib-version)" + TAIL,
    "declare-input X float64": HEADER + TAIL.replace("float32", "float64"),
    "declare-input X int8": HEADER + NETWORK.format("int8") + "(assert (<= Y[0] 1))",
    "declare-input X Float32": HEADER + TAIL.replace("float32", "Float32"),
    "declare-input X nonsense": HEADER + TAIL.replace("float32", "nonsense"),
    "float32 and real": HEADER + TAIL.replace("Y float32", "Y real"),
    "Y": HEADER + TAIL.replace("[3]", "[0]"),
    "[-3]": HEADER + TAIL.replace("[3]", "[-3]"),
    "[3.0]": HEADER + TAIL.replace("[3]", "[3.0]"),
    "4 inputs up to declare-input X": HEADER
    + "(declare-network f (declare-input A real [1,2]) (declare-output B real [3]))"
    "(declare-network g (equal-to f) (declare-input X real [1,2]) (declare-output Y real [3]))" + BOX,
    "5 outputs up to declare-hidden H": HEADER
    + '(declare-network f (declare-input X real [1,2]) (declare-hidden H real [2] "a;b(")'
    "(declare-output Y real [3]))" + BOX,
    "3 inputs up to declare-input X": HEADER + TAIL.replace("[1,2]", "[1,3]"),
    "4 outputs up to declare-output Y": HEADER + TAIL.replace("[3]", "[4]"),
    "4 inputs up to declare-input Z": HEADER
    + TAIL.replace("X float32 [1,2]", "X float32 [1,2]) (declare-input Z float32 [2]"),
}  # fmt: skip


@walk("found", FILES)
def test_files_that_cannot_be_read(read, found):
    with pytest.raises(InputError) as error:
        read(FILES[found])
    assert f": found {found!r}; accepted: " in str(error.value) and ", line " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_an_input_without_an_end(read):
    for without in ("(and (>= X[0,1] -1.0) (<= Y[0] Y[1]))", "(or (<= X[0,1] 1.0) (>= X[0,1] -1.0))"):
        with pytest.raises(InputError, match=r"line 2: found 'X\[0,1\]'; accepted: .* in every disjunct"):
            read(HEADER + NETWORK.format("real") + BOX.splitlines()[0] + f"(assert {without})")


def test_deep_formulas_within_the_limit(read):
    nested = "(and " * (DEPTH - 2) + "(<= Y[0] Y[1])" + ")" * (DEPTH - 2)
    prop = read(BEFORE + f"(assert {nested})")
    assert violated(prop, [0.0, 0.0], [0.0, 0.0, 0.0]) and not violated(prop, [0.0, 0.0], [1.0, 0.0, 0.0])


def test_an_empty_box_has_a_remark(read):
    for text, words in (
        ("(> X[0,0] 1.0)", "X[0,0] > 1.0 and <= 1.0"),
        ("(< X[0,0] -2.0)", "X[0,0] >= -1.0 and < -2.0"),
    ):
        prop = read(BEFORE + f"(assert {text})")
        assert not prop.cases and prop.remark.endswith(f"line 5: an empty box: {words}")
    assert len(read(BEFORE + "(assert (!= X[0,0] 0.5))").cases) == 2
