"""The l0 set: at most k pixels change, each to any valid value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor

from .. import kernels
from ..errors import InputError, check
from ..noise import Noise
from ..typed import as_floats, as_ints
from .interval import Interval
from .perturbation import PerturbationSet, Purpose

Unit = Literal["pixel", "feature", "row", "column", "patch"]
UNITS: tuple[Unit, ...] = get_args(Unit)
MOST = 2**53
"""The largest k: schedules multiply it, and kernels count in int64."""
ONE_STEP = {"type": "SparsePgd", "steps": 1, "alpha": 1.0, "beta": 1.0, "patience": None, "keep": "last"}
"""The attack of one-step training (arXiv 2502.21041), with its random start."""
TWENTY_STEPS = {"type": "SparsePgd", "steps": 20, "patience": 10, "keep": "last"}
"""The attack of multi-step training, without its early stop: every image contributes to the loss."""


@dataclass(frozen=True)
class SparseBall(PerturbationSet):
    """At most k units of x' differ from x, and 0 <= x' <= 1: an l0 ball, which is not convex.

    Units partition the image. In *grouped* form (B, M, N) there are N units of M numbers each.

    Args:
        k: number of units; one int, or int64 (B,) with one per image. A k above N means all units.
        unit: ``pixel``, all channels at one place (any shape (C, …); each number of a vector); ``feature``, each
            number; for images (C, H, W) also ``row``, ``column`` or ``patch``.
        side: of a patch, in pixels; divides height and width, since patches lie on a grid.
    """

    k: int | Tensor = 20
    unit: Unit = "pixel"
    side: int = 1
    size: ClassVar[str] = "k"
    default_attacks: ClassVar[Mapping[Purpose, Mapping[str, Any]]] = {
        "certified_training": ONE_STEP,
        "adversarial_training": TWENTY_STEPS,
        "one_step": ONE_STEP,
        "many_steps": TWENTY_STEPS,
        "measure": {"type": "SparsePgd", "steps": 20},
        "accuracy": {"type": "SparsePgd", "steps": 20},
        "search": {"type": "SparsePgd", "steps": 100},
        "falsify": {"type": "SparsePgd", "steps": 300},
    }

    def __post_init__(self) -> None:
        if isinstance(self.k, Tensor):
            whole = self.k.dtype == torch.int64 and self.k.ndim <= 1
            check(whole, "k", f"{self.k.dtype} {tuple(self.k.shape)}", "int64 (B,)")
        else:
            given = cast(object, self.k)  # callers without a type checker pass anything
            whole = isinstance(given, int) and not isinstance(given, bool)
            check(whole and 0 <= self.k <= MOST, "k", self.k, f"a whole number of {self.plural} >= 0, at most {MOST}")
        check(self.unit in UNITS, "unit", self.unit, ", ".join(UNITS))
        check(self.side >= 1, "side", self.side, "a whole number of pixels >= 1")
        check(self.side == 1 or self.unit == "patch", "side", self.side, f"1 where the unit is a {self.unit}")

    @classmethod
    def sized(cls, size: float, digits: int = 6) -> str:
        return f"{cls.size} {int(size)}"

    @property
    def plural(self) -> str:
        """The plural of ``unit``, for messages."""
        return f"{self.unit}es" if self.unit == "patch" else f"{self.unit}s"

    @property
    def epsilon(self) -> int | Tensor:
        return self.k

    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        """The set with another k; a schedule's tensor is rounded to the nearest whole number.

        Raises:
            FieldError: a number that is not whole.
        """
        if isinstance(epsilon, Tensor):
            return dataclasses.replace(self, k=epsilon.round().long())
        check(
            0 <= epsilon < math.inf and epsilon == int(epsilon), "k", epsilon, f"a whole number of {self.plural} >= 0"
        )
        return dataclasses.replace(self, k=int(epsilon))

    def scaled(self, factor: float) -> Self:
        """The set with k times ``factor``, rounded up."""
        if isinstance(self.k, Tensor):
            return dataclasses.replace(self, k=torch.ceil(self.k.double() * factor).long())
        return dataclasses.replace(self, k=math.ceil(self.k * factor))

    def check_shape(self, shape: Sequence[int]) -> None:
        images = len(shape) == 3
        if self.unit in ("row", "column", "patch") and not images:
            raise InputError(f"unit: found {self.plural} of inputs {tuple(shape)}; accepted: images (C, H, W)")
        if self.unit == "patch" and any(size % self.side for size in shape[1:]):
            raise InputError(
                f"side: found patches of {self.side}×{self.side} for images of {shape[1]}×{shape[2]}; "
                "accepted: a side that divides both"
            )

    def remark(self, shape: Sequence[int]) -> str:
        units = self.units(shape)
        if isinstance(self.k, Tensor) or self.k <= units:
            return ""
        return f"k: found {self.k}, of images with {units} {self.plural}: it means all of them"

    @property
    def is_local(self) -> bool:
        return self.unit != "patch"  # a window cuts through the grid

    def windowed(self) -> SparseBall:
        if self.is_local:
            return self
        k = self.k * self.side**2  # numbers of a window that k patches can change
        return SparseBall(k if isinstance(k, Tensor) else min(k, MOST))

    @property
    def projects_by_entry(self) -> bool:
        return True

    def follows(self, images: Tensor, reached: Tensor, target: Tensor) -> Tensor:
        """The derivative of ``project``, with the selection of units held fixed."""
        # an entry that is not selected may equal its target by chance
        selected = self.grouped(reached != images).any(1, keepdim=True)
        moved = self.ungrouped(selected.expand_as(self.grouped(images)), images.shape[1:])
        return moved & (reached == target)

    def change(self, image: Tensor, point: Tensor) -> dict[str, Any]:
        """``changed``, the number of units that differ, and ``change``: ``[[unit, [its values]], …]`` in increasing
        order of units, exact also as JSON."""
        before, after = (self.grouped(x[None])[0] for x in (image, point))
        units = (before != after).any(0).nonzero().flatten()
        pairs = zip(as_ints(units), map(as_floats, after[:, units].t()), strict=True)
        return {"changed": len(units), "change": [[unit, values] for unit, values in pairs]}

    def units(self, shape: Sequence[int]) -> int:
        """The number N of units of images of ``shape`` (C, …)."""
        self.check_shape(shape)
        match self.unit:
            case "pixel":
                return math.prod(shape[1:]) if len(shape) > 1 else shape[0]
            case "feature":
                return math.prod(shape)
            case "row":
                return shape[1]
            case "column":
                return shape[2]
            case _:
                return (shape[1] // self.side) * (shape[2] // self.side)

    def grouped(self, x: Tensor) -> Tensor:
        """(B, *shape) → (B, M, N): N units of M numbers."""
        self.check_shape(x.shape[1:])
        units = self.units(x.shape[1:])
        members = math.prod(x.shape[1:]) // max(units, 1)
        match self.unit:
            case "row":
                return x.transpose(2, 3).reshape(len(x), members, units)
            case "patch":
                batch, channels, height, width = x.shape
                tiles = x.reshape(batch, channels, height // self.side, self.side, width // self.side, self.side)
                return tiles.permute(0, 1, 3, 5, 2, 4).reshape(batch, members, units)
            case _:
                return x.reshape(len(x), members, units)

    def ungrouped(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, M, N) → (B, *shape), the inverse of ``grouped``."""
        match self.unit:
            case "row":
                channels, height, width = shape
                return x.reshape(len(x), channels, width, height).transpose(2, 3)
            case "patch":
                channels, height, width = shape
                down, across = height // self.side, width // self.side
                tiles = x.reshape(len(x), channels, self.side, self.side, down, across)
                return tiles.permute(0, 1, 4, 2, 5, 3).reshape(len(x), *shape)
            case _:
                return x.reshape(len(x), *shape)

    def counts(self, like: Tensor) -> int | Tensor:
        """k as ``kernels`` take it: an int, or int64 (B,) for the batch ``like``."""
        if not isinstance(self.k, Tensor):
            return self.k
        k = self.k.to(device=like.device, dtype=torch.int64)
        return k.expand(len(like)).contiguous() if k.ndim == 0 else k

    def changed(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        """(B,) int64: the number of units in which candidates differ by more than ``slack``; NaN differs."""
        same = self.grouped((candidates.double() - images.double()).abs() <= slack)
        return (~same).any(1).sum(1)

    def hull(self, images: Tensor) -> Interval:
        k = self.counts(images)
        free = k > 0 if isinstance(k, Tensor) else torch.full((len(images),), k > 0, device=images.device)
        free = free.reshape(-1, *[1] * (images.ndim - 1))
        return Interval.from_bounds(torch.where(free, 0, images), torch.where(free, 1, images))

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """A nearest point of the set in the Euclidean norm.

        The k units with the largest gain keep their change d, cut to [0, 1]; the gain is |d|² - |d - cut d|².
        """
        valid = candidates.clamp(0, 1)
        change, cut = candidates.double() - images.double(), candidates.double() - valid.double()
        gains = self.grouped(change.square() - cut.square()).sum(1)
        moved = self.grouped(valid != images).any(1)
        gains = torch.where(moved, gains.clamp(min=torch.finfo(gains.dtype).tiny), 0)  # squares may underflow
        mask = kernels.topk_mask(gains, self.counts(images))
        chosen = self.ungrouped(mask.bool().unsqueeze(1).expand_as(self.grouped(images)), images.shape[1:])
        return torch.where(chosen, valid, images)

    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        valid = ((candidates >= -slack) & (candidates <= 1 + slack)).flatten(1).all(1)
        return valid & (self.changed(images, candidates, slack) <= self.counts(images))

    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """The minimum over the set, exact up to rounding: the k units that lower the form most go to their corners."""
        values, gains = self.effects(coefficients, images)
        k = self.counts(images)
        if isinstance(k, Tensor):
            k = k.repeat_interleave(coefficients.shape[1])
        mask = kernels.topk_mask(gains.detach().flatten(0, 1).neg(), k).reshape(gains.shape)
        return values + torch.where(mask.bool(), gains, 0).sum(2)

    def effects(self, coefficients: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Values of linear forms (B, S, *shape) at the images, (B, S), and the lowest change that each unit can make to
        them, (B, S, N), <= 0."""
        products = coefficients * images.unsqueeze(1)
        effects = coefficients.clamp(max=0) - products  # c x' - c x is smallest at x' = 0 or 1
        gains = self.grouped(effects.flatten(0, 1)).sum(1)
        return products.flatten(2).sum(2), gains.reshape(*coefficients.shape[:2], gains.shape[1])

    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        """Changes of k random units, uniform in [-1, 1] and cut to valid images."""
        center = self.grouped(images)
        change = 2 * noise.uniform(center.shape[1:], f"{stream}/size", images.dtype) - 1
        change = torch.minimum(torch.maximum(change, -center), 1 - center)
        scores = noise.uniform(center.shape[2:], f"{stream}/place", images.dtype)
        mask = kernels.topk_mask(scores, self.counts(images))
        return self.ungrouped(torch.where(mask.bool().unsqueeze(1), change, 0), images.shape[1:])
