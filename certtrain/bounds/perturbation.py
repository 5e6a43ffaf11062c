"""Perturbation sets: the images an attacker may turn an image into. A new threat model is one small file.

All sets contain valid images only, with pixels in [0, 1].
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
"""Purpose of an attack, in this order: the attacked term of a certified loss; adversarial training; a diagnostic's
single step; a diagnostic's strong attack (on every image, right or wrong); ``training.measure``; accuracy under attack
during training; a search that may end at the first wrong prediction; the verifier's search for counterexamples."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


@dataclass(frozen=True)
class PerturbationSet(Component):
    """A set around each image x, used by attacks, interval bounds and linear relaxations.

    ``epsilon`` is its size: the radius of a norm's ball in pixel units of [0, 1], or the number k of pixels of a sparse
    set. Inside a training step it is a 0-d tensor; with one size per image, a tensor (B,).
    """

    size: ClassVar[str] = "epsilon"
    """The name of the size field, also in messages, tables and file names."""
    norm: ClassVar[str | None] = None
    """The norm, ``Linf``, ``L2`` or ``L1``, of a set that is a norm's ball cut to valid images; None for other sets."""
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
    """The default attack for each purpose, as a recipe's section; missing purposes are inherited. FrankWolfe works on
    every set, since it needs ``concretise`` only."""

    @classmethod
    def matches(cls, ball: PerturbationSet) -> TypeGuard[Self]:
        """Whether a set is of this class, which may be abstract, such as ``NormBall``."""
        return isinstance(ball, cls)

    @classmethod
    def of(cls, ball: PerturbationSet) -> Self:
        """``ball``, checked to be a set of this class.

        Raises:
            InputError: it is of another class.
        """
        if not cls.matches(ball):
            raise InputError(f"perturbation: found a {ball.kind}; accepted: a {cls.__name__}")
        return ball

    @property
    def kind(self) -> str:
        """The class name, which messages and records use."""
        return type(self).__name__

    @classmethod
    def sized(cls, size: float, digits: int = 6) -> str:
        """A size with its name: ``epsilon 0.0313725``, ``k 20``."""
        return f"{cls.size} {size:.{digits}g}"

    @classmethod
    def default_attack_of(cls, purpose: Purpose) -> Mapping[str, Any]:
        """The default attack for a purpose: the class' own, or the nearest base class'; see ``default_attacks``."""
        tables = (vars(kind).get("default_attacks", {}) for kind in cls.__mro__)
        return next(table[purpose] for table in tables if purpose in table)

    @property
    @abstractmethod
    def epsilon(self) -> Any:
        """The size."""

    @abstractmethod
    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        """The set with another size."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The set with its size multiplied by ``factor``."""

    def take(self, index: Tensor) -> Self:
        """The set for the images ``index`` of a batch; differs from the set itself if there is one size per image."""
        if not self._has_size_per_image():
            return self
        return self.with_epsilon(self.epsilon[index.to(self.epsilon.device)])

    def _has_size_per_image(self) -> bool:
        return isinstance(self.epsilon, Tensor) and self.epsilon.ndim == 1

    def region(self, images: Tensor) -> Around:
        """This set around each of ``images`` (B, *shape), the region that bounds are computed over.

        Raises:
            InputError: a shape without such a set, or another number of images than of sizes; on the CPU also pixels
                outside [0, 1] or NaN. On other devices pixels are not checked, which would wait for the device in
                every training step: bounds over such images are NaN.
        """
        self.check_shape(images.shape[1:])
        if self._has_size_per_image() and len(self.epsilon) != len(images):
            found = f"{len(self.epsilon)} numbers for {len(images)} images"
            raise InputError(f"{self.size}: found {found}; accepted: one, or one for each")
        if not devices.reading_waits(images):
            check_pixels(images)
        return Around(self, images)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse a shape of images, without batch dimension, that the set is not defined for.

        Raises:
            InputError: images of this shape have no such set.
        """

    def remark(self, shape: Sequence[int]) -> str:
        """A remark for the user about this set around images of ``shape``, printed once; empty for none."""
        return ""

    @property
    def is_box(self) -> bool:
        """Whether the set equals its ``hull``; bounds of any other set take their first layer from ``concretise``."""
        return False

    @property
    def is_local(self) -> bool:
        """Whether the set's projection to a window of the image is the same kind and size of set around the window."""
        return False

    def windowed(self) -> PerturbationSet | None:
        """A local set that contains this one, for bounds over windows; None to use the hull."""
        return self if self.is_local else None

    @property
    def projects_by_entry(self) -> bool:
        """Whether ``project`` moves each entry independently, after selecting the entries that may change; then
        ``follows`` is its derivative."""
        return self.is_box

    def follows(self, images: Tensor, reached: Tensor, target: Tensor) -> Tensor:
        """The derivative of ``project``, entry by entry: whether an entry of ``reached``, the projection of ``target``
        around ``images``, moves with the target. Bool, shaped as ``images``."""
        return reached == target

    def tiny(self, images: Tensor, radius: float) -> Interval | Region:
        """A region of a tiny ``radius`` around ``images``, for losses that need a width in every entry while the set's
        size is 0: the box, or the set itself with that radius if it has one."""
        return cut_box(images, radius)

    def change(self, image: Tensor, point: Tensor) -> dict[str, Any]:
        """Record entries, as JSON, on how ``point`` differs from ``image``, both (C, H, W); none by default."""
        return {}

    def ends(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) of the hull, both shaped as ``images``; for a box, exactly the set's ends."""
        hull = self.hull(images)
        return hull.lower, hull.upper

    @abstractmethod
    def hull(self, images: Tensor) -> Interval:
        """The smallest box around the set, wider by an ulp at most."""

    @abstractmethod
    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """A point of the set for each candidate, both (B, *shape); points of the set are not moved."""

    @abstractmethod
    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        """(B,) bool: whether each candidate lies in the set, up to ``slack``."""

    @abstractmethod
    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """The minimum over the set of each linear form <coefficients, x'>, or a lower bound of it, up to rounding.

        Args:
            coefficients: (B, S, *shape), S forms for each image.
            images: (B, *shape).
        Returns:
            (B, S), differentiable in the coefficients.
        """

    @abstractmethod
    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        """A random change for each of ``images`` (B, *shape), uniform in the norm's ball. The changed image may leave
        [0, 1] until it is projected."""


