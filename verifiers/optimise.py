"""Linear bounds made as tight as their free parameters allow: alpha-CROWN (arXiv 2011.13824) and, with constraints on
the signs of activations' inputs, beta-CROWN (arXiv 2103.06624)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bounds import Bounds, Region
from ..bounds.clock import OutOfTime, look, now
from ..bounds.crown import LinearBound, backward, relax_all, slack_of
from ..bounds.network import Network
from ..bounds.rounding import OWN


@dataclass(frozen=True)
class Neurons:
    """The inputs of all non-linear operations as one flat row, N numbers for each image."""

    places: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, network: Network) -> Neurons:
        return cls(network.nonlinear, tuple(network.shapes[place] for place in network.nonlinear))

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def apart(self, flat: Tensor) -> dict[int, Tensor]:
        """(…, N) → (…, *shape) for each operation."""
        parts = torch.split(flat, self.sizes, -1)
        return {
            place: part.reshape(*flat.shape[:-1], *shape)
            for place, part, shape in zip(self.places, parts, self.shapes, strict=True)
        }

    def together(self, parts: Mapping[int, Tensor], leading: int = 1) -> Tensor:
        return torch.cat([parts[place].flatten(leading) for place in self.places], -1)

    def ends(self, bounds: Mapping[int, Bounds], like: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (B, N), of B images, as many as rows in ``like``."""
        none = like.new_zeros(len(like), 0)
        lower, upper = (
            torch.cat([none, *(getattr(bounds[place], end).flatten(1) for place in self.places)], -1)
            for end in ("lower", "upper")
        )
        return lower, upper


@dataclass(frozen=True)
class Subproblems:
    """D linear bounds to be made: R forms of the logits of each, over a region and under constraints.

    Args:
        region: around D images.
        forms: (D, R, K); offsets: (D, R).
        lower, upper: (D, N) bounds of the neurons' inputs, in agreement with ``signs``.
        signs: (D, N) int8, what is assumed of each neuron's input: 1 for >= 0, -1 for <= 0, 0 for nothing.
    """

    region: Region
    forms: Tensor
    offsets: Tensor
    lower: Tensor
    upper: Tensor
    signs: Tensor | None = None


@dataclass(frozen=True)
class Optimised:
    """The best bounds found (D, R), and the last parameters: slopes and multipliers (D, R, N)."""

    best: Tensor
    alphas: Tensor
    betas: Tensor | None
    bound: LinearBound
    seen: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


class BestParameters:
    """Keeps the slopes and multipliers (D, R, N) of an ascent's best bounds; its last ones may be worse."""

    def __init__(self) -> None:
        self.alphas: Tensor | None = None
        self.betas: Tensor | None = None

    def update(self, improved: Tensor, alphas: Tensor, betas: Tensor | None) -> None:
        """Take over those of the forms whose bounds ``improved`` (D, R)."""
        improved = improved.unsqueeze(2)
        alphas, betas = alphas.detach(), None if betas is None else betas.detach()
        self.alphas = alphas.clone() if self.alphas is None else torch.where(improved, alphas, self.alphas)
        if betas is not None:
            self.betas = betas.clone() if self.betas is None else torch.where(improved, betas, self.betas)


def finite(lower: Tensor) -> Tensor:
    """A bound that overflowed, or NaN, proves nothing."""
    return lower.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def with_offsets(network: Network, lower: Tensor, offsets: Tensor) -> Tensor:
    """Lower bounds with constants added, rounded down where the network has a ``rounding``."""
    found = lower + offsets
    return found if network.rounding is None else found - 4 * OWN * (lower.abs() + offsets.abs()) * (offsets != 0)


def starting_slopes(lower: Tensor, upper: Tensor, rows: int) -> Tensor:
    """(D, rows, N): CROWN's choice, the line with the smaller area."""
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
    """Lower bounds of all forms by gradient ascent on slopes and multipliers; every iterate is a valid bound. Out of
    time, the iterates so far have to do.

    Args:
        alphas: (D, R, N) to start from; betas: likewise, needed with ``sub.signs``.
        steps: of Adam; 0 bounds with the parameters as they are.
        done: which of the subproblems (D,) need no better bounds, given the best (D, R) so far.
        kept: is given the parameters of the best bounds.
    Raises:
        OutOfTime: before the first of them.
    """
    neurons = Neurons.of(network)
    bounds = {
        place: Bounds(low, up)
        for (place, low), up in zip(neurons.apart(sub.lower).items(), neurons.apart(sub.upper).values(), strict=True)
    }
    alphas = alphas.detach().clone().requires_grad_(steps > 0)
    free, against = [alphas], None
    if sub.signs is not None:
        against = -sub.signs.unsqueeze(1).to(sub.lower.dtype)
        betas = torch.zeros_like(alphas) if betas is None else betas.detach().clone()
        free.append(betas.requires_grad_(steps > 0))
    ascent = torch.optim.Adam(free, lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(ascent, decay)
    best = torch.full_like(sub.offsets, -torch.inf)
    finished = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    slack = slack_of(network, sub.region, bounds)
    bound: LinearBound | None = None
    seen: dict[int, Tensor] = {}
    for step in range(steps + 1):
        last, started, met = step == steps, now(), dict[int, Tensor]()
        try:
            with torch.set_grad_enabled(not last):
                lines = relax_all(network, bounds, neurons.apart(alphas))
                pushed = None if betas is None or against is None else neurons.apart(against * betas)
                found = backward(network, len(network.operations) - 1, sub.forms, lines, pushed, met, slack)
                lower = with_offsets(network, found.lower(sub.region), sub.offsets)
        except OutOfTime:
            if bound is None:
                raise
            break
        bound, seen = found, met
        # a finished subproblem's bounds rest: they are not to depend on what else is in the batch
        better = torch.maximum(best, finite(lower.detach()))
        better = torch.where(finished.unsqueeze(1), best, better)
        if kept is not None:
            kept.update(better > best, alphas, betas)
        best = better
        finished = finished | done(best)
        if last or bool(finished.all()) or not lower.requires_grad:  # no slope to choose
            break
        try:
            look(seconds=2 * (now() - started))  # the way back takes twice as long as the way there
        except OutOfTime:
            break
        gradients = torch.autograd.grad(lower, free, torch.full_like(lower, -1.0), allow_unused=True)
        for parameters, gradient in zip(free, gradients, strict=True):  # and not of the network's own weights
            parameters.grad = gradient
        before = torch.empty(0) if betas is None else betas.detach().clone()
        ascent.step()  # pyright: ignore[reportUnknownMemberType]  # torch's closure is a bare Callable
        schedule.step()
        with torch.no_grad():
            alphas.clamp_(0, 1)
            if betas is not None and neurons.places:
                # Adam's steps have the size of its rate, multipliers that of the forms that they push against
                size = torch.cat(
                    [
                        seen[place].abs().flatten(2).amax(2, keepdim=True).expand(-1, -1, n)
                        for place, n in zip(neurons.places, neurons.sizes, strict=True)
                    ],
                    -1,
                )
                betas.copy_((before + (betas - before) * size).clamp(min=0))
    assert bound is not None
    detached = LinearBound(bound.forms.detach(), bound.constants.detach())
    return Optimised(
        best, alphas.detach(), None if betas is None else betas.detach(), detached,
        {place: forms.detach() for place, forms in seen.items()},
    )  # fmt: skip
