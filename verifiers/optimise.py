"""Linear bounds with optimised parameters: alpha-CROWN (arXiv 2011.13824) and, with constraints on the signs of
activations' inputs, beta-CROWN (arXiv 2103.06624)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..bounds import Bounds, Region, memory
from ..bounds.clock import OutOfTime, look, now
from ..bounds.crown import AddedForms, backward, relax_all, slack_of
from ..bounds.network import Network
from ..bounds.operations import Nonlinear
from ..bounds.relaxation import Lines, Relaxation
from ..bounds.rounding import OWN, Slack
from .neurons import Columns, Neurons


@dataclass(frozen=True)
class Subproblems:
    """D subproblems: R linear forms of the logits of each, to be bounded over a region and under assumed signs.

    Args:
        region: a region around D images.
        forms: (D, R, K); offsets: (D, R).
        lower, upper: (D, N) bounds of the neurons' inputs, which agree with ``signs``.
        signs: (D, N) int8, assumed sign of each neuron's input: 1 for >= 0, -1 for <= 0, 0 for none.
        position: of the operation whose output stands in place of the logits; N then counts the neurons up to it.
    """

    region: Region
    forms: Tensor
    offsets: Tensor
    lower: Tensor
    upper: Tensor
    signs: Tensor | None = None
    position: int | None = None


@dataclass(frozen=True)
class Optimised:
    """Results of ``maximise``. Those of a subproblem that was done early are of the iterate before it left.

    Args:
        best: (D, R) best lower bounds of all iterates, offsets included.
        alphas, betas: (D, R, U) slopes and multipliers of the last iterate, in columns.
        forms, constants: (D, R, *shape) and (D, R), the linear bound forms · x + constants of the last iterate that
            was evaluated, offsets included. In networks with a ``rounding`` the constants pay for the errors of
            evaluating it in float64.
        reached: (D, R, U) the coefficients of the neurons' outputs in it.
        values: (D, R, U) inputs of the neurons at its minimiser, in the network of the lines that it uses; 0 where
            they were not computed.
    """

    best: Tensor
    alphas: Tensor
    betas: Tensor | None
    forms: Tensor
    constants: Tensor
    reached: Tensor
    values: Tensor


class BestParameters:
    """Slopes and multipliers (D, R, U) of an ascent's best bounds; the last iterate's may be worse."""

    def __init__(self) -> None:
        self.alphas: Tensor | None = None
        self.betas: Tensor | None = None

    def start(self, alphas: Tensor, betas: Tensor | None) -> None:
        self.alphas, self.betas = alphas.clone(), None if betas is None else betas.clone()

    def update(self, index: Tensor, improved: Tensor, alphas: Tensor, betas: Tensor | None) -> None:
        """Keep the parameters (A, R, U) of the subproblems ``index`` (A,) where bounds ``improved``, (A, R) bool."""
        assert self.alphas is not None
        improved = improved.unsqueeze(2)
        self.alphas[index] = torch.where(improved, alphas, self.alphas[index])
        if betas is not None and self.betas is not None:
            self.betas[index] = torch.where(improved, betas, self.betas[index])


ASCENT = 12
"""Arrays of the size of all operations' outputs that ``maximise`` holds at its peak, for each linear form: parameters,
their gradients and Adam's averages, lines, and what the gradient keeps of the backward pass; measured."""


def ascents_at_a_time(network: Network, rows: int, like: Tensor, position: int | None = None) -> int:
    """Number of subproblems, of so many linear forms of an operation's output (the logits by default), that
    ``maximise`` takes together; 0 if even one is too large for a round. Independent of the memory that is free."""
    last = len(network.operations) - 1 if position is None else position
    numbers = sum(shape.numel() for shape in network.shapes[: last + 1])
    return memory.planned(like) // max(1, ASCENT * rows * numbers * like.element_size())


def finite(lower: Tensor) -> Tensor:
    """Lower bounds with -inf in place of every value that is not finite: it proves nothing."""
    return lower.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def with_offsets(network: Network, lower: Tensor, offsets: Tensor) -> Tensor:
    """Lower bounds plus constants, rounded down where the network has a ``rounding``."""
    total = lower + offsets
    return total if network.rounding is None else total - 4 * OWN * (lower.abs() + offsets.abs()) * (offsets != 0)


