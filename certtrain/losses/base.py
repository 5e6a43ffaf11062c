"""What every loss is: a frozen dataclass whose fields are its hyper-parameters and its YAML section."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

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
    """A hyper-parameter that moves from ``start`` to ``end`` along the epsilon ramp.

    Args:
        along: linearly in the ramp's ``steps``, or in ``epsilon`` itself, which a smoothed schedule bends.
    """

    start: float
    end: float
    along: Literal["steps", "epsilon"] = "steps"


def value_at(parameter: float | Ramp, step: Step) -> float:
    """A hyper-parameter's value at a step."""
    if isinstance(parameter, Ramp):
        share = step.ramp if parameter.along == "steps" else step.reached
        return parameter.start + (parameter.end - parameter.start) * share
    return parameter


def check_share(name: str, parameter: float | Ramp) -> None:
    ends = (parameter.start, parameter.end) if isinstance(parameter, Ramp) else (parameter,)
    check(all(0 <= end <= 1 for end in ends), name, parameter, "a number in [0, 1], or {start, end} along the ramp")


@dataclass(frozen=True)
class Loss(Component):
    """One training method. Subclasses are one file each."""

    def declare_state(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        """State kept across batches, by name, for images of ``shape``; none by default."""
        return {}

    def files(self) -> Mapping[str, str]:
        """sha256 of files beside the data that it learns from, by field; a run records them, and resumes with the same
        alone.

        Raises:
            InputError: one of them cannot be read.
        """
        return {}

    def check_model(self, model: nn.Module) -> None:
        """Refuse, before anything is written, a model that this loss cannot train.

        Raises:
            InputError: says what the model lacks, or which other file of the loss.
        """

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, step: Step) -> LossTerms:
        """The loss of one batch; the model is in training mode."""
