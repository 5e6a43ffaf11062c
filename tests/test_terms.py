"""What constraints may say about variables: products, equalities among inputs, polytopes; against exact oracles."""

import itertools
import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import vnnlib
from hypothesis import given, settings
from hypothesis import strategies as st
from milp_oracle import minimum
from test_vnncomp import IDENTITY, save_network
from test_vnncomp_second import ask, assert_accepted, fractions, interval, query, value

from certtrain.bounds import Box
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.verifiers.constraints import CONSTANT, multiplied
from certtrain.verifiers.free_inputs import Equalities, FreeInputs
from certtrain.verifiers.onnx_network import read_onnx
from certtrain.verifiers.polytope import Polytope
from certtrain.verifiers.terms import with_terms
from certtrain.verifiers.vnncomp import ONLY_TIES, UNMET, UNWRITTEN, answer
from certtrain.verifiers.vnnlib_reader import read_property

__all__ = ["ask"]  # a fixture

TWO = ("X float32 [1,2]", "Y float32 [1,2]")
SQUARE = interval("0.0", "1.0", "X[0,0]") + interval("0.0", "1.0", "X[0,1]")
SUM_AND_FALL = [([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], [0.0] * 3), ([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0.0] * 2)]
"""(x + y, relu(x - y))"""


def test_products_over_an_interval(ask, tmp_path):
    """Of the identity, whose extremes are known."""
    network = save_network(tmp_path / "n.onnx", IDENTITY)
    for assertion, word in {
        "(> (* Y[0,0] X[0,0]) 1.001)": "holds",
        "(>= (* Y[0,0] X[0,0]) 1.0)": "violated",
        "(> (* Y[0,0] (- 1.0 Y[0,0])) 0.2501)": "holds",
        "(> (* Y[0,0] (- 1.0 X[0,0])) 0.2501)": "holds",
        "(> (* (- 1.0 X[0,0]) X[0,0]) 0.2501)": "holds",
        "(> (* Y[0,0] (- 1.0 X[0,0])) 0.2499)": "violated",
        "(< (* (- Y[0,0] 0.5) (- Y[0,0] 0.5)) -0.0001)": "holds",
        "(<= (* (- Y[0,0] 0.5) (- Y[0,0] 0.5)) 0.0)": "violated",
        "(== (* X[0,0] X[0,0]) 0.25)": "violated",
        "(== (* X[0,0] Y[0,0]) 1.25)": "holds",
        "(and (> (* X[0,0] Y[0,0]) 0.3) (or (< X[0,0] 0.54) (> (* Y[0,0] Y[0,0]) 1.01)))": "holds",
        "(and (> (* X[0,0] Y[0,0]) 0.28) (or (< X[0,0] 0.54) (> (* Y[0,0] Y[0,0]) 1.01)))": "violated",
        "(!= (* X[0,0] X[0,0]) 0.25)": "violated",
        "(> (- (* X[0,0] Y[0,0]) (* Y[0,0] X[0,0])) 0.0)": "holds",
    }.items():
        assert ask(query(interval("0.0", "1.0") + f"(assert {assertion})"), network).word == word, assertion


def test_a_square_is_never_negative(ask, tmp_path):
    """By one bound, without splitting: a product of independent values in [-1, 1] would reach -1."""
    network = save_network(tmp_path / "n.onnx", IDENTITY)
    for term in ("(* X[0,0] X[0,0])", "(* Y[0,0] Y[0,0])"):
        found = ask(query(interval("-1.0", "1.0") + f"(assert (< {term} -0.001))"), network)
        assert (found.word, found.stage) == ("holds", "ibp")


