"""VNN-COMP's front door: what is said of files, what stands in results, and what bad input comes to."""

import gzip
import re
import signal
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from planted import planted_pairs
from torch import nn

from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.training import Interrupted
from certtrain.verifiers import InputSplitStage, instances, onnx_network, vnncomp
from certtrain.verifiers.instances import Instance, read_instances, run_instances
from certtrain.verifiers.vnncomp import Answer, answer

IDENTITY = [([[1.0]], [0.0])]
TENT = [([[1.0], [-1.0]], [-0.3, 0.3]), ([[-4.0, -4.0]], [1.0])]
"""1 - 4 |x - 0.3|: above 0 within a quarter of 0.3."""
NEEDLE = [([[1.0], [-1.0]], [-0.3, 0.3]), ([[-3e3, -3e3]], [1.0]), ([[1.0]], [0.0])]
"""max(0, 1 - 3000 |x - 0.3|): gradients are 0 almost everywhere."""


def save_network(path: Path, layers, activation: str = "Relu", shape=None) -> Path:
    """Dense layers, the activation between each two."""
    nodes, weights, name = [], [], "x"
    for number, (weight, bias) in enumerate(layers):
        for letter, values in (("w", weight), ("b", bias)):
            weights.append(numpy_helper.from_array(np.asarray(values, np.float32), f"{letter}{number}"))
        if number:
            nodes.append(helper.make_node(activation, [name], [f"a{number}"]))
            name = f"a{number}"
        nodes.append(helper.make_node("Gemm", [name, f"w{number}", f"b{number}"], [f"y{number}"], transB=1))
        name = f"y{number}"
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or [1, len(layers[0][0][0])]),
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, len(layers[-1][0])])]  # fmt: skip
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:], weights)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )
    return path


def save_property(path: Path, text: str, inputs: int = 1, outputs: int = 1) -> Path:
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{j}" for j in range(outputs)]
    path.write_text("".join(f"(declare-const {name} Real)\n" for name in names) + text + "\n")
    return path


def box(*ends: tuple[str, str], first: int = 0) -> str:
    return " ".join(f"(>= X_{i} {low}) (<= X_{i} {high})" for i, (low, high) in enumerate(ends, start=first))


@pytest.fixture
def ask(tmp_path):
    """An answer to layers and a formula, and the content of its result file."""

    def ask(formula: str, layers=IDENTITY, activation="Relu", **options) -> tuple[Answer, str]:
        network = save_network(tmp_path / "network.onnx", layers, activation)
        sizes = len(layers[0][0][0]), len(layers[-1][0])
        asked = save_property(tmp_path / "property.vnnlib", f"(assert {formula})", *sizes)
        found = answer(network, asked, results=tmp_path / "result.txt", **({"timeout": 20.0} | options))
        text = (tmp_path / "result.txt").read_text()
        if found.word == "violated":
            assert_stands(text, network)
        else:
            assert text == {"holds": "unsat", "timeout": "timeout", "unknown": "unknown"}[found.word] + "\n"
            assert found.inputs is None and found.outputs is None
        return found, text

    return ask


def numbers_of(text: str) -> tuple[list[str], list[str]]:
    """The decimals of a result file's counterexample."""
    pairs = r"\({0}_(\d+) ([^\s)]+)\)"
    whole = r"sat\n\((\(X_\d+ \S+\)\n)+(\(Y_\d+ \S+\)\n)*\(Y_\d+ \S+\)\)\n"
    assert re.fullmatch(whole, text), text
    found = [re.findall(pairs.format(letter), text) for letter in "XY"]
    assert all([int(number) for number, _ in values] == list(range(len(values))) for values in found)
    inputs, outputs = ([decimal for _, decimal in values] for values in found)
    return inputs, outputs


def assert_stands(text: str, network: Path) -> None:
    """The outputs of a result file are those of its inputs."""
    inputs, outputs = numbers_of(text)
    run = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    point = np.array([float(decimal) for decimal in inputs], np.float32)
    (found,) = run.run(None, {run.get_inputs()[0].name: point.reshape(run.get_inputs()[0].shape)})
    assert [float(decimal) for decimal in outputs] == found.reshape(-1).astype(float).tolist()


def assert_between(text: str, *ends: tuple[str, str]) -> None:
    """In exact arithmetic, as the decimals stand there."""
    inputs, _ = numbers_of(text)
    for decimal, (low, high) in zip(inputs, ends, strict=True):
        assert Decimal(low) <= Decimal(decimal) <= Decimal(high), (low, decimal, high)


