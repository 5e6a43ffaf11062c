"""Made queries with known answers: how they are made and scored, and that none is answered wrongly."""

import itertools
from dataclasses import asdict
from pathlib import Path

import make_queries
import numpy as np
import pytest
import query_networks as made
import torch
import vnnlib
from benchmark_queries import ask, known_queries, table
from query_answers import MixedProgram, climb, impossible, largest_difference, vertices, zonotopes
from query_scoring import Refused, Score, score, witness

from certtrain.verifiers.vnncomp import answer

ACCEPTED = Score(accepted=True, exact=True, exact32=True, forgiven=True)

SUM = """(vnnlib-version <2.0>)
(declare-network f (declare-input X float32 [1,2]) (declare-hidden H real [1,1] "h1") (declare-output Y float32 [1,1]))
(assert (and (>= X[0,0] 0.0) (<= X[0,0] 0.5) (>= X[0,1] 0.0) (<= X[0,1] 0.5)))
(assert (or (> Y[0,0] 0.75) (and (== H[0,0] 0.25) (!= (* X[0,0] X[0,0]) 0.0))))
"""


def lines(x: str, y: str, h: str = "1.0", o: str = "1.0") -> str:
    return f"sat\nX float32 [1,2]\n{x}\n{y}\nH real [1,1]\n{h}\nY float32 [1,1]\n{o}\n"


@pytest.fixture
def sums(tmp_path) -> Path:
    """relu(x + y), in one hidden neuron."""
    one = np.ones((1, 1), np.float32)
    network = made.Mlp((np.ones((1, 2), np.float32), one), (np.zeros(1, np.float32),) * 2)
    network.save(tmp_path / "sum.onnx")
    return tmp_path / "sum.onnx"


def test_scores(sums):
    """Stated outputs are ignored; ties are no violations of strict comparisons; inputs may be off for credit alone."""
    assert score(SUM, lines("0.5", "0.3", "7.0", "7.0"), sums) == ACCEPTED
    nothing = Score(False, False, False, False)
    assert score(SUM, lines("0.5", "0.25"), sums) == nothing  # a tie
    assert score(SUM, lines("0.125", "0.125"), sums) == ACCEPTED
    assert score(SUM, lines("0.0", "0.25"), sums) == nothing
    assert score(SUM, lines("0.50005", "0.3"), sums) == Score(False, False, False, True)
    assert score(SUM, lines("0.5003", "0.3"), sums) == nothing
    assert witness(SUM, {"X": np.array([[0.5, 0.375]], np.float32)}, sums)
    assert not witness(SUM, {"X": np.array([[0.5, 0.25]], np.float32)}, {"f": sums})


def test_float32_of_the_scorer(sums):
    """The competition's code computes in float32: what exceeds 0.1 by less than its step is a tie there."""
    asked = SUM.replace("(> Y[0,0] 0.75)", "(> (- Y[0,0] X[0,0]) 0.1)")
    below, above = 0.0999999940395355224609375, 0.100000001490116119384765625
    assert score(asked, lines("0.0", f"{below:.25f}"), sums) == Score(False, False, False, False)
    assert score(asked, lines("0.0", f"{above:.27f}"), sums) == Score(False, True, True, False)