def test_products_of_inputs_and_outputs(ask, tmp_path):
    network = save_network(tmp_path / "n.onnx", SUM_AND_FALL)
    half = SQUARE + "(assert (<= (+ X[0,0] X[0,1]) 1.0))"
    for text, word in {
        half + "(assert (> (* X[0,0] X[0,1]) 0.2501))": "holds",
        half + "(assert (> (* X[0,0] X[0,1]) 0.2499))": "violated",
        half + "(assert (> (* Y[0,0] Y[0,1]) 1.001))": "holds",
        half + "(assert (> (* Y[0,0] Y[0,1]) 0.99))": "violated",
        # (x + y) relu(x - y) = x^2 - y^2 where x >= y
        half + "(assert (>= X[0,0] X[0,1]))(assert (> (- (* Y[0,0] Y[0,1]) (* X[0,0] X[0,0])) 0.001))": "holds",
        half + "(assert (> (- (* Y[0,0] Y[0,1]) (* X[0,0] X[0,0])) -0.001))": "violated",
    }.items():
        assert ask(query(text, *TWO), network).word == word, text


def random_term(draw: random.Random, left: int) -> str:
    """Of degree ``left`` at most."""
    names = ["X[0,0]", "X[0,1]", "Y[0,0]", "Y[0,1]"]
    if left == 2 and draw.random() < 0.6:
        return f"(* {random_term(draw, 1)} {random_term(draw, 1)})"
    kind = draw.random()
    if kind < 0.5:
        return draw.choice(names)
    if kind < 0.7:
        return f"(* {draw.randint(-4, 4) / 2:.1f} {draw.choice(names)})"
    return f"({draw.choice('+-')} {draw.choice(names)} {draw.choice(names)})"


def random_formula(draw: random.Random, depth: int = 0) -> str:
    if depth > 1 or (depth and draw.random() < 0.4):
        sign = draw.choice(["<=", ">=", "<", ">", "<=", ">=", "==", "!="])
        return f"({sign} {random_term(draw, 2)} (+ {random_term(draw, 2)} {draw.randint(-6, 6) / 4:.2f}))"
    parts = " ".join(random_formula(draw, depth + 1) for _ in range(draw.randint(2, 3)))
    return f"({draw.choice(['and', 'and', 'or'])} {parts})"


