"""Perturbation sets: what an attacker may do to an image. A new threat model is one small file like this.

Every set is cut to valid images: it never leaves [0, 1].
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, Self, TypeGuard, cast, get_args

import torch
from torch import Tensor

from .. import devices
from ..config import Component
from ..errors import InputError, check
from ..noise import Noise
from ..typed import as_floats
from .interval import Interval, check_pixels, cut_box
from .region import Around, Region

Purpose = Literal[
    "certified_training", "adversarial_training", "one_step", "many_steps", "measure", "accuracy", "search", "falsify"
]  # fmt: skip
"""What an attack is for: the attacked term of a certified loss, all of adversarial training, a diagnostic's single step
and its strong attack (which attacks every image, right or wrong), ``training.measure``, accuracy under attack during
training, a search that may end at the first wrong prediction, and the verifier's search for counterexamples."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


@dataclass(frozen=True)
class PerturbationSet(Component):
    """A set around each image x. Attacks, interval bounds and linear relaxations all go through it.

    ``epsilon`` is its size: the radius of a norm's ball in pixel units of [0, 1], the number k of pixels of a sparse
    one. Inside a training step it is a 0-d tensor; where every image has its own, a tensor (B,).
    """

    size: ClassVar[str] = "epsilon"
    """The field that holds the size, and its name in messages, tables and file names."""
    norm: ClassVar[str | None] = None
    """The norm whose ball, cut to valid images, the set is: ``Linf``, ``L2``, ``L1``; None for any other set."""
    default_attacks: ClassVar[Mapping[Purpose, Mapping[str, Any]]] = {
        "certified_training": {"type": "FrankWolfe", "steps": 1},
        "adversarial_training": {"type": "FrankWolfe", "steps": 10},
        "one_step": {"type": "FrankWolfe", "steps": 1},
        "many_steps": {"type": "FrankWolfe", "steps": 20},
        "measure": {"type": "FrankWolfe", "steps": 20},
        "accuracy": {"type": "FrankWolfe", "steps": 20},
        "search": {"type": "FrankWolfe", "steps": 100},
        "falsify": {"type": "FrankWolfe", "steps": 300},
    }
    """The attack for each purpose, as a recipe's section; a purpose left out is inherited. FrankWolfe, which needs
    ``concretise`` alone, attacks every set."""

    @classmethod
    def matches(cls, ball: PerturbationSet) -> TypeGuard[Self]:
        """Whether a set is of this kind, an abstract one such as ``NormBall`` included."""
        return isinstance(ball, cls)

    @classmethod
    def of(cls, ball: PerturbationSet) -> Self:
        """``ball``, seen as a set of this kind.

        Raises:
            InputError: it is none.
        """
        if not cls.matches(ball):
            raise InputError(f"perturbation: found a {ball.kind}; accepted: a {cls.__name__}")
        return ball

    @property
    def kind(self) -> str:
        """The name of its class, which messages and records use."""
        return type(self).__name__

    @classmethod
    def sized(cls, size: float, digits: int = 6) -> str:
        """A size in words: ``epsilon 0.0313725``, ``k 20``."""
        return f"{cls.size} {size:.{digits}g}"

    @classmethod
    def default_attack_of(cls, purpose: Purpose) -> Mapping[str, Any]:
        """The section of the set's default attack, its own or that of the nearest base; see ``default_attacks``."""
        tables = (vars(kind).get("default_attacks", {}) for kind in cls.__mro__)
        return next(table[purpose] for table in tables if purpose in table)

    @property
    @abstractmethod
    def epsilon(self) -> Any:
        """The size."""

    @abstractmethod
    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        """The same kind of set with another size."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The same kind of set, so many times as large."""

    def take(self, index: Tensor) -> Self:
        """The sets of some images of a batch, by their numbers: differs where each image has a size of its own."""
        if not self._each_its_own():
            return self
        return self.with_epsilon(self.epsilon[index.to(self.epsilon.device)])

    def _each_its_own(self) -> bool:
        return isinstance(self.epsilon, Tensor) and self.epsilon.ndim == 1

    def region(self, images: Tensor) -> Around:
        """This set around each of ``images`` (B, *shape): what bounds are computed over.

        Raises:
            InputError: images that have no such set: another shape, or another number than there are sizes; on the CPU
                also pixels outside [0, 1] or NaN (on another device these would have to be waited for, in every step
                of a training: bounds over them are NaN).
        """
        self.check_shape(images.shape[1:])
        if self._each_its_own() and len(self.epsilon) != len(images):
            found = f"{len(self.epsilon)} numbers for {len(images)} images"
            raise InputError(f"{self.size}: found {found}; accepted: one, or one for each")
        if not devices.reading_waits(images):
            check_pixels(images)
        return Around(self, images)

    def check_shape(self, shape: Sequence[int]) -> None:
        """
        Raises:
            InputError: images of this shape have no such set.
        """

    def remark(self, shape: Sequence[int]) -> str:
        """What is worth saying, once, of this set around images of ``shape``; empty for nothing."""
        return ""

    @property
    def is_box(self) -> bool:
        """Whether the set equals its ``hull``; bounds of any other set take their first layer from ``concretise``."""
        return False

    @property
    def is_local(self) -> bool:
        """Whether what the set leaves of a window of the image is a set of the same kind and size around the window."""
        return False

    def windowed(self) -> PerturbationSet | None:
        """A local set that holds this one, which bounds of windows use; None for its hull."""
        return self if self.is_local else None

    @property
    def projects_by_entry(self) -> bool:
        """Whether ``project`` moves each entry by itself, once it has chosen which entries may change; then
        ``follows`` is its derivative."""
        return self.is_box

    def follows(self, images: Tensor, reached: Tensor, target: Tensor) -> Tensor:
        """Which entries of ``reached``, the projection of ``target`` around ``images``, move as the target moves:
        bool, as ``images``."""
        return reached == target

    def tiny(self, images: Tensor, radius: float) -> Interval | Region:
        """What bounds are computed over where the set is still the image alone, and yet a width in every entry is
        needed: the box of so small a radius, unless the kind has a radius itself."""
        return cut_box(images, radius)

    def change(self, image: Tensor, point: Tensor) -> dict[str, Any]:
        """What records say of how ``point`` differs from ``image``, both (C, H, W), as JSON; nothing by default."""
        return {}

    def ends(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), both as ``images``: of a box all that lies between them is the set."""
        hull = self.hull(images)
        return hull.lower, hull.upper

    @abstractmethod
    def hull(self, images: Tensor) -> Interval:
        """The smallest box around the set, outward by an ulp at most."""

    @abstractmethod
    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """A point of the set for each candidate, both (B, *shape); points of the set stay where they are."""

    @abstractmethod
    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        """(B,) bool: does each candidate lie in the set, give or take ``slack``?"""

    @abstractmethod
    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """The minimum over the set of each linear form <coefficients, x'>, never above it up to rounding.

        Args:
            coefficients: (B, S, *shape), S forms for each image.
            images: (B, *shape).
        Returns:
            (B, S), differentiable in the coefficients.
        """

    @abstractmethod
    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        """A random change for each of ``images`` (B, *shape), uniform in the norm's ball. The sum is in the set only
        once it is projected to [0, 1]."""


@dataclass(frozen=True)
class NormBall(PerturbationSet):
    """The ball of a norm, cut to valid images.

    Args:
        epsilon: its radius in pixel units of [0, 1]; or, where every image has its own, floats (B,).
    """

    epsilon: float = 0.1  # type: ignore[assignment]  # a field that stands for the property
    default_attacks: ClassVar[Mapping[Purpose, Mapping[str, Any]]] = {
        "certified_training": {"type": "Pgd"},
        "adversarial_training": {"type": "Ascent"},
        "one_step": {"type": "Ascent", "steps": 1, "step_size": 1.0, "start": "zero"},
        "many_steps": {"type": "Ascent"},
        "measure": {"type": "Pgd", "steps": 8, "step_size": 0.25},
        "accuracy": {"type": "Ascent"},
        "search": {"type": "Ascent"},
        "falsify": {
            "type": "Pgd", "steps": 40, "step_size": 0.1, "restarts": 5, "diversified": 2, "objective": "margin",
        },
    }  # fmt: skip
    largest: ClassVar[float] = math.inf
    """The radius above which every image lies in the ball: more is a slip. In l1 and l2 it depends on the image's size,
    and a radius of 8 is ordinary."""

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, Tensor):
            self._check_radii(self.epsilon)
            return
        given = cast(object, self.epsilon)  # by callers without a type checker
        number = not isinstance(given, bool) and isinstance(given, Real)
        check(number and 0 <= self.epsilon < math.inf, "epsilon", self.epsilon, self._accepted())
        check(self.epsilon <= self.largest, "epsilon", self.epsilon, self._accepted(self.epsilon))
        object.__setattr__(self, "epsilon", float(self.epsilon) if isinstance(self.epsilon, Real) else self.epsilon)

    def _check_radii(self, radii: Tensor) -> None:
        shape = f"{radii.dtype} of shape {(*radii.shape,)}"
        check(radii.is_floating_point() and radii.ndim <= 1, "epsilon", shape, "a number, or floats (B,)")
        if devices.reading_waits(radii):  # see ``cut_box``
            return
        for radius in as_floats(radii[~((radii >= 0) & (radii < torch.inf))]):
            check(False, "epsilon", radius, self._accepted())
        if radii.ndim:  # a schedule's 0-d tensor may be a multiple of the recipe's radius
            for radius in as_floats(radii[radii > self.largest]):
                check(False, "epsilon", radius, self._accepted(radius))

    def _accepted(self, *meant: float) -> str:
        size = "a number >= 0" + ("" if self.largest == math.inf else f", at most {self.largest:g}")
        return f"{size}, in pixel units of [0, 1]" + "".join(f"; did you mean {float(size):g}/255?" for size in meant)

    def radius(self, like: Tensor, dtype: torch.dtype | None = None) -> float | Tensor:
        """``epsilon`` as it is combined with ``like`` (B, …): broadcast where every image has its own, and of the dtype
        of ``like``, unless another one is named, which more precise radii would raise it to."""
        if not self._each_its_own():
            return self.epsilon
        radii: Any = self.epsilon
        return radii.to(like.device, dtype or like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def region(self, images: Tensor) -> Around:
        check(images.is_floating_point(), "images", images.dtype, "floats in [0, 1]")
        return super().region(images)

    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        radius: Any = epsilon  # a 0-d tensor does a float's arithmetic
        return dataclasses.replace(self, epsilon=radius)

    def scaled(self, factor: float) -> Self:
        check(0 <= factor < math.inf, "epsilon", f"{factor} times the radius", self._accepted())
        wider = copy.copy(self)  # unchecked: a multiple of a radius may well exceed 1
        object.__setattr__(wider, "epsilon", self.epsilon * factor)
        return wider

    def tiny(self, images: Tensor, radius: float) -> Interval | Region:
        return self.with_epsilon(radius).region(images)

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The change of size 1 (in the set's norm) along which a linear function of this gradient grows fastest,
        for each of a batch, as ``gradient``; 0 where the gradient is 0."""