class TestAnswer:
    """Of x, of 1 - 4 |x - 0.3|, and of others whose truth is plain."""

    @pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
    def test_words(self, ask, arithmetic):
        peak = "(and (>= X_0 0.0) (<= X_0 1.0) (>= Y_0 {}))"
        found, _ = ask(peak.format(1.001), TENT, arithmetic=arithmetic)
        assert found.word == "holds" and str(found) == "holds"
        assert found.arithmetic == ("nearest float32" if arithmetic == "nearest" else arithmetic)
        found, text = ask(peak.format(0.999), TENT, arithmetic=arithmetic)
        assert found.word == "violated" and str(found) == "violated" and found.arithmetic == "onnxruntime float32"
        assert_between(text, ("0.29975", "0.30025"))
        assert 0 < found.seconds < 20

    def test_strict_comparisons_and_ties(self, ask):
        """A tie is unsafe under <=, and safe under <: where only ties are found the answer is open, and says so."""
        found, text = ask(f"(and {box(('0.5', '2.0'))} (<= Y_0 0.5))")
        assert found.word == "violated" and numbers_of(text) == (["0.5"], ["0.5"])
        assert ask(f"(and {box(('0.5', '2.0'))} (>= Y_0 2.0))")[0].word == "violated"
        for tied in ("(< Y_0 0.5)", "(> Y_0 2.0)"):
            found, text = ask(f"(and {box(('0.5', '2.0'))} {tied})")
            assert str(found) == "unknown (only ties found, which its strict comparisons exclude)"
            assert text == "unknown\n"
        for comparison in (">=", ">"):
            assert ask(f"(and {box(('0.5', '2.0'))} ({comparison} Y_0 2.001))")[0].word == "holds"
            assert ask(f"(and {box(('0.5', '2.0'))} ({comparison} Y_0 1.999))")[0].word == "violated"
        assert ask(f"(and {box(('0.5', '2.0'))} (<= Y_0 Y_0))")[0].word == "violated"

    def test_strict_ends_of_inputs(self, ask):
        """What is printed lies inside, by a float32 at least: as decimals and as onnxruntime's input."""
        for formula in ("(and (> X_0 0.5) (< X_0 2.0) (<= Y_0 0.6))", "(and (> X_0 0.1) (< X_0 0.3) (>= Y_0 0.29))"):
            found, _ = ask(formula)
            low, high = (Fraction(end) for end in re.findall(r"X_0 ([0-9.]+)", formula))
            (stated,) = found.inputs
            assert found.word == "violated" and low < Fraction(stated) < high
            assert low < Fraction(float(np.float32(stated))) < high
        for closed, word in (("(>= X_0 0.5000000000001)", "violated"), ("(> X_0 0.5)", "unknown")):  # no float32 inside
            assert ask(f"(and {closed} (<= X_0 0.5000000000001) (<= Y_0 2.0))")[0].word == word

    def test_a_disjunction_of_outputs(self, ask):
        layers = [([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.0, 0.0, -1.0])]
        square = box(("0.0", "1.0"), ("0.0", "1.0"))
        both = "(or (and (<= Y_2 {0}) (>= Y_0 0.9)) (and (>= Y_1 Y_0) (>= Y_2 {1})))"
        assert ask(f"(and {square} {both.format(-0.2, 1.1)})", layers)[0].word == "holds"
        for low, high in ((-0.05, 1.1), (-0.2, 0.9)):
            found, _ = ask(f"(and {square} {both.format(low, high)})", layers)
            (x, y), (a, b, c) = map(float, found.inputs), found.outputs.tolist()
            assert (c <= low and a >= 0.9) or (b >= a and c >= high)
            assert 0 <= x <= 1 and 0 <= y <= 1

    def test_an_unsafe_set_that_no_row_alone_keeps_away(self, ask):
        """x <= 0.4 and x >= 0.6 at a time."""
        assert ask(f"(and {box(('-1.0', '2.0'))} (<= Y_0 0.4) (>= Y_0 0.6))")[0].word == "holds"
        assert ask(f"(and {box(('-1.0', '2.0'))} (<= Y_0 0.6) (>= Y_0 0.4))")[0].word == "violated"

    @pytest.mark.parametrize("count", [2, 40])
    def test_one_of_several_boxes(self, ask, count):
        boxes = [(f"{n}.125", f"{n}.5") for n in range(count)]
        safe = " ".join(f"(and {box(ends)} (>= Y_0 {float(ends[1]) + 0.25}))" for ends in boxes)
        assert ask(f"(or {safe})")[0].word == "holds"
        last = f"(and {box(('70.1', '70.3'))} (>= Y_0 70.29))"
        found, text = ask(f"(or {safe} {last})")
        assert found.word == "violated"
        assert_between(text, ("70.1", "70.3"))
        found, text = ask(f"(or (and {box(('1.0', '2.0'))} (<= Y_0 0.0)) (and {box(('3.0', '4.0'))} (<= Y_0 0.0) "
                          "(>= Y_0 -9.0)))")  # fmt: skip
        assert found.word == "holds"

    def test_boxes_and_outputs_in_one_disjunction(self, ask):
        """Cases of different clauses, which share no batch."""
        parts = [f"(and {box(('0.0', '0.2'))} (>= Y_0 0.65))",
                 f"(and {box(('0.2', '0.4'))} (or (>= Y_0 1.01) (<= Y_0 0.5)))",
                 f"(and {box(('0.6', '0.7'))} (>= Y_0 -0.15) (<= Y_0 9.0))"]  # fmt: skip
        assert ask(f"(or {' '.join(parts)})", TENT)[0].word == "holds"
        for number, wrong in enumerate(["(>= Y_0 0.55)", "(or (>= Y_0 1.01) (<= Y_0 0.7))", "(>= Y_0 -0.25)"]):
            ends = [("0.0", "0.2"), ("0.2", "0.4"), ("0.6", "0.7")][number]
            changed = [*parts[:number], f"(and {box(ends)} {wrong})", *parts[number + 1 :]]
            found, text = ask(f"(or {' '.join(changed)})", TENT)
            assert found.word == "violated"
            assert_between(text, ends)

    def test_a_needle(self, ask):
        """A counterexample that neither descents nor the middle show: it is found, and never proved away."""
        for low, high in (("0", "1"), ("-5", "5"), ("0.2995", "1")):
            found, text = ask(f"(and {box((low, high))} (>= Y_0 0.5))", NEEDLE)
            assert found.word == "violated"
            assert_between(text, ("0.29983", "0.30017"))
        assert ask(f"(and {box(('0.301', '1'))} (>= Y_0 0.5))", NEEDLE)[0].word == "holds"
        assert ask(f"(and {box(('0', '1'))} (>= Y_0 1.001))", NEEDLE)[0].word == "holds"

    def test_units_of_the_network(self, ask):
        """Nothing is cut to [0, 1]."""
        layers = [([[1e-3, -2e-3]], [0.0])]
        ends = ("-54321.5", "-12345.678"), ("1000", "60000")
        low = -54.3215 - 120.0
        assert ask(f"(and {box(*ends)} (<= Y_0 {low - 0.1}))", layers)[0].word == "holds"
        found, text = ask(f"(and {box(*ends)} (<= Y_0 {low + 0.1}))", layers)
        assert found.word == "violated"
        assert_between(text, *ends)

    @pytest.mark.parametrize("activation", ["Sigmoid", "Tanh"])
    def test_smooth_networks_of_few_inputs(self, ask, activation):
        draw = np.random.default_rng(0)
        layers = [(draw.normal(size=(b, a)) * 2, draw.normal(size=b)) for a, b in pairwise((2, 6, 6, 1))]
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 201)] * 2), -1).reshape(-1, 2)
        values = grid
        for number, (weight, bias) in enumerate(layers):
            values = values if not number else np.tanh(values) if activation == "Tanh" else 1 / (1 + np.exp(-values))
            values = values @ weight.T + bias
        least, square = float(values.min()), box(("-1", "1"), ("-1", "1"))
        assert ask(f"(and {square} (<= Y_0 {least - 0.05}))", layers, activation)[0].word == "holds"
        assert ask(f"(and {square} (<= Y_0 {least + 0.01}))", layers, activation)[0].word == "violated"
        with pytest.raises(InputError, match="accepted in this arithmetic: relu, leaky_relu"):
            ask(f"(and {square} (<= Y_0 {least - 0.05}))", layers, activation, arithmetic="real")

    def test_smooth_networks_of_many_inputs_may_stay_unknown(self, ask):
        """tanh(s) - tanh(s) is 0, which no lines say."""
        wide, layers = box(*[("-1", "1")] * 30), [([[1.0] * 30] * 2, [0.0, 0.0]), ([[1.0, -1.0]], [0.0])]
        found, _ = ask(f"(and {wide} (<= Y_0 -0.01))", layers, "Tanh")
        assert found.word == "unknown" and found.reason and str(found) == "unknown"
        assert ask(f"(and {wide} (<= Y_0 0.01))", layers, "Tanh")[0].word == "violated"

    def test_within_tolerance(self, ask):
        """The float32 that 0.1 becomes is above 0.1: safe, by less than is ever proved."""
        found, _ = ask(f"(and {box(('0.1', '0.1'))} (<= Y_0 0.1))")
        assert found.word == "unknown" and str(found) == "unknown (within tolerance)"

    def test_planted_networks_and_their_twins(self, tmp_path):
        for case, twin in planted_pairs(12, seed=9000, kinds=("dense",)):
            ends = [(f"{float(x - case.epsilon):.9f}", f"{float(x + case.epsilon):.9f}") for x in case.image.flatten()]
            for one, word in ((case, "violated"), (twin, "holds")):
                layers = [
                    (layer.weight.tolist(), layer.bias.tolist()) for layer in one.model if isinstance(layer, nn.Linear)
                ]
                sizes = len(ends), len(layers[-1][1])
                near = [(f"{max(float(low), 0)}", f"{min(float(high), 1)}") for low, high in ends]
                losses = " ".join(f"(>= Y_{j} Y_{one.label})" for j in range(sizes[1]) if j != one.label)
                network = save_network(tmp_path / "network.onnx", layers)
                asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(*near)} (or {losses})))", *sizes)
                found = answer(network, asked, 60.0, results=tmp_path / "result.txt")
                assert found.word == word
                if word == "violated":
                    assert_between((tmp_path / "result.txt").read_text(), *near)
                    assert_stands((tmp_path / "result.txt").read_text(), network)

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(*[st.integers(-30, 30)] * 2), min_size=1, max_size=3),
           st.lists(st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.integers(-45, 45)), min_size=1, max_size=3),
                    min_size=1, max_size=3))  # fmt: skip
    def test_random_properties_of_a_plain_network(self, tmp_path_factory, boxes, clauses):
        """Y_0 = |X_0|, Y_1 = -X_0: boxes and thresholds are tenths, so that the truth is found in integers; where
        something is unsafe, it is so by a tenth at least, or at ends that are ties."""
        folder = tmp_path_factory.getbasetemp()
        layers = [([[1.0], [-1.0]], [0.0, 0.0]), ([[1.0, 1.0], [-1.0, 1.0]], [0.0, 0.0])]
        network = save_network(folder / "random.onnx", layers)
        rows = [[f"(<= Y_{j} {value / 10 + 0.05:.2f})" if below else f"(>= Y_{j} {value / 10 - 0.05:.2f})"
                 for j, below, value in clause] for clause in clauses]  # fmt: skip
        unsafe = " ".join(f"(and {' '.join(row)})" for row in rows)
        places = " ".join(f"(and {box((str(min(pair) / 10), str(max(pair) / 10)))} (or {unsafe}))" for pair in boxes)
        asked = save_property(folder / "random.vnnlib", f"(assert (or {places}))", 1, 2)

        def wrong(x: int) -> bool:  # x in hundredths
            y = abs(x), -x
            return any(all(y[j] <= 10 * value + 5 if below else y[j] >= 10 * value - 5 for j, below, value in clause)
                       for clause in clauses)  # fmt: skip

        truth = any(wrong(x) for pair in boxes for x in range(10 * min(pair), 10 * max(pair) + 1))
        found = answer(network, asked, 20.0)
        if found.word == "unknown":  # two ties at one point: no float32 has both
            assert found.reason == "within tolerance" and truth
        else:
            assert (found.word == "violated") == truth, (boxes, clauses)

    def test_rows_of_any_size(self, ask):
        """What float32 would lose of coefficients is kept: 1e-40 - 1e-50 x is far below 0."""
        wide = box(("1e20", "2e20"))
        for arithmetic in ("nearest", "real"):
            assert ask(f"(and {wide} (<= (+ (* -1e-50 Y_0) 1e-40) 0.0))", arithmetic=arithmetic)[0].word == "violated"
            assert ask(f"(and {wide} (<= (* 1e60 Y_0) 1e70))", arithmetic=arithmetic)[0].word == "holds"
            assert ask(f"(and {wide} (>= (* 1e60 Y_0) 1e70))", arithmetic=arithmetic)[0].word == "violated"
        assert ask(f"(and {wide} (<= (* 0.0 Y_0) -1.0))")[0].word == "holds"
        assert ask(f"(and {wide} (<= (* 0.0 Y_0) 0.0))")[0].word == "violated"


