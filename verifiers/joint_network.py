"""Several networks as one program, side by side on one input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..bounds.network import NetworkModule, with_inputs
from ..bounds.operations import Concat, Input, Operation, Rearrangement
from .onnx_network import OnnxNetwork
from .onnx_scores import Index, shown
from .stage import Replay


@dataclass(frozen=True, eq=False)
class JointNetwork:
    """One network or several, as one program for bounds and verifiers.

    The inputs of several are flattened and concatenated in their order. So are the outputs, which hidden tensors
    follow, in the networks' order as well.

    Args:
        module: (B, *shape) → (B, outputs). shape: of one input: that of the only network, or (N,).
        outputs: number of outputs and hidden tensors' entries.
        dtype: of the module.
        parts: the networks.
    """

    module: NetworkModule
    shape: torch.Size
    outputs: int
    dtype: torch.dtype
    parts: tuple[OnnxNetwork, ...]

    @cached_property
    def indices(self) -> Mapping[int, Index]:
        """The declared outputs, by their numbers, that are indices of the program's scores."""
        found, number = dict[int, Index](), 0
        for part in self.parts:
            if part.chosen is not None:
                found[number] = Index(part.own_outputs, part.chosen)
            number += 1 if part.chosen is not None else part.own_outputs
        return found

    @property
    def declared_outputs(self) -> int:
        """The number of outputs and hidden tensors' entries with an index in place of its scores."""
        return self.outputs - sum(index.size - 1 for index in self.indices.values())

    def shown(self, outputs: Tensor) -> Tensor:
        """The declared outputs of the program's (K,)."""
        return shown(outputs, self.declared_outputs, self.indices)

    def read(self, point: Tensor) -> Tensor:
        """(N,) float64: a point (N,) float64 rounded to the element types of the models' inputs."""
        slices = torch.split(point, [part.shape.numel() for part in self.parts])
        single = [part.inputs[0].kind == np.float32 for part in self.parts]
        return torch.cat([own.float().double() if one else own for own, one in zip(slices, single, strict=True)])

    def replay(self) -> Replay:
        """onnxruntime's runs of all networks, each on its own inputs, as ``replay_session`` gives them of one: one
        input (*shape) → (R, outputs)."""
        return self.parts[0].replay() if len(self.parts) == 1 else _joint_replay(self.parts)


def joint_network(parts: Sequence[OnnxNetwork]) -> JointNetwork:
    """The networks, of one dtype, as one program. The same network may occur several times."""
    if len(parts) == 1:
        (part,) = parts
        return JointNetwork(part.module, part.shape, part.outputs, part.dtype, (part,))
    inputs, shown = (sum(sizes) for sizes in zip(*((part.shape.numel(), part.outputs) for part in parts), strict=True))
    module = NetworkModule(_side_by_side(parts))
    return JointNetwork(module, torch.Size([inputs]), shown, parts[0].dtype, tuple(parts))


def _side_by_side(parts: Sequence[OnnxNetwork]) -> list[Operation]:
    """Operations of all networks, each on its slice of the input."""
    operations: list[Operation] = [Input("inputs", ())]
    ends, hidden, start = list[int](), list[int](), 0

    def append(operation: Operation) -> int:
        operations.append(operation)
        return len(operations) - 1

    for number, part in enumerate(parts):
        size = part.shape.numel()
        place = [append(Rearrangement(f"{number}.inputs", (0,), _slice(start, start + size, part.shape)))]
        for operation in part.module.network.operations[1:]:
            path = f"{number}.{operation.path}"
            moved = with_inputs(replace(operation, path=path), *(place[read] for read in operation.inputs))
            place.append(append(moved))
        end, behind = place[-1], part.outputs - part.own_outputs
        if behind:
            own, flat = part.own_outputs, torch.Size([behind])
            hidden.append(append(Rearrangement(f"{number}.hidden", (end,), _slice(own, part.outputs, flat))))
            end = append(Rearrangement(f"{number}.outputs", (end,), _slice(0, own, torch.Size([own]))))
        ends.append(end)
        start += size
    operations.append(Concat("outputs", (*ends, *hidden), 1))
    return operations


def _slice(first: int, end: int, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """Entries ``first`` to ``end`` of each sample, in a shape."""
    return lambda x: x.flatten(1)[:, first:end].reshape(x.shape[0], *shape)


def _joint_replay(parts: Sequence[OnnxNetwork]) -> Replay:
    """Replays of all networks at once. Where the networks have different numbers of runs, the last of each stands for
    those that it lacks."""
    sessions = {part: part.replay() for part in dict.fromkeys(parts)}
    sizes = [part.shape.numel() for part in parts]

    def replay(image: Tensor) -> Tensor:
        slices = zip(torch.split(image.flatten(), sizes), parts, strict=True)
        each = [sessions[part](own.reshape(part.shape)) for own, part in slices]
        most = max(map(len, each))
        each = [torch.cat([runs, runs[-1:].expand(most - len(runs), -1)]) for runs in each]
        outputs = [runs[:, : part.own_outputs] for runs, part in zip(each, parts, strict=True)]
        hidden = [runs[:, part.own_outputs :] for runs, part in zip(each, parts, strict=True)]
        return torch.cat([*outputs, *hidden], 1)

    return replay
