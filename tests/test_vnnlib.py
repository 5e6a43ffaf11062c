"""VNN-LIB: what is written reads back, and what is read means what the text says."""

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
from certtrain.verifiers import Specification
from certtrain.verifiers.vnnlib import Case, Property, write_property
from certtrain.verifiers.vnnlib_reader import read_property
from certtrain.verifiers.vnnlib_text import DEPTH

BOX = "".join(f"(assert (>= X_{i} -1.0)) (assert (<= X_{i} 1e0)) ; input {i}\n" for i in range(2))


def header(inputs: int = 2, outputs: int = 3) -> str:
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{j}" for j in range(outputs)]
    return " ".join(f"(declare-const {name} Real)" for name in names) + "\n"


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    path = tmp_path_factory.mktemp("vnnlib") / "property.vnnlib"

    def read(text: str, inputs: int = 2, outputs: int = 3) -> Property:
        path.write_text(text)
        return read_property(path, inputs, outputs)

    return read


def same(first: Case, second: Case) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("lower", "upper", "rows", "offsets", "clauses")]
    return first.ends == second.ends and all(torch.equal(a, b) for a, b in pairs)


def violated(prop: Property, inputs: list[float], outputs: list[float]) -> bool:
    """As written, strict comparisons included; the closed sets of verifiers contain whatever is violated."""
    point, logits = (torch.tensor(values, dtype=torch.float64) for values in (inputs, outputs))
    found = False
    for case in prop.cases:
        specification = Specification(case.rows[None], case.offsets[None], case.clauses)
        closed = specification.worst(specification.values(logits[None])) <= 0
        closed = closed and ((case.lower <= point) & (point <= case.upper)).all()
        unsafe = case.contains(inputs, outputs) and case.written(point) == [repr(value) for value in point.tolist()]
        assert closed or not unsafe
        found = found or unsafe
    return found


WIDE = st.floats(-(2.0**100), 2.0**100, allow_subnormal=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WIDE, WIDE), min_size=1, max_size=6), st.booleans(), st.integers(0, 3))
def test_what_is_written_reads_back(tmp_path_factory, pairs, single, label):
    path = tmp_path_factory.getbasetemp() / "round_trip.vnnlib"
    dtype = torch.float32 if single else torch.float64
    lower, upper = (torch.tensor([choose(pair) for pair in pairs], dtype=dtype) for choose in (min, max))
    write_property(path, lower, upper, label, 4)
    (case,) = read_property(path, len(pairs), 4).cases
    assert (case.lower <= lower.double()).all() and (upper.double() <= case.upper).all()
    for ends, given_ends, outward in ((case.lower, lower, -math.inf), (case.upper, upper, math.inf)):
        near, end = ends.float(), given_ends.float()  # what readers make of the decimals
        if single:
            assert torch.equal(near, end)
        step = torch.nextafter(end, torch.full_like(end, outward))
        assert ((near == end) | (near == step)).all()
        assert ((near.double() - given_ends.double()) * (1 if outward > 0 else -1) >= 0).all()
    robust = Specification.robust(torch.tensor([label]), 4)
    assert torch.equal(case.rows.float(), robust.rows[0]) and torch.equal(case.clauses, robust.clauses)
    assert not case.offsets.any()


def test_every_line_is_one_that_strict_parsers_know(tmp_path):
    path = tmp_path / "a.vnnlib"
    write_property(path, torch.tensor([[0.1, -0.0]]), torch.tensor([[0.1, 1e-42]]), 1, 3)
    assert path.read_text().splitlines()[5:] == [
        "(assert (>= X_0 0.100000001))", "(assert (<= X_0 0.100000002))",
        "(assert (>= X_1 0))", "(assert (<= X_1 1.00052711e-42))",
        "(assert (or (and (<= Y_1 Y_0)) (and (<= Y_1 Y_2))))",
    ]  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.vnnlib"]


