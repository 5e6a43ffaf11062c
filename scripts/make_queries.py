"""Make verification queries whose answers are known without certtrain's verifiers.

    python scripts/make_queries.py OUT_DIR --seed 0

Networks (``onnx/``), queries (``vnnlib/``), ``instances.csv`` in the competition's form and ``answers.csv`` (query,
family, size, expected, why). Half of the queries are of the size of ACAS Xu (5 inputs, 6 × 50 ReLUs) or of MNIST's
width (784 inputs). Of each ``sat`` query a point is known that onnxruntime confirms by the competition's rules
(``query_scoring.witness``), optimised or not; each ``unsat`` one says what proves it (``query_answers``). Thresholds
keep a distance from the extremes, above float32's roundings, except where a tie is what is asked.

The same seed gives the same files, on the same machine and versions.
"""

from __future__ import annotations

import argparse
import csv
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import query_networks as made
import torch
import vnnlib
from query_answers import MixedProgram, climb, impossible, largest_difference, vertices, zonotopes
from query_networks import Mlp
from query_scoring import witness
from sklearn.datasets import load_digits

ACAS = (5, 50, 50, 50, 50, 50, 50, 5)
WIDE = (784, 64, 32, 10)
DIGITS = (64, 24, 12, 10)
SECONDS = 20
INSIDE = 1e-3
"""By how much points of ``sat`` queries keep off the ends of rows."""

Draw = np.random.Generator


@dataclass(frozen=True)
class Query:
    """A query and what is known of it.

    Args:
        networks: those with a file of their own, by name; in VNN-LIB 1.0 one without a name.
        text: of the file.
        expected: ``sat`` or ``unsat``. why: how that is known.
        point: the inputs of a ``sat`` query, by the names of its tensors.
    """

    family: str
    large: bool
    networks: Mapping[str, Mlp]
    text: str
    expected: str
    why: str
    point: Mapping[str, np.ndarray] | None = None


Family = Callable[[Draw], Iterator[Query]]


# text


def number(value: float) -> str:
    """The exact decimal, without an exponent, with a decimal point."""
    text = format(Decimal(float(value)), "f")
    return text if "." in text else f"{text}.0"


def entry(name: str, index: int, shape: Sequence[int]) -> str:
    return f"{name}[{','.join(str(int(i)) for i in np.unravel_index(index, shape))}]"


def declared(name: str, mlp: Mlp, given: Sequence[str], output: str, related: str = "",
             hidden: Sequence[tuple[str, int, str]] = (), kind: str = "float32") -> str:  # fmt: skip
    """The declaration of a network. hidden: (name, width, tensor of the graph)."""

    def shape(sizes: Sequence[int]) -> str:
        return f"[{','.join(map(str, sizes))}]"

    inputs = [f"  (declare-input {one} {kind} {shape(sizes)})" for one, sizes in zip(given, mlp.shapes, strict=True)]
    inner = [f'  (declare-hidden {one} {kind} [1,{width}] "{tensor}")' for one, width, tensor in hidden]
    lines = [f"(declare-network {name} {related}".rstrip(), *inputs, *inner]
    return "\n".join([*lines, f"  (declare-output {output} {kind} [1,{mlp.outputs}])", ")"])


def box(name: str, shape: Sequence[int], low: np.ndarray, high: np.ndarray) -> list[str]:
    lines = list[str]()
    for index, (least, most) in enumerate(zip(low, high, strict=True)):
        place = entry(name, index, shape)
        lines.append(f"(and (>= {place} {number(least)}) (<= {place} {number(most)}))")
    return lines


def equal(first: str, second: str, shape: Sequence[int], indices: Sequence[int] | None = None) -> list[str]:
    places = range(int(np.prod(shape))) if indices is None else indices
    return [f"(== {entry(first, i, shape)} {entry(second, i, shape)})" for i in places]


def second(declarations: Sequence[str], assertions: Sequence[str]) -> str:
    return "\n".join(["(vnnlib-version <2.0>)", *declarations, *(f"(assert {one})" for one in assertions), ""])


def first(inputs: int, outputs: int, assertions: Sequence[str]) -> str:
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{i}" for i in range(outputs)]
    lines = [f"(declare-const {name} Real)" for name in names] + [f"(assert {one})" for one in assertions]
    return "\n".join([*lines, ""])


def linear(parts: Sequence[tuple[float, str]]) -> str:
    """The sum of factor · variable."""
    words = [name if factor == 1 else f"(* {number(factor)} {name})" for factor, name in parts]
    return words[0] if len(words) == 1 else f"(+ {' '.join(words)})"


def dyadic(values: np.ndarray | float, step: int = 64) -> np.ndarray:
    return np.round(np.asarray(values) * step) / step


def short(value: float) -> float:
    """A threshold of few digits in binary, and so in decimals."""
    return float(np.round(value * 2**16) / 2**16)


