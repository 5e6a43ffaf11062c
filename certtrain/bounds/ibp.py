"""Interval bound propagation (arXiv 1810.12715), by fused kernels where neighbours allow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..labels import as_labels, check_logits, classes_in
from . import clock, memory
from .faithful import check_faithful
from .first_layer import first_layer
from .interval import Interval
from .network import Network, Statistics
from .operations import Affine, Dense, Relu
from .output_forms import OutputForms
from .region import Region
from .tracing import is_traced, trace


@dataclass(frozen=True)
class Activity:
    """Intermediate intervals of a pass, for regularisers and verifiers.

    Args:
        first: the input interval of the first affine layer, in normalised units.
        preactivations: the input interval of each ReLU, by the ReLU's position.
    """

    first: Interval | None
    preactivations: dict[int, Interval]


def compute_bounds(
    model: nn.Module | Network, box: Interval | Region, statistics: Statistics | None = None
) -> Interval:
    """Sound bounds of the model's logits over a box, or over a perturbation set around a batch of images.

    Bounds enclose the network with fixed batch-norm statistics: the running ones, or those given. The model is compared
    with its traced network at the centre and at a random point of the box: in evaluation mode always, in training mode
    only before it is traced.

    Args:
        model: any ``nn.Module`` of supported layers; takes (B, *shape), carries its own normalisation. Or a network.
        box: ``Interval.box(images, epsilon)``, or ``LinfBall(epsilon).region(images)``, ``L2Ball(…)…``.
        statistics: batch statistics of a ``forward`` pass, with gradients, for training.
    Returns:
        An ``Interval`` of shape (B, K); ``.lower`` and ``.upper`` are the bounds. Differentiable. Holds in
        round-to-nearest arithmetic of the model's dtype, up to its rounding error.
    Raises:
        UnsupportedOperation: the model contains an operation without a rule.
        InputError: an invalid box (crossed ends, a negative radius, NaN, pixels outside [0, 1]); a model whose logits
            differ from its traced network's, or depend on other images.
    """
    box.check()
    if isinstance(model, nn.Module) and not (model.training and is_traced(model)):
        check_faithful(model, box)
    return _Propagation(model, box, statistics, keep=False).run(box)[0]


def compute_margins(
    model: nn.Module | Network,
    box: Interval | Region,
    labels: Tensor,
    statistics: Statistics | None = None,
    *,
    keep: bool = False,
    shrink: float = 1.0,
) -> tuple[Tensor, Activity]:
    """Lower bounds of all margins z_y - z_j, with the specification merged into the last linear layer.

    Args:
        labels: (B,) whole numbers. Others as in ``compute_bounds``, but the box's values are not checked, which would
            wait for the device in training: margins over an invalid box are NaN.
        keep: whether to keep the pre-activation intervals.
        shrink: factor for the upper end of every ReLU's input interval with 0 inside. Below 1 the results are not
            bounds: SABR trains on them (arXiv 2210.04871).
    Returns:
        (B, K - 1), columns j != y in increasing order; and the intervals kept (none without ``keep``).
    Raises:
        InputError: a network of one output, which has no margins; labels that are not whole numbers.
        UnsupportedOperation: as in ``compute_bounds``.
    """
    propagation = _Propagation(model, box, statistics, keep, shrink)
    output, last = propagation.run(box, stop_before_last=True)
    labels = as_labels(labels, len(output.center), device=output.center.device)
    if last is None:
        check_logits(output.center, labels)
        return _difference(output, labels), propagation.activity()
    weight, bias = last
    classes_in((*output.center.shape[:-1], len(weight)))
    return kernels.ibp_margins(output.center, output.radius, weight, bias, labels), propagation.activity()


def compute_activity(
    model: nn.Module | Network, box: Interval | Region, statistics: Statistics | None = None, *, shrink: float = 1.0
) -> tuple[Interval, Activity]:
    """Bounds of the logits, and the intermediate intervals of the pass. Arguments as in ``compute_margins``."""
    propagation = _Propagation(model, box, statistics, True, shrink)
    return propagation.run(box)[0], propagation.activity()


def compute_rows(
    model: nn.Module, box: Interval | Region, rows: Tensor | OutputForms, statistics: Statistics | None = None
) -> Tensor:
    """Lower bounds of linear forms of the logits, merged into the last linear layer.

    Args:
        rows: (B, R, K), R forms for each image. Others as in ``compute_bounds``.
    Returns:
        (B, R), computed for as many rows at a time as fit into memory.
    """
    output, last = _Propagation(model, box, statistics, keep=False).run(box, stop_before_last=True)
    center, radius = output.center.unsqueeze(-1), output.radius.unsqueeze(-1)

    def bound(part: OutputForms) -> Tensor:
        constant: Tensor | float = 0.0
        if last is None:
            forms = part.dense()
        else:
            weight, bias = last
            constant = 0.0 if bias is None else part.through(bias)
            forms = part.through(weight)
        return (forms @ center - forms.abs() @ radius).squeeze(-1) + constant

    rows = OutputForms.of(rows)
    numbers = rows.shape[2] + 3 * output.center.shape[1:].numel()  # the forms, their magnitudes and a temporary
    size = memory.at_once(center) // max(1, len(center) * numbers * center.element_size())
    return torch.cat([bound(part) for part in rows.split(max(1, size))], 1)


def _difference(logits: Interval, labels: Tensor) -> Tensor:
    """Lower bounds of margins (B, K - 1) from the logits' own bounds, for a network without a last linear layer."""
    classes = logits.center.shape[1]
    own = F.one_hot(labels, classes).bool()
    lower = logits.lower[own].reshape(-1, 1) - logits.upper
    return lower[~own].reshape(len(labels), classes - 1)


