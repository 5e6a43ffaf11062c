"""Linear bounds of a folded network, carried backward from linear forms of its values to its input.

CROWN (arXiv 1811.00866) and, with interval bounds of the activations' inputs, CROWN-IBP (arXiv 1906.06316).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import clock, memory
from .effort import work_of
from .interval import Bounds, Interval
from .network import Network
from .operations import Dense, Nonlinear, Sum
from .output_forms import OutputForms
from .region import Region, least
from .relaxation import Relaxation
from .rounding import Slack, interval_of, widened
from .windows import View, Windows

COPIES = 12
"""Arrays of the widest layer's size that a backward pass without gradients holds at its peak, for each linear form:
forms before and after an operation, its temporaries, and buffers of the library of convolutions; measured."""


@dataclass(frozen=True)
class LinearBound:
    """A lower bound forms · x + constants, valid for every x of the region.

    Args:
        forms, constants: (B, R, *shape) and (B, R).
        slack, size: for ``lower``, in networks with a ``rounding``: the rounding errors to subtract, and the sum of
            the magnitudes of all terms, (B, R).
        floor: (B, R), another lower bound, if one is known.
    """

    forms: Tensor
    constants: Tensor
    slack: Slack | None = None
    size: Tensor | None = None
    floor: Tensor | None = None

    def lower(self, region: Region) -> Tensor:
        """(B, R), the bound's minimum over the region; with a ``slack``, lowered by the float64 rounding errors."""
        minimum = region.concretise(self.forms) + self.constants
        minimum = minimum if self.floor is None else torch.maximum(minimum, self.floor)
        return minimum - self._remainder(region)

    def safe_constants(self, region: Region) -> Tensor:
        """(B, R), the constants; with a ``slack``, lowered by twice the float64 rounding errors that the minimum over
        the region pays for once: enough for forms in other coordinates of its box, and for a multiple of their sums."""
        return self.constants - 2 * self._remainder(region)

    def _remainder(self, region: Region) -> Tensor | float:
        if self.slack is None or self.size is None:
            return 0.0
        return self.slack.remainder(self.forms, self.size, region.hull)


def joined(parts: Sequence[LinearBound]) -> LinearBound:
    """The bounds of all forms (B, R, *shape) from those of parts of them, in order."""
    if len(parts) == 1:
        return parts[0]
    slack = parts[0].slack
    sizes = [part.size for part in parts if part.size is not None]
    floors = [part.floor for part in parts if part.floor is not None]
    return LinearBound(
        torch.cat([part.forms for part in parts], 1), torch.cat([part.constants for part in parts], 1), slack,
        torch.cat(sizes, 1) if sizes else None, torch.cat(floors, 1) if floors else None,
    )  # fmt: skip


@dataclass(frozen=True)
class AddedForms:
    """Forms (B, R, U) that are added to those of an operation's input, at its flat numbers ``entries`` (B, 1, U)."""

    entries: Tensor
    forms: Tensor

    def added_to(self, forms: Tensor) -> Tensor:
        flat = forms.flatten(2)
        return flat.scatter_add(2, self.entries.expand_as(self.forms), self.forms).reshape(forms.shape)


def backward(
    network: Network,
    position: int,
    forms: Tensor,
    lines: Mapping[int, Relaxation],
    multipliers: Mapping[int, AddedForms] | None = None,
    reached: dict[int, Tensor] | None = None,
    slack: Slack | None = None,
    view: View | None = None,
    intervals: Mapping[int, Interval] | None = None,
) -> LinearBound:
    """Lower bounds of linear forms of an operation's output, as linear forms of the input.

    Args:
        position: of the operation; forms: (B, R, *its output's shape).
        lines: relaxations of all non-linear operations that ``position`` depends on.
        multipliers: by non-linear operation, the Lagrange multipliers of constraints on its input (beta-CROWN, arXiv
            2103.06624).
        reached: a dict to fill with the forms that reach each non-linear operation's output.
        slack: rounding errors to subtract, for networks with a ``rounding``.
        view: the windows to which all forms are confined; not with ``multipliers`` or ``reached``.
        intervals: of operations' outputs; not with a ``slack``. Where the forms depend on a single operation's output,
            their minimum over its interval is a lower bound too; the largest of these is the result's ``floor``.
    """
    constants: Tensor = forms.new_zeros(forms.shape[:2])
    size = constants
    pending, floor = {position: forms}, None
    for number in range(position, 0, -1):
        if number not in pending:
            continue
        forms, operation = pending.pop(number), view.operation(number) if view else network.operations[number]
        clock.look(type(operation).__name__, operation.work(forms.numel()))
        if intervals is not None and not pending:
            minimum = least(forms, intervals[number]) + constants
            floor = minimum if floor is None else torch.maximum(floor, minimum)
        if slack is not None:
            cost, more = slack.charge(number, forms, view.extract(number, slack.magnitudes[number]) if view else None)
            constants, size = constants - cost, size + more
        relaxation = None
        if isinstance(operation, Nonlinear):
            if reached is not None:
                reached[number] = forms
            relaxation = lines[number].map(partial(view.extract, number)) if view else lines[number]
        shapes = [(view or network).shape(number, read) for read in operation.inputs]
        parts, constants = operation.backward(forms, constants, shapes, relaxation)
        if multipliers is not None and number in multipliers:
            (through,) = parts
            parts = (multipliers[number].added_to(through),)
            if slack is not None:
                constants = constants - slack.charge(number, parts[0])[0]
        for read, part in zip(operation.inputs, parts, strict=True):
            part = view.align(number, read, part) if view else part
            pending[read] = pending[read] + part if read in pending else part
    clock.done()
    if 0 not in pending:
        pending[0] = constants.new_zeros(*constants.shape, *network.shapes[0])
    return LinearBound(pending[0], constants, slack, size, floor)