@pytest.mark.parametrize(
    "result",
    {
        "of 1.0": "sat\n((X_0 0.5)\n(X_1 0.3)\n(Y_0 0.8))\n",
        "another word": lines("0.5", "0.3").replace("sat", "unsat"),
        "no outputs": lines("0.5", "0.3").rpartition("Y")[0],
        "too few values": lines("0.5", "0.3").replace("0.3\n", ""),
        "more behind": lines("0.5", "0.3") + "1.0\n",
        "an exponent": lines("5e-1", "0.3"),
        "another type": lines("0.5", "0.3").replace("X float32", "X float64"),
        "another shape": lines("0.5", "0.3").replace("[1,2]", "[2]"),
        "another order": "sat\nX float32 [1,2]\n0.5\n0.3\nY float32 [1,1]\n1.0\nH real [1,1]\n1.0\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_forms_that_the_scorer_refuses(sums, result):
    with pytest.raises(Refused):
        score(SUM, result[1], sums)


def test_scores_of_the_first_version(sums):
    asked = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)"
    asked += "(assert (>= X_0 0))(assert (<= X_0 1e-1))(assert (= X_1 0.5)); (assert (> X_0 7))\n"
    asked += "(assert (or (and (> (+ Y_0 (* 2.0 X_0)) 0.75) (< Y_0 9)) (< Y_0 (- 1))))"
    assert score(asked, "sat\n((X_0 0.09375)\n(X_1 0.5)\n(Y_0 0))\n", sums) == ACCEPTED
    assert not score(asked, "sat\n((X_0 0.0625) (X_1 5e-1) (Y_0 0))\n", sums).forgiven
    # the float32 of 0.1 is above it, the decimal is not
    assert score(asked, "sat\n((X_0 0.1)(X_1 0.5)(Y_0 0))", sums) == Score(True, True, False, True)
    for wrong in ("sat\n((X_0 0.1) (X_1 0.5))", "sat\n((X_1 0.5) (X_0 0.1) (Y_0 0))", lines("0.1", "0.5"),
                  "sat\n((X_0 0.1) (X_1 0.5) (Y_0 nan))", "sat\n"):  # fmt: skip
        with pytest.raises(Refused):
            score(asked, wrong, sums)


def test_zonotopes():
    """They contain what points give, and differences of similar networks closely."""
    draw = np.random.default_rng(0)
    f = made.random((3, 20, 20, 2), draw)
    low, high = np.array([-0.2, 0.1, 0.0]), np.array([0.3, 0.4, 0.0])
    x = low + (high - low) * draw.random((2000, 3))
    for g in (made.pruned(f, 0.1), made.random((3, 20, 20, 2), draw)):
        own, difference = zonotopes(f, g, low, high)
        for value, bounds in ((f(x), own), (g(x) - f(x), difference)):
            assert ((bounds.ends[0] - 1e-9 <= value) & (value <= bounds.ends[1] + 1e-9)).all()
    g = made.pruned(f, 0.1)
    whole, parts = (largest_difference(f, g, low, high, cells) for cells in (1, 256))
    found = max(
        float(np.abs(g(p[None]) - f(p[None])).max())
        for row in np.vstack([np.eye(2), -np.eye(2)])
        for p in [climb(lambda x, r=row: (g(x) - f(x)) @ r, lambda x, r=row: g.gradient(x, r) - f.gradient(x, r),
                        low, high, draw)]
    )  # fmt: skip
    assert np.abs(g(x) - f(x)).max() <= found + 1e-6 and found <= parts <= whole and parts <= 1.4 * found
    step = 1e-6 * np.eye(3)
    slopes = (f(x[0] + step) - f(x[0] - step))[:, 1] / 2e-6
    np.testing.assert_allclose(f.gradient(x[:1], np.array([0.0, 1.0]))[0], slopes, atol=1e-5)


def test_mixed_programs_and_vertices():
    draw = np.random.default_rng(1)
    low, high = np.array([-0.5, 0.0, 0.25]), np.array([0.5, 0.5, 0.5])
    row, most = np.array([1.0, -1.0, 0.0]), -0.25
    for tight, network in itertools.product((False, True), (made.convex, made.random)):
        f, program = network((3, 8, 6, 2), draw), MixedProgram()
        x = program.variables(low, high)
        program.row(dict(zip(x, row, strict=True)), most if tight else -np.inf, most)
        y = program.network(f, x)[-1]
        bound, found = program.maximise({y[1]: 1.0})
        assert f(found[None, :3])[0, 1] == pytest.approx(bound, abs=1e-4)
        corners = vertices(low, high, row, most, tight)
        assert (abs(corners @ row - most) < 1e-9 if tight else corners @ row <= most + 1e-9).all()
        points = draw.dirichlet(np.ones(len(corners)), 3000) @ corners
        assert f(points)[:, 1].max() <= bound + 1e-4
        if network is made.convex:
            assert f(corners)[:, 1].max() == pytest.approx(bound, abs=1e-4)


def test_splitting_with_intervals():
    draw = np.random.default_rng(2)
    f, low, high = made.random((2, 8, 8, 1), draw), np.array([-0.5, 0.25]), np.array([0.5, 0.75])
    x = low + (high - low) * draw.random((20_000, 2))
    most = float((f(x)[:, 0] * x[:, 0]).max())
    for threshold, proved in ((most + 0.01, True), (most - 0.01, False)):
        asked = [f"(> (* Y[0,0] X[0,0]) {make_queries.number(threshold)})", "(!= X[0,1] 0.5)"]
        text = make_queries.second([make_queries.declared("f", f, ["X"], "Y")], asked)
        assertions = vnnlib.parse_query_string(text).assertions
        assert impossible(assertions, [(f, "X", "Y")], low, high, 30_000) == proved


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_queries.write_queries(tmp_path / name, seed, ["unrelated"])
    contents = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
                for folder in (tmp_path / name for name in "abc")]  # fmt: skip
    assert contents[0] == contents[1] != contents[2]


