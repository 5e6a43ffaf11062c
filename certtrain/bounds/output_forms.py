"""Linear forms of a network's outputs, kept in little memory and made dense for a part of them at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


class OutputForms(ABC):
    """R linear forms of K outputs for each of B images.

    ``forms[image, row]`` is (*, K), the forms of these numbers densely: tensors and numbers that index the first two
    dimensions of ``dense()``.
    """

    @staticmethod
    def of(forms: Tensor | OutputForms) -> OutputForms:
        """Forms from a tensor (B, R, K), or the forms themselves."""
        return DenseForms(forms) if isinstance(forms, Tensor) else forms

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(B, R, K)."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """Numbers that the forms of one image take in ``take``, or that their values take, whichever is more."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same forms in another dtype."""

    @abstractmethod
    def take(self, index: Tensor) -> Self:
        """The forms of the images ``index``."""

    @abstractmethod
    def part(self, numbers: Tensor) -> Self:
        """The forms ``numbers`` of every image."""

    @abstractmethod
    def split(self, size: int) -> Iterator[Self]:
        """All forms in order, ``size`` of each image at a time."""

    @abstractmethod
    def dense(self) -> Tensor:
        """(B, R, K)."""

    @abstractmethod
    def __getitem__(self, at: tuple[Tensor | int, Tensor | int]) -> Tensor:
        """The forms at[1] of the images at[0], (*, K)."""

    @abstractmethod
    def values(self, outputs: Tensor) -> Tensor:
        """(B, R) values at outputs (B, K), or (N, K) for the forms of one image, in the outputs' dtype; NaN where an
        output with a coefficient of 0 is not finite."""

    @abstractmethod
    def through(self, weight: Tensor) -> Tensor:
        """The forms as forms of the input of a linear map of ``weight`` (K, *): (B, R, *)."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """(B, K) sums of each image's forms with ``weights`` (B, R)."""


@dataclass(frozen=True, eq=False)
class DenseForms(OutputForms):
    """Any forms, as a tensor (B, R, K)."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def numbers(self) -> int:
        return self.tensor.shape[1:].numel()

    def to(self, dtype: torch.dtype) -> DenseForms:
        return DenseForms(self.tensor.to(dtype))

    def take(self, index: Tensor) -> DenseForms:
        return DenseForms(self.tensor[index])

    def part(self, numbers: Tensor) -> DenseForms:
        return DenseForms(self.tensor[:, numbers])

    def split(self, size: int) -> Iterator[DenseForms]:
        yield from map(DenseForms, torch.split(self.tensor, size, 1))

    def dense(self) -> Tensor:
        return self.tensor

    def __getitem__(self, at: tuple[Tensor | int, Tensor | int]) -> Tensor:
        return self.tensor[at]

    def values(self, outputs: Tensor) -> Tensor:
        return (self.tensor.to(outputs.dtype) @ outputs.unsqueeze(-1)).squeeze(-1)

    def through(self, weight: Tensor) -> Tensor:
        return self.tensor @ weight

    def weighted(self, weights: Tensor) -> Tensor:
        return (weights.unsqueeze(2) * self.tensor).sum(1)


@dataclass(frozen=True, eq=False)
class Margins(OutputForms):
    """Forms e_y - e_j, the lead of an image's label y over another class j, in memory linear in K.

    Args:
        labels: (B,) int64, the label of each image.
        others: (R,) int64, places of the classes j among those other than the label, which are in increasing order.
        classes: K.
        dtype: of dense forms.
    """

    labels: Tensor
    others: Tensor
    classes: int
    dtype: torch.dtype = torch.float32

    @classmethod
    def of_labels(cls, labels: Tensor, classes: int) -> Margins:
        """The forms for all other classes."""
        return cls(labels, torch.arange(classes - 1, device=labels.device), classes)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.labels), len(self.others), self.classes))

    @property
    def numbers(self) -> int:
        return 4 * len(self.others)  # two numbers and one of int64

    def to(self, dtype: torch.dtype) -> Margins:
        return replace(self, dtype=dtype)

    def take(self, index: Tensor) -> Margins:
        return replace(self, labels=self.labels[index])

    def part(self, numbers: Tensor) -> Margins:
        return replace(self, others=self.others[numbers])

    def split(self, size: int) -> Iterator[Margins]:
        for others in torch.split(self.others, size):
            yield replace(self, others=others)

    def dense(self) -> Tensor:
        every = torch.arange(len(self.labels), device=self.labels.device)
        return self[every.unsqueeze(1), torch.arange(len(self.others), device=self.others.device)]

    def __getitem__(self, at: tuple[Tensor | int, Tensor | int]) -> Tensor:
        label, other = self._classes(self.labels[at[0]], self.others[at[1]])
        rows = torch.zeros(*other.shape, self.classes, dtype=self.dtype, device=other.device)
        rows.scatter_(-1, label.expand_as(other).unsqueeze(-1), 1.0)
        return rows.scatter_(-1, other.unsqueeze(-1), -1.0)

    def values(self, outputs: Tensor) -> Tensor:
        label, other = self._classes(self.labels.unsqueeze(1), self.others)
        label, other = label.expand(len(outputs), -1), other.expand(len(outputs), -1)  # gather takes too few rows too
        values, wrong = outputs.gather(1, label) - outputs.gather(1, other), ~outputs.isfinite()
        apart = wrong.sum(1, keepdim=True) > wrong.gather(1, label).int() + wrong.gather(1, other).int()
        return torch.where(apart, torch.nan, values)

    def through(self, weight: Tensor) -> Tensor:
        label, other = self._classes(self.labels.unsqueeze(1), self.others)
        # embedding, not indexing: the gradient of indexing is summed in a thread-dependent order
        own, others = (F.embedding(at, weight.reshape(self.classes, -1)) for at in (label, other))
        return (own - others).reshape(*other.shape, *weight.shape[1:])

    def weighted(self, weights: Tensor) -> Tensor:
        label, other = self._classes(self.labels.unsqueeze(1), self.others)
        sums = weights.new_zeros(len(weights), self.classes)
        return sums.scatter_add(1, other, -weights).scatter_add(1, label, weights.sum(1, keepdim=True))

    @staticmethod
    def _classes(label: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The labels, and the classes at places among the others of each; both broadcast to the classes' shape."""
        return label, other + (other >= label)
