"""GELU and SiLU as exporters write them: products of a value and a gate that is computed from it.

ONNX has Gelu from opset 20 on, and no SiLU. Recognised forms: x sigmoid(x), x (1 + erf(x / sqrt(2))) / 2, and
x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, with the constant factors in any place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..bounds.operations import Entrywise, Gelu, GeluTanh, Operation, Power, Scale, Silu, Sum
from .onnx_steps import Construction, OnnxStep, Value

TOLERANCE = 3e-7
"""Relative difference at which two constants count as equal: a few roundings of float32, in which files hold them."""


KINDS = {kind.kind: kind for kind in (Gelu, GeluTanh, Silu)}


def gelu(step: OnnxStep) -> Value:
    kinds = {b"none": Gelu, b"tanh": GeluTanh}
    form = step.attributes.get("approximate", b"none")
    if form not in kinds:
        step.refuse(f"approximate={form.decode()}", "none, tanh")
    return step.append(kinds[form], step.value(0), step.shape)


def product(step: OnnxStep) -> Value | None:
    """The activation that a Mul of two computed values is, if one is a gate of the other; else None."""
    for own, other in ((0, 1), (1, 0)):
        for kind, gain, position in _gates(step.run, step.value(own).position, step.value(other).position):
            done = step.append(KINDS[kind], Value(position, step.shape), step.shape)
            return done if _near(gain, 1.0) else step.scaled(done, gain, 0.0)
    return None


def _gates(run: Construction, own: int, gate: int) -> Iterator[tuple[str, float, int]]:
    """Yield (kind, gain, position): the product is gain times that activation of the value at ``position``."""
    factors = {position: factor for factor, shift, position in _chain(run, own) if shift == 0}
    for factor, shift, position in _chain(run, gate):
        node = run.operations[position]
        function = _function(node)
        for inner, offset, read in _chain(run, node.inputs[0]) if function else ():
            gain = factor * factors.get(read, math.nan)
            if offset != 0 or math.isnan(gain):
                continue
            if function == "sigmoid" and inner == 1 and shift == 0:
                yield "silu", gain, read
            if function == "erf" and _near(inner, math.sqrt(0.5)) and _near(shift, factor):
                yield "gelu", 2 * gain, read
        if function == "tanh" and _near(shift, factor):
            read = _cubic(run, node.inputs[0])
            if read in factors:
                yield "gelu_tanh", 2 * factor * factors[read], read


def _cubic(run: Construction, position: int) -> int | None:
    """The position of x if sqrt(2 / pi) (x + 0.044715 x^3) is at ``position``; else None."""
    for factor, shift, place in _chain(run, position):
        node = run.operations[place]
        if not (isinstance(node, Sum) and node.sign == 1 and shift == 0 and _near(factor, math.sqrt(2 / math.pi))):
            continue
        for read, other in (node.inputs, node.inputs[::-1]):
            for cube, more, at in _chain(run, other):
                power = run.operations[at]
                cubed = isinstance(power, Power) and power.exponent == 3 and power.inputs == (read,)
                if cubed and more == 0 and _near(cube, 0.044715):
                    return read
    return None


def _function(operation: Operation) -> str | None:
    return operation.kind if isinstance(operation, Entrywise) else None


def _chain(run: Construction, position: int) -> Iterator[tuple[float, float, int]]:
    """Yield (factor, shift, place): the value at ``position`` is factor * (value at ``place``) + shift; for every place
    on the way back through products and sums with single numbers."""
    factor, shift = 1.0, 0.0
    yield factor, shift, position
    while isinstance(node := run.operations[position], Scale):
        numbers = [torch.as_tensor(constant).flatten() for constant in node.coefficients()]
        if any(len(number) == 0 or not bool((number == number[0]).all()) for number in numbers):
            return
        scale, more = (float(number[0]) for number in numbers)
        factor, shift, position = factor * scale, factor * more + shift, node.inputs[0]
        yield factor, shift, position


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= TOLERANCE * abs(wanted)