class TestTime:
    HARD = f"(and {' '.join(f'(>= X_{i} -1) (<= X_{i} 1)' for i in range(5))} "

    @staticmethod
    def layers():
        draw = np.random.default_rng(1)
        return [
            (draw.normal(size=(b, a)) * 2 / a**0.5, draw.normal(size=b) / 2) for a, b in pairwise((5, 30, 30, 30, 1))
        ]

    def test_a_timeout(self, ask):
        found, _ = ask(f"{self.HARD} (<= Y_0 -9.02))", self.layers(), timeout=0.3)
        assert found.word == "timeout" and str(found) == "timeout" and found.seconds < 20

    def test_no_time_at_all(self, ask):
        assert ask(f"(and {box(('0', '1'))} (<= Y_0 -1.0))", timeout=1e-9)[0].word == "timeout"

    @pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
    def test_what_is_no_time(self, ask, tmp_path, timeout):
        with pytest.raises(InputError, match="timeout"):
            ask(f"(and {box(('0', '1'))} (<= Y_0 -1.0))", timeout=timeout)
        assert not (tmp_path / "result.txt").exists()

    def test_what_the_others_leave_goes_to_the_hard_ones(self, ask, monkeypatch):
        """Ten boxes share 20 seconds; one of them needs more than two."""
        shares = []

        def call(self, problem, known):
            shares.append((len(problem), self.timeout))
            finding = original(self, problem, known)
            statuses = ["timeout" if int(index) == 3 and self.timeout < 4 else "verified" for index in problem.index]
            return vnncomp.replace(finding, statuses=statuses)

        original = InputSplitStage.__call__
        monkeypatch.setattr(InputSplitStage, "__call__", call)
        monkeypatch.setattr(vnncomp, "STAGES_OF_FEW_INPUTS", ("input_split",))
        parts = " ".join(f"(and {box((f'{n}.0', f'{n}.5'))} (<= Y_0 -1.0))" for n in range(10))
        assert ask(f"(or {parts})")[0].word == "holds"
        assert [count for count, _ in shares] == [10, 1]
        assert shares[0][1] <= 2.0 and shares[1][1] > 10.0

    def test_one_counterexample_ends_the_search(self, ask):
        """Of all the boxes: the hard ones are not waited for."""
        hard = " ".join(f"{self.HARD} (<= Y_0 {-9.02 - n / 1000}))" for n in range(3))
        found, _ = ask(f"(or {hard} {self.HARD.replace('1)', '1.0)')} (<= Y_0 9.0)))", self.layers(), timeout=60.0)
        assert found.word == "violated" and found.seconds < 30


