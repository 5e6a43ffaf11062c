"""The base of all losses: frozen dataclasses whose fields are the hyper-parameters and the YAML section."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ..bounds import PerturbationSet
from ..config import Component
from ..errors import check
from ..step import Batch, StateSpec, Step


@dataclass(frozen=True)
class LossTerms:
    """The loss of a batch.

    Args:
        total: 0-d, what is minimised.
        parts: 0-d, detached, by name: the terms and accuracies that progress and ``metrics.jsonl`` show.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Ramp:
    """A hyper-parameter that moves from ``start`` to ``end`` along the epsilon ramp, or along all of training.

    Args:
        along: linear in the ramp's ``steps``; in ``epsilon`` itself, which a smoothed schedule bends; or in the steps
            of the whole ``training``.
        over: the share of that range after which ``end`` is reached.
    """

    start: float
    end: float
    along: Literal["steps", "epsilon", "training"] = "steps"
    over: float = 1.0

    def __post_init__(self) -> None:
        check(0 < self.over <= 1, "over", self.over, "a share in (0, 1]")


def value_at(parameter: float | Ramp, step: Step) -> float:
    """A hyper-parameter's value at a step."""
    if isinstance(parameter, Ramp):
        done = {"steps": step.ramp, "epsilon": step.reached, "training": step.progress}[parameter.along]
        return parameter.start + (parameter.end - parameter.start) * min(1.0, done / parameter.over)
    return parameter


def check_least(name: str, parameter: float | Ramp, least: float = 0.0) -> None:
    ends = (parameter.start, parameter.end) if isinstance(parameter, Ramp) else (parameter,)
    check(
        all(least <= end for end in ends), name, parameter, f"a number >= {least:g}, or {{start, end}} along the ramp"
    )


def check_share(name: str, parameter: float | Ramp) -> None:
    ends = (parameter.start, parameter.end) if isinstance(parameter, Ramp) else (parameter,)
    check(all(0 <= end <= 1 for end in ends), name, parameter, "a number in [0, 1], or {start, end} along the ramp")


@dataclass(frozen=True)
class Loss(Component):
    """One training method. Subclasses are one file each."""

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        """State kept across batches, by name, for images of ``shape`` and so many classes; none by default."""
        return {}

    def files(self) -> Mapping[str, str]:
        """The sha256, by field, of the files that the loss learns from besides the data, such as a teacher's weights; a
        run records them, and resumes only with the same files.

        Raises:
            InputError: one of them cannot be read.
        """
        return {}

    def check_model(self, model: nn.Module) -> None:
        """Refuse, before anything is written, a model that this loss cannot train.

        Raises:
            InputError: names what the model lacks, or the file of the loss that does not fit.
        """

    def check_ball(self, ball: PerturbationSet) -> None:
        """Refuse, before anything is written, a perturbation set for which this loss has no formula.

        Raises:
            InputError: names the sets that are accepted.
        """

    @property
    def replays(self) -> int:
        """The number of weight updates made with each batch."""
        return 1

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, step: Step) -> LossTerms:
        """Compute the loss of one batch; the model is in training mode.

        Raises:
            InputError: logits of fewer than two classes; labels (checked on the CPU alone) outside of the classes.
        """
