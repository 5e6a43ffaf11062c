"""Rules of ONNX operators that apply a function of one number to each entry, or take the larger or smaller of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx.defs
import torch
from torch import Tensor, nn

from ..bounds.operations import (
    Abs,
    Ceil,
    Celu,
    Clamp,
    Cos,
    Elu,
    Erf,
    Exp,
    Floor,
    Hardswish,
    LeakyRelu,
    Log,
    Maximum,
    Mish,
    Operation,
    Power,
    PRelu,
    Reciprocal,
    Relu,
    Round,
    Selu,
    Signum,
    Sin,
    Softplus,
    Softsign,
    Sqrt,
    ThresholdedRelu,
)  # fmt: skip
from ..typed import as_floats, broadcast_shape
from .onnx_steps import OnnxStep, Value, fixed

Rule = Callable[[OnnxStep], Value]


def _entrywise(kind: type[Operation]) -> Rule:
    return lambda step: step.append(kind, step.value(0), step.shape)


def _number(step: OnnxStep, name: str) -> float:
    """A number among the attributes; where it is left out, the default that the file's opset gives it."""
    opset = next(entry.version for entry in step.run.model.opset_import if entry.domain in ("", "ai.onnx"))
    schema = onnx.defs.get_schema(step.node.op_type, opset)
    found = step.attributes.get(name)
    return float(schema.attributes[name].default_value.f if found is None else found)


def _positive(kind: type[Operation]) -> Rule:
    """The rule of a function with a number alpha > 0."""

    def rule(step: OnnxStep) -> Value:
        alpha = _number(step, "alpha")
        if not 0 < alpha < math.inf:
            step.refuse(f"alpha={alpha}", "a number > 0")
        return step.append(kind, step.value(0), step.shape, alpha)

    return rule


def _selu(step: OnnxStep) -> Value:
    alpha, gamma = _number(step, "alpha"), _number(step, "gamma")
    if not (0 < alpha < math.inf and 0 < gamma < math.inf):
        step.refuse(f"alpha={alpha}, gamma={gamma}", "numbers > 0")
    return step.append(Selu, step.value(0), step.shape, alpha, gamma)


def _thresholded(step: OnnxStep) -> Value:
    return step.append(ThresholdedRelu, step.value(0), step.shape, _number(step, "alpha"))


def _hard_sigmoid(step: OnnxStep) -> Value:
    return _clipped(step, step.scaled(step.value(0), _number(step, "alpha"), _number(step, "beta")), 0.0, 1.0)


def _clip(step: OnnxStep) -> Value:
    """Ends are attributes up to opset 10, then inputs; one that is left out leaves its side as it is."""
    ends: list[float] = []
    for place, (name, missing) in enumerate({"min": -math.inf, "max": math.inf}.items(), start=1):
        own = torch.tensor([step.attributes.get(name, missing)])
        given = step.constant(place).flatten() if step.has(place) else own
        if given.numel() != 1:
            step.refuse(f"{name} of {given.numel()} numbers", "one")
        ends.append(float(given))
    return _clipped(step, step.value(0), *ends)


def _clipped(step: OnnxStep, value: Value, least: float, most: float) -> Value:
    for end in (least, most):
        if not Clamp.takes(end):
            step.refuse(f"an end of {end:g}", Clamp.ACCEPTED)
    return step.append(Clamp, value, step.shape, least, most)


def _larger(step: OnnxStep) -> Value:
    """The rule of Max and Min of any number of inputs, computed or constant."""
    sign = 1.0 if step.node.op_type == "Max" else -1.0
    places = range(len(step.node.input))
    constants = [step.constant(place).double() for place in places if not step.computed(place)]
    values = [step.value(place) for place in places if step.computed(place)]
    found = step.aligned(values[0])
    for value in map(step.aligned, values[1:]):
        step.run.operations.append(Maximum(step.path, (found.position, value.position), sign))
        found = Value(len(step.run.operations) - 1, tuple(broadcast_shape(found.shape, value.shape)))
    if not constants:
        return step.reshaped(found)
    if found.shape != step.shape:
        step.refuse(f"a constant that widens shape {found.shape} to {step.shape}", "one that keeps the shape")
    constant = constants[0]
    for other in constants[1:]:
        constant = (torch.maximum if sign > 0 else torch.minimum)(constant, other)
    if constant.numel() and bool((constant == constant.flatten()[0]).all()):
        end = float(constant.flatten()[0])
        return _clipped(step, found, *((end, math.inf) if sign > 0 else (-math.inf, end)))
    if not bool((constant.abs() <= Clamp.MODERATE).all()):
        step.refuse("a constant with large numbers", f"numbers of size {Clamp.MODERATE:g} at most")
    above = step.append(Relu, step.scaled(found, sign, -sign * constant), step.shape)
    return step.scaled(above, sign, constant)


def _power(step: OnnxStep) -> Value:
    if not step.computed(0):
        step.refuse("a computed exponent", "a constant one")
    exponents = step.constant(1).double().flatten()
    if not (exponents.numel() and bool((exponents == exponents[0]).all()) and bool(exponents.isfinite().all())):
        step.refuse(f"exponents {as_floats(exponents)[:5]}", "one finite number for all entries")
    exponent, value = float(exponents[0]), step.value(0)
    if math.prod(value.shape) != math.prod(step.shape):
        step.refuse(f"an exponent that widens shape {value.shape} to {step.shape}", "one that keeps the shape")
    if exponent in (0, 1):
        return step.scaled(value, exponent, 1 - exponent)
    return step.append(Power, step.reshaped(value), step.shape, exponent)


def _prelu(step: OnnxStep) -> Value:
    slopes = step.constant(1)
    if not bool(slopes.isfinite().all()) or not slopes.numel():
        step.refuse("slopes that are not finite", "finite ones")
    first = float(slopes.flatten()[0])
    if bool((slopes == first).all()) and 0 <= first <= 1:
        return step.append(LeakyRelu, step.value(0), step.shape, first)
    layer = nn.PReLU(device="meta")
    layer.weight = fixed(step.against(slopes))
    return step.append(PRelu, step.value(0), step.shape, layer, _as_it_is)


def _as_it_is(weight: Tensor, dimensions: int) -> Tensor:
    return weight


ENTRYWISE: Sequence[type[Operation]] = (
    Abs, Ceil, Cos, Erf, Exp, Floor, Log, Mish, Reciprocal, Round, Sin, Softplus, Softsign, Sqrt,
)  # fmt: skip
RULES: dict[str, Rule] = {
    **{kind.__name__: _entrywise(kind) for kind in ENTRYWISE},
    "Celu": _positive(Celu),
    "Clip": _clip,
    "Elu": _positive(Elu),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _entrywise(Hardswish),
    "Max": _larger,
    "Min": _larger,
    "PRelu": _prelu,
    "Pow": _power,
    "Selu": _selu,
    "Sign": _entrywise(Signum),
    "ThresholdedRelu": _thresholded,
}