def relax_all(
    network: Network, bounds: Mapping[int, Bounds], alphas: Mapping[int, Tensor] | None = None
) -> dict[int, Relaxation]:
    """Relaxations of the non-linear operations, by position, over the ``bounds`` of their inputs."""
    return {
        number: network.nonlinear_at(number).relax(
            *network.split_bounds(number, entering), alpha=alphas.get(number) if alphas else None
        )
        for number, entering in bounds.items()
    }


def bound_forms(
    network: Network, region: Region, forms: Tensor, bounds: Mapping[int, Bounds], position: int | None = None
) -> Tensor:
    """(B, R) lower bounds of linear forms (B, R, *shape) of an operation's output (the logits by default).

    Args:
        bounds: of every non-linear operation's input, by position.
    """
    position = len(network.operations) - 1 if position is None else position
    slack = slack_of(network, region, bounds)
    return backward(network, position, forms, relax_all(network, bounds), slack=slack).lower(region)


def backward_rows(
    network: Network, rows: OutputForms, like: Tensor, lines: Mapping[int, Relaxation], slack: Slack | None = None
) -> LinearBound:
    """``backward`` of rows of the logits, of as many at a time as fit into a search's round (``memory.planned``)."""
    size = rows_at_a_time(network, rows.shape[0], like, size=memory.planned(like))
    last = len(network.operations) - 1
    return joined([backward(network, last, part.dense(), lines, slack=slack) for part in rows.split(size)])


def interval_forms(network: Network, region: Region, rows: Tensor | OutputForms) -> Tensor:
    """(B, R) lower bounds of linear forms (B, R, K) of the logits by intervals alone, of as many at a time as fit into
    memory; forms are merged into the last layer if it is dense."""
    walk = _Bounding(network, region, refine=False)
    walk.run()
    number, last, rows = len(network.operations) - 1, network.operations[-1], OutputForms.of(rows)
    slack = None if network.rounding is None else Slack.of(network, walk.intervals)

    def lower(forms: Tensor) -> Tensor:
        cost = size = constants = forms.new_zeros(forms.shape[:2])
        if slack is not None:
            cost, size = slack.charge(number, forms)
        box = walk.intervals[number]
        if isinstance(last, Dense):
            (read,) = last.inputs
            constants, box = constants + last.constant(forms), walk.intervals[read]
            (forms,) = last.adjoints(forms, network.shapes[read])
        bound = least(forms, box) + constants - cost
        return bound if slack is None else bound - slack.remainder(forms, size, box)

    return torch.cat([lower(part.dense()) for part in rows.split(_rows_of_intervals(network, walk))], 1)


def interval_ends(network: Network, region: Region, rows: OutputForms) -> tuple[Tensor, Tensor]:
    """(lower, upper), each (B, R): ``interval_forms`` of rows of the logits from below and above, for networks without
    a ``rounding``. Differentiable."""
    walk = _Bounding(network, region, refine=False)
    walk.run()
    number, last, constants = len(network.operations) - 1, network.operations[-1], 0.0
    if isinstance(last, Dense):
        forms, (number,) = rows.through(last.weight), last.inputs
        constants = 0.0 if last.bias is None else rows.through(last.bias)
    else:
        forms = rows.dense()
    box = walk.intervals[number]
    return least(forms, box) + constants, constants - least(-forms, box)