def starting_slopes(lower: Tensor, upper: Tensor, rows: int) -> Tensor:
    """(D, rows, N) CROWN's slopes of the lower lines, 0 or 1: of the line that encloses the smaller area."""
    return (upper > -lower).to(lower.dtype).unsqueeze(1).repeat(1, rows, 1)


@torch.no_grad()
def maximise(
    network: Network,
    sub: Subproblems,
    alphas: Tensor,
    betas: Tensor | None = None,
    *,
    columns: Columns | None = None,
    steps: int,
    rate: float = 0.1,
    decay: float = 0.97,
    done: Callable[[Tensor], Tensor] = lambda best: best.new_zeros(len(best), dtype=torch.bool),
    kept: BestParameters | None = None,
    with_values: bool = False,
) -> Optimised:
    """Lower bounds of all forms by gradient ascent on slopes and multipliers. Every iterate is a valid bound; if time
    runs out, the best so far is returned.

    Args:
        alphas: (D, R, U) slopes to start from; betas: (D, R, U) multipliers to start from where ``sub`` has signs, zero
            if None.
        columns: the neurons that have slopes and multipliers of their own, among them all unstable ones; all by
            default.
        steps: steps of Adam; 0 evaluates the bounds at the given parameters.
        rate, decay: learning rate, and its factor after each step.
        done: maps the best bounds (D, R) so far to (D,) bool, the subproblems that need no better ones.
        kept: receives the parameters of the best bounds.
        with_values: whether to compute ``Optimised.values``, where ``sub`` has signs.
    Raises:
        OutOfTime: the clock ran out before the first iterate.
    """
    columns = columns or Columns.of(Neurons.of(network, sub.position), torch.ones_like(sub.lower, dtype=torch.bool))
    ascent = _Ascent.start(network, sub, columns, alphas, betas)
    best = torch.full_like(sub.offsets, -torch.inf)
    finished = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    if kept is not None:
        kept.start(ascent.alphas, ascent.betas)
    results: list[tuple[_Ascent, _Evaluation]] = []
    iterate: _Evaluation | None = None
    for step in range(steps + 1):
        last, started = step == steps, now()
        try:
            new = ascent.evaluate(gradient=not last or with_values)
        except OutOfTime:
            if iterate is None:
                raise
            break
        iterate, index = new, ascent.index
        # a finished subproblem's bounds stay as they are, so that they do not depend on the rest of the batch
        before = best[index]
        better = torch.where(finished[index].unsqueeze(1), before, torch.maximum(before, finite(iterate.lower)))
        if kept is not None:
            kept.update(index, better > before, ascent.alphas, ascent.betas)
        best[index] = better
        finished = finished | done(best)
        if last or bool(finished.all()) or iterate.graph is None:  # no slope to choose
            break
        try:
            look(seconds=2 * (now() - started))  # the gradient takes twice as long as the bound
        except OutOfTime:
            break
        ascent = ascent.step(iterate, rate * decay**step, step + 1)
        iterate = replace(iterate, graph=None)  # its memory is freed
        leaving = finished[index]
        if ascent.slack is None and float(leaving.sum()) >= LEAVE * len(leaving):
            results.append((ascent.take(leaving), iterate.take(leaving)))
            ascent, iterate = ascent.take(~leaving), iterate.take(~leaving)
    assert iterate is not None
    if with_values:
        iterate = iterate.with_values()
    return _joined(best, [*results, (ascent, iterate)])


LEAVE = 0.25
"""Share of an ascent's subproblems that must be done before they are taken out of it, which copies the others."""


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """One evaluation of A subproblems.

    Args:
        lower: (A, R) bounds; forms, constants: (A, R, *shape) and (A, R), the linear bound whose minima they are.
        reached: (A, R, U) coefficients of the neurons' outputs.
        sizes: for each operation (A, R, its columns), the largest coefficient of its columns' outputs.
        values: (A, R, U) as in ``Optimised``.
        slopes, pushed: for each operation, and others: by position, the leaves of the gradient graph.
        graph: ``lower`` with its gradient graph; None without one.
    """

    lower: Tensor
    forms: Tensor
    constants: Tensor
    reached: Tensor
    values: Tensor
    sizes: Sequence[Tensor] = ()
    slopes: Sequence[Tensor] = ()
    pushed: Sequence[Tensor] = ()
    others: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    graph: Tensor | None = None

    def take(self, index: Tensor) -> _Evaluation:
        return _Evaluation(
            self.lower[index], self.forms[index], self.constants[index], self.reached[index], self.values[index]
        )

    def with_values(self) -> _Evaluation:
        """The iterate with its ``values``: the derivatives by what is added to the forms of the neurons' inputs."""
        if self.graph is None or not self.pushed:
            return self
        one = torch.ones_like(self.graph)
        values = torch.autograd.grad(self.graph, list(self.pushed), one, materialize_grads=True)
        return replace(self, values=torch.cat(values, 2), graph=None)


