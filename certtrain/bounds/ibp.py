"""Interval bound propagation: one small rule per node kind, the table last (arXiv 1810.12715)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..labels import as_labels, check_logits, classes_in
from . import clock, convolution
from . import program as p
from .faithful import check_faithful
from .forward import Statistics, check_features, coefficients
from .interval import Interval
from .region import Region
from .tracing import is_traced, trace


@dataclass(frozen=True)
class Activity:
    """What a pass saw on its way, for regularisers and verifiers.

    Args:
        first: the interval that entered the first affine layer, that is in normalised units.
        preactivations: the interval that entered each ReLU, by the position of its node.
    """

    first: Interval | None
    preactivations: dict[int, Interval]


def compute_bounds(
    model: nn.Module | p.Program, box: Interval | Region, statistics: Statistics | None = None
) -> Interval:
    """Sound bounds of the model's logits over a box, or over a perturbation set around a batch of images.

    Bounds enclose the network with fixed batch-norm statistics: the running ones, or those given. In evaluation mode
    the model itself is compared with what was traced of it, at the centre and at a random point of the box; in training
    mode when it was traced.

    Args:
        model: any ``nn.Module`` of supported layers; takes (B, *shape), carries its own normalisation. Or a program.
        box: ``Interval.box(images, epsilon)``, or ``LinfBall(epsilon).region(images)``, ``L2Ball(…)…``.
        statistics: batch statistics of a ``forward`` pass, with gradients, for training.
    Returns:
        An ``Interval`` of shape (B, K); ``.lower`` and ``.upper`` are the bounds. Differentiable. Holds in
        round-to-nearest arithmetic of the model's dtype, up to its rounding error.
    Raises:
        UnsupportedNode: the model holds an operation without a rule.
        InputError: a box that does not exist: crossed ends, a negative radius, NaN, pixels outside [0, 1]; a model that
            computes something else than was traced of it, or no function of one image.
    """
    box.check()
    if isinstance(model, nn.Module) and not (model.training and is_traced(model)):
        check_faithful(model, box)
    return _Propagation(model, statistics, keep=False).run(box)[0]


def compute_margins(
    model: nn.Module | p.Program,
    box: Interval | Region,
    labels: Tensor,
    statistics: Statistics | None = None,
    *,
    keep: bool = False,
    shrink: float = 1.0,
) -> tuple[Tensor, Activity]:
    """Lower bounds of all margins z_y - z_j, with the specification merged into the last linear layer.

    Args:
        labels: (B,) whole numbers. Others as in ``compute_bounds``, but values of the box are not looked at, which in
            training would wait for a device: over a box that does not exist margins are NaN.
        keep: whether to keep the pre-activation intervals.
        shrink: multiplies the upper end of every ReLU's input interval that holds 0 inside. Below 1 the results bound
            nothing: SABR trains on them (arXiv 2210.04871).
    Returns:
        (B, K - 1), columns j != y in increasing order; and what was kept (empty if not asked).
    Raises:
        InputError: a network of one output, which has no margins; labels that are no whole numbers.
        UnsupportedNode: as in ``compute_bounds``.
    """
    propagation = _Propagation(model, statistics, keep, shrink)
    output, last = propagation.run(box, stop_before_last=True)
    labels = as_labels(labels, len(output.center), device=output.center.device)
    if last is None:
        check_logits(output.center, labels)
        return _difference(output, labels), propagation.activity()
    weight, bias = last
    classes_in((*output.center.shape[:-1], len(weight)))
    return kernels.ibp_margins(output.center, output.radius, weight, bias, labels), propagation.activity()


def compute_activity(
    model: nn.Module | p.Program, box: Interval | Region, statistics: Statistics | None = None, *, shrink: float = 1.0
) -> tuple[Interval, Activity]:
    """``compute_bounds``, and what the pass saw on its way. Arguments as in ``compute_margins``."""
    propagation = _Propagation(model, statistics, True, shrink)
    return propagation.run(box)[0], propagation.activity()


def compute_rows(
    model: nn.Module, box: Interval | Region, rows: Tensor, statistics: Statistics | None = None
) -> Tensor:
    """Lower bounds of linear forms of the logits, merged into the last linear layer.

    Args:
        rows: (B, R, K), R forms for each image. Others as in ``compute_bounds``.
    Returns:
        (B, R).
    """
    output, last = _Propagation(model, statistics, keep=False).run(box, stop_before_last=True)
    constant: Tensor | float = 0.0
    if last is not None:
        weight, bias = last
        constant = 0.0 if bias is None else rows @ bias
        rows = rows @ weight
    center, radius = output.center.unsqueeze(-1), output.radius.unsqueeze(-1)
    return (rows @ center - rows.abs() @ radius).squeeze(-1) + constant


def _difference(logits: Interval, labels: Tensor) -> Tensor:
    """Margins from the logits' own bounds, where the network does not end in a linear layer."""
    classes = logits.center.shape[1]
    own = F.one_hot(labels, classes).bool()
    lower = logits.lower[own].reshape(-1, 1) - logits.upper
    return lower[~own].reshape(len(labels), classes - 1)