def points_of(network: Path, axis: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Inputs on a grid, and their outputs, exactly."""
    run = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, 2).astype(np.float32)
    return [{"X": fractions(point), "Y": fractions(run.run(None, {"x": point})[0])} for point in points]


@pytest.mark.parametrize("equality", ["", "(assert (== X[0,0] X[0,1]))", "(assert (== (* 2.0 X[0,0]) X[0,1]))"])
def test_no_answer_is_contradicted_by_a_point(ask, tmp_path, equality):
    """Random queries of degree 2: where one holds, no point of a grid of eighths satisfies it in exact arithmetic."""
    words = list[str]()
    for seed in range(12):
        draw, weights = random.Random(seed), np.random.default_rng(seed)
        layers = [(weights.integers(-2, 3, (k, n)) / 2, weights.integers(-2, 3, k) / 2) for k, n in ((6, 2), (2, 6))]
        network = save_network(tmp_path / "n.onnx", layers)
        box = interval("-1.0", "1.0", "X[0,0]") + interval("-1.0", "1.0", "X[0,1]")
        text = query(box + equality + f"(assert {random_formula(draw)})", *TWO)
        found = ask(text, network, timeout=3.0)
        words.append(found.word)
        asserted = vnnlib.parse_query_string(text).assertions
        some = any(
            all(value(assertion.expr, point) for assertion in asserted)
            for point in points_of(network, np.linspace(-1, 1, 17))
        )
        assert not (some and found.word == "holds"), (seed, text)
    assert {"holds", "violated"} <= set(words)


# equalities among inputs

FACTORS = st.sampled_from([Fraction(number, 2) for number in (-4, -2, -1, 1, 2, 3)])
EQUALITIES = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 5), FACTORS, min_size=1, max_size=3), FACTORS | st.just(Fraction(0))),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(EQUALITIES, st.lists(FACTORS, min_size=6, max_size=6))
def test_equalities_are_solved_exactly(equalities, values):
    """Whatever the free variables are, the equalities that were solved hold; the others are left in one variable."""
    terms = [{**{(v,): factor for v, factor in form.items()}, CONSTANT: constant} for form, constant in equalities]
    solved = Equalities(terms)
    left = [{one: factor for one, factor in solved.resolved(term).items() if factor} for term in terms]
    assert all(len(term.keys() - {CONSTANT}) <= 1 for term in left)
    rank = np.linalg.matrix_rank(np.array([[float(form.get(v, 0)) for v in range(6)] for form, _ in equalities]))
    assert len(solved) <= rank
    inputs = [solved.resolved({(v,): Fraction(1)}) for v in range(6)]
    assert all(not (set(one) & {v for v in range(6) if v in solved}) for term in inputs for one in term)

    def at(term, given):
        return sum(factor * math.prod(given[one] for one in monomial) for monomial, factor in term.items())

    whole = [at(term, values) for term in inputs]
    for term, rest in zip(terms, left, strict=True):
        assert at(term, whole) == at(rest, values)
    product = multiplied(terms[0], terms[-1])
    assert at(solved.resolved(product), values) == at(terms[0], whole) * at(terms[-1], whole)


def test_decimals_satisfy_equalities_exactly():
    """Of random decimals as factors, whose solutions have no end, next to random points."""
    found, draw = 0, random.Random(0)
    for _ in range(200):
        count, rows = draw.randint(3, 7), draw.randint(1, 3)
        terms = [
            {(v,): Fraction(draw.randint(1, 999999), 10 ** draw.randint(0, 6)) for v in draw.sample(range(count), 3)}
            | {CONSTANT: Fraction(draw.randint(-99999, 99999), 10**4)}
            for _ in range(rows)
        ]
        solved = Equalities(terms)
        place = {v: k for k, v in enumerate(v for v in range(count) if v not in solved)}
        inputs = [solved.resolved({(v,): Fraction(1)}) for v in range(count)]
        free = FreeInputs(
            tuple({tuple(place[v] for v in one): value for one, value in term.items() if value} for term in inputs),
            len(place),
        )
        point = [repr(draw.uniform(-1, 1)) for _ in place]
        near = [(Fraction(text) - Fraction(1, 10**12), Fraction(text) + Fraction(1, 10**12)) for text in point]
        texts = free.written(point, lambda number, value, near=near: near[number][0] <= value <= near[number][1])
        if texts is not None:
            found += 1
            values = [Fraction(text) for text in texts]
            for term in terms:
                left = sum(factor * math.prod(values[v] for v in one) for one, factor in term.items())
                assert left == 0 or any(solved.resolved(term).values())
    assert found > 140


def chain(count: int, reverse: bool) -> str:
    pairs = [(f"X[0,{i}]", f"X[0,{i + 1}]") for i in range(count - 1)]
    return "".join(f"(assert (== {a} {b}))" for a, b in (reversed(pairs) if reverse else pairs))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_chain_of_equalities_leaves_one_input(tmp_path, ask, reverse):
    """A copy is exact in every arithmetic, and its box the intersection of all boxes."""
    count = 40
    weights = np.random.default_rng(0).normal(size=(1, count)).astype(np.float32)
    network = save_network(tmp_path / "n.onnx", [(weights, [0.0])])
    box = "".join(interval(f"{i / 100}", f"{1 + i / 100}", f"X[0,{i}]") for i in range(count))
    text = query(box + chain(count, reverse) + "(assert (>= Y[0,0] (* 2.0 X[0,3])))", f"X float32 [1,{count}]")
    (tmp_path / "p.vnnlib").write_text(text)
    prop = read_property(tmp_path / "p.vnnlib", count, 1)
    (case,) = prop.cases
    assert prop.free is not None and prop.free.copies and prop.free.count == 1
    assert case.ends == ((Fraction(39, 100), Fraction(1)),) and prop.terms == ((0,),)
    read = read_onnx(network)
    whole = with_terms(read, prop)
    assert whole.shape == (1,)
    points = torch.rand(50, 1)
    expected = torch.cat([read.module(points.expand(-1, count)), points], 1)
    assert torch.equal(whole.module(points), expected)
    slope = float(weights.astype(np.float64).sum())
    for least, word in ((slope - 1e-3, "violated"), (slope + 1e-3, "holds")):
        for arithmetic in ("nearest", "real", "float32"):
            asserted = f"(assert (>= Y[0,0] (* {least:.6f} X[0,3])))"
            asked = query(box + chain(count, reverse) + asserted, f"X float32 [1,{count}]")
            assert ask(asked, network, arithmetic=arithmetic).word == word


def test_equalities_decide_comparisons_and_ties(ask, tmp_path):
    network = save_network(tmp_path / "n.onnx", SUM_AND_FALL)
    tied = SQUARE + "(assert (== X[0,1] X[0,0]))"
    for text, word, reason in (
        (tied + "(assert (== X[0,1] (+ X[0,0] 1.0)))", "holds", "line 5: a == that the equalities of inputs exclude"),
        (tied + "\n(assert (> X[0,0] X[0,1]))", "holds", "line 6: a > that the equalities of inputs exclude"),
        (tied + "(assert (or (!= X[0,0] X[0,1]) (> Y[0,0] 2.1)))", "holds", "that the equalities of inputs exclude"),
        (tied + "(assert (or (!= X[0,0] X[0,1]) (> Y[0,0] 1.9)))", "violated", None),
        (tied + "(assert (>= X[0,0] X[0,1]))(assert (>= Y[0,1] 0.0))", "violated", None),
        (tied + "(assert (> Y[0,1] 0.0))", "unknown", ONLY_TIES),
        (tied + "(assert (> Y[0,0] (* 2.0 X[0,0])))", "unknown", ONLY_TIES),
        (tied + "(assert (> Y[0,0] (+ (* 2.0 X[0,0]) 0.0001)))", "holds", None),
        (tied + "(assert (== (+ X[0,0] X[0,1]) 3.0))", "holds", "an empty box: X[0,0] >= 1.5 and <= 1.0"),
        (tied + "(assert (== (+ X[0,0] X[0,1]) 1.0))(assert (>= Y[0,0] 1.0))", "violated", None),
        (SQUARE + "(assert (> X[0,1] 0.75))(assert (== X[0,1] X[0,0]))(assert (<= X[0,0] 0.75))", "holds", "X[0,0] > "),
    ):
        found = ask(query(text, *TWO), network, timeout=3.0 if word == "unknown" else 20.0)
        assert found.word == word and (reason or "") in (found.reason or ""), (text, found)


def counterexample(answer, query_text: str, network: Path) -> dict[str, np.ndarray]:
    """The decimals of a counterexample, with onnxruntime's outputs at what float32 makes of them."""
    decimals = np.array([Fraction(text) for text in answer.inputs], object).reshape(1, -1)
    given = np.array([[float(text) for text in answer.inputs]], np.float32)
    run = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    exact = {"X": decimals, "Y": fractions(run.run(None, {"x": given})[0])}
    assert all(value(assertion.expr, exact) for assertion in vnnlib.parse_query_string(query_text).assertions)
    return exact


def test_affine_equalities(tmp_path):
    """Decimals satisfy them exactly; where float32 can hold all inputs, so do these."""
    network = save_network(tmp_path / "n.onnx", SUM_AND_FALL)

    def answered(text: str):
        (tmp_path / "q.vnnlib").write_text(text)
        found = answer(network, tmp_path / "q.vnnlib", 20.0, results=tmp_path / "r.txt")
        if found.word == "violated":
            counterexample(found, text, network)
        return found

    for equality, top, floats in (
        ("(== X[0,1] (+ X[0,0] 0.1))", 1.9, False),
        ("(== X[0,1] (+ X[0,0] 0.5))", 1.5, True),
        ("(== X[0,1] (* X[0,0] 2.0))", 1.5, True),
        ("(== (* 2.5 X[0,1]) (- 1.0 (* 0.3 X[0,0])))", 1.28, False),
        ("(== (+ (* 0.123457 X[0,0]) (* 0.7 X[0,1])) 0.5)", 1 + 0.376543 / 0.7, False),
        ("(== (* 3.0 X[0,1]) (* X[0,0] 7.0))", 1 + 3 / 7, True),
        ("(== (* 5.3 X[0,1]) (* X[0,0] 7.1))", 1 + 53 / 71, True),
    ):
        for shift, word in ((-0.05, "violated"), (0.01, "holds")):
            text = query(SQUARE + f"(assert {equality})(assert (>= Y[0,0] {top + shift:.6f}))", *TWO)
            found = answered(text)
            assert found.word == word, (equality, word, found)
            if word == "violated" and floats:
                assert_accepted((tmp_path / "r.txt").read_text(), text, network)
    text = query(SQUARE + "(assert (== (* 3.0 X[0,1]) (+ (* 3.0 X[0,0]) 1.0)))(assert (>= Y[0,0] 0.5))", *TWO)
    found = answered(text)
    assert (found.word, found.reason) == ("unknown", UNWRITTEN)


def test_equalities_against_integer_programs(ask, tmp_path):
    """Largest outputs of tied inputs are those of a network whose first weights are multiplied by the ties."""
    ties = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -2.0]])  # X1 = X0, X3 = -2 X2
    box = "".join(interval("-1.0", "1.0", f"X[0,{i}]") for i in range(4))
    box += "(assert (== X[0,1] X[0,0]))(assert (== (+ X[0,3] (* 2.0 X[0,2])) 0.0))"
    for seed in range(5):
        draw = np.random.default_rng(seed)
        first, last = (draw.integers(-8, 9, shape) / 8 for shape in ((10, 4), (1, 10)))
        bias = draw.integers(-8, 9, 10) / 16
        network = save_network(tmp_path / "n.onnx", [(first, bias), (last, [0.0])])
        free = save_network(tmp_path / "free.onnx", [(first @ ties, bias), (last, [0.0])])
        folded = fold(read_onnx(free).module, torch.Size((2,)), dtype=torch.float64)
        ends = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        best = minimum(folded, Box(-ends, ends), -one, torch.zeros_like(one[0]), crown_bounds(folded, Box(-ends, ends)))
        assert bool(best.optimal.all())
        for shift, word in ((0.001, "holds"), (-0.001, "violated")):
            text = query(box + f"(assert (>= Y[0,0] {-float(best.values[0]) + shift:.6f}))", "X float32 [1,4]")
            for arithmetic in ("nearest", "real", "float32"):
                assert ask(text, network, arithmetic=arithmetic).word == word, (seed, shift, arithmetic)


