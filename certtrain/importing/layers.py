"""A state dict as a list of layers, identified by the kind, order and shape of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import InputError

Kind = Literal["normalisation", "convolution", "linear", "batch norm"]
NORM = ("weight", "bias", "running_mean", "running_var")
SPELLINGS = {"mu": "mean", "means": "mean", "sigma": "std", "stds": "std"}
ACCEPTED = "accepted: convolutions, linear layers, batch norms, and mean and std of a normalisation before them"


@dataclass(frozen=True)
class Layer:
    """One layer of a state dict.

    Args:
        kind: of layer.
        names: the tensors' names in the file, by role: weight, bias, running_mean, running_var, mean, std.
        tensors: the tensors, by role.
    """

    kind: Kind
    names: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {role: tuple(tensor.shape) for role, tensor in self.tensors.items()}

    def __str__(self) -> str:
        return f"{self.kind} {' '.join(map(str, list(self.shapes.values())[:1]))}"


def layers_of(tensors: Mapping[str, Tensor], where: str) -> list[Layer]:
    """Group tensors into layers, in the order of the tensors.

    Two naming schemes are supported. torch's: the layer's name, then the tensor's, ``layers.0.weight``. auto_LiRPA's,
    used by CTRAIN: numbered nodes ``/1.param``, ``/5.buffer``, whose roles follow from their order and number of
    dimensions.

    Args:
        where: the file's name, for messages.
    Raises:
        InputError: names a tensor that belongs to no layer of a known kind.
    """
    groups = _numbered(tensors) if _is_numbered(tensors) else _named(tensors)
    layers = []
    for group in groups:
        kind = _kind({role: tensors[name] for role, name in group.items()})
        if kind is None:
            shown = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in group.values())
            raise InputError(f"{where}: found {shown}, which is no layer of a known kind; {ACCEPTED}")
        layers.append(Layer(kind, group, {role: tensors[name] for role, name in group.items()}))
    late = next((layer for layer in layers[1:] if layer.kind == "normalisation"), None)
    if late:
        raise InputError(f"{where}: found the normalisation {late.names['mean']} behind other layers; {ACCEPTED}")
    return layers


def naming(tensors: Mapping[str, Tensor]) -> str:
    return "auto_LiRPA" if _is_numbered(tensors) else "torch"


def _is_numbered(tensors: Mapping[str, Tensor]) -> bool:
    return all(name.rpartition(".")[2] in ("param", "buffer") for name in tensors)


def _named(tensors: Mapping[str, Tensor]) -> list[dict[str, str]]:
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        layer, _, role = name.rpartition(".")
        group = groups.setdefault(layer, {})
        role = SPELLINGS.get(role, role)
        group[role if role not in group else name] = name  # both mean and mu: the second one belongs to nothing
    return list(groups.values())


def _numbered(tensors: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Group auto_LiRPA's numbered tensors.

    Leading buffers are mean and std. Each parameter of two or more dimensions is a layer's weight; of the vectors
    behind it the last two belong to a batch norm if two buffers follow, and a remaining one is the layer's bias.
    """
    names = list(tensors)
    weights = [place for place, name in enumerate(names) if tensors[name].ndim > 1 and name.endswith(".param")]
    first = weights[0] if weights else len(names)
    groups = [dict(zip(("mean", "std", *names), names[:first]))] if first else []
    for start, stop in zip(weights, [*weights[1:], len(names)]):
        vectors = [name for name in names[start + 1 : stop] if name.endswith(".param")]
        buffers = [name for name in names[start + 1 : stop] if name.endswith(".buffer")]
        own = vectors[: len(vectors) - 2] if buffers else vectors
        groups.append(dict(zip(("weight", "bias", *names), [names[start], *own])))
        if buffers:
            groups.append(dict(zip((*NORM, *names), [*vectors[len(own) :], *buffers])))
    return groups


def _kind(tensors: Mapping[str, Tensor]) -> Kind | None:
    """The kind of layer with these tensors; None where roles or shapes fit none."""
    roles = set(tensors)
    if roles == {"mean", "std"}:
        return "normalisation" if all(_per_channel(tensor) for tensor in tensors.values()) else None
    if "weight" not in roles:
        return None
    features = tensors["weight"].shape[:1]
    vectors = all(tensor.shape == features for role, tensor in tensors.items() if role != "weight")
    if roles == set(NORM) and tensors["weight"].ndim == 1 and vectors:
        return "batch norm"
    if roles <= {"weight", "bias"} and vectors and tensors["weight"].ndim in (2, 4):
        return "linear" if tensors["weight"].ndim == 2 else "convolution"
    return None


def _per_channel(tensor: Tensor) -> bool:
    """Whether the shape is (C,), (1, C, 1, 1) or the like, or one number."""
    return 0 < tensor.numel() == max(tensor.shape, default=1)