ENDS = [("0.1", "0.1"), ("0.3", "0.3"), ("0.1", "0.3"), ("-0.3", "-0.1"), ("0.7", "0.7"), ("0.7", "0.8"),
        ("1e-3", "2e-3"), ("0.5", "0.5"), ("0", "1e-50"), ("-1e-46", "0"), ("123456.789", "123456.789"),
        ("-0.328422877", "0.679857769"), ("0.0", "1.0"), ("16777217", "16777219"), ("1e-5", "1.000001e-5"),
        ("0.123456789012345", "0.123456789012345"), ("-0.123456789012345", "0.123456789012346")]  # fmt: skip


class TestCounterexamples:
    @pytest.mark.parametrize("ends", ENDS, ids=" to ".join)
    def test_they_lie_within_the_decimals(self, ask, ends):
        """Those of float32 points beyond the decimals too, and of points that no float is equal to."""
        low, high = (float(end) for end in ends)
        close = 1e-5 * max(abs(low), abs(high)) + 1e-5 * (high - low)
        near = [f"(<= Y_0 {low + close})", f"(>= Y_0 {high - close})"] if max(abs(low), abs(high)) > 1e-38 else []
        for unsafe in ("(<= (* 0.0 Y_0) 0.0)", *near):
            found, text = ask(f"(and {box(ends)} {unsafe})")
            assert found.word == "violated"
            assert_between(text, ends)
            if low >= 0:
                assert "-" not in text.replace("e-", "")

    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(st.tuples(*[st.integers(-(10**15) + 1, 10**15 - 1)] * 2), st.integers(-18, -6), st.booleans())
    def test_they_lie_within_any_decimals_of_fifteen_digits(self, tmp_path_factory, digits, exponent, point):
        folder = tmp_path_factory.getbasetemp()
        low, high = (f"{number}e{exponent}" for number in sorted(digits if not point else digits[:1] * 2))
        network = save_network(folder / "within.onnx", IDENTITY)
        for unsafe in (f"(<= Y_0 {low})", f"(>= Y_0 {high})", "(<= (* 0.0 Y_0) 0.0)"):
            asked = save_property(folder / "within.vnnlib", f"(assert (and {box((low, high))} {unsafe}))")
            found = answer(network, asked, 20.0)
            if found.word == "violated":
                assert_between(found.result(), (low, high))
            else:  # float32 is beyond the very end
                assert str(found) == "unknown (within tolerance)"

    def test_decimals_of_more_digits_are_met_to_an_ulp(self, ask):
        for ends in (("0.12345678901234567", "0.12345678901234567"), ("0.30000000000000001", "0.30000000000000002")):
            _, text = ask(f"(and {box(ends)} (<= (* 0.0 Y_0) 0.0))")
            (decimal,), _ = numbers_of(text)
            assert abs(Fraction(decimal) - Fraction(ends[0])) < Fraction(2) ** -54

    def test_what_only_our_own_run_finds_unsafe_is_none(self, tmp_path, monkeypatch):
        """onnxruntime has the last word."""
        network = save_network(tmp_path / "network.onnx", IDENTITY)
        asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 0.5)))")
        monkeypatch.setattr(onnx_network, "replay_session", lambda *model: lambda image: torch.ones(2, 1))
        monkeypatch.setattr(vnncomp, "_check_reading", lambda *given: None)
        found = answer(network, asked, 2.0)
        assert found.word in ("unknown", "timeout") and found.inputs is None


