"""What passes between rooms during one step: the batch, the step's circumstances, declared state, other processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .bounds import PerturbationSet
from .labels import as_labels
from .noise import Noise, key_of


@dataclass(frozen=True)
class Augmentation:
    """The crop and flip that were drawn for each sample of a batch.

    Args:
        top, left: (B,) int64 offset of the crop in the padded image.
        flip: (B,) bool, mirrored left to right.
        pad: pixels that were padded on each side.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    pad: int = 0

    def rows_and_columns(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(B, H) and (B, W): for each pixel of the augmented image its row and its column in the padded one."""
        device = self.top.device
        columns = torch.arange(width, device=device).expand(len(self.left), -1)
        columns = self.left[:, None] + torch.where(self.flip[:, None], width - 1 - columns, columns)
        return self.top[:, None] + torch.arange(height, device=device), columns


@dataclass(frozen=True)
class Batch:
    """Images ready for the model, on its device.

    Args:
        images: (B, C, H, W) in [0, 1], after augmentation.
        labels: (B,) int64; other whole numbers, lists and arrays are converted, whatever else is given is an
            ``InputError``. Whether they are classes shows where logits are.
        index: (B,) int64, each sample's number in its split.
        augmentation: what was drawn, or None where images are as stored.
        targets: (B, K) soft labels, rows that sum to 1, which cross-entropies take instead of ``labels`` where a loss
            has set them; else None.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    augmentation: Augmentation | None = None
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", as_labels(self.labels, len(self.images), device=self.images.device))

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: slice) -> Batch:
        drawn = self.augmentation
        if drawn is not None:
            drawn = Augmentation(drawn.top[rows], drawn.left[rows], drawn.flip[rows], drawn.pad)
        targets = None if self.targets is None else self.targets[rows]
        return Batch(self.images[rows], self.labels[rows], self.index[rows], drawn, targets)


@dataclass(frozen=True)
class StateSpec:
    """State that a loss or an attack keeps across batches. It is allocated, checkpointed and resumed for it.

    Args:
        key: what a row belongs to: a ``sample`` of the training split (as many rows as samples), a
            ``position`` in the batch (as many rows as the batch size) or the ``run`` (one row).
        shape: of one row.
        dtype, fill: of every entry at the start.
        padded: whether a row is an image in the frame of the padded image that crops are taken of: its last two
            sides are then longer by what the training pads.
    """

    key: Literal["sample", "position", "run"]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
    padded: bool = False

    def allocate(self, samples: int, batch_size: int, device: torch.device, pad: int = 0) -> Tensor:
        rows = {"sample": samples, "position": batch_size, "run": 1}[self.key]
        shape = self.shape
        if self.padded:
            shape = (*shape[:-2], shape[-2] + 2 * pad, shape[-1] + 2 * pad)
        return torch.full((rows, *shape), self.fill, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class State:
    """The tensors that were declared, by name. ``rows`` says which rows belong to the batch at hand."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    specs: Mapping[str, StateSpec] = field(default_factory=dict)
    offset: int = 0

    def rows(self, name: str, batch: Batch) -> Tensor:
        match self.specs[name].key:
            case "sample":
                return batch.index
            case "position":
                return torch.arange(self.offset, self.offset + len(batch), device=batch.index.device)
            case _:
                return torch.zeros(1, dtype=torch.int64, device=batch.index.device)

    def read(self, name: str, batch: Batch) -> Tensor:
        """(B, *shape), or (1, *shape) for the run's."""
        return self.tensors[name][self.rows(name, batch)]

    def write(self, name: str, batch: Batch, value: Tensor) -> None:
        self.tensors[name][self.rows(name, batch)] = value.detach().to(self.tensors[name].dtype)


class Exchange(ABC):
    """How the processes that share the steps of a training make one gradient and one set of figures of theirs.

    Every process makes the same calls in the same order.
    """

    @abstractmethod
    def samples(self, count: int) -> int:
        """The size of the global batch, of which this process has ``count`` samples."""

    @abstractmethod
    def gradient(self, parameters: Sequence[nn.Parameter], figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave in ``.grad`` the sum over all processes. Called once for every gradient that is taken, when this
        process' backward passes are done and before anything is made of it: before it is clipped, weights are moved
        along it, or the optimiser steps. Does not look at a value: no step waits for its device here.

        Args:
            figures: 0-d; each this process' share of a mean over the global batch.
        Returns:
            ``figures``, summed over all processes.
        """


class Alone(Exchange):
    """One process has the whole batch: everything stays as it is."""

    def samples(self, count: int) -> int:
        return count

    def gradient(self, parameters: Sequence[nn.Parameter], figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(figures)


ALONE = Alone()


@dataclass(frozen=True)
class Step:
    """The circumstances of one step.

    Args:
        ball: this step's perturbation set.
        epsilon, epsilon_max: its radius now and at the end of the ramp, 0-d tensors in pixel units.
        ramp: share of the epsilon ramp that is done, in [0, 1]; progress: share of all training steps.
        epoch, epochs: the one at hand, from 0 on, and how many there are.
        reached: epsilon over epsilon_max, known without asking the device.
        clean: whether epsilon is still 0, known without asking the device.
        noise: keyed random numbers for the batch's samples.
        state: what the loss and its attack declared.
        exchange: what this process shares with others that train the same model.
    """

    ball: PerturbationSet
    epsilon: Tensor
    epsilon_max: Tensor
    progress: float
    noise: Noise
    state: State = field(default_factory=State)
    ramp: float = 1.0
    reached: float = 1.0
    clean: bool = False
    epoch: int = 0
    epochs: int = 1
    exchange: Exchange = ALONE

    def part(self, rows: slice) -> Step:
        """The step of some of the batch's samples: their noise, and their state."""
        noise = replace(self.noise, positions=self.noise.positions[rows])
        return replace(self, noise=noise, state=replace(self.state, offset=self.state.offset + (rows.start or 0)))

    def again(self, name: int | str) -> Step:
        """The same step with other random numbers."""
        return replace(self, noise=replace(self.noise, key=key_of(self.noise.key, name)))

    @classmethod
    def evaluation(cls, ball: PerturbationSet, noise: Noise) -> Step:
        """The step of an evaluation: full radius, training over."""
        epsilon = torch.as_tensor(ball.epsilon, device=noise.positions.device)
        return cls(ball, epsilon, epsilon, 1.0, noise)