@dataclass(frozen=True)
class NormBall(PerturbationSet):
    """The ball of a norm, cut to valid images.

    Args:
        epsilon: the radius in pixel units of [0, 1]; one number, or floats (B,) with one per image.
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
    largest_radius: ClassVar[float] = math.inf
    """The largest accepted radius, at which the ball holds every image: more is a mistake. Unlimited in l1 and l2,
    where it depends on the image's size and a radius of 8 is ordinary."""

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, Tensor):
            self._check_radii(self.epsilon)
            return
        given = cast(object, self.epsilon)  # callers without a type checker pass anything
        number = not isinstance(given, bool) and isinstance(given, Real)
        check(number and 0 <= self.epsilon < math.inf, "epsilon", self.epsilon, self._accepted())
        check(self.epsilon <= self.largest_radius, "epsilon", self.epsilon, self._accepted(self.epsilon))
        object.__setattr__(self, "epsilon", float(self.epsilon) if isinstance(self.epsilon, Real) else self.epsilon)

    def _check_radii(self, radii: Tensor) -> None:
        shape = f"{radii.dtype} of shape {(*radii.shape,)}"
        check(radii.is_floating_point() and radii.ndim <= 1, "epsilon", shape, "a number, or floats (B,)")
        if devices.reading_waits(radii):  # see ``cut_box``
            return
        for radius in as_floats(radii[~((radii >= 0) & (radii < torch.inf))]):
            check(False, "epsilon", radius, self._accepted())
        if radii.ndim:  # a schedule's 0-d tensor may be a multiple of the recipe's radius
            for radius in as_floats(radii[radii > self.largest_radius]):
                check(False, "epsilon", radius, self._accepted(radius))

    def _accepted(self, *meant: float) -> str:
        size = "a number >= 0" + ("" if self.largest_radius == math.inf else f", at most {self.largest_radius:g}")
        return f"{size}, in pixel units of [0, 1]" + "".join(f"; did you mean {float(size):g}/255?" for size in meant)

    def radius(self, like: Tensor, dtype: torch.dtype | None = None) -> float | Tensor:
        """``epsilon``, ready to be combined with ``like`` (B, …).

        One radius per image is reshaped to broadcast, in ``dtype`` or that of ``like``: more precise radii would
        promote the result.
        """
        if not self._has_size_per_image():
            return self.epsilon
        radii: Any = self.epsilon
        return radii.to(like.device, dtype or like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def region(self, images: Tensor) -> Around:
        check(images.is_floating_point(), "images", images.dtype, "floats in [0, 1]")
        return super().region(images)

    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        radius: Any = epsilon  # a 0-d tensor behaves like a float
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
        """The change of norm 1, in the set's norm, along which a linear function with this gradient grows fastest.

        Shaped as ``gradient`` (B, *shape); 0 where the gradient is 0.
        """