def _rows_of_intervals(network: Network, walk: _Bounding) -> int:
    """Number of linear forms of the logits, for each image, that go through the last layer together; at least 1."""
    like = walk.region.images
    before = max(network.shapes[read].numel() for read in network.operations[-1].inputs)
    numbers = network.shapes[-1].numel() + 3 * before  # forms of both, magnitudes and a temporary
    return max(1, memory.at_once(like) // max(1, len(like) * numbers * like.element_size()))


def slack_of(network: Network, region: Region, bounds: Mapping[int, Bounds]) -> Slack | None:
    """Rounding errors of linear bounds, given bounds of the activations' inputs; None without a ``rounding``."""
    if network.rounding is None:
        return None
    return Slack.of(network, all_intervals(network, region, bounds))


def interval_bounds(network: Network, region: Region) -> dict[int, Bounds]:
    """Interval bounds of every non-linear operation's input, by position. Checks the clock before each operation."""
    return _Bounding(network, region, refine=False).run()


def all_intervals(network: Network, region: Region, given: Mapping[int, Bounds]) -> dict[int, Interval]:
    """Intervals of every operation's output, tightened by ``given`` bounds of non-linear operations' inputs."""
    walk = _Bounding(network, region, refine=False, given=given)
    walk.run()
    return walk.intervals


def best_forms(network: Network, region: Region, forms: Tensor) -> Tensor:
    """(B, R) lower bounds of linear forms of the logits by CROWN-IBP, for networks without a ``rounding``.

    Like ``bound_forms`` over interval bounds, but each form takes the best of its minima over the intervals of all
    operations it passes through on its way back, not only over the input's.
    """
    walk = _Bounding(network, region, refine=False)
    lines = relax_all(network, walk.run())
    return backward(network, len(network.operations) - 1, forms, lines, intervals=walk.intervals).lower(region)


def crown_bounds(network: Network, region: Region, given: Mapping[int, Bounds] | None = None) -> dict[int, Bounds]:
    """Bounds of every non-linear operation's input, by position: the tightest of interval, linear and ``given`` ones.

    Linear bounds are computed by backward passes, for the entries that ``Nonlinear.open`` selects on interval bounds,
    where intervals are not exact and linear functions of the input have no ``given`` bounds.
    ``given`` bounds may rest on assumptions; where these contradict each other, lower > upper may result for piecewise
    linear operations. Checks the clock before each operation, also inside backward passes. Out of time, the bounds so
    far are kept, and the rest are intervals over them.
    """
    return _Bounding(network, region, refine=True, given=given).run()


class _Bounding:
    """One walk from the input to the output: the intervals and bounds so far."""

    def __init__(self, network: Network, region: Region, refine: bool, given: Mapping[int, Bounds] | None = None):
        self.network, self.region, self.refine, self.given = network, region, refine, given or {}
        self.keeping, self.late = refine, False
        self.intervals = {0: region.hull if network.rounding is None else widened(region.hull)}
        self.bounds: dict[int, Bounds] = {}
        self.refined: dict[int, Tensor] = {}  # by position: the entries of the output that have linear bounds

    def run(self) -> dict[int, Bounds]:
        behind: list[bool] = [False]  # by position: whether its output depends on a non-linear operation
        for number, operation in enumerate(self.network.operations[1:], start=1):
            self._in_time(clock.look)
            behind.append(isinstance(operation, Nonlinear) or any(behind[read] for read in operation.inputs))
            if isinstance(operation, Nonlinear):
                self.bounds[number] = self._entering(number, operation, behind)
            inputs = [self.intervals[read] for read in operation.inputs]
            self.intervals[number] = interval_of(self.network, operation, *inputs)
            if isinstance(operation, Sum) and operation.maximum_of is not None:  # b + relu(a - b) counts b twice
                parts = (self.intervals[i] for i in operation.maximum_of)
                self.intervals[number] = self.intervals[number].tightened_to_maximum(*parts)
        return self.bounds

    def _entering(self, number: int, operation: Nonlinear, behind: Sequence[bool]) -> Bounds:
        """Bounds of a non-linear operation's inputs; tightens ``intervals`` at these inputs to them."""
        ends = [self.intervals[read].bounds() for read in operation.inputs]
        if number in self.given:
            ends = [
                own.intersect(given)
                for own, given in zip(ends, self.network.split_bounds(number, self.given[number]), strict=True)
            ]
        wanted = operation.open(*ends)
        for place, read in enumerate(operation.inputs):
            if not self.region.is_box and not behind[read]:
                ends[place] = self._refined(read, ends[place], torch.ones_like(ends[place].lower, dtype=torch.bool))
            elif (
                self.refine
                and not self.late
                and (behind[read] or not (number in self.given or self.network.exact_intervals[read]))
            ):
                done = self.refined.get(read)
                ends[place] = self._refined(read, ends[place], wanted[place] if done is None else wanted[place] & ~done)
                self.refined[read] = wanted[place] if done is None else wanted[place] | done
            uncrossed = ends[place].uncrossed()
            self.intervals[read] = uncrossed.interval()
            if not operation.piecewise_linear:  # of others, crossed ends tell that assumptions contradict each other
                ends[place] = uncrossed
        return self.network.join_bounds(ends)

    def _in_time(self, action: Callable[[], object]) -> bool:
        """Run ``action``; whether it ended in time. A refining walk then continues without refinement and clock."""
        if self.late:
            return False
        try:
            action()
        except clock.OutOfTime:
            if not self.keeping:
                raise
            self.late = True
        return not self.late

    def _refined(self, position: int, known: Bounds, wanted: Tensor) -> Bounds:
        """``known`` bounds of an operation's output, tightened at the entries ``wanted`` (B, *shape) bool."""
        shape = wanted.shape
        if self.region.is_local and (windows := Windows.behind(self.network, position)) is not None:
            return self._refined_in_windows(windows, known, wanted)
        wanted = wanted.flatten(1)
        most = int(wanted.sum(1).max()) if wanted.numel() else 0
        if not most:
            return known
        # wanted entries first; the entries that pad shorter rows keep their bounds: bounds must not depend on the batch
        order = torch.argsort(wanted.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
        lines, slack = self._lines_and_slack()
        lower, upper = known.lower.flatten(1).clone(), known.upper.flatten(1).clone()
        work = work_of(self.network, position, lambda number: 2 * len(order) * self.network.shapes[number].numel())

        def tighten(part: Tensor) -> None:
            units = lower.new_zeros(*part.shape, lower.shape[1]).scatter_(2, part.unsqueeze(-1), 1.0)
            forms = torch.cat([units, -units], 1).reshape(len(part), -1, *shape[1:])
            values = backward(self.network, position, forms, lines, slack=slack).lower(self.region)
            below, above = torch.split(values, part.shape[1], 1)
            below, above = (
                torch.where(wanted.gather(1, part), end, -torch.inf).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
                for end in (below, above)
            )
            lower.scatter_reduce_(1, part, below, "amax")
            upper.scatter_reduce_(1, part, -above, "amin")

        rows = rows_at_a_time(self.network, len(order), lower, position)
        self._in_chunks(order.T, rows // 2 or 1, work, lambda p: tighten(p.T))
        return Bounds(lower.reshape(shape), upper.reshape(shape))

    def _refined_in_windows(self, windows: Windows, known: Bounds, wanted: Tensor) -> Bounds:
        """``_refined`` for a convolution's output, with forms confined to the window of each wanted entry."""
        image, entry = wanted.flatten(1).nonzero(as_tuple=True)
        lines, slack = self._lines_and_slack()
        lower, upper = known.lower.flatten(1).clone(), known.upper.flatten(1).clone()
        size = memory.at_once(lower) // (2 * COPIES * windows.widest * lower.element_size()) or 1
        work = work_of(self.network, windows.position, lambda number: 2 * windows.shape(number).numel())

        def tighten(part: Tensor) -> None:
            at, view = (image[part], entry[part]), windows.at(image[part], entry[part])
            bound = backward(self.network, windows.position, view.units(lower), lines, slack=slack, view=view)
            below, above = (
                bound.lower(view.region(self.region)).nan_to_num(-torch.inf, -torch.inf, -torch.inf).unbind(1)
            )
            lower[at], upper[at] = torch.maximum(lower[at], below), torch.minimum(upper[at], -above)

        self._in_chunks(torch.arange(len(image), device=image.device), size, work, tighten)
        return Bounds(lower.reshape(wanted.shape), upper.reshape(wanted.shape))

    def _in_chunks(self, items: Tensor, most: int, work: Mapping[str, float], action: Callable[[Tensor], None]) -> None:
        """Act on ``most`` items at a time, on fewer if that would end too late; ``work``: of one item, by kind."""
        first = 0
        while first < len(items):
            part = items[first : first + clock.fitting(min(most, len(items) - first), work)]
            if not self._in_time(partial(action, part)):
                break
            first += len(part)

    def _lines_and_slack(self) -> tuple[dict[int, Relaxation], Slack | None]:
        slack = None if self.network.rounding is None else Slack.of(self.network, self.intervals)
        return relax_all(self.network, self.bounds), slack


def rows_at_a_time(
    network: Network, batch: int, like: Tensor, position: int | None = None, size: int | None = None
) -> int:
    """Number of linear forms of an operation's output (the logits by default), for each image of a batch, that are
    carried backward together in ``size`` bytes (by default ``memory.at_once``); at least 1."""
    last = len(network.operations) - 1 if position is None else position
    widest = max(shape.numel() for shape in network.shapes[: last + 1])
    return max(1, (size or memory.at_once(like)) // max(1, COPIES * batch * widest * like.element_size()))
