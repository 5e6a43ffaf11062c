"""Networks that give some of their inputs beside their outputs, for properties that tie inputs to outputs or to each
other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..bounds.network import NetworkModule
from ..bounds.operations import Concat, Selection
from .joint_network import JointNetwork
from .stage import Replay


def with_inputs(network: JointNetwork, tied: Sequence[int]) -> JointNetwork:
    """The network with the inputs ``tied``, by their numbers, behind its outputs."""
    operations, index = list(network.module.operations), torch.tensor(tied)

    def pick(x: Tensor) -> Tensor:
        return x.flatten(1).gather(1, index.to(x.device).expand(x.shape[0], -1))

    last = len(operations)
    operations += [Selection("tied", (0,), pick), Concat("beside", (last - 1, last), 1)]
    return replace(network, module=NetworkModule(operations), outputs=network.outputs + len(tied))


def replay_with_inputs(replay: Replay, tied: Sequence[int]) -> Replay:
    """The same for a replay."""

    def beside(image: Tensor) -> Tensor:
        outputs = replay(image)
        inputs = image.flatten()[torch.tensor(tied)].to(outputs)
        return torch.cat([outputs, inputs.expand(len(outputs), -1)], 1)

    return beside