def test_gzipped_files(tmp_path):
    plain, packed = tmp_path / "a.vnnlib", tmp_path / "a.vnnlib.gz"
    write_property(plain, torch.tensor([0.25, 0.5]), torch.tensor([0.25, 0.5]), 0, 2)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    first, second = (read_property(path, 2, 2).cases[0] for path in (plain, packed))
    assert same(first, second)
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(InputError, match="text or gzipped"):
        read_property(packed, 2, 2)


@pytest.mark.parametrize(
    ("lower", "upper", "label", "match"),
    [
        ([0.0], [0.0, 1.0], 0, "one shape"),
        ([], [], 0, "not empty"),
        ([1], [2], 0, "of floats"),
        ([1.0], [0.0], 0, "lower <= upper"),
        ([math.nan], [0.0], 0, "NaN"),
        ([0.0], [math.inf], 0, "infinite"),
        ([0.0], [1.0], 3, "0 to classes - 1"),
    ],
)
def test_what_cannot_be_written(tmp_path, lower, upper, label, match):
    with pytest.raises(InputError, match=match):
        write_property(tmp_path / "a.vnnlib", torch.tensor(lower), torch.tensor(upper), label, 3)
    assert not list(tmp_path.iterdir())


@settings(max_examples=150, deadline=None)
@given(st.fractions(-2, 2), st.integers(-330, 300), st.integers(1, 25))
def test_ends_are_rounded_outward(read, fraction, exponent, digits):
    text = f"{fraction.numerator * 10**digits // fraction.denominator}e{exponent - digits}"
    (case,) = read(header(1, 1) + f"(assert (and (>= X_0 {text}) (<= X_0 {text})))", 1, 1).cases
    exact, lower, upper = Fraction(text), float(case.lower), float(case.upper)
    assert lower <= exact <= upper and upper <= math.nextafter(lower, math.inf)
    assert float(case.lower32) <= lower and upper <= float(case.upper32)
    if math.isfinite(float(case.lower32)) and math.isfinite(float(case.upper32)):
        step = torch.nextafter(case.lower32, torch.full((1,), math.inf))
        assert (case.upper32 <= step).all()


# formulas as trees: ("and" | "or", parts), ("<=" …, term, term); terms are (coefficients of Y_0 … Y_2, constant)
NUMBERS = st.integers(-3, 3)
TERMS = st.tuples(st.tuples(NUMBERS, NUMBERS, NUMBERS), NUMBERS)
OUTPUTS = st.tuples(st.sampled_from(["<=", ">=", "<", ">"]), TERMS, TERMS)
INPUTS = st.tuples(st.sampled_from(["<=", ">=", "<", ">"]), st.integers(0, 1), NUMBERS)
FORMULAS = st.recursive(
    OUTPUTS | INPUTS.filter(lambda bound: (bound[0][0] == "<") == (bound[2] >= 0)),
    lambda parts: st.tuples(st.sampled_from(["and", "or"]), st.lists(parts, min_size=1, max_size=3)),
    max_leaves=8,
)
COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


def term_text(term) -> str:
    (first, *others), constant = term
    return f"(- (+ (* {first} Y_0) {' '.join(f'(* Y_{j} {c})' for j, c in enumerate(others, 1))}) (- {constant}))"


def text_of(formula) -> str:
    if formula[0] in ("and", "or"):
        return f"({formula[0]} {' '.join(map(text_of, formula[1]))})"
    if isinstance(formula[1], int):
        return f"({formula[0]} X_{formula[1]} {formula[2]})"
    return f"({formula[0]} {term_text(formula[1])} {term_text(formula[2])})"


def disjuncts(formula) -> int:
    counts = map(disjuncts, formula[1]) if formula[0] in ("and", "or") else (1,)
    return math.prod(counts) if formula[0] == "and" else sum(counts)