@dataclass(frozen=True, eq=False)
class _Place:
    """One non-linear operation of A subproblems in an ascent.

    Args:
        bounds: of each of its inputs; lines: its relaxation with default parameters.
        base: (A, 1, n) effective slopes of its neurons, 0 where they are free.
        columns: its range of the columns.
        local: (A, 1, its columns) numbers of their neurons within the operation.
    """

    position: int
    operation: Nonlinear
    shape: torch.Size
    bounds: tuple[Bounds, ...]
    lines: Relaxation
    base: Tensor
    columns: slice
    local: Tensor

    def take(self, index: Tensor) -> _Place:
        return replace(
            self, bounds=tuple(Bounds(ends.lower[index], ends.upper[index]) for ends in self.bounds),
            lines=self.lines.map(lambda values: values[index]), base=self.base[index], local=self.local[index],
        )  # fmt: skip

    def slopes(self, alphas: Tensor) -> Tensor:
        """(A, R, n) effective slopes: the free ones are ``alphas`` (A, R, U), 0 where not free."""
        own = alphas[..., self.columns]
        whole = self.base.expand(-1, alphas.shape[1], -1)
        return whole.scatter_add(2, self.local.expand_as(own), own)

    @property
    def own_parameters(self) -> bool:
        """Whether it has parameters that are no slopes of neurons."""
        return self.operation.adjustable and not self.operation.piecewise_linear

    def relaxation(self, slopes: Tensor, own: Tensor | None) -> Relaxation:
        """The relaxation with the given slopes (A, R, n) or parameters (A, R, *shape)."""
        if self.operation.piecewise_linear:
            own = slopes.reshape(*slopes.shape[:2], *self.shape)
        return self.lines if own is None else self.operation.adjusted(self.lines, self.bounds, own)


