"""What a batch may cost: seconds, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..bounds.clock import now

T = TypeVar("T")

TOTAL_TIMEOUT = "total timeout"
"""The reason of an image that was left because the whole sweep's time was up: it has had less than its own limit."""

_SAID = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Limits:
    """When to give up.

    Args:
        seconds: of an image: its share of the time of the batches that it is in, over all stages.
        deadline: on the clock of ``time.perf_counter``, of the whole sweep.
        end: on the same clock, of this batch: as many times ``seconds`` as it has images, from its beginning on.
    """

    seconds: float = math.inf
    deadline: float = math.inf
    end: float = math.inf

    def of(self, images: int) -> Limits:
        """Of a batch that begins now."""
        return replace(self, end=now() + images * self.seconds) if images else self

    def exceeded(self, spent: float) -> str | None:
        """Why an image that has had so many seconds gets no further stage, else None."""
        if now() >= self.deadline:
            return TOTAL_TIMEOUT
        return "timeout" if spent >= self.seconds or now() >= self.end else None

    def share(self, spent: float, images: int) -> tuple[float, str]:
        """Seconds that each of some images may still have, and the reason if they are not enough."""
        own = min(self.seconds - spent, (self.end - now()) / images)
        together = (self.deadline - now()) / images
        return (own, "timeout") if own <= together else (max(0.0, together), TOTAL_TIMEOUT)


def within_memory(action: Callable[[], T]) -> T | None:
    """What ``action`` returns; None where it ran out of memory, on whichever device and however torch says so."""
    try:
        return action()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():  # after the except clause: until then the error's frames hold their tensors
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in _SAID)