# polytopes


def test_points_go_inside_of_polytopes():
    """Around a point inside, whatever the widths of the inputs are."""
    shares = list[float]()
    for seed, inputs, count in itertools.product(range(8), range(1, 7), range(1, 5)):
        draw = torch.Generator().manual_seed(seed)
        width = 10.0 ** torch.randint(-3, 4, (inputs,), generator=draw).double()
        inside = (torch.rand(inputs, generator=draw, dtype=torch.float64) * 1.6 - 0.8) * width
        normals = torch.randn(1, count, inputs, generator=draw, dtype=torch.float64) / width
        offsets = -(normals[0] @ inside) - 0.01 * torch.rand(count, generator=draw, dtype=torch.float64)
        polytope = Polytope(Box(-width[None].float(), width[None].float()), normals, offsets[None])
        points = (torch.rand(64, inputs, generator=draw) * 2 - 1) * width.float()
        every = torch.zeros(64, dtype=torch.int64)
        found = polytope.take(every).nearest(points)
        assert found.dtype == torch.float32 and bool(polytope.take(every).contains(found).all())
        shares.append(float((found.double() @ normals[0].T + offsets <= 0).all(1).double().mean()))
        already = (points.double() @ normals[0].T + offsets <= 0).all(1)
        assert torch.equal(found[already], points[already])
    assert np.mean(shares) > 0.9 and np.median(shares) == 1