def holds(formula, inputs, outputs) -> bool:
    if formula[0] in ("and", "or"):
        return {"and": all, "or": any}[formula[0]](holds(part, inputs, outputs) for part in formula[1])
    if isinstance(formula[1], int):
        return COMPARE[formula[0]](inputs[formula[1]], formula[2])
    left, right = (sum(c * y for c, y in zip(term[0], outputs)) + term[1] for term in formula[1:])
    return COMPARE[formula[0]](left, right)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(FORMULAS, max_size=4),
    st.lists(st.tuples(*[st.sampled_from([-5, -2, -1, 0, 1, 2, 3, 5])] * 5), min_size=5, max_size=5),
)
def test_the_property_is_what_the_formula_says(read, formulas, points):
    assume(disjuncts(("and", formulas)) <= 300)
    ends = [(">=", 0, -4), ("<=", 0, 4), (">=", 1, -4), ("<=", 1, 4)]
    prop = read(header() + "\n".join(f"(assert {text_of(formula)})" for formula in (*formulas, *ends)))
    for inputs, outputs in ((point[:2], point[2:]) for point in points):
        assert violated(prop, inputs, outputs) == holds(("and", [*formulas, *ends]), inputs, outputs)
    boxes = {(*case.lower.tolist(), *case.upper.tolist(), case.excluded) for case in prop.cases}
    assert len(boxes) == len(prop.cases)


def test_boxes_with_conditions_of_their_own(read):
    """As ACAS Xu's property 6: two boxes, and outputs in either; what is shared is shared."""
    text = (
        header()
        + """
        (assert (or (and (<= X_0 0.5) (>= X_0 0.25) (<= Y_0 Y_1))
                    (and (<= X_0 -0.25) (>= X_0 -0.5) (<= Y_1 Y_0) (<= Y_2 0))
                    (and (<= X_0 0.5) (>= X_0 0.25) (<= Y_0 Y_2))))
        (assert (>= X_1 0)) (assert (<= X_1 1))
        (assert (<= Y_0 (+ Y_1 (* 2 Y_2) 3)))"""
    )
    first, second = read(text).cases
    assert (first.lower.tolist(), first.upper.tolist()) == ([0.25, 0.0], [0.5, 1.0])
    assert (second.lower.tolist(), second.upper.tolist()) == ([-0.5, 0.0], [-0.25, 1.0])
    assert first.clauses.tolist() == [0, 0, 1, 1] and second.clauses.tolist() == [0, 0, 0]
    assert first.rows.tolist() == [[1, -1, -2], [1, -1, 0], [1, -1, -2], [1, 0, -1]]
    assert first.offsets.tolist() == [-3, 0, -3, 0]
    again = read(text).cases
    for one, other in zip((first, second), again):
        assert same(one, other)


def test_ties_are_unsafe_unless_the_comparison_is_strict(read):
    for comparison in ("<=", "<"):
        prop = read(header() + BOX + f"(assert ({comparison} Y_0 Y_1))")
        assert violated(prop, [1.0, -1.0], [2.0, 2.0, 0.0]) == (comparison == "<=")
        assert violated(prop, [1.0, -1.0], [2.0, 2.5, 0.0]) and not violated(prop, [1.0, -1.0], [2.0, 1.0, 0.0])


def test_without_outputs_every_point_of_the_box_violates(read):
    prop = read(header() + BOX)
    assert violated(prop, [0.0, 0.0], [5.0, 5.0, 5.0]) and not violated(prop, [2.0, 0.0], [5.0, 5.0, 5.0])