class _Propagation:
    """One pass of interval bound propagation, with the intervals it keeps."""

    def __init__(
        self,
        model: nn.Module | Network,
        box: Interval | Region,
        statistics: Statistics | None,
        keep: bool,
        shrink: float = 1.0,
    ):
        shape = box.center.shape[1:] if isinstance(box, Interval) else box.images.shape[1:]
        self.network = trace(model, shape).with_statistics(statistics)
        self.keep, self.shrink = keep, shrink
        self.first: Interval | None = None
        self.preactivations: dict[int, Interval] = {}

    def activity(self) -> Activity:
        return Activity(self.first, self.preactivations)

    def run(
        self, box: Interval | Region, *, stop_before_last: bool = False
    ) -> tuple[Interval, tuple[Tensor, Tensor | None] | None]:
        """The output interval and None; with ``stop_before_last``, the last linear layer's input and (weight, bias)."""
        operations, last_use = self.network.operations, self.network.last_use
        self.region = box if isinstance(box, Region) and not box.is_box else None
        values = {0: box.hull if isinstance(box, Region) else box.invalid_to_nan()}
        for step in self.network.steps:
            clock.look()
            operation = operations[step[0]]
            inputs = [values[read] for read in operation.inputs]
            if stop_before_last and step[-1] == len(operations) - 1 and (last := self._last_dense(step, inputs)):
                if self.keep:
                    self.first = self.first or inputs[0]
                return inputs[0], (last.weight, last.bias)
            values[step[-1]] = self._through(step, inputs)
            for read in {read for read in operation.inputs if last_use[read] == step[0]}:
                del values[read]
        return values[len(operations) - 1], None

    def _through(self, step: Sequence[int], inputs: Sequence[Interval]) -> Interval:
        """The output interval of one of the network's steps."""
        operation, norm = self.network.operations[step[0]], self.network.norm_of(step)
        if not isinstance(operation, Affine):
            return self._separately(step, inputs)
        (x,) = inputs
        if self.keep:
            self.first = self.first or x
        if norm is not None and not operation.takes_norm(x.center.ndim):
            return self._separately(step, inputs)
        rest = step[1:] if norm is None else step[2:]
        if self._starts_at(operation):
            merged = operation if norm is None else operation.with_norm(*norm.coefficients())
            assert self.region is not None
            return self._separately(rest, [first_layer(self.network, merged, self.region, x)])
        scale, shift = (None, None) if norm is None else norm.coefficients()
        if rest and not self.keep and self.shrink == 1:  # a ReLU
            return operation.fused(x, scale, shift, relu=True)
        return self._separately(rest, [operation.fused(x, scale, shift)])

    def _separately(self, step: Sequence[int], inputs: Sequence[Interval]) -> Interval:
        """The output interval of a step, one operation at a time."""
        for number in step:
            operation = self.network.operations[number]
            if isinstance(operation, Relu):
                if self.keep:
                    self.preactivations[number] = inputs[0]
                if self.shrink < 1:
                    inputs = [_with_scaled_upper(inputs[0], self.shrink)]
            inputs = [operation.interval(*inputs)]
        return inputs[0]

    def _last_dense(self, step: Sequence[int], inputs: Sequence[Interval]) -> Dense | None:
        """The linear layer, its batch norm merged, if the step consists of nothing else; else None."""
        operation, norm = self.network.operations[step[0]], self.network.norm_of(step)
        if not isinstance(operation, Dense) or self._starts_at(operation) or len(step) > (1 if norm is None else 2):
            return None
        if norm is None:
            return operation
        return operation.with_norm(*norm.coefficients()) if operation.takes_norm(inputs[0].center.ndim) else None

    def _starts_at(self, operation: Affine) -> bool:
        """Whether ``operation`` is the first affine one, over a set that is not a box."""
        if self.region is None:
            return False
        queue = list(operation.inputs)
        while queue:
            before = self.network.operations[queue.pop()]
            if not before.entrywise_map:
                return False
            queue.extend(before.inputs)
        return True


def _with_scaled_upper(interval: Interval, share: float) -> Interval:
    """The interval with its upper end multiplied by ``share`` where 0 lies inside."""
    lower, upper = interval.lower, interval.upper
    return Interval.from_bounds(lower, torch.where((lower < 0) & (upper > 0), share * upper, upper))