def polytope_query(seed: int, inputs: int, width: float) -> tuple[list, str, float]:
    """Layers, four slabs that hold a known point, and the output there."""
    draw = np.random.default_rng(seed)
    layers = [(draw.normal(size=(k, n)) / 3, draw.normal(size=k) / 4) for k, n in ((16, inputs), (16, 16), (1, 16))]
    slabs, point = np.round(draw.normal(size=(4, inputs)), 6), draw.uniform(-0.7, 0.7, inputs)
    text = "".join(interval("-1.0", "1.0", f"X[0,{i}]") for i in range(inputs))
    for slab in slabs:
        form = "(+ " + " ".join(f"(* {a:.6f} X[0,{i}])" for i, a in enumerate(slab)) + ")"
        text += f"(assert (and (<= {form} {slab @ point + width:.6f}) (>= {form} {slab @ point - width:.6f})))\n"
    hidden = point
    for number, (weight, bias) in enumerate(layers):
        hidden = weight @ (hidden if number == 0 else np.maximum(hidden, 0)) + bias
    return layers, text, float(hidden[0])


def test_searches_go_inside_of_polytopes(ask, tmp_path):
    """In a share of 1e-6 of the box, by descents: with 30 inputs, branch and bound finds hardly any."""
    for seed in range(4):
        for inputs in (5, 30):
            layers, text, height = polytope_query(seed, inputs, 0.02)
            network = save_network(tmp_path / "n.onnx", layers)
            asked = query(text + f"(assert (>= Y[0,0] {height - 0.02:.6f}))", f"X float32 [1,{inputs}]")
            found = ask(asked, network, timeout=60.0)
            assert (found.word, found.stage in ("", "falsify")) == ("violated", True), found