class _Propagation:
    """One pass: the intervals so far, and what the rules share."""

    def __init__(self, model: nn.Module | p.Program, statistics: Statistics | None, keep: bool, shrink: float = 1.0):
        self.program = trace(model)
        self.statistics = statistics
        self.keep, self.shrink = keep, shrink
        self.first: Interval | None = None
        self.preactivations: dict[int, Interval] = {}

    def activity(self) -> Activity:
        return Activity(self.first, self.preactivations)

    def run(
        self, box: Interval | Region, *, stop_before_last: bool = False
    ) -> tuple[Interval, tuple[Tensor, Tensor | None] | None]:
        """The output interval; or, before a last plain linear layer, its input and that layer's (weight, bias)."""
        nodes, last_use = self.program.nodes, self.program.last_use()
        self.region = box if isinstance(box, Region) and not box.is_box else None
        values = {0: box.hull if isinstance(box, Region) else box.or_nan()}
        for position, node in enumerate(nodes[1:], start=1):
            clock.look()
            inputs = [values[read] for read in node.inputs]
            if stop_before_last and position == len(nodes) - 1 and self._is_last_linear(node):
                if self.keep:
                    self.first = self.first or inputs[0]
                return inputs[0], self.weights(node, position)
            values[position] = RULES[type(node)](node, position, self, *inputs)
            for read in {read for read in node.inputs if last_use[read] == position}:
                del values[read]
        return values[len(nodes) - 1], None

    def _is_last_linear(self, node: p.Node) -> bool:
        linear = isinstance(node, p.Affine) and isinstance(node.layer, nn.Linear) and node.activation is None
        return linear and not self.starts_at(node)

    def starts_at(self, node: p.Node) -> bool:
        """Whether ``node`` is the first affine layer over a set that is not a box."""
        return self.region is not None and all(isinstance(self.program.nodes[i], (p.Input, p.Scale, p.Reshape))
                                               for i in self._ancestors(node))  # fmt: skip

    def _ancestors(self, node: p.Node) -> set[int]:
        found, queue = set(), list(node.inputs)
        while queue:
            read = queue.pop()
            found.add(read)
            queue.extend(self.program.nodes[read].inputs)
        return found

    def coefficients(self, norm: p.BatchNorm | None, position: int) -> tuple[Tensor | None, Tensor | None]:
        if norm is None:
            return None, None
        return coefficients(norm, None if self.statistics is None else self.statistics.get(position))

    def weights(self, node: p.Node, position: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer with its batch norm folded in."""
        assert isinstance(node, p.Affine)
        weight, bias = node.layer.weight, node.layer.bias
        scale, shift = self.coefficients(node.norm, position)
        if scale is None or shift is None:
            return weight, bias
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return weight, shift if bias is None else bias * scale + shift

    def activate(self, activation: p.Activation | None, position: int, interval: Interval) -> Interval:
        if activation is None:
            return interval
        if activation.kind == "relu":
            if self.keep:
                self.preactivations[position] = interval
            if self.shrink < 1:
                interval = _shrunk(interval, self.shrink)
            return Interval(*kernels.ibp_relu(interval.center, interval.radius))
        return activation.interval(interval)


def _shrunk(interval: Interval, share: float) -> Interval:
    """With ``share`` of the upper end where 0 lies inside."""
    lower, upper = interval.lower, interval.upper
    return Interval.from_bounds(lower, torch.where((lower < 0) & (upper > 0), share * upper, upper))


def _affine(node: p.Affine, position: int, run: _Propagation, x: Interval) -> Interval:
    check_features(node, x.center)
    if run.first is None and run.keep:
        run.first = x
    if run.starts_at(node):
        from .first_layer import first_layer  # only sets that are not boxes need it

        return run.activate(node.activation, position, first_layer(node, position, run, x))
    scale, shift = run.coefficients(node.norm, position)
    fused = node.activation is not None and node.activation.kind == "relu" and not run.keep and run.shrink == 1
    layer = node.layer
    if isinstance(layer, nn.Linear):
        ends = kernels.ibp_linear(x.center, x.radius, layer.weight, layer.bias, scale=scale, shift=shift, relu=fused)
        y = Interval(*ends)
    else:
        if layer.padding_mode != "zeros":  # the border repeats known intervals: pad both alike
            x = x.map(lambda t: F.pad(t, layer._reversed_padding_repeated_twice, mode=layer.padding_mode))
        padding = layer.padding if layer.padding_mode == "zeros" else (0,) * (layer.weight.ndim - 2)
        y = convolution.interval(
            x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups,
            scale=scale, shift=shift, relu=fused,
        )  # fmt: skip
    return y if fused else run.activate(node.activation, position, y)


def _norm(node: p.Norm, position: int, run: _Propagation, x: Interval) -> Interval:
    scale, shift = run.coefficients(node.norm, position)
    assert scale is not None and shift is not None
    return run.activate(node.activation, position, Interval(*kernels.ibp_affine(x.center, x.radius, scale, shift)))


def _pool(node: p.Pool, position: int, run: _Propagation, x: Interval) -> Interval:
    if node.linear:
        return Interval(node.function(x.center), node.function(x.radius).abs())  # a divisor may be negative
    return Interval.from_bounds(node.function(x.lower), node.function(x.upper))


def _scale(node: p.Scale, position: int, run: _Propagation, x: Interval) -> Interval:
    center = node(x.center)
    return Interval(center, node.radius(x.radius).expand_as(center))


def _add(node: p.Add, position: int, run: _Propagation, x: Interval, y: Interval) -> Interval:
    return Interval(x.center + node.sign * y.center, x.radius + y.radius)


def _concat(node: p.Concat, position: int, run: _Propagation, *parts: Interval) -> Interval:
    dim = node.along(parts[0].center.ndim)
    return Interval(torch.cat([x.center for x in parts], dim), torch.cat([x.radius for x in parts], dim))


def _whole(node: p.Whole, position: int, run: _Propagation, x: Interval) -> NoReturn:
    raise node.why


RULES: dict[type[p.Node], Callable[..., Interval]] = {
    p.Affine: _affine,
    p.Norm: _norm,
    p.Activate: lambda node, position, run, x: run.activate(node.activation, position, x),
    p.Pool: _pool,
    p.Reshape: lambda node, position, run, x: x.map(node.function),
    p.Add: _add,
    p.Concat: _concat,
    p.Scale: _scale,
    p.Dropout: lambda node, position, run, x: x,
    p.Whole: _whole,
}