class TestFiles:
    def test_gzipped_and_named_without_it(self, tmp_path):
        network = save_network(tmp_path / "network.onnx", IDENTITY)
        asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 -0.5)))")
        for path in (network, asked):
            (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        for ending in ("", ".gz"):
            assert answer(f"{network}{ending}", f"{asked}{ending}").word == "holds"

    def test_the_plain_file_comes_first(self, tmp_path):
        network = save_network(tmp_path / "network.onnx", IDENTITY)
        asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 -0.5)))")
        (tmp_path / "p.vnnlib.gz").write_bytes(b"no property")
        assert answer(network, asked).word == "holds"

    def test_a_model_that_is_read_wrongly_is_an_error(self, tmp_path, monkeypatch):
        network = save_network(tmp_path / "network.onnx", IDENTITY)
        asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 -0.5)))")
        original = onnx_network.replay_session
        monkeypatch.setattr(onnx_network, "replay_session", lambda *model: lambda x: original(*model)(x) + 0.1)
        with pytest.raises(InputError, match=r"differ from onnxruntime's by 0\.1"):
            answer(network, asked)


SAFE, UNSAFE = f"(assert (and {box(('0', '1'))} (<= Y_0 -0.5)))", f"(assert (and {box(('0', '1'))} (<= Y_0 0.5)))"
ROWS = [
    ("network.onnx", "safe.vnnlib", "unsat"),
    ("network.onnx", "unsafe.vnnlib", "sat"),
    ("missing.onnx", "safe.vnnlib", "error"),
    ("broken.onnx", "safe.vnnlib", "error"),
    ("operator.onnx", "safe.vnnlib", "error"),
    ("network.onnx", "missing.vnnlib", "error"),
    ("network.onnx", "malformed.vnnlib", "error"),
    ("network.onnx", "inputs.vnnlib", "error"),
    ("network.onnx", "tie, or not.vnnlib", "unknown"),
    ("wide.onnx", "hard.vnnlib", "timeout"),
    ("network.onnx", "safe.vnnlib", "unsat"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Networks and properties of every kind, and the table of them."""
    (tmp_path / "sub").mkdir()
    save_network(tmp_path / "network.onnx", IDENTITY)
    save_network(tmp_path / "wide.onnx", TestTime.layers())
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Sinh", ["x"], ["y"])], "hyperbolic sine", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "operator.onnx"
    )
    save_property(tmp_path / "safe.vnnlib", SAFE)
    save_property(tmp_path / "unsafe.vnnlib", UNSAFE)
    save_property(tmp_path / "inputs.vnnlib", f"(assert (and {box(('0', '1'), ('0', '1'))} (<= Y_0 -0.5)))", inputs=2)
    save_property(tmp_path / "malformed.vnnlib", SAFE + "\n(assert (<= Y_0 Z_7))")
    save_property(tmp_path / "tie, or not.vnnlib", f"(assert (and {box(('0.1', '0.1'))} (<= Y_0 0.1)))")
    save_property(tmp_path / "hard.vnnlib", f"(assert {TestTime.HARD} (<= Y_0 -9.02)))", inputs=5)
    lines = [f'{network},"{asked}",{0.05 if status == "timeout" else 20}' for network, asked, status in ROWS]
    (tmp_path / "instances.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def columns(path: Path) -> list[tuple[str, str, str]]:
    rows = list(instances.csv.reader(path.read_text().splitlines()))
    assert all(len(row) == 4 and re.fullmatch(r"\d+\.\d{3}", row[3]) for row in rows)
    return [(row[0], row[1], row[2]) for row in rows]


MALFORMED = ["a.onnx,b.vnnlib", "a.onnx,b.vnnlib,soon", "a.onnx,b.vnnlib,-1", "a.onnx,b.vnnlib,0",
             "a.onnx,b.vnnlib,nan", "a.onnx,b.vnnlib,inf", "a.onnx,b.vnnlib,5,6", ",b.vnnlib,5", "a.onnx,,5", "",
             "onnx,vnnlib,timeout"]  # fmt: skip


class TestInstances:
    def test_every_row_is_answered_in_order(self, folder):
        said = []
        run_instances(folder / "instances.csv", folder / "out.csv", watch=lambda *words: said.append(words))
        assert columns(folder / "out.csv") == ROWS
        assert [number for number, _, _ in said] == list(range(1, 12)) and {count for _, count, _ in said} == {11}
        for number, mention in ((2, "missing.onnx"), (3, "broken.onnx"), (4, "Sin"), (5, "missing.vnnlib"),
                                (6, "line 4"), (7, "X_1"), (8, "within tolerance")):  # fmt: skip
            assert mention in said[number][2] and "\n" not in said[number][2]
        assert "(" not in said[0][2]

    @pytest.mark.parametrize("kept", [0, 1, 4, 9, 11])
    @pytest.mark.parametrize("half", ["", "beginning", "all but the newline"])
    def test_a_run_that_was_killed_goes_on(self, folder, kept, half, monkeypatch):
        answered = []
        monkeypatch.setattr(instances, "_answer_instance", lambda reader, folder, instance, *rest: (
            answered.append(instance), (Answer("holds", 1.0, "nearest"), None))[1])  # fmt: skip
        run_instances(folder / "instances.csv", folder / "whole.csv")
        lines = (folder / "whole.csv").read_text().splitlines(keepends=True)
        if half and kept == len(lines):
            kept -= 1
        last = "" if not half else lines[kept][:5] if half == "beginning" else lines[kept][:-1]
        (folder / "out.csv").write_text("".join(lines[:kept]) + last)
        answered.clear()
        places = []
        run_instances(folder / "instances.csv", folder / "out.csv", watch=lambda place, *rest: places.append(place))
        assert places == list(range(kept + 1, len(lines) + 1))
        assert (folder / "out.csv").read_text() == "".join(lines)
        assert [(instance.network, instance.property) for instance in answered] == [row[:2] for row in ROWS[kept:]]

    @pytest.mark.parametrize(
        "content",
        ["my notes", "my notes\n", "network.onnx,safe.vnnlib,20", "network.onnx,safe.vnnlib,unsat,1.0\nmy notes",
         "network.onnx,unsafe.vnnlib,sat,1.0\n", "network.onnx,safe.vnnlib,holds,1.0\n", "network.onnx,safe.vnnlib\n",
         "network.onnx,safe.vnnlib,unsat,1.0\n" * 2, "\n", "onnx,vnnlib,status,seconds\n"],
    )  # fmt: skip
    def test_other_contents_are_refused_and_left_alone(self, folder, content):
        (folder / "out.csv").write_text(content)
        with pytest.raises(InputError, match=r"out\.csv, line [12]: found .*accepted: a new file"):
            run_instances(folder / "instances.csv", folder / "out.csv")
        assert (folder / "out.csv").read_text() == content

    def test_the_table_itself_is_no_place_for_results(self, folder):
        table = folder / "instances.csv"
        for text in (table.read_text(), table.read_text().rstrip("\n"), "network.onnx,safe.vnnlib,20\n"):
            table.write_text(text)
            with pytest.raises(InputError):
                run_instances(table, table)
            assert table.read_text() == text

    def test_more_results_than_instances(self, folder):
        (folder / "one.csv").write_text("network.onnx,safe.vnnlib,20")
        run_instances(folder / "one.csv", folder / "out.csv")
        before = (folder / "out.csv").read_text()
        (folder / "out.csv").write_text(before * 2)
        with pytest.raises(InputError, match="line 2"):
            run_instances(folder / "one.csv", folder / "out.csv")
        assert (folder / "out.csv").read_text() == before * 2

    def test_times(self, folder, monkeypatch):
        limits = []

        def answered(reader, folder, instance, settings):
            limits.append((settings.timeout, settings.arithmetic))
            return Answer("holds", 1.0, "nearest"), None

        monkeypatch.setattr(instances, "_answer_instance", answered)
        run_instances(folder / "instances.csv", folder / "out.csv", timeout=5.0, arithmetic="real")
        assert limits == [(0.05 if status == "timeout" else 5.0, "real") for _, _, status in ROWS]
        for timeout in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(InputError, match="timeout"):
                run_instances(folder / "instances.csv", folder / "other.csv", timeout=timeout)
        assert not (folder / "other.csv").exists()

    def test_a_signal_is_no_answer(self, folder, monkeypatch):
        def stopped(*given):
            raise Interrupted(signal.SIGTERM)

        monkeypatch.setattr(instances, "check_property", stopped)
        with pytest.raises(Interrupted):
            run_instances(folder / "instances.csv", folder / "out.csv")
        assert (folder / "out.csv").read_text() == ""

    def test_out_of_memory_is_unknown(self, folder, monkeypatch):
        def full(*given):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(instances, "check_property", full)
        said = []
        run_instances(folder / "instances.csv", folder / "out.csv", watch=lambda *words: said.append(words[2]))
        assert columns(folder / "out.csv")[:3] == [(*ROWS[0][:2], "unknown"), (*ROWS[1][:2], "unknown"), ROWS[2]]
        assert "out of memory" in said[0]

    @pytest.mark.parametrize("line", MALFORMED)
    def test_malformed_tables(self, tmp_path, line):
        table = tmp_path / "instances.csv"
        table.write_text(f"a.onnx,b.vnnlib,5\n{line}\nc.onnx,d.vnnlib,5\n")
        with pytest.raises(InputError, match=r"instances\.csv, line 2: found .*accepted: onnx,vnnlib,seconds"):
            run_instances(table, tmp_path / "out.csv")
        assert not (tmp_path / "out.csv").exists()

    def test_tables_that_are_none(self, tmp_path):
        for path, content in (
            (tmp_path / "none.csv", None),
            (tmp_path, None),
            (tmp_path / "bytes.csv", b"\xff\xfe\x00"),
        ):
            if content:
                path.write_bytes(content)
            with pytest.raises(InputError, match=re.escape(str(path))):
                read_instances(path)

    def test_spaces_and_windows_lines(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b" a.onnx , b.vnnlib, 1.5\r\n")
        assert read_instances(tmp_path / "a.csv") == [Instance("a.onnx", "b.vnnlib", 1.5)]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD = {
    "missing network": (["none.onnx", "safe.vnnlib"], ["none.onnx"]),
    "missing property": (["network.onnx", "none.vnnlib"], ["none.vnnlib"]),
    "a folder": (["sub", "safe.vnnlib"], ["sub"]),
    "no network": (["broken.onnx", "safe.vnnlib"], ["broken.onnx"]),
    "unsupported operator": (["operator.onnx", "safe.vnnlib"], ["operator.onnx", "Sin"]),
    "unknown name": (["network.onnx", "malformed.vnnlib"], ["malformed.vnnlib, line 4", "'Z_7'"]),
    "wrong inputs": (["network.onnx", "inputs.vnnlib"], ["inputs.vnnlib, line 2", "X_1"]),
    "files exchanged": (["safe.vnnlib", "network.onnx"], ["network.onnx", "VNN-LIB"]),
    "one file": (["network.onnx", None], ["--onnx FILE and --vnnlib FILE"]),
    "the other file": ([None, "safe.vnnlib"], ["--onnx FILE and --vnnlib FILE"]),
    "stray word": (["network.onnx", "safe.vnnlib", "runs/x"], ["'runs/x'"]),
    "images": (["network.onnx", "safe.vnnlib", "--images", "0:5"], ["--images", "--timeout"]),
    "other verifier": (["network.onnx", "safe.vnnlib", "--verifier", "abcrown"], ["--verifier"]),
    "no time": (["network.onnx", "safe.vnnlib", "--timeout", "0"], ["timeout: found 0"]),
    "negative time": (["network.onnx", "safe.vnnlib", "--timeout", "-1"], ["timeout: found -1"]),
    "text for time": (["network.onnx", "safe.vnnlib", "--timeout", "soon"], ["--timeout: found 'soon'"]),
    "arithmetic": (["network.onnx", "safe.vnnlib", "--arithmetic", "exact"], ["--arithmetic: found 'exact'"]),
    "results in no folder": (["network.onnx", "safe.vnnlib", "--results", "none/r.txt"], ["none/r.txt"]),
    "results are a folder": (["network.onnx", "safe.vnnlib", "--results", "sub"], ["sub"]),
}  # fmt: skip


TABLES = {
    "no results": (["instances.csv"], ["--results CSV"]),
    "no table": (["none.csv", "--results", "out.csv"], ["none.csv"]),
    "a network too": (["instances.csv", "--results", "out.csv", "--onnx", "network.onnx"], ["--onnx"]),
    "a run too": (["instances.csv", "--results", "out.csv", "runs/x"], ["'runs/x'"]),
    "negative time": (["instances.csv", "--results", "out.csv", "--timeout", "-1"], ["timeout: found -1"]),
    "text for time": (["instances.csv", "--results", "out.csv", "--timeout", "soon"], ["--timeout: found 'soon'"]),
    "arithmetic": (["instances.csv", "--results", "out.csv", "--arithmetic", "exact"],
                   ["--arithmetic: found 'exact'"]),
    "other results": (["instances.csv", "--results", "notes.txt"], ["notes.txt, line 1", "'notes'"]),
    "results in no folder": (["instances.csv", "--results", "none/out.csv"], ["none/out.csv"]),
    "results are a folder": (["instances.csv", "--results", "sub"], ["sub"]),
    "malformed": (["bad.csv", "--results", "out.csv"], ["bad.csv, line 2", "'a,b'"]),
}  # fmt: skip


class TestCommandLine:
    @pytest.mark.parametrize(
        "name, line", [("safe", "holds"), ("unsafe", "violated"), ("tie, or not", "unknown (within tolerance)")]
    )
    def test_one_line_comes_out(self, folder, capsys, name, line):
        words = ["verify", "--onnx", str(folder / "network.onnx"), "--vnnlib", str(folder / f"{name}.vnnlib")]
        before = everything_in(folder)
        assert main(words) == 0
        said = capsys.readouterr()
        assert said.out == line + "\n" and said.err == ""
        assert everything_in(folder) == before
        assert main([*words, "--results", str(folder / "r.txt"), "--timeout", "20", "--arithmetic", "nearest"]) == 0
        assert capsys.readouterr().out == line + "\n"
        assert (folder / "r.txt").read_text().split("\n")[0] == {"holds": "unsat", "violated": "sat"}.get(
            line, "unknown"
        )

    @pytest.mark.parametrize(("words", "mentions"), BAD.values(), ids=BAD)
    def test_bad_input(self, folder, monkeypatch, capsys, words, mentions):
        monkeypatch.chdir(folder)
        network, asked, *rest = words
        given = [*(["--onnx", network] if network else []), *(["--vnnlib", asked] if asked else []), *rest]
        (folder / "old.txt").write_text("sat\n")
        before = everything_in(folder)
        for more in ([], [] if "--results" in rest else ["--results", "old.txt"]):
            assert main(["verify", *given, *more]) == 2
            said = capsys.readouterr()
            assert said.out == "error\n"
            assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.err.endswith("\n")
            assert all(mention in said.err for mention in [*mentions, "accepted"]), said.err
            assert everything_in(folder) == before

    def test_tables(self, folder, monkeypatch, capsys):
        """Rows that are errors are rows."""
        monkeypatch.chdir(folder)
        assert main(["verify", "--instances", "instances.csv", "--results", "out.csv", "--timeout", "10"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert columns(folder / "out.csv") == ROWS and len(lines) == 11
        assert lines[0].startswith("1/11 network.onnx,safe.vnnlib,unsat,") and "missing.onnx" in lines[2]
        assert main(["verify", "--instances", "instances.csv", "--results", "out.csv"]) == 0
        assert capsys.readouterr().out == "" and columns(folder / "out.csv") == ROWS

    @pytest.mark.parametrize(("words", "mentions"), TABLES.values(), ids=TABLES)
    def test_bad_tables(self, folder, monkeypatch, capsys, words, mentions):
        monkeypatch.chdir(folder)
        (folder / "notes.txt").write_text("notes")
        (folder / "bad.csv").write_text("a,b,5\na,b\n")
        before = everything_in(folder)
        assert main(["verify", "--instances", *words]) == 2
        said = capsys.readouterr()
        assert said.out == "error\n" and said.err.startswith("error: ") and said.err.count("\n") == 1
        assert all(mention in said.err for mention in [*mentions, "accepted"]), said.err
        assert everything_in(folder) == before