def test_inputs_outside_of_a_polytope_are_cut_off(ask, tmp_path):
    """No point of the box lies in it, or none of the product: closed by one bound of one box, or by splitting."""
    network = save_network(tmp_path / "n.onnx", SUM_AND_FALL)
    for text, stage in (
        ("(> (+ X[0,0] X[0,1]) 2.001)", "ibp"), ("(< (- X[0,0] X[0,1]) -1.001)", "ibp"),
        ("(and (> (+ X[0,0] X[0,1]) 1.5) (< (+ X[0,0] (* 3.0 X[0,1])) 1.499))", "input_split"),
        ("(and (> (* X[0,0] X[0,1]) 0.5) (< (+ X[0,0] X[0,1]) 1.41))", "input_split"),
        ("(> (+ (* X[0,0] X[0,0]) (* X[0,1] X[0,1])) 2.001)", "ibp"),
    ):  # fmt: skip
        found = ask(query(SQUARE + f"(assert {text})(assert (>= Y[0,0] -9.0))", *TWO), network)
        assert (found.word, found.stage) == ("holds", stage), (text, found)


# bounds


def test_bounds_of_terms_contain_their_values(tmp_path):
    """Of the extended program, over random boxes, by intervals and by linear bounds."""
    network = save_network(tmp_path / "n.onnx", SUM_AND_FALL)
    read = read_onnx(network)
    asserted = "(assert (<= (+ (* X[0,0] Y[0,0]) (* Y[0,1] Y[0,1]) (* X[0,0] X[0,1]) (* Y[0,0] Y[0,1]) X[0,1]) 1.0))"
    (tmp_path / "p.vnnlib").write_text(query(SQUARE + asserted, *TWO))
    prop = read_property(tmp_path / "p.vnnlib", 2, 2)
    assert prop.terms == ((1,), (0, 1), (0, 2), (2, 3), (3, 3))
    whole = with_terms(read, prop)
    folded = fold(whole.module, torch.Size((2,)), dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        ends = torch.rand(2, 1, 2, generator=draw, dtype=torch.float64) * 2 - 1
        box = Box(ends.amin(0), ends.amax(0))
        points = box.lower + (box.upper - box.lower) * torch.rand(500, 2, generator=draw, dtype=torch.float64)
        (x, y), (fall, total) = points.T, ((points[:, 0] - points[:, 1]).clamp(min=0), points.sum(1))
        expected = torch.stack([total, fall, y, x * y, x * total, total * fall, fall * fall], 1)
        torch.testing.assert_close(folded(points), expected)
        signs = torch.cat([torch.eye(7), -torch.eye(7)]).double()[None]
        from certtrain.bounds.crown import bound_forms

        lower = bound_forms(folded, box, signs, crown_bounds(folded, box))
        assert ((torch.cat([expected, -expected], 1).amin(0) - lower) >= -1e-9).all()


@pytest.mark.parametrize("term", ["(* Y[0,0] (* X[0,0] Y[0,1]))", "(* X[0,0] X[0,0] X[0,0])"])
def test_terms_of_degree_3_are_refused(tmp_path, term):
    network = save_network(tmp_path / "n.onnx", SUM_AND_FALL)
    (tmp_path / "q.vnnlib").write_text(query(SQUARE + f"\n(assert (<= {term} 1.0))", *TWO))
    with pytest.raises(InputError, match=r"q.vnnlib, line 6: found '\(\* .*'; accepted: terms of degree 2 at most"):
        answer(network, tmp_path / "q.vnnlib", 20.0)


def test_products_of_too_many_inputs_are_left_open(ask, tmp_path):
    """Branch and bound on neurons does not sharpen products: the answer names them."""
    network = save_network(tmp_path / "n.onnx", [(np.ones((1, 24)), [0.0])])
    box = "".join(interval("-1.0", "1.0", f"X[0,{i}]") for i in range(24))
    products = "(+ " + " ".join(f"(* X[0,{i}] X[0,{i + 1}])" for i in range(0, 24, 2)) + ")"
    for asserted, word in (
        (f"(> {products} 12.1)", "holds"), (f"(> {products} 11.9)", "violated"),
        ("(> (- (* Y[0,0] X[0,0]) (* Y[0,0] Y[0,0])) 0.3)", "unknown"),
    ):  # fmt: skip
        found = ask(query(box + f"(assert {asserted})", "X float32 [1,24]"), network)
        assert found.word == word, (asserted, found)
        assert word != "unknown" or "products" in found.reason


@pytest.mark.parametrize("arithmetic", ["real", "float32"])
def test_products_have_no_bounds_of_rounding(tmp_path, arithmetic):
    network = save_network(tmp_path / "n.onnx", IDENTITY)
    (tmp_path / "q.vnnlib").write_text(query(interval("0.0", "1.0") + "(assert (> (* Y[0,0] X[0,0]) 1.5))"))
    with pytest.raises(InputError, match="products of the property: found product of two computed values; accepted"):
        answer(network, tmp_path / "q.vnnlib", 20.0, arithmetic=arithmetic)


# equalities of outputs


def test_equalities_of_outputs(ask, tmp_path):
    """Whether two outputs meet is told by their difference's extremes, by integer programs; points are found at which
    onnxruntime gives the same float32 for both."""
    words = list[str]()
    for seed in range(6):
        draw = np.random.default_rng(seed)
        shapes = ((12, 4), (12, 12), (2, 12))
        layers = [(draw.normal(size=(k, n)) / 2, draw.normal(size=k) / 2) for k, n in shapes]
        network = save_network(tmp_path / "n.onnx", layers)
        folded = fold(read_onnx(network).module, torch.Size((4,)), dtype=torch.float64)
        ends = torch.ones(1, 4, dtype=torch.float64)
        rows = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)
        square, zero = Box(-ends, ends), torch.zeros(1, 2, dtype=torch.float64)
        best = minimum(folded, square, rows, zero, crown_bounds(folded, square), clauses=torch.arange(2))
        least, most = float(best.values[0]), -float(best.values[1])
        assert bool(best.optimal.all()) and min(abs(least), abs(most)) > 1e-3
        box = "".join(interval("-1.0", "1.0", f"X[0,{i}]") for i in range(4))
        for asserted, word in (
            ("(== Y[0,0] Y[0,1])", "violated" if least < 0 < most else "holds"),
            (f"(== Y[0,0] (+ Y[0,1] {most + 0.001:.6f}))", "holds"),
            ("(and (== Y[0,0] Y[0,1]) (or (> Y[0,0] 99.0) (< Y[0,1] -99.0)))", "holds"),
        ):
            found = ask(query(box + f"(assert {asserted})", "X float32 [1,4]", "Y float32 [1,2]"), network)
            words.append(found.word)
            assert found.word == word, (seed, asserted, found)
    assert "violated" in words and words.count("holds") > 12