@dataclass(frozen=True, eq=False)
class _Ascent:
    """The A subproblems of an ascent that are not done, their parameters, and Adam's moments.

    Args:
        index: (A,) numbers of the subproblems.
        free: (A, 1, U) bool, the columns with a free slope.
        least: (U,) smallest slopes.
        push: (A, 1, U) minus the assumed signs, 0 in padding; None without signs.
        moments: Adam's first and second moments of slopes and multipliers, which ``step`` changes in place.
        others: by position, the parameters (A, R, *shape) of operations that are not piecewise linear, and their
            moments.
    """

    network: Network
    index: Tensor
    sub: Subproblems
    places: tuple[_Place, ...]
    free: Tensor
    least: Tensor
    push: Tensor | None
    alphas: Tensor
    betas: Tensor | None
    moments: tuple[Tensor, ...]
    others: dict[int, tuple[Tensor, ...]]
    slack: Slack | None

    @classmethod
    def start(
        cls, network: Network, sub: Subproblems, columns: Columns, alphas: Tensor, betas: Tensor | None
    ) -> _Ascent:
        neurons = Neurons.of(network, sub.position)
        uppers = neurons.apart(sub.upper)
        bounds = {place: Bounds(low, uppers[place]) for place, low in neurons.apart(sub.lower).items()}
        lines = relax_all(network, bounds)
        member = columns.added(torch.zeros_like(sub.lower), torch.ones_like(columns.real, dtype=sub.lower.dtype)) > 0
        members = neurons.apart(member)
        places, opens, least = list[_Place](), list[Tensor](), list[Tensor]()
        first_neuron = first = 0
        for place, shape, size in zip(neurons.places, neurons.shapes, columns.sizes, strict=True):
            operation, own = network.nonlinear_at(place), lines[place]
            ends = network.split_bounds(place, bounds[place])
            open_ = torch.cat([part.flatten(1) for part in operation.open(*ends)], 1)
            base = torch.zeros_like(open_, dtype=alphas.dtype)
            if operation.piecewise_linear and isinstance(own, Lines):
                base = torch.where(open_ & members[place].flatten(1), 0.0, own.lower_slope.flatten(1))
            part = slice(first, first + size)
            local = (columns.neurons[:, part] - first_neuron).unsqueeze(1)
            places.append(_Place(place, operation, shape, tuple(ends), own, base.unsqueeze(1), part, local))
            opens.append(open_)
            least.append(alphas.new_full((size,), operation.kink))
            first_neuron, first = first_neuron + shape.numel(), first + size
        free = (torch.cat([*opens, columns.real[:, :0]], 1).gather(1, columns.neurons) & columns.real).unsqueeze(1)
        push = None
        if sub.signs is None:
            betas = None
        else:
            push = torch.where(columns.real, -sub.signs.gather(1, columns.neurons), 0).unsqueeze(1).to(alphas.dtype)
            betas = torch.zeros_like(alphas) if betas is None else betas
        moments = [torch.zeros_like(alphas) for _ in range(2 if betas is None else 4)]
        smallest = torch.cat([*least, alphas.new_zeros(0)])
        index = torch.arange(len(alphas), device=alphas.device)
        others = dict[int, tuple[Tensor, ...]]()
        for one in places:
            if one.own_parameters:
                zero = alphas.new_zeros(*alphas.shape[:2], *network.shapes[one.position])
                others[one.position] = (zero + 0.5, zero.clone(), zero)
        return cls(network, index, sub, tuple(places), free, smallest, push, alphas, betas, tuple(moments), others,
                   slack_of(network, sub.region, bounds))  # fmt: skip

    def take(self, index: Tensor) -> _Ascent:
        """The subproblems ``index``, for an ascent without ``slack``."""
        sub, betas, push = self.sub, self.betas, self.push
        return replace(
            self, index=self.index[index], places=tuple(place.take(index) for place in self.places),
            sub=Subproblems(
                sub.region.take(index), sub.forms[index], sub.offsets[index], sub.lower[index], sub.upper[index],
                None if sub.signs is None else sub.signs[index], sub.position,
            ),
            free=self.free[index], push=None if push is None else push[index], alphas=self.alphas[index],
            betas=None if betas is None else betas[index], moments=tuple(moment[index] for moment in self.moments),
            others={place: tuple(part[index] for part in own) for place, own in self.others.items()},
        )  # fmt: skip

    def evaluate(self, gradient: bool) -> _Evaluation:
        """The bounds at the current parameters.

        Raises:
            OutOfTime: the clock ran out.
        """
        used = self._sound(self.alphas) * self.free
        slopes = [place.slopes(used).requires_grad_(gradient) for place in self.places]
        pushed, multipliers, reaching = list[Tensor](), dict[int, AddedForms](), dict[int, Tensor]()
        if self.push is not None and self.betas is not None:
            for place in self.places:
                pushed.append((self.push[..., place.columns] * self.betas[..., place.columns]).requires_grad_(gradient))
                if len(place.operation.inputs) == 1:  # no sign is assumed of others
                    multipliers[place.position] = AddedForms(place.local, pushed[-1])
        others = {place: own[0].detach().requires_grad_(gradient) for place, own in self.others.items()}
        with torch.set_grad_enabled(gradient):
            lines = {
                place.position: place.relaxation(own, others.get(place.position))
                for place, own in zip(self.places, slopes, strict=True)
            }
            linear = backward(self.network, self._position, self.sub.forms, lines, multipliers, reaching, self.slack)
            lower = with_offsets(self.network, linear.lower(self.sub.region), self.sub.offsets)
        none = self.alphas[..., :0]
        reached, sizes = [none], [none]
        for place in self.places:
            size = place.columns.stop - place.columns.start
            forms = reaching[place.position].detach().flatten(2) if place.position in reaching else None
            if forms is None or len(place.operation.inputs) > 1 or forms.shape[2] != place.shape.numel():
                reached.append(self.alphas.new_zeros(*self.alphas.shape[:2], size))
                sizes.append(reached[-1])
                continue
            reached.append(forms.gather(2, place.local.expand(-1, forms.shape[1], -1)))
            if gradient and pushed and size:
                sizes.append(reached[-1].abs().amax(2, keepdim=True).expand(-1, -1, size))
        graph = lower if gradient and self.places and lower.requires_grad else None
        coefficients = torch.cat(reached, 2)
        return _Evaluation(
            lower.detach(), linear.forms.detach(),
            with_offsets(self.network, linear.safe_constants(self.sub.region).detach(), self.sub.offsets),
            coefficients, torch.zeros_like(coefficients), sizes, slopes, pushed, others, graph,
        )  # fmt: skip

    def step(self, iterate: _Evaluation, rate: float, number: int) -> _Ascent:
        """The ascent after step ``number`` (from 1) of Adam (arXiv 1412.6980) from an iterate with its graph."""
        assert iterate.graph is not None
        leaves = [*iterate.slopes, *iterate.pushed, *iterate.others.values()]
        one = torch.ones_like(iterate.graph)
        gradients = torch.autograd.grad(iterate.graph, leaves, one, materialize_grads=True)
        count = len(self.places), len(self.places) + len(iterate.pushed)
        of_slopes, of_pushed, of_others = gradients[: count[0]], gradients[count[0] : count[1]], gradients[count[1] :]
        forms = self.alphas.shape[1]
        gradient = torch.cat([
            g.gather(2, place.local.expand(-1, forms, -1)) for place, g in zip(self.places, of_slopes, strict=True)
        ], 2)  # fmt: skip
        change = _adam(gradient * self.free, self.moments[:2], rate, number)
        alphas, betas = self._sound(self.alphas + change), self.betas
        if betas is not None and self.push is not None:
            # Adam's steps have the size of its rate; multipliers are in units of the forms at their neuron
            change = _adam(torch.cat(of_pushed, 2) * self.push, self.moments[2:], rate, number)
            betas = (betas + change * torch.cat(list(iterate.sizes), 2)).clamp(min=0)
        others = {
            place: ((self.others[place][0] + _adam(own, self.others[place][1:], rate, number)).clamp(0, 1),
                    *self.others[place][1:])
            for place, own in zip(iterate.others, of_others, strict=True)
        }  # fmt: skip
        return replace(self, alphas=alphas, betas=betas, others=others)

    @property
    def _position(self) -> int:
        return len(self.network.operations) - 1 if self.sub.position is None else self.sub.position

    def _sound(self, alphas: Tensor) -> Tensor:
        return torch.maximum(alphas.clamp(max=1), self.least)


