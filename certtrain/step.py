"""Values of one training step: the batch, the settings of the step, declared state, the exchange between processes."""

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
    """Crop and flip drawn for each sample of a batch.

    Args:
        top, left: (B,) int64 offset of the crop in the padded image.
        flip: (B,) bool, true for images mirrored left to right.
        pad: padding on each side, in pixels.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    pad: int = 0

    def rows_and_columns(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(B, H) and (B, W): row and column in the padded image of each pixel of the augmented one."""
        device = self.top.device
        columns = torch.arange(width, device=device).expand(len(self.left), -1)
        columns = self.left[:, None] + torch.where(self.flip[:, None], width - 1 - columns, columns)
        return self.top[:, None] + torch.arange(height, device=device), columns


@dataclass(frozen=True)
class Batch:
    """Images ready for the model, on its device.

    Args:
        images: (B, C, H, W) in [0, 1], after augmentation.
        labels: (B,) int64; other whole numbers, lists and arrays are converted, anything else is an ``InputError``.
            Their range is checked against the logits.
        index: (B,) int64, number of each sample in its split.
        augmentation: crop and flip drawn, or None for images as stored.
        targets: (B, K) soft labels set by a loss, rows that sum to 1, which cross-entropies use instead of ``labels``;
            else None.
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
    """State that a loss or attack keeps across batches; the training loop allocates, checkpoints and resumes it.

    Args:
        key: owner of a row: a ``sample`` of the training split (as many rows as samples), a
            ``position`` in the batch (as many rows as the batch size) or the ``run`` (one row).
        shape: shape of one row.
        dtype, fill: type and initial value of all entries.
        padded: whether a row covers the padded image from which crops are taken; its last two dimensions are then
            longer by the padding on both sides.
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
    """The declared tensors by name, read and written by the rows of a batch."""

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
        """The rows of the batch, (B, *shape), or (1, *shape) for state of the run."""
        return self.tensors[name][self.rows(name, batch)]

    def write(self, name: str, batch: Batch, value: Tensor) -> None:
        self.tensors[name][self.rows(name, batch)] = value.detach().to(self.tensors[name].dtype)


class Exchange(ABC):
    """Sums of gradients and figures over the processes that share each step of a training.

    Every process makes the same calls in the same order.
    """

    @abstractmethod
    def samples(self, count: int) -> int:
        """The size of the global batch, of which this process has ``count`` samples."""

    @abstractmethod
    def gradient(self, parameters: Sequence[nn.Parameter], figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replace ``.grad`` by its sum over all processes.

        Called once for every gradient, after this process' backward passes and before the gradient is clipped or used.
        Reads no values, so that the step does not wait for its device.

        Args:
            figures: 0-d tensors, each this process' share of a mean over the global batch.
        Returns:
            ``figures``, summed over all processes.
        """


class SingleProcess(Exchange):
    """Exchange of a training in one process, which has the whole batch: nothing changes."""

    def samples(self, count: int) -> int:
        return count

    def gradient(self, parameters: Sequence[nn.Parameter], figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(figures)


SINGLE_PROCESS = SingleProcess()


@dataclass(frozen=True)
class Step:
    """The settings of one step.

    Args:
        ball: this step's perturbation set.
        epsilon, epsilon_max: radius now and at the end of the ramp, 0-d tensors in pixel units.
        ramp: share of the epsilon ramp that is done, in [0, 1]; progress: share of all training steps that is done.
        epoch, epochs: current epoch, from 0 on, and number of epochs.
        reached: epsilon / epsilon_max, known without reading from the device.
        clean: whether epsilon is 0, known without reading from the device.
        noise: keyed random numbers for the batch's samples.
        state: the state declared by the loss and its attack.
        exchange: exchange with the other processes that train the same model.
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
    exchange: Exchange = SINGLE_PROCESS

    def part(self, rows: slice) -> Step:
        """The step restricted to some samples of the batch: their noise and state."""
        noise = replace(self.noise, positions=self.noise.positions[rows])
        return replace(self, noise=noise, state=replace(self.state, offset=self.state.offset + (rows.start or 0)))

    def again(self, name: int | str) -> Step:
        """The same step with other random numbers, keyed by ``name``."""
        return replace(self, noise=replace(self.noise, key=key_of(self.noise.key, name)))

    @classmethod
    def evaluation(cls, ball: PerturbationSet, noise: Noise) -> Step:
        """The step of an evaluation: full radius, training done."""
        epsilon = torch.as_tensor(ball.epsilon, device=noise.positions.device)
        return cls(ball, epsilon, epsilon, 1.0, noise)