def test_equalities_that_float32_cannot_meet(ask, tmp_path):
    network = save_network(tmp_path / "n.onnx", IDENTITY)
    for asserted, word in (
        ("(== Y[0,0] 0.3)", "unknown"),
        ("(== Y[0,0] 0.25)", "violated"),
        ("(== Y[0,0] 1.3)", "holds"),
    ):
        found = ask(query(interval("0.0", "1.0") + f"(assert {asserted})"), network)
        assert found.word == word and (found.reason == UNMET) == (word == "unknown"), (asserted, found)
        assert str(found) == (f"unknown ({UNMET})" if word == "unknown" else word)


def test_equalities_of_outputs_with_other_constraints(ask, tmp_path):
    """Inside of a polytope, of products, and two at a time."""
    draw = np.random.default_rng(1)
    layers = [(draw.normal(size=(k, n)) / 2, draw.normal(size=k) / 4) for k, n in ((16, 5), (16, 16), (3, 16))]
    network = save_network(tmp_path / "n.onnx", layers)
    point = np.zeros(5)
    for number, (weight, bias) in enumerate(layers):
        point = weight @ (np.maximum(point, 0) if number else point) + bias
    shifts = [f"(== (- Y[0,{j}] Y[0,0]) {round((point[j] - point[0]) * 64) / 64:.6f})" for j in (1, 2)]
    box = "".join(interval("-1.0", "1.0", f"X[0,{i}]") for i in range(5))
    for asserted in (
        shifts[0] + "(<= (+ X[0,0] X[0,1] X[0,2]) 0.2)(>= (+ X[0,0] X[0,1] X[0,2]) -0.2)",
        " ".join(shifts), shifts[0] + "(>= (* X[0,0] X[0,1]) 0.01)",
        "(== (* Y[0,0] Y[0,0]) (* Y[0,1] Y[0,1]))",
    ):  # fmt: skip
        found = ask(query(box + f"(assert (and {asserted}))", "X float32 [1,5]", "Y float32 [1,3]"), network)
        assert (found.word, found.stage in ("", "falsify")) == ("violated", True), (asserted, found)


