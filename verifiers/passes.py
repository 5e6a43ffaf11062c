"""Choice between halving a box and bounding it by backward passes, by the rise of its bound for the work of each.

Forward bounds of a box cost one column per varying input, backward passes two rows per unstable neuron. Halving raises
forward bounds by some amount on average; to rise as far as by backward passes takes as many levels as the one is of
the other, and twice as many boxes on each. Passes that prove more boxes than forward bounds for the same work are made
too: bounds far below 0 rise fast at first. Work is counted in multiplications, never in seconds, so that a search
repeats exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..bounds import Bounds, Box
from ..bounds.effort import work_of
from ..bounds.network import Network

AFFORDABLE = 30
"""Unstable neurons behind the first layer, for each input that varies, with which backward passes are always made. On
ACAS Xu they pay well below this; on networks of thousands of neurons and two inputs forward bounds are a hundred times
cheaper."""

TRIALS = 10.0
"""Times the work of one box's backward passes that goes into forward bounds before the former are tried again."""

LEVELS = 60.0
"""Most levels of halving that are counted."""


class BackwardPasses:
    """The choice for all boxes of one search."""

    def __init__(self, network: Network):
        last = len(network.operations) - 1
        self._later = [place for place in network.nonlinear if _behind_nonlinear(network, place)]
        read = {place: network.operations[place].inputs[0] for place in self._later}
        numels = [shape.numel() for shape in network.shapes]
        self._row = {place: sum(work_of(network, read[place], numels.__getitem__).values()) for place in self._later}
        self._column = sum(work_of(network, last, numels.__getitem__).values())
        self._by_halving, self._by_passes = _Mean(), _Mean()
        self._proved, self._work = [0, 0], [0.0, 0.0]  # boxes proved by forward bounds and by passes, and their work
        self._since = 0.0  # work of forward bounds since the last trial of backward passes

    def saw_forward(self, bounds: Tensor, before: Tensor | None, box: Box) -> None:
        """Learn from forward bounds (P,) of boxes, and ``before`` of those that were halved."""
        self._since += len(bounds) * self._forward(box)
        self._proved[0] += int((bounds > 0).sum())
        self._work[0] += len(bounds) * self._forward(box)
        if before is not None:
            self._by_halving.add((bounds - before)[before > -torch.inf])

    def saw_backward(self, before: Tensor, bounds: Tensor) -> None:
        """Learn from the bounds (P,) of boxes by backward passes, and ``before`` by forward bounds."""
        self._by_passes.add(bounds - before)
        self._proved[1] += int((bounds > 0).sum())

    def chosen(
        self, open_: Tensor, forward: Tensor, before: Tensor | None, bounds: Mapping[int, Bounds], box: Box
    ) -> Tensor:
        """(P,) bool, those of the boxes ``open_`` (P,) that backward passes are made for now; to be asked again once
        they are made, for the others.

        Args:
            forward, before: (P,) forward bounds of the boxes, and of those that were halved (-inf for a whole set, for
                which earlier stages made the passes).
            bounds: forward bounds of all neurons' inputs.
        """
        unstable = {
            place: ((bounds[place].lower < 0) & (bounds[place].upper > 0)).flatten(1).sum(1) for place in self._later
        }
        wide = (box.hull.radius > 0).flatten(1).sum(1)
        count = torch.as_tensor(sum(unstable.values()), device=wide.device)
        cheap = open_ & (count <= AFFORDABLE * (1 + wide))
        dear = open_ & (count > AFFORDABLE * (1 + wide))
        dear = torch.zeros_like(dear) if before is None else dear & (before > -torch.inf)
        if not bool(dear.any()):
            return cheap
        work = sum(2 * number.double() * self._row[place] for place, number in unstable.items())
        assert isinstance(work, Tensor)
        more = self._proved[1] * self._work[0] > self._proved[0] * self._work[1]  # boxes proved for the same work
        pays = dear & (more | (self._boxes() * self._forward(box) > work))
        if not bool(pays.any()):
            worst = torch.where(dear, forward, torch.inf).argmin()
            if not self._by_passes.count or self._since > TRIALS * float(work[worst]):
                pays[worst] = True
        if bool(pays.any()):
            self._since = 0.0
            self._work[1] += float(work[pays].sum())
        return cheap | pays

    def _forward(self, box: Box) -> float:
        """Work of one box's forward bounds."""
        return self._column * (1 + int((box.hull.radius > 0).flatten(1).any(0).sum()))

    def _boxes(self) -> float:
        """Number of boxes into which one must be halved for the rise that backward passes give."""
        gain, step = self._by_passes.value(), self._by_halving.value()
        if gain <= 0 or not self._by_halving.count:
            return 0.0
        return 2.0 ** (1 + (min(LEVELS, gain / step) if step > 0 else LEVELS))


class _Mean:
    """A mean in which each batch weighs as much as all before it."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0.0

    def add(self, values: Tensor) -> None:
        values = values[values.isfinite()].double()
        if len(values):
            mean = float(values.mean())
            self.total = mean if not self.count else (self.total + mean) / 2
            self.count += 1

    def value(self) -> float:
        return self.total


def _behind_nonlinear(network: Network, place: int) -> bool:
    """Whether the input of the operation ``place`` depends on a non-linear one."""
    wanted, pending = set[int](), [*network.operations[place].inputs]
    while pending:
        number = pending.pop()
        if number not in wanted:
            wanted.add(number)
            pending += network.operations[number].inputs
    return any(number in network.nonlinear for number in wanted)
