"""The normalisation that an imported network expects: the file's own, the user's, or the published one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..recipe import Config
from .layers import Layer

PUBLISHED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "Cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "TinyImageNet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "ImageNet64": ((0.4815, 0.4578, 0.4082), (0.2153, 0.2111, 0.2121)),
}
"""Mean and std by data set, as applied outside the network by expressive-losses and CTRAIN, inside by CTBench."""

CTRAIN_MNIST = ((0.1307,), (0.3081,))


@dataclass(frozen=True)
class Normalisation:
    """Mean and std of a normalisation, and their source.

    Args:
        mean, std: per channel, or one number for all; empty for none.
        source: a description for ``run.json`` and the user.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def normalisation_of(inside: Layer | None, config: Config, naming: str, channels: int, file: Path) -> Normalisation:
    """The file's own normalisation, which must agree with ``config.model``'s if that has one; else ``config.model``'s;
    else the one published for the data set.

    Args:
        inside: the file's normalisation layer, if it has one.
        naming: ``torch`` or ``auto_LiRPA``: distinguishes projects that normalise MNIST differently.
    Raises:
        InputError: the file's normalisation is invalid, or differs from ``config.model``'s.
    """
    mean, std = config.model.mean, config.model.std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, channels):
            raise InputError(
                f"{name}: found {len(values)} numbers; accepted: {channels}, one per channel, or one for all"
            )
    if inside is None:
        return _outside(config, naming, mean, std)
    own = tuple(_shortest(inside.tensors[role]) for role in ("mean", "std"))
    for role, values in zip(("mean", "std"), own):
        if len(values) not in (1, channels) or (role == "std" and not all(value > 0 for value in values)):
            raise InputError(
                f"{file}: {inside.names[role]}: found {_listed(values)}; accepted: {channels} numbers, one per channel"
                + (", all > 0" if role == "std" else "")
            )
    for role, values, given in zip(("mean", "std"), own, (mean, std)):
        if given and not np.allclose(*np.broadcast_arrays(values, given), rtol=0, atol=1e-6):
            raise InputError(
                f"{role}: found {_listed(given)}, but the file normalises inside, by {_listed(values)}; "
                "accepted: the file's own, or neither mean nor std"
            )
    return Normalisation(own[0], own[1], f"inside the file: {inside.names['mean']} and {inside.names['std']}")


def _outside(config: Config, naming: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
    if mean:
        nothing = set(mean) == {0.0} and set(std) == {1.0}
        return Normalisation((), (), "given: none") if nothing else Normalisation(mean, std, "given")
    data = type(config.data).__name__
    if data in PUBLISHED:
        return Normalisation(*PUBLISHED[data], f"outside the file: published for {data}")
    if data == "Mnist" and naming == "auto_LiRPA":
        return Normalisation(*CTRAIN_MNIST, "outside the file: as CTRAIN, which names tensors so, does on MNIST")
    if data == "Mnist":
        return Normalisation((), (), "none, as expressive-losses does on MNIST (CTRAIN: --mean 0.1307 --std 0.3081)")
    return Normalisation((), (), f"none: nothing is published for {data}")


def _shortest(values: torch.Tensor) -> tuple[float, ...]:
    """The shortest decimals that round to these float32 numbers: 0.4914, not 0.49140000343322754."""
    return tuple(float(str(value)) for value in values.reshape(-1).float().numpy())


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