@walk(
    ("text", "line", "found"),
    [
        ("(assert (not (<= Y_0 Y_1) (<= Y_0 Y_2)))", 4, "not"),
        ("(assert (=> (<= Y_0 Y_1) (<= Y_0 Y_2)))", 4, "=>"),
        ("(assert (let ((a Y_0)) (<= a Y_1)))", 4, "let"),
        ("(assert (= (<= Y_0 Y_1) true))", 4, "<="),
        ("(assert maybe)", 4, "maybe"),
        ("(push 1)", 4, "push"),
        ("(declare-fun Y_0 Real)", 4, "Y_0 Real"),
        ("(declare-fun Y_0 (Real) Real)", 4, "Y_0 (…) Real"),
        ("(declare-fun Y_0 () Real)", 4, "Y_0 () Real"),
        ("(set-info :source |no end)\n(assert (<= Y_0 Z_0))", 5, "Z_0"),
        ("(vnnlib-version <2.0>)", 4, "vnnlib-version"),
        ("(assert (<= Y_0 Y_1)", 4, "("),
        ("(assert (<= Y_0 Y_1)))", 4, ")"),
        ("assert", 4, "assert"),
        ("(assert)", 4, "assert"),
        ("(assert ())", 4, "("),
        ("(assert Y_0)", 4, "Y_0"),
        ("(assert (and))", 4, "("),
        ("\n(assert (<= Y_0\nY_3))", 6, "Y_3"),
        ("(assert (<= Y_0 nan))", 4, "nan"),
        ("(assert (<= Y_0 -inf))", 4, "-inf"),
        ("(assert (<= Y_0 1e309))", 4, "1e309"),
        ("(assert (<= Y_0 1e999999999))", 4, "1e999999999"),
        ("(assert (<= Y_0 1e-999999999))", 4, "1e-999999999"),
        ("(assert (<= Y_0 1/3))", 4, "1/3"),
        ("(assert (<= Y_0 (* 1e200 (* 1e200 Y_1))))", 4, "<="),
        ("(assert (<= X_0 (* 1e200 1e200)))", 4, "<="),
        ("(assert (<= Y_0 Y_1 Y_2))", 4, "<="),
        ("(assert (<= Y_0 (* Y_1 Y_2)))", 4, "*"),
        ("(assert (<= Y_0 (/ Y_1 2)))", 4, "/"),
        ("(declare-const X_0 Real)", 4, "X_0 Real"),
        ("(declare-const X_2 Real)", 4, "X_2 Real"),
        ("(declare-const Y_3 Real)", 4, "Y_3 Real"),
        ("(declare-const Z_0 Real)", 4, "Z_0 Real"),
        ("(declare-const Y_0 Int)", 4, "Y_0 Int"),
        ("(assert (and " + " ".join(["(or (<= Y_0 0) (<= Y_1 0))"] * 20) + "))", 4, "and"),
        ("(" * 100_000, 4, "("),
        ("(assert " + "(and " * 100_000, 4, "("),
        ("(assert (<= Y_0 " + "(+ 1 " * 100_000, 4, "("),
    ],
)
def test_what_cannot_be_read(read, text, line, found):
    with pytest.raises(InputError) as error:
        read(header() + BOX + text)
    assert f"property.vnnlib, line {line}: found {found!r}; accepted: " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_deep_formulas_within_the_limit(read):
    nested = "(and " * (DEPTH - 2) + "(<= Y_0 Y_1)" + ")" * (DEPTH - 2)
    assert violated(read(header() + BOX + f"(assert {nested})"), [0.0, 0.0], [0.0, 0.0, 0.0])


def test_what_is_missing(read, tmp_path):
    with pytest.raises(InputError, match=r"line 2: found 'X_0'; accepted: .* in every disjunct"):
        read("\n" + header() + "(assert (or (and (<= X_0 1) (>= X_0 0) (<= X_1 1) (>= X_1 0)) (<= X_1 0)))")
    with pytest.raises(InputError, match=r"line 2: found 'assert'; accepted: .* X_0 to X_1 and Y_0 to Y_3"):
        read(header() + "(assert (<= X_0 1))", outputs=4)
    for content in ("", "; nothing"):
        with pytest.raises(InputError, match="a file that declares X_0 to X_1"):
            read(content)
    with pytest.raises(InputError, match=r"none\.vnnlib: found .*; accepted: VNN-LIB 1\.0"):
        read_property(tmp_path / "none.vnnlib", 1, 1)
