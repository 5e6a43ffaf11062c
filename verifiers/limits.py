"""Limits of time and memory for a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..bounds.clock import now

T = TypeVar("T")

TOTAL_TIMEOUT = "total timeout"
"""Reason of an image left undecided because the sweep's total time was up, before its own limit."""

_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Limits:
    """Time limits of a sweep, of a batch and of an image.

    Args:
        seconds: limit of one image, over all stages; an image is charged its share of each batch's time.
        deadline: end of the whole sweep, by ``time.perf_counter``.
        end: end of this batch, by the same clock: ``seconds`` times its number of images after its start.
    """

    seconds: float = math.inf
    deadline: float = math.inf
    end: float = math.inf

    def of(self, images: int) -> Limits:
        """The limits of a batch of so many images that begins now."""
        return replace(self, end=now() + images * self.seconds) if images else self

    def exceeded(self, spent: float) -> str | None:
        """Reason why an image that has used ``spent`` seconds gets no further stage; None if it does."""
        if now() >= self.deadline:
            return TOTAL_TIMEOUT
        return "timeout" if spent >= self.seconds or now() >= self.end else None

    def share(self, spent: float, images: int) -> tuple[float, str]:
        """(seconds, reason): seconds left for each of ``images`` images that used ``spent`` each; the reason to give if
        they are not enough."""
        own = min(self.seconds - spent, (self.end - now()) / images)
        together = (self.deadline - now()) / images
        return (own, "timeout") if own <= together else (max(0.0, together), TOTAL_TIMEOUT)


def within_memory(action: Callable[[], T]) -> T | None:
    """Run ``action`` and return its result, or None where it ran out of memory on any device."""
    try:
        return action()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():  # after the except clause: until then the error's frames hold their tensors
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, by its class or by the message of torch or the system."""
    own_class = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return own_class or any(words in str(error) for words in _MESSAGES)
