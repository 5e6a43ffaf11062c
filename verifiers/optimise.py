"""Linear bounds with optimised parameters: alpha-CROWN (arXiv 2011.13824) and, with constraints on the signs of
activations' inputs, beta-CROWN (arXiv 2103.06624)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bounds import Bounds, Region, memory
from ..bounds.clock import OutOfTime, look, now
from ..bounds.crown import LinearBound, backward, relax_all, slack_of
from ..bounds.network import Network
from ..bounds.rounding import OWN


@dataclass(frozen=True)
class Neurons:
    """The inputs of all non-linear operations as one flat row of N entries for each image.

    Args:
        places: positions of the operations in the network; shapes: shapes of their inputs.
    """

    places: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, network: Network) -> Neurons:
        return cls(network.nonlinear, tuple(network.shapes[place] for place in network.nonlinear))

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def apart(self, flat: Tensor) -> dict[int, Tensor]:
        """Split a flat tensor (…, N) into one (…, *shape) for each operation."""
        parts = torch.split(flat, self.sizes, -1)
        return {
            place: part.reshape(*flat.shape[:-1], *shape)
            for place, part, shape in zip(self.places, parts, self.shapes, strict=True)
        }

    def together(self, parts: Mapping[int, Tensor], leading: int = 1) -> Tensor:
        """Join the operations' tensors, with ``leading`` dimensions in front, into one (…, N)."""
        return torch.cat([parts[place].flatten(leading) for place in self.places], -1)

    def ends(self, bounds: Mapping[int, Bounds], like: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (B, N), from bounds by position; ``like`` (B, …) gives B, dtype and device."""
        none = like.new_zeros(len(like), 0)
        lower, upper = (
            torch.cat([none, *(getattr(bounds[place], end).flatten(1) for place in self.places)], -1)
            for end in ("lower", "upper")
        )
        return lower, upper


@dataclass(frozen=True)
class Subproblems:
    """D subproblems: R linear forms of the logits of each, to be bounded over a region and under assumed signs.

    Args:
        region: a region around D images.
        forms: (D, R, K); offsets: (D, R).
        lower, upper: (D, N) bounds of the neurons' inputs, which agree with ``signs``.
        signs: (D, N) int8, assumed sign of each neuron's input: 1 for >= 0, -1 for <= 0, 0 for none.
    """

    region: Region
    forms: Tensor
    offsets: Tensor
    lower: Tensor
    upper: Tensor
    signs: Tensor | None = None


@dataclass(frozen=True)
class Optimised:
    """Results of ``maximise``.

    Args:
        best: (D, R) best lower bounds of all iterates, offsets included.
        alphas, betas: (D, R, N) slopes and multipliers of the last iterate.
        bound: the linear bound of the last evaluated iterate.
        forms: by position, the linear forms (D, R, *shape) that reach each non-linear operation's output in it.
    """

    best: Tensor
    alphas: Tensor
    betas: Tensor | None
    bound: LinearBound
    forms: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


class BestParameters:
    """Slopes and multipliers (D, R, N) of an ascent's best bounds; the last iterate's may be worse."""

    def __init__(self) -> None:
        self.alphas: Tensor | None = None
        self.betas: Tensor | None = None

    def update(self, improved: Tensor, alphas: Tensor, betas: Tensor | None) -> None:
        """Keep the parameters of the forms whose bounds ``improved`` (D, R) bool."""
        improved = improved.unsqueeze(2)
        alphas, betas = alphas.detach(), None if betas is None else betas.detach()
        self.alphas = alphas.clone() if self.alphas is None else torch.where(improved, alphas, self.alphas)
        if betas is not None:
            self.betas = betas.clone() if self.betas is None else torch.where(improved, betas, self.betas)


ASCENT = 12
"""Arrays of the size of all operations' outputs that ``maximise`` holds at its peak, for each linear form: parameters,
their gradients and Adam's averages, lines, and what the gradient keeps of the backward pass; measured."""


def ascents_at_a_time(network: Network, rows: int, like: Tensor) -> int:
    """Number of subproblems of so many linear forms that ``maximise`` takes together; 0 if even one is too large for a
    round. Independent of the memory that is free."""
    numbers = sum(shape.numel() for shape in network.shapes)
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


def maximise(
    network: Network,
    sub: Subproblems,
    alphas: Tensor,
    betas: Tensor | None = None,
    *,
    steps: int,
    rate: float = 0.1,
    decay: float = 0.97,
    done: Callable[[Tensor], Tensor] = lambda best: best.new_zeros(len(best), dtype=torch.bool),
    kept: BestParameters | None = None,
) -> Optimised:
    """Lower bounds of all forms by gradient ascent on slopes and multipliers. Every iterate is a valid bound; if time
    runs out, the best so far is returned.

    Args:
        alphas: (D, R, N) slopes to start from; betas: (D, R, N) multipliers to start from where ``sub`` has signs, zero
            if None.
        steps: steps of Adam; 0 evaluates the bounds at the given parameters.
        rate, decay: learning rate, and its factor after each step.
        done: maps the best bounds (D, R) so far to (D,) bool, the subproblems that need no better ones.
        kept: receives the parameters of the best bounds.
    Raises:
        OutOfTime: the clock ran out before the first iterate.
    """
    neurons = Neurons.of(network)
    bounds = {
        place: Bounds(low, up)
        for (place, low), up in zip(neurons.apart(sub.lower).items(), neurons.apart(sub.upper).values(), strict=True)
    }
    alphas = alphas.detach().clone().requires_grad_(steps > 0)
    free, negated_signs = [alphas], None
    if sub.signs is not None:
        negated_signs = -sub.signs.unsqueeze(1).to(sub.lower.dtype)
        betas = torch.zeros_like(alphas) if betas is None else betas.detach().clone()
        free.append(betas.requires_grad_(steps > 0))
    ascent = torch.optim.Adam(free, lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(ascent, decay)
    best = torch.full_like(sub.offsets, -torch.inf)
    finished = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    slack = slack_of(network, sub.region, bounds)
    bound: LinearBound | None = None
    forms: dict[int, Tensor] = {}
    for step in range(steps + 1):
        last, started, reaching = step == steps, now(), dict[int, Tensor]()
        try:
            with torch.set_grad_enabled(not last):
                lines = relax_all(network, bounds, neurons.apart(alphas))
                pushed = None if betas is None or negated_signs is None else neurons.apart(negated_signs * betas)
                linear = backward(network, len(network.operations) - 1, sub.forms, lines, pushed, reaching, slack)
                lower = with_offsets(network, linear.lower(sub.region), sub.offsets)
        except OutOfTime:
            if bound is None:
                raise
            break
        bound, forms = linear, reaching
        # a finished subproblem's bounds stay as they are, so that they do not depend on the rest of the batch
        better = torch.maximum(best, finite(lower.detach()))
        better = torch.where(finished.unsqueeze(1), best, better)
        if kept is not None:
            kept.update(better > best, alphas, betas)
        best = better
        finished = finished | done(best)
        if last or bool(finished.all()) or not lower.requires_grad:  # no slope to choose
            break
        try:
            look(seconds=2 * (now() - started))  # the gradient takes twice as long as the bound
        except OutOfTime:
            break
        gradients = torch.autograd.grad(lower, free, torch.full_like(lower, -1.0), allow_unused=True)
        for parameters, gradient in zip(free, gradients, strict=True):  # none for the network's weights
            parameters.grad = gradient
        before = torch.empty(0) if betas is None else betas.detach().clone()
        ascent.step()  # pyright: ignore[reportUnknownMemberType]  # torch's closure is a bare Callable
        schedule.step()
        with torch.no_grad():
            alphas.clamp_(0, 1)
            if betas is not None and neurons.places:
                # Adam's steps have the size of its rate; multipliers are in units of the forms at their neuron
                size = torch.cat(
                    [
                        forms[place].abs().flatten(2).amax(2, keepdim=True).expand(-1, -1, n)
                        for place, n in zip(neurons.places, neurons.sizes, strict=True)
                    ],
                    -1,
                )
                betas.copy_((before + (betas - before) * size).clamp(min=0))
    assert bound is not None
    detached = LinearBound(bound.forms.detach(), bound.constants.detach())
    return Optimised(
        best, alphas.detach(), None if betas is None else betas.detach(), detached,
        {place: reached.detach() for place, reached in forms.items()},
    )  # fmt: skip