def test_comparisons_that_exclude_each_other(tmp_path):
    """A clause with two of them is left out, though its closed form is not empty; one that follows from another is
    not kept."""

    def read(asserted: str):
        (tmp_path / "p.vnnlib").write_text(query(SQUARE + f"(assert {asserted})", *TWO))
        return read_property(tmp_path / "p.vnnlib", 2, 2)

    for asserted in (
        "(and (> Y[0,0] Y[0,1]) (<= (* 2.0 Y[0,0]) (* 2.0 Y[0,1])))",
        "(and (!= Y[0,0] 0.0) (== (* -3.0 Y[0,0]) 0.0))",
        "(and (> (* Y[0,0] X[0,0]) 1.0) (< (* X[0,0] Y[0,0]) 1.0))",
        "(and (>= (- Y[0,0] Y[0,1]) 0.3) (<= (- Y[0,0] Y[0,1]) 0.2))",
    ):
        prop = read(asserted)
        assert not prop.cases and prop.remark == "no input satisfies the asserts", asserted
    for asserted, clauses, rows in (
        ("(and (>= Y[0,0] Y[0,1]) (<= Y[0,0] Y[0,1]))", 1, 2),
        ("(and (> Y[0,0] 1.0) (or (< Y[0,0] 1.0) (> Y[0,0] 0.5) (> Y[0,0] 2.0)))", 2, 3),
        ("(and (> Y[0,0] 1.0) (>= (* 2.0 Y[0,0]) 2.0))", 1, 1),
        ("(and (>= (* 2.0 Y[0,0]) 2.0) (> Y[0,0] 1.0))", 1, 2),
    ):
        (case,) = read(asserted).cases
        assert (int(case.clauses.max()) + 1, len(case.rows)) == (clauses, rows), asserted
