"""The state of a search for each image: what is refuted, given up or in doubt, counts, and shares of the time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..bounds.clock import now
from ..typed import as_floats, as_ints
from .search_statistics import Part, SearchStatistics, measured, part

Violates = Callable[[int, Tensor], bool]
"""Whether an input (*shape) is a counterexample for the image of the given number, by replay."""


class ImageProgress:
    """State of the search for each of B images.

    Per image: ``counterexamples``; ``reasons`` why it was given up; ``doubts`` why one of its leaves was not proved;
    ``seconds`` (B,) float64, its share of the time, and ``spent``, the same by part; ``rounds``, ``splits`` and
    ``children`` as in ``SearchStatistics``; ``closed`` (B,) int64 on the search's device, as there.
    """

    def __init__(self, count: int, timeout: float, violates: Violates, device: torch.device):
        self.timeout, self._violates = timeout, violates
        self.counterexamples: list[Tensor | None] = [None] * count
        self.reasons: list[str | None] = [None] * count
        self.doubts: list[str | None] = [None] * count
        self.seconds = torch.zeros(count, dtype=torch.float64)
        self.spent: dict[Part, Tensor] = {}
        self.rounds, self.splits, self.children = [0] * count, [0] * count, [0] * count
        self.closed = torch.zeros(count, dtype=torch.int64, device=device)

    def statistics(self) -> list[SearchStatistics]:
        """The statistics of each image."""
        seconds: dict[Part, list[float]] = {name: as_floats(shares) for name, shares in self.spent.items()}
        counts = zip(self.rounds, self.splits, self.children, as_ints(self.closed), strict=True)
        found = list[SearchStatistics]()
        for image, four in enumerate(counts):
            own: dict[Part, float] = {name: shares[image] for name, shares in seconds.items() if shares[image] > 0}
            found.append(SearchStatistics(*four, own))
        return found

    def count_splits(self, parents: Tensor, children: Tensor) -> None:
        """Count a round: the images of the subproblems that were split, and of their children."""
        chosen = as_ints(parents)
        for image in set(chosen):
            self.rounds[image] += 1
        for image in chosen:
            self.splits[image] += 1
        for image in as_ints(children):
            self.children[image] += 1

    def is_unfinished(self, image: int) -> bool:
        return self.counterexamples[image] is None and self.reasons[image] is None

    def unfinished(self, images: Tensor) -> Tensor:
        """(P,) bool, whether each of ``images`` (P,) is neither refuted nor given up."""
        every = [self.is_unfinished(image) for image in range(len(self.reasons))]
        return torch.tensor(every, dtype=torch.bool, device=images.device)[images]

    def refute(self, image: int, point: Tensor) -> bool:
        """Replay the candidate ``point`` (*shape) unless the image is refuted; return whether the image is refuted."""
        with part("attack"):
            if self.counterexamples[image] is None and self._violates(image, point):
                self.counterexamples[image] = point
        return self.counterexamples[image] is not None

    def time_left(self, image: int) -> float:
        return self.timeout - float(self.seconds[image])

    @contextmanager
    def charged(self, images: Tensor, name: Part) -> Generator[None]:
        """Charge the time spent inside in equal shares to the images ``images`` (P,) of the subproblems. It counts as
        the part ``name`` where the inside names no other."""
        started, spent = now(), dict[Part, float]()
        try:
            with measured(name) as spent:
                yield
        finally:
            seconds = now() - started
            shares = torch.bincount(images.cpu(), minlength=len(self.seconds)).double() / len(images)
            self.seconds += seconds * shares
            for inner, own in spent.items():
                self.spent[inner] = self.spent.get(inner, torch.zeros_like(shares)) + own * shares