def test_made_networks():
    draw = np.random.default_rng(3)
    f = made.random((3, 10, 10, 2), draw)
    x = draw.uniform(-1, 1, (500, 3))
    np.testing.assert_allclose(made.permuted(f, draw)(x), f(x), atol=1e-6)
    centre = np.array([0.25, -0.5, 0.0])
    bump = made.with_bump(f, centre, 0.5, 0.75, 1)(x) - f(x)
    np.testing.assert_allclose(bump[:, 0], 0, atol=1e-6)
    np.testing.assert_allclose(bump[:, 1], 0.75 * np.maximum(0, 1 - np.abs(x - centre).sum(1) / 0.5), atol=1e-6)
    rising, more = made.rising(made.convex((3, 10, 10, 2), draw), 0.5), x + np.array([0.25, 0, 0])
    assert (rising(more) - rising(x) >= 0.125 - 1e-6).all()
    halves, y = made.convex((3, 10, 10, 2), draw), x[::-1]
    assert (halves((x + y) / 2) <= (halves(x) + halves(y)) / 2 + 1e-6).all()


FEW = {
    "hidden": slice(0, None, 4), "two_inputs": slice(0, None, 5), "unrelated": slice(0, None, 3),
    "coupled": slice(0, None, 4), "products": slice(0, None, 5), "planted": slice(16, None, 3),
    "monotone": slice(0, None, 7), "single": slice(0, None, 4),
}  # fmt: skip
"""Families of the fast test, and which of their queries are asked."""


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("queries")
    make_queries.write_queries(folder, 1, [*FEW])
    return folder


def test_some_queries(few):
    """A slice of the whole, in CPU seconds: none is wrong, and hardly one undecided."""
    outcomes = []
    for family, which in FEW.items():
        own = [known for known in known_queries(few) if known.query.startswith(family)]
        outcomes += [ask(few, known, 10.0) for known in own[which]]
    assert {one.expected for one in outcomes} == {"sat", "unsat"} and {one.size for one in outcomes} == {
        "small",
        "large",
    }
    assert not [asdict(one) for one in outcomes if one.fault]
    assert sum(one.decided for one in outcomes) >= 0.9 * len(outcomes), table(outcomes)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_queries(tmp_path):
    """The whole: 200 at least, half of them large; none is wrong, and 95 of 100 are decided."""
    torch.set_num_threads(1)
    make_queries.write_queries(tmp_path, 0)
    outcomes = [ask(tmp_path, known, 20.0) for known in known_queries(tmp_path)]
    assert len(outcomes) >= 200 and sum(one.size == "large" for one in outcomes) >= len(outcomes) / 2
    assert not [asdict(one) for one in outcomes if one.fault]
    assert sum(one.decided for one in outcomes) >= 0.95 * len(outcomes), table(outcomes)


def test_counterexamples_bear_the_rules_in_both_versions(tmp_path):
    """Also where ends are no float32 numbers, and where an end is strict."""
    f = made.random((2, 8, 1), np.random.default_rng(4))
    f.save(tmp_path / "f.onnx")
    worst = float(f(np.array([[0.1, 0.7]]))[0, 0])
    ends = (("X_0", "X[0,0]", 0.1, 0.1), ("X_1", "X[0,1]", 0.2, 0.7))
    signs = [f"({sign} {{{k}}} {end})" for k, (_, _, *pair) in enumerate(ends)
             for sign, end in zip((">=", "<="), pair)]  # fmt: skip
    asked = [*signs, f"(>= {{2}} {worst - 0.01:.6f})", "(< {1} 0.7)"]
    old = make_queries.first(2, 1, [one.format("X_0", "X_1", "Y_0") for one in asked])
    new = make_queries.second([make_queries.declared("f", f, ["X"], "Y")],
                              [one.format("X[0,0]", "X[0,1]", "Y[0,0]") for one in asked])  # fmt: skip
    for text in (old, new):
        (tmp_path / "q.vnnlib").write_text(text)
        found = answer(tmp_path / "f.onnx", tmp_path / "q.vnnlib", 20.0)
        assert found.word == "violated"
        judged = score(text, found.result(), tmp_path / "f.onnx")
        assert judged.accepted and judged.exact