def around(draw: Draw, inputs: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """A box in [-1/2, 1/2]."""
    centre = dyadic(draw.uniform(radius - 0.5, 0.5 - radius, inputs))
    return centre - radius, centre + radius


def either(large: float, slack: float) -> tuple[tuple[str, float], ...]:
    """Thresholds above and below a known maximum, at a distance of ``slack``."""
    return ("unsat", short(large + slack)), ("sat", short(large - slack))


# networks


def scores(x: np.ndarray) -> np.ndarray:
    """Costs of five manoeuvres, from distance, angle, heading and two speeds in [-1/2, 1/2]."""
    distance, angle, heading, own, other = x.T
    closing = own * np.cos(np.pi * angle) + other * np.cos(np.pi * (heading - angle))
    danger = np.exp(-2 * (distance + 0.5)) * (1 + closing)
    turns = [0.0, 0.25, -0.25, 0.5, -0.5]
    return np.stack([danger * np.cos(np.pi * (angle - turn)) + 0.3 * abs(turn) for turn in turns], 1)


def acas_like(draw: Draw) -> tuple[Mlp, Callable[[Mlp, int, float], Mlp]]:
    """A trained network of the size of ACAS Xu's, and its further training: (network, steps, rate) → network."""
    x = draw.uniform(-0.5, 0.5, (4096, 5))
    y, seed = scores(x), int(draw.integers(1 << 30))

    def train(network: Mlp, steps: int, rate: float) -> Mlp:
        return made.trained(network, x, y, steps, rate, seed + steps)

    return train(made.random(ACAS, draw), 300, 2e-3), train


def images(wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits in steps of 1/16: 8 × 8, or as 28 × 28 with each pixel three times and a margin."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels / 16.0
    if wide:
        tripled = pixels.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2)
        pixels = np.pad(tripled, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784)
    return pixels, labels.astype(np.int64)


def classifier(
    draw: Draw, sizes: Sequence[int]
) -> tuple[Mlp, Callable[[Mlp, int, float], Mlp], np.ndarray, np.ndarray]:
    x, labels = images(sizes[0] == 784)
    seed = int(draw.integers(1 << 30))

    def train(network: Mlp, steps: int, rate: float) -> Mlp:
        return made.trained(network, x[:1400], labels[:1400], steps, rate, seed + steps)

    inputs = ((1, 1, 28, 28),) if sizes[0] == 784 else ()
    return train(made.random(sizes, draw, inputs), 250, 3e-3), train, x[1400:], labels[1400:]


def changed(network: Mlp, train: Callable[[Mlp, int, float], Mlp]) -> dict[str, Mlp]:
    return {
        "pruned": made.pruned(network, 0.04), "quantised": made.quantised(network),
        "fine-tuned": train(network, 10, 5e-5),
    }  # fmt: skip


# families


def differs(outputs: int, tolerance: float, sign: str = ">") -> str:
    parts = [f"({sign} (- {a}[0,{k}] {b}[0,{k}]) {number(tolerance)})" for k in range(outputs)
             for a, b in (("Y_g", "Y_f"), ("Y_f", "Y_g"))]  # fmt: skip
    return f"(or {' '.join(parts)})"


def equivalence_of(f: Mlp, g: Mlp, low: np.ndarray, high: np.ndarray, draw: Draw, family: str, large: bool, what: str,
                   cells: int, related: str = "(isomorphic-to f)") -> Iterator[Query]:  # fmt: skip
    """A tolerance above the difference that zonotopes bound, and one below the largest found."""
    above, shape = largest_difference(f, g, low, high, cells), f.shapes[0]
    best, x = -1.0, low
    for output in range(f.outputs):
        row = np.eye(f.outputs)[output]
        for sign in (1, -1):
            found = climb(
                lambda x, row=row, sign=sign: (g(x) - f(x)) @ row * sign,
                lambda x, row=row, sign=sign: (g.gradient(x, row) - f.gradient(x, row)) * sign,
                low, high, draw, starts=16, steps=25,
            )  # fmt: skip
            value = float((g(found[None]) - f(found[None]))[0] @ row * sign)
            best, x = (value, found) if value > best else (best, x)
    assert best <= above + 1e-9
    networks, point = {"f": f, "g": g}, x.astype(np.float32).reshape(shape)
    declarations = [declared("f", f, ["X_f"], "Y_f"), declared("g", g, ["X_g"], "Y_g", related)]
    for expected, tolerance in (("unsat", above * 1.03 + 2e-4), ("sat", best * 0.95 - 1e-5)):
        inputs = box("X_f", shape, low, high) + equal("X_f", "X_g", shape)
        text = second(declarations, [*inputs, differs(f.outputs, short(tolerance))])
        why = (f"difference <= {above:.6g} by zonotopes of {cells} cells" if expected == "unsat"
               else f"difference {best:.6g} at a point found by gradients")  # fmt: skip
        yield Query(family, large, networks, text, expected, f"{what}: {why}",
                    {"X_f": point, "X_g": point} if expected == "sat" else None)  # fmt: skip


def equivalence_acas(draw: Draw) -> Iterator[Query]:
    for radius in (1 / 64, 1 / 32):
        network, train = acas_like(draw)
        for what, other in changed(network, train).items():
            for _ in range(2):
                low, high = around(draw, 5, radius)
                yield from equivalence_of(network, other, low, high, draw, "equivalence", True, what, 48)


def equivalence_wide(draw: Draw) -> Iterator[Query]:
    network, train, x, _ = classifier(draw, WIDE)
    for number_, (what, other) in enumerate(changed(network, train).items()):
        for patch in (False, True):
            image = x[int(draw.integers(len(x)))]
            radius = np.full(784, 1 / 256)
            if patch:
                radius[:] = 0.0
                radius[draw.choice(784, 12, replace=False)] = 1 / 8
            half = what == "quantised" and patch
            other_ = Mlp(other.weights, other.biases, other.inputs, half)
            yield from equivalence_of(network, other_, image - radius, image + radius, draw, "equivalence", True,
                                      f"{what}, patch" if patch else what, 8 if patch else 1,
                                      "" if half or number_ == 2 else "(isomorphic-to f)")  # fmt: skip


def equivalence_small(draw: Draw) -> Iterator[Query]:
    network, train, x, _ = classifier(draw, DIGITS)
    for what, other in changed(network, train).items():
        for radius in (1 / 64, 1 / 32):
            image = x[int(draw.integers(len(x)))]
            yield from equivalence_of(
                network, other, image - radius, image + radius, draw, "equivalence", False, what, 1
            )


def permuted(draw: Draw) -> Iterator[Query]:
    """The same function with its neurons in another order; and one weight off."""
    for sizes, large, radius in ((ACAS, True, 1 / 64), ((4, 12, 12, 2), False, 1 / 4)):
        for number_ in range(5):
            f = made.random(sizes, draw)
            g = made.permuted(f, draw)
            low, high = around(draw, sizes[0], radius)
            declarations = [declared("f", f, ["X_f"], "Y_f"), declared("g", g, ["X_g"], "Y_g", "(isomorphic-to f)")]
            inputs = box("X_f", (1, sizes[0]), low, high) + equal("X_g", "X_f", (1, sizes[0]))
            text = second(declarations, [*inputs, differs(sizes[-1], 1 / 64, ">=")])
            expected, why, point = (
                "unsat",
                "the same function but for float32's roundings",
                low.astype(np.float32)[None],
            )
            if number_ == 4:
                bias = g.biases[-1].copy()
                bias[1] += 1 / 32
                g, expected, why = Mlp(g.weights, (*g.biases[:-1], bias)), "sat", "a bias of the second is off by 1/32"
            yield Query("permuted", large, {"f": f, "g": g}, text, expected, why, {"X_f": point, "X_g": point})


def planted(draw: Draw) -> Iterator[Query]:
    """A bump in the second network alone: its exact height is the largest difference, at its middle."""
    for sizes, large, radius, count in ((ACAS, True, 1 / 16, 8), ((3, 10, 10, 2), False, 1 / 4, 5)):
        for number_ in range(count):
            f, inputs = made.random(sizes, draw), sizes[0]
            low, high = around(draw, inputs, radius)
            centre = dyadic(draw.uniform(low + radius / 2, high - radius / 2), 256)
            height, output = float(dyadic(draw.uniform(0.25, 1.0))), int(draw.integers(sizes[-1]))
            g = made.with_bump(f, centre, radius * float(draw.uniform(0.8, 1.6)), height, output)
            point = {"X_f": centre.astype(np.float32)[None], "X_g": centre.astype(np.float32)[None]}
            value = float(f(centre[None])[0, output])
            declarations = [declared("f", f, ["X_f"], "Y_f"), declared("g", g, ["X_g"], "Y_g")]
            inputs_ = box("X_g", (1, inputs), low, high) + equal("X_f", "X_g", (1, inputs))
            for expected, tolerance in either(height, height * 0.08):
                asked = [f"(>= Y_g[0,{output}] (+ Y_f[0,{output}] {number(tolerance)}))"]
                if number_ % 2 and expected == "sat":  # and the first is well-behaved where the second is not
                    asked = [f"(<= Y_f[0,{output}] {number(short(value + height / 8))})",
                             f"(> Y_g[0,{output}] {number(short(value + height * 0.85))})"]  # fmt: skip
                why = f"a bump of height {height}, and no other difference"
                yield Query("planted", large, {"f": f, "g": g}, second(declarations, inputs_ + asked), expected, why,
                            point if expected == "sat" else None)  # fmt: skip


def monotone(draw: Draw) -> Iterator[Query]:
    """A network at two inputs that differ in the first entry alone."""

    def asked(mlp: Mlp, low: np.ndarray, high: np.ndarray, order: str, outputs: str) -> str:
        shape = mlp.shapes[0]
        declarations = [declared("f", mlp, ["X_f"], "Y_f"), declared("g", mlp, ["X_g"], "Y_g", "(equal-to f)")]
        inputs = box("X_f", shape, low, high) + box("X_g", shape, low, high)
        inputs += equal("X_f", "X_g", shape, range(1, shape[1]))
        return second(declarations, [*inputs, order, outputs])

    diagonal = "(<= X_f[0,0] X_g[0,0])"
    for sizes, large, radius, count in ((ACAS, True, 1 / 32, 4), ((3, 12, 12, 2), False, 1 / 4, 4)):
        for number_ in range(count):
            f = made.rising(made.convex(sizes, draw), 0.5)
            low, high = around(draw, sizes[0], radius)
            networks, why = {"f": f}, "rises by half of input 0 at least: no weight that input 0 meets is negative"
            text = asked(f, low, high, diagonal, f"(> Y_f[0,0] (+ Y_g[0,0] {number(1 / 64)}))")
            yield Query("monotone", large, networks, text, "unsat", why)
            apart = f"(<= (+ X_f[0,0] {number(radius / 2)}) X_g[0,0])"
            yield Query("monotone", large, networks, asked(f, low, high, apart, "(>= Y_f[0,1] Y_g[0,1])"), "unsat", why)
            if number_ == 0:
                point = {"X_f": low.astype(np.float32)[None], "X_g": low.astype(np.float32)[None]}
                strict, closed = (asked(f, low, high, diagonal, f"({sign} Y_g[0,0] Y_f[0,0])") for sign in ("<", "<="))
                yield Query("monotone", large, networks, strict, "unsat", f"{why}; closed, the diagonal is a tie")
                yield Query("monotone", large, networks, closed, "sat", "a tie on the diagonal", point)
        for number_ in range(count):
            while True:
                f = acas_like(draw)[0] if large and number_ == 0 else made.random(sizes, draw)
                low, high = around(draw, sizes[0], 1 / 4)
                falls = [_fall(f, low, high, output, draw) for output in range(sizes[-1])]
                drop, output, x, y = max(falls, key=lambda one: one[0])
                if drop >= 1 / 32:
                    break
            strict = asked(f, low, high, diagonal, f"(< Y_g[0,{output}] Y_f[0,{output}])")
            deep = f"(< (+ Y_g[0,{output}] {number(short(drop / 2))}) Y_f[0,{output}])"
            for text in (strict, asked(f, low, high, diagonal, deep)):
                yield Query("monotone", large, {"f": f}, text, "sat", f"falls by {drop:.4g} at two points found",
                            {"X_f": x, "X_g": y})  # fmt: skip


def _fall(
    f: Mlp, low: np.ndarray, high: np.ndarray, output: int, draw: Draw
) -> tuple[float, int, np.ndarray, np.ndarray]:
    """The largest fall of an output found where input 0 rises: (size, output, lower point, upper point)."""
    x = low + (high - low) * draw.random((2000, len(low)))
    y = x.copy()
    x[:, 0], y[:, 0] = low[0], high[0]
    x, y = (value.astype(np.float32) for value in (x, y))
    falls = (f(x.astype(float)) - f(y.astype(float)))[:, output]
    best = int(falls.argmax())
    return float(falls[best]), output, x[best : best + 1], y[best : best + 1]


def coupled(draw: Draw) -> Iterator[Query]:
    """Inputs in polytopes, and inputs of two networks at an offset."""
    for _ in range(3):  # a convex function over a polytope is largest at a vertex
        f = made.convex(ACAS, draw)
        low, high = around(draw, 5, 1 / 8)
        row = np.append(draw.choice([-1.0, 1.0], 3), [0.0, 0.0])
        most = float(dyadic(row @ (low + high) / 2 - 1 / 16, 256))
        for tight in (False, True):
            corners = vertices(low, high, row, most, tight)
            values = f(corners)[:, 0]
            large = float(values.max())
            total = linear([(factor, f"X[0,{i}]") for i, factor in enumerate(row) if factor])
            tied = f"({'==' if tight else '<='} {total} {number(most)})"
            for expected, threshold in either(large, 0.02 * float(np.ptp(values)) + 1e-4):
                asked = [*box("X", (1, 5), low, high), tied, f"(>= Y[0,0] {number(threshold)})"]
                text = second([declared("f", f, ["X"], "Y")], asked)
                yield Query("coupled", True, {"f": f}, text, expected, f"convex, largest at a vertex: {large:.6g}",
                            {"X": corners[values.argmax()].astype(np.float32)[None]})  # fmt: skip
    for _ in range(2):
        f, g = made.convex(ACAS, draw), made.convex(ACAS, draw)
        low, high = around(draw, 5, 1 / 16)
        offset = np.array([1 / 16, -1 / 32, 0.0, 0.0, 1 / 64])
        corners = vertices(low, high)
        values = f(corners)[:, 0] + g(corners + offset)[:, 1]
        x, large = corners[values.argmax()], float(values.max())
        ties = [f"(== X_g[0,{i}] (+ X_f[0,{i}] {number(shift)}))" if shift else f"(== X_f[0,{i}] X_g[0,{i}])"
                for i, shift in enumerate(offset)]  # fmt: skip
        for expected, threshold in either(large, 0.02 * float(np.ptp(values)) + 1e-4):
            asked = [*box("X_f", (1, 5), low, high), *ties, f"(> (+ Y_f[0,0] Y_g[0,1]) {number(threshold)})"]
            text = second([declared("f", f, ["X_f"], "Y_f"), declared("g", g, ["X_g"], "Y_g")], asked)
            yield Query("coupled", True, {"f": f, "g": g}, text, expected, f"convex, largest at a vertex: {large:.6g}",
                        {"X_f": x.astype(np.float32)[None], "X_g": (x + offset).astype(np.float32)[None]})  # fmt: skip
    for number_ in range(6):  # random networks over random polytopes
        f, inputs = made.random((4, 10, 8, 3), draw), range(4)
        low, high = around(draw, 4, 3 / 8)
        programs, ties = (MixedProgram(), MixedProgram()), list[str]()
        x, _ = (program.variables(low, high) for program in programs)
        for line in range(1 + number_ % 3):
            row = draw.choice([-1.0, 0.5, 1.0, 2.0], 4)
            most = float(dyadic(row @ (low + high) / 2 + draw.uniform(0, 0.1)))
            tight = line == 0 and number_ >= 3
            for program, slack in zip(programs, (0.0, 0.0 if tight else INSIDE), strict=True):
                program.row(dict(zip(x, row, strict=True)), most if tight else -np.inf, most - slack)
            total = linear([(float(row[i]), f"X[0,{i}]") for i in inputs])
            ties.append(f"({'==' if tight else '<='} {total} {number(most)})")
        y, _ = (program.network(f, x)[-1] for program in programs)
        parts = [(1.0, y[0], "Y[0,0]"), (-1.0, y[1], "Y[0,1]")]
        yield from _by_program("coupled", f, programs, x, parts, low, high, ties)


def _by_program(
    family: str, f: Mlp, programs: Sequence[MixedProgram], x: Sequence[int], parts: Sequence[tuple[float, int, str]],
    low: np.ndarray, high: np.ndarray, ties: Sequence[str], hidden: Sequence[tuple[str, int, str]] = (),
    kind: str = "float32",
) -> Iterator[Query]:  # fmt: skip
    """Thresholds above and below the largest sum of parts that a mixed-integer program finds; the last program has the
    same variables, and says where the point of the ``sat`` query lies."""
    bound, values = (programs[side].maximise({variable: factor for factor, variable, _ in parts}) for side in (0, -1))
    bound, values = bound[0], values[1]
    sizes = np.cumsum([int(np.prod(shape)) for shape in f.shapes])[:-1]
    names = ["X"] if len(f.shapes) == 1 else [f"X{i}" for i in range(len(f.shapes))]
    asked = list[str]()
    for name, shape, least, most in zip(names, f.shapes, np.split(low, sizes), np.split(high, sizes), strict=True):
        asked += box(name, shape, least, most)
    total = linear([(factor, name) for factor, _, name in parts])
    point = _inside(values[list(x)], programs[0], x, low, high)
    split = np.split(point, sizes)
    at = {name: own.reshape(shape) for name, own, shape in zip(names, split, f.shapes, strict=True)}
    for expected, threshold in either(bound, 0.03 * (1 + abs(bound))):
        text = second([declared("f", f, names, "Y", hidden=hidden, kind=kind)],
                      [*asked, *ties, f"(>= {total} {number(threshold)})"])  # fmt: skip
        yield Query(family, False, {"f": f}, text, expected, f"largest {bound:.6g} by a mixed-integer program", at)


def _inside(
    point: np.ndarray, program: MixedProgram, x: Sequence[int], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Multiples of 2^-18 next to a point, which satisfy the program's equalities of inputs alone exactly."""
    found = np.clip(dyadic(point, 1 << 18), low, high)
    for factors, least, most in program.rows:
        if least == most and set(factors) <= set(x):
            off = sum(factor * found[x.index(variable)] for variable, factor in factors.items()) - most
            for variable, factor in sorted(factors.items(), key=lambda one: -abs(one[1])):
                place = x.index(variable)
                if off and low[place] <= found[place] - off / factor <= high[place]:
                    found[place], off = found[place] - off / factor, 0.0
    return found.astype(np.float32)


def hidden(draw: Draw) -> Iterator[Query]:
    """Tensors inside of networks."""
    for number_ in range(4):
        f = made.convex(ACAS, draw)
        low, high = around(draw, 5, 1 / 8)
        layer, unit, corners = 2 + number_, int(draw.integers(50)), vertices(low, high)
        found = f.layers(corners)
        tensor = f"h{layer}" if number_ % 2 else f"r{layer}"
        values = found[layer - 1] if number_ % 2 else np.maximum(found[layer - 1], 0)
        total = values[:, unit] + found[-1][:, 2]
        large = float(total.max())
        for expected, threshold in either(large, 0.02 * float(np.ptp(total)) + 1e-4):
            asked = [*box("X", (1, 5), low, high), f"(>= (+ H[0,{unit}] Y[0,2]) {number(threshold)})"]
            text = second([declared("f", f, ["X"], "Y", hidden=[("H", 50, tensor)])], asked)
            yield Query("hidden", True, {"f": f}, text, expected, f"convex, largest at a vertex: {large:.6g}",
                        {"X": corners[total.argmax()].astype(np.float32)[None]})  # fmt: skip
    for number_ in range(5):
        f = made.random((3, 10, 8, 2), draw)
        low, high = around(draw, 3, 3 / 8)
        programs = MixedProgram(), MixedProgram()
        x, _ = (program.variables(low, high) for program in programs)
        (before, middle, y), _ = (program.network(f, x) for program in programs)
        level = short(float(np.quantile(f.layers(low + (high - low) * draw.random((200, 3)))[0][:, 3], 0.6)))
        for program, slack in zip(programs, (0.0, INSIDE), strict=True):
            program.row({before[3]: 1.0}, -np.inf, level - slack)
        ties = [f"(<= P[0,3] {number(level)})"]
        parts = [(1.0, middle[5], "H[0,5]"), (-1.0, y[number_ % 2], f"Y[0,{number_ % 2}]")]
        yield from _by_program("hidden", f, programs, x, parts, low, high, ties, [("P", 10, "h1"), ("H", 8, "h2")])


def two_inputs(draw: Draw) -> Iterator[Query]:
    """Inputs of two shapes: an image and a few numbers."""
    for number_ in range(4):
        f = made.convex((789, 64, 32, 3), draw, ((1, 1, 28, 28), (1, 5)), signs=True)
        image, radius = images(True)[0][int(draw.integers(1797))], 1 / 32
        low = np.concatenate([image - radius, np.full(5, -0.25)])
        high = np.concatenate([image + radius, np.full(5, 0.25)])
        best = np.where(f.gradient(high[None], np.ones(3))[0] >= 0, high, low)
        best = np.where(f.weights[0].sum(0) >= 0, high, low)
        worst = low + high - best
        large, small = (float(f(x[None])[0, 0]) for x in (best, worst))
        for expected, threshold in either(large, 0.03 * (large - small) + 1e-4):
            asked = box("A", (1, 1, 28, 28), low[:784], high[:784]) + box("B", (1, 5), low[784:], high[784:])
            asked.append(
                f"(>= Y[0,0] {number(threshold)})"
                if number_ % 2
                else f"(or (>= Y[0,0] {number(threshold)}) (and (< Y[0,1] Y[0,2]) (> Y[0,0] {number(threshold)})))"
            )
            x = best.astype(np.float32)
            yield Query("two inputs", True, {"f": f}, second([declared("f", f, ["A", "B"], "Y")], asked), expected,
                        f"monotone in each input, largest at a corner: {large:.6g}",
                        {"A": x[:784].reshape(1, 1, 28, 28), "B": x[784:][None]})  # fmt: skip
    for _ in range(4):
        f = made.random((7, 10, 8, 2), draw, ((1, 2, 2), (1, 3)))
        low, high = around(draw, 7, 1 / 4)
        programs, most = (MixedProgram(), MixedProgram()), float(dyadic(low[0] - high[5] + 3 / 4))
        x, _ = (program.variables(low, high) for program in programs)
        for program, slack in zip(programs, (0.0, INSIDE), strict=True):
            program.row({x[0]: 1.0, x[5]: -1.0}, -np.inf, most - slack)
        y, _ = (program.network(f, x)[-1] for program in programs)
        ties = [f"(<= (- X0[0,0,0] X1[0,1]) {number(most)})"]
        parts = [(1.0, y[0], "Y[0,0]"), (0.5, y[1], "Y[0,1]")]
        yield from _by_program("two inputs", f, programs, x, parts, low, high, ties, kind="real")


def unrelated(draw: Draw) -> Iterator[Query]:
    """Two networks of different sizes, one number shared or none."""
    for sizes, others, large in ((ACAS, (3, 50, 50, 2), True), ((3, 10, 8, 2), (2, 8, 6, 2), False)):
        for number_ in range(4):
            f, g = made.convex(sizes, draw), made.convex(others, draw)
            low, high = around(draw, sizes[0] + others[0], 1 / 8)
            low[sizes[0]], high[sizes[0]] = low[0], high[0]
            shared, corners = bool(number_ % 2), vertices(low, high)
            if shared:
                corners = corners[corners[:, 0] == corners[:, sizes[0]]]
            x, z = corners[:, : sizes[0]], corners[:, sizes[0] :]
            values = f(x)[:, 0] + g(z)[:, 1]
            best, most = int(values.argmax()), float(values.max())
            declarations = [declared("f", f, ["X_f"], "Y_f"), declared("g", g, ["X_g"], "Y_g")]
            inputs = box("X_f", (1, sizes[0]), low[: sizes[0]], high[: sizes[0]])
            inputs += box("X_g", (1, others[0]), low[sizes[0] :], high[sizes[0] :])
            inputs += ["(== X_f[0,0] X_g[0,0])"] if shared else []
            for expected, threshold in either(most, 0.02 * float(np.ptp(values)) + 1e-4):
                text = second(declarations, [*inputs, f"(<= {number(threshold)} (+ Y_f[0,0] Y_g[0,1]))"])
                point = {name: own[best : best + 1].astype(np.float32) for name, own in (("X_f", x), ("X_g", z))}
                why = f"convex, largest at a vertex: {most:.6g}"
                yield Query("unrelated", large, {"f": f, "g": g}, text, expected, why, point)


def products(draw: Draw) -> Iterator[Query]:
    """Products of variables: of numbers that are positive and rise together, and of a small control network."""
    for number_ in range(4):
        f = made.convex(ACAS, draw, signs=True)
        f = Mlp((np.abs(f.weights[0]), *f.weights[1:]), tuple(np.abs(bias) for bias in f.biases))
        low, high = (ends + 0.75 for ends in around(draw, 5, 1 / 16))
        ends = f(np.stack([low, high]))
        factors = (low[1], high[1]) if number_ % 2 else ends[:, 1]
        small, large = (float(a * b) for a, b in zip(factors, ends[:, 0], strict=True))
        term = "(* X[0,1] Y[0,0])" if number_ % 2 else "(* Y[0,0] Y[0,1])"
        for expected, threshold in either(large, 0.04 * (large - small)):
            text = second([declared("f", f, ["X"], "Y")],
                          [*box("X", (1, 5), low, high), f"(>= {term} {number(threshold)})"])  # fmt: skip
            yield Query("products", True, {"f": f}, text, expected,
                        f"no weight is negative, largest at the upper corner: {large:.6g}",
                        {"X": high.astype(np.float32)[None]})  # fmt: skip
    counts = {"sat": 0, "unsat": 0}
    while min(counts.values()) < 11:
        f = made.random((3, 8, 8, 1), draw)
        low, high = np.array([0.25, -0.5, 0.25]), np.array([1.0, 0.5, 0.75])  # gap, closing speed, speed
        x = low + (high - low) * draw.random((4000, 3))
        x[:8] = vertices(low, high)
        x = dyadic(x, 1 << 12)
        y = f(x)[:, 0]
        gap, speed, own = x.T
        a, v, d, w = "Y[0,0]", "X[0,1]", "X[0,0]", "X[0,2]"
        shapes = [
            (f"(- (* {a} {d}) (* {v} {v}))", y * gap - speed**2), (f"(+ (* {a} {a}) (* {v} {w}))", y * y + speed * own),
            (f"(- (* 2.0 {a} {v}) {d})", 2 * y * speed - gap),
            (f"(* (+ {a} {v}) (- {w} {d}))", (y + speed) * (own - gap)),
        ]  # fmt: skip
        term, values = shapes[int(draw.integers(4))]
        other, others = shapes[int(draw.integers(4))]
        deep = bool(draw.integers(2))
        cut = short(float(np.quantile(others, 0.3)))
        allowed = (others <= cut) & (x[:, 0] != 0.5) | (speed > 0.25) if deep else np.ones(len(x), bool)
        spread = float(np.ptp(values[allowed]))
        slack = 0.1 * spread if draw.integers(2) else -0.03 * spread
        threshold = short(float(values[allowed].max()) + slack)
        asked = [f"(> {term} {number(threshold)})"]
        if deep:
            asked = [f"(and {asked[0]} (or (and (<= {other} {number(cut)}) (!= {d} 0.5)) (> {v} 0.25)))"]
        text = second([declared("f", f, ["X"], "Y")], [*box("X", (1, 3), low, high), *asked])
        expected = "unsat" if slack > 0 else "sat"
        if counts[expected] >= 11:
            continue
        if expected == "unsat" and not impossible(
            vnnlib.parse_query_string(text).assertions, [(f, "X", "Y")], low, high, 150_000
        ):
            continue
        counts[expected] += 1
        best = int(np.where(allowed, values, -np.inf).argmax())
        why = "splitting with intervals" if expected == "unsat" else "the best of 4000 points"
        yield Query("products", False, {"f": f}, text, expected, why, {"X": x[best].astype(np.float32)[None]})


def ties(draw: Draw) -> Iterator[Query]:
    """Comparisons that whole regions of ties meet: an output that saturates, and a network compared with itself."""
    for sizes, large, radius in ((ACAS, True, 1 / 64), ((3, 12, 12, 2), False, 1 / 8)):
        low, high = around(draw, sizes[0], radius)
        centre, f = (low + high) / 2, made.random(sizes, draw)
        inputs, at = box("X_f", (1, sizes[0]), low, high), centre.astype(np.float32)[None]
        top = made.saturated(f, 1.5 - f(centre[None])[0])
        for sign, expected in ((">", "unsat"), (">=", "sat")):
            text = second([declared("f", top, ["X_f"], "Y_f")], [*inputs, f"({sign} Y_f[0,0] 1.0)"])
            why = "1 - relu(1 - h) is 1 at most, in float32 too, and 1 where h is above"
            yield Query("ties", large, {"f": top}, text, expected, why, {"X_f": at})
        declarations = [declared("f", f, ["X_f"], "Y_f"), declared("g", f, ["X_g"], "Y_g", "(equal-to f)")]
        inputs += equal("X_f", "X_g", (1, sizes[0]))
        for sign, expected in (("!=", "unsat"), ("==", "sat")):
            text = second(declarations, [*inputs, f"({sign} Y_f[0,1] Y_g[0,1])"])
            yield Query(
                "ties", large, {"f": f}, text, expected, "the same network at one point", {"X_f": at, "X_g": at}
            )


def single(draw: Draw) -> Iterator[Query]:
    """One network, in VNN-LIB 1.0 and 2.0."""
    for number_ in range(4):
        f = made.convex(ACAS, draw)
        low, high = around(draw, 5, 1 / 8)
        corners = vertices(low, high)
        values = f(corners)[:, 0] + f(corners)[:, 3]
        large = float(values.max())
        for expected, threshold in either(large, 0.02 * float(np.ptp(values)) + 1e-4):
            why, asked = f"convex, largest at a vertex: {large:.6g}", f"(>= (+ {{0}} {{3}}) {number(threshold)})"
            yield _in_version(f, low, high, asked, number_ % 2 == 0, expected, True, why, corners[values.argmax()])
    network, _, x, labels = classifier(draw, WIDE)
    small, _, x_small, labels_small = classifier(draw, DIGITS)
    for f, x_, labels_, large, counts in ((network, x, labels, True, 3), (small, x_small, labels_small, False, 5)):
        left = {"sat": counts, "unsat": counts}
        for image, label in zip(x_, labels_, strict=True):
            expected = max(left, key=lambda word: left[word])
            radius = 1 / 16 if expected == "sat" else 1 / 128
            low, high = image - radius, image + radius
            clean = f(image[None])[0]
            if not left[expected] or clean.argmax() != label:
                continue
            rival = int(np.argsort(clean)[-2])
            row = np.eye(10)[rival] - np.eye(10)[label]
            point = image
            if expected == "sat":
                point = climb(lambda x, f=f, row=row: f(x) @ row, lambda x, f=f, row=row: f.gradient(x, row),
                              low, high, draw, starts=8, steps=25)  # fmt: skip
                if float(f(point[None])[0] @ row) < 0.05:
                    continue
            else:
                own, _ = zonotopes(f, None, low, high)
                rows = np.delete(np.eye(10) - np.eye(10)[label], label, 0)
                if (own.through(rows, 0.0).ends[1] > -0.05).any():
                    continue
            left[expected] -= 1
            losses = " ".join(f"(>= {{{j}}} {{{label}}})" for j in range(10) if j != label)
            yield _in_version(f, low, high, f"(or {losses})", left[expected] % 2 == 0, expected, large,
                              "a zonotope" if expected == "unsat" else "a point found by gradients", point)  # fmt: skip
    for number_ in range(4):
        f = made.random((4, 10, 8, 2), draw)
        low, high = around(draw, 4, 3 / 8)
        program = MixedProgram()
        x = program.variables(low, high)
        y = program.network(f, x)[-1]
        found = program.maximise({y[0]: 1.0, y[1]: -1.0})
        for expected, threshold in either(found[0], 0.03):
            yield _in_version(
                f,
                low,
                high,
                f"(<= (+ {{1}} {number(threshold)}) {{0}})",
                number_ % 2 == 0,
                expected,
                False,
                f"largest {found[0]:.6g} by a mixed-integer program",
                np.clip(found[1][:4], low, high),
            )


def _in_version(f: Mlp, low: np.ndarray, high: np.ndarray, asked: str, old: bool, expected: str, large: bool, why: str,
                point: np.ndarray) -> Query:  # fmt: skip
    """The query with {k} for output k, in VNN-LIB 1.0 where ``old``."""
    shape, own = f.shapes[0], point.astype(np.float32)
    if old:
        inputs = [f"({sign} X_{i} {number(end)})" for i, ends in enumerate(zip(low, high, strict=True))
                  for sign, end in zip((">=", "<="), ends, strict=True)]  # fmt: skip
        text = first(len(low), f.outputs, [*inputs, asked.format(*(f"Y_{k}" for k in range(f.outputs)))])
        return Query("single", large, {"": f}, text, expected, why, {"X": own})
    outputs = [f"Y[0,{k}]" for k in range(f.outputs)]
    text = second([declared("f", f, ["X"], "Y")], [*box("X", shape, low, high), asked.format(*outputs)])
    return Query("single", large, {"f": f}, text, expected, why, {"X": own.reshape(shape)})


FAMILIES: dict[str, Family] = {
    "equivalence_acas": equivalence_acas, "equivalence_wide": equivalence_wide, "equivalence_small": equivalence_small,
    "permuted": permuted, "planted": planted, "monotone": monotone, "coupled": coupled, "products": products,
    "hidden": hidden, "two_inputs": two_inputs, "unrelated": unrelated, "ties": ties, "single": single,
}  # fmt: skip


def write_queries(folder: Path, seed: int, families: Sequence[str] = (*FAMILIES,)) -> list[Query]:
    """Write the queries of some families, their networks, ``instances.csv`` and ``answers.csv``.

    Raises:
        AssertionError: the point of a ``sat`` query does not satisfy it.
    """
    for name in ("onnx", "vnnlib"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    files, written = dict[int, str](), list[Query]()
    with (
        open(folder / "instances.csv", "w", newline="") as table,
        open(folder / "answers.csv", "w", newline="") as known,
    ):
        instances, answers = csv.writer(table, lineterminator="\n"), csv.writer(known, lineterminator="\n")
        answers.writerow(["query", "family", "size", "expected", "why"])
        for family in families:
            draw = np.random.default_rng([seed, zlib.crc32(family.encode())])
            for count, query in enumerate(FAMILIES[family](draw)):
                name = f"{family}_{count:02d}"
                for own, mlp in query.networks.items():
                    if id(mlp) not in files:
                        files[id(mlp)] = f"onnx/{name}{'_' * bool(own)}{own}.onnx"
                        mlp.save(folder / files[id(mlp)])
                named = {own: files[id(mlp)] for own, mlp in query.networks.items()}
                (folder / f"vnnlib/{name}.vnnlib").write_text(query.text)
                if query.expected == "sat":
                    paths = {own: folder / file for own, file in named.items()}
                    assert query.point is not None and witness(query.text, dict(query.point), paths), (name, query.why)
                column = (
                    next(iter(named.values())) if len(named) == 1 else str(list(named.items())).replace("), (", "),(")
                )
                instances.writerow([column, f"vnnlib/{name}.vnnlib", SECONDS])
                answers.writerow([name, query.family, "large" if query.large else "small", query.expected, query.why])
                written.append(query)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    written = write_queries(options.folder, options.seed, options.families)
    for large in (True, False):
        for expected in ("sat", "unsat"):
            count = sum((query.large, query.expected) == (large, expected) for query in written)
            print(f"{'large' if large else 'small'} {expected}: {count}")


if __name__ == "__main__":
    main()
