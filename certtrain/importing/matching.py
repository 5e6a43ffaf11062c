"""Match a list of layers with an architecture by kind, order and shape, never by name alone."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import InputError
from ..models import Architecture, Cnn3, Cnn5, Cnn7, Gowal, Mlp, SmallCnn
from .layers import Layer, layers_of
from .reading import IGNORED

KNOWN: dict[str, type[Architecture]] = {
    kind.__name__.lower(): kind for kind in (Cnn3, Cnn5, Cnn7, Gowal, Mlp, SmallCnn)
}  # fmt: skip
"""The architectures that can be imported: those whose layers are stored in the order of computation. Residual networks
are not among them: files differ in the place of a shortcut, and two convolutions of one shape could be exchanged."""


def known_architecture(name: str) -> type[Architecture]:
    """The architecture with that name, in upper or lower case.

    Raises:
        InputError: no architecture of that name can be imported.
    """
    if name.lower() not in KNOWN:
        accepted = ", ".join(kind.__name__ for kind in KNOWN.values())
        raise InputError(f"--architecture: found {name!r}; accepted: {accepted}")
    return KNOWN[name.lower()]


def expected_layers(architecture: Architecture, shape: tuple[int, ...], classes: int) -> list[Layer]:
    """The architecture's layers without its normalisation, as shapes (tensors on the meta device).

    Raises:
        InputError: the architecture does not take such images.
    """
    with torch.device("meta"):
        model = dataclasses.replace(architecture, mean=(), std=()).build(shape, classes)
    tensors = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[2] not in IGNORED}
    return layers_of(tensors, type(architecture).__name__)


def mismatch(found: list[Layer], wanted: list[Layer]) -> tuple[int, str] | None:
    """The number of layers that fit before the first mismatch, and its description; None where all fit."""
    for place, (one, other) in enumerate(zip(found, wanted)):
        if one.kind != other.kind:
            return place, f"{next(iter(one.names.values()))} belongs to a {one}, expected a {other}"
        for role in {**one.shapes, **other.shapes}:
            here, there = one.shapes.get(role, "missing"), other.shapes.get(role, "none")
            if here != there:
                name = one.names.get(role, f"the {role} of {next(iter(one.names.values()))}")
                return place, f"{name} is {here}, expected {there}"
    fits = min(len(found), len(wanted))
    if len(found) > fits:
        return fits, f"{next(iter(found[fits].names.values()))} belongs to a {found[fits]}, expected no further layer"
    if len(wanted) > fits:
        last = next(iter(found[-1].names.values()))
        return fits, f"nothing follows {last}, expected a {wanted[fits]}"
    return None


def fit(
    found: list[Layer], architecture: Architecture, shape: tuple[int, ...], classes: int, where: str
) -> list[Layer]:
    """The architecture's layers, checked to have the kinds and shapes of those found.

    Raises:
        InputError: names the first tensor that does not fit, and the architecture that fits or is nearest.
    """
    wanted = expected_layers(architecture, shape, classes)
    wrong = mismatch(found, wanted)
    if wrong is None:
        return wanted
    images = f"images of {'×'.join(map(str, shape))} and {classes} classes"
    nearest = _nearest(found, shape, classes)
    if nearest[0].wrong is None:
        raise InputError(
            f"{where}: found no {type(architecture).__name__} as asked for, for {images}: {wrong[1]}; "
            f"accepted: {nearest[0].words}, which fits"
        )
    raise InputError(
        f"{where}: fits no known architecture for {images}; nearest: {' or '.join(near.words for near in nearest)}, "
        f"but {nearest[0].wrong[1]}; accepted: a {', '.join(kind.__name__ for kind in KNOWN.values())} of any width"
    )


@dataclasses.dataclass(frozen=True)
class _Candidate:
    architecture: Architecture
    wrong: tuple[int, str] | None
    lengths: int  # difference between the numbers of layers

    @property
    def distance(self) -> tuple[int, int]:
        return (-self.wrong[0] if self.wrong else -1_000_000), self.lengths

    @property
    def words(self) -> str:
        """The command-line options for this architecture."""
        fields = [field for field in dataclasses.fields(self.architecture) if field.name not in ("mean", "std")]
        changed = [(field.name, getattr(self.architecture, field.name)) for field in fields
                   if getattr(self.architecture, field.name) != field.default]  # fmt: skip
        options = [f"--model.{name} {_yaml(value)}" for name, value in changed]
        return " ".join([f"--architecture {type(self.architecture).__name__}", *options])


def _nearest(found: list[Layer], shape: tuple[int, ...], classes: int) -> list[_Candidate]:
    """The nearest candidates, at most one of each architecture, with the shortest options."""
    candidates = []
    for architecture in _variants(found):
        with contextlib.suppress(InputError):  # it does not take such images
            wanted = expected_layers(architecture, shape, classes)
            candidates.append(_Candidate(architecture, mismatch(found, wanted), abs(len(found) - len(wanted))))
    best = min(candidate.distance for candidate in candidates)
    near = sorted((c for c in candidates if c.distance == best), key=lambda candidate: len(candidate.words))
    return list({type(candidate.architecture): candidate for candidate in reversed(near)}.values())[::-1]


def _variants(found: list[Layer]) -> Iterator[Architecture]:
    """The known architectures in the widths suggested by the file, with the published variants of each."""
    features = [layer.shapes["weight"][0] for layer in found[:-1] if layer.kind == "linear"]
    norms = any(layer.kind == "batch norm" for layer in found)
    width = {"width": [found[0].shapes["weight"][0]]} if found[0].kind == "convolution" else {}
    hidden = {"hidden": features[:1]} if features else {}
    fields: dict[type[Architecture], dict[str, list[Any]]] = {
        Cnn7: {**width, **hidden, "batch_norm": [norms], "last_stride": [None, 1], "more": [0, 2, 4]},
        Cnn5: {**width, **hidden, "batch_norm": [norms], "growth": [2, 4]},
        Cnn3: {**width, **hidden, "batch_norm": [norms], "growth": [2, 4]},
        Gowal: {"size": ["small", "medium", "large"]},
        SmallCnn: {**width, **hidden, "batch_norm": [norms]},
        Mlp: {"hidden": [tuple(features)], "batch_norm": [norms]},
    }
    for kind, choices in fields.items():
        for values in itertools.product(*choices.values()):
            yield kind(**dict(zip(choices, values)))


def _yaml(value: object) -> str:
    text = "null" if value is None else str(value).lower()
    return f"'{list(value)}'" if isinstance(value, tuple) else text