def _adam(gradient: Tensor, moments: Sequence[Tensor], rate: float, number: int) -> Tensor:
    """The change of parameters that are maximised; updates the moments in place."""
    first, second = moments
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    size = (second / (1 - 0.999**number)).sqrt_().add_(1e-8)
    return first / size * (rate / (1 - 0.9**number))


def _joined(best: Tensor, parts: Sequence[tuple[_Ascent, _Evaluation]]) -> Optimised:
    """The results of all subproblems, whose ascents ended at different steps."""
    if len(parts) == 1:
        ((ascent, iterate),) = parts
        return Optimised(
            best, ascent.alphas, ascent.betas, iterate.forms, iterate.constants, iterate.reached, iterate.values
        )
    order = torch.argsort(torch.cat([ascent.index for ascent, _ in parts]))
    iterates = [iterate for _, iterate in parts]
    alphas, forms, constants, reached, values = (
        torch.cat(tensors)[order]
        for tensors in (
            [ascent.alphas for ascent, _ in parts], [i.forms for i in iterates], [i.constants for i in iterates],
            [i.reached for i in iterates], [i.values for i in iterates],
        )
    )  # fmt: skip
    betas = [ascent.betas for ascent, _ in parts if ascent.betas is not None]
    return Optimised(best, alphas, torch.cat(betas)[order] if betas else None, forms, constants, reached, values)


def joined(numbers: Sequence[Tensor], parts: Sequence[Optimised]) -> Optimised:
    """The results of parts of a batch, in the order of the subproblems' ``numbers`` in it."""
    order = torch.argsort(torch.cat(list(numbers)))

    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order]

    betas = column("betas") if all(part.betas is not None for part in parts) else None
    names = ("forms", "constants", "reached", "values")
    return Optimised(column("best"), column("alphas"), betas, *(column(name) for name in names))
