"""Weights that a file stores in parts: pruned ones, weight_norm and spectral_norm, old or parametrised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod

from torch import Tensor

PARAMETRISED = re.compile(r"(.*\.|)parametrizations\.([^.]+)\.(original[01]?)$")


def folded(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Compute the weights of known reparametrisations as their layers do in evaluation mode.

    Each weight takes the place of its first part. Computed in float64, stored in the file's dtype; other tensors are
    unchanged.

    Returns:
        the tensors, and the reparametrisations applied, by the names of the weights.

    Sources: ``torch.nn.utils.prune``, ``weight_norm`` (arXiv 1602.07868), ``spectral_norm`` (arXiv 1802.05957).
    """
    done: dict[str, str] = {}
    while True:
        step = next(_steps(tensors), None)
        if step is None:
            return tensors, done
        name, value, parts, how = step
        place = min(list(tensors).index(part) for part in parts)
        left = [(key, tensor) for key, tensor in tensors.items() if key not in parts]
        ahead = sum(key not in parts for key in list(tensors)[:place])
        dtype = tensors[parts[0]].dtype
        tensors = dict([*left[:ahead], (name, value.to(dtype)), *left[ahead:]])
        before = [done.pop(part) for part in parts if part in done]
        done[name] = ", ".join([*before, how])


Step = tuple[str, Tensor, list[str], str]


def _steps(tensors: dict[str, Tensor]) -> Iterator[Step]:
    for name in tensors:
        stem, found = name.rpartition("_")[0], PARAMETRISED.match(name)
        if name.endswith("_orig"):
            yield from _pruned(tensors, stem)
            yield from _spectral(tensors, stem, name, f"{stem}_u", f"{stem}_v")
        elif name.endswith("_g"):
            yield from _normalised(tensors, stem, name, f"{stem}_v")
        elif found:
            yield from _parametrised(tensors, name, *found.groups())


def _pruned(tensors: dict[str, Tensor], stem: str) -> Iterator[Step]:
    parts = [f"{stem}_orig", f"{stem}_mask"]
    if all(part in tensors for part in parts) and tensors[parts[0]].shape == tensors[parts[1]].shape:
        yield stem, tensors[parts[0]].double() * tensors[parts[1]].double(), parts, "pruned"


def _normalised(tensors: dict[str, Tensor], stem: str, size: str, direction: str) -> Iterator[Step]:
    """size * direction / |direction|, the norm along the dimensions in which ``size`` has one entry."""
    if size not in tensors or direction not in tensors:
        return
    g, v = tensors[size].double(), tensors[direction].double()
    along = [place for place in range(v.ndim) if g.ndim == 0 or (g.ndim == v.ndim and g.shape[place] == 1)]
    one = g.ndim == 0 or (g.ndim == v.ndim and all(n in (1, m) for n, m in zip(g.shape, v.shape)))
    if one and along:
        yield stem, v * (g / v.square().sum(along, keepdim=True).sqrt()), [direction, size], "weight_norm"


def _spectral(tensors: dict[str, Tensor], stem: str, original: str, left: str, right: str) -> Iterator[Step]:
    """original / (u · W v), with u and v of the power iteration as stored."""
    if not all(name in tensors for name in (original, left, right)):
        return
    w, u, v = (tensors[name].double() for name in (original, left, right))
    if w.ndim > 1 and u.shape == w.shape[:1] and v.shape == (prod(w.shape[1:]),):
        yield stem, w / (u @ (w.flatten(1) @ v)), [original, left, right], "spectral_norm"


def _parametrised(tensors: dict[str, Tensor], name: str, layer: str, tensor: str, role: str) -> Iterator[Step]:
    """Apply all parametrisations of a tensor in the order of their numbers; nothing unless all of them are known.

    A last one without tensors leaves no trace in a file.
    """
    stem = f"{layer}parametrizations.{tensor}."
    if role == "original1":
        return
    value, parts, how, number = tensors[name], [name], [], 0
    if role == "original0":
        found = next(_normalised(tensors, "", name, f"{stem}original1"), None)
        if found is None:
            return
        _, value, parts, kind = found
        how, number = [kind], 1
    while own := {key for key in tensors if key.startswith(f"{stem}{number}.")}:
        left, right = f"{stem}{number}._u", f"{stem}{number}._v"
        found = next(_spectral({**tensors, name: value}, stem, name, left, right), None)
        if found is None or own != {left, right}:
            return
        value, parts, how, number = found[1], [*parts, left, right], [*how, found[3]], number + 1
    if how and all(key in parts for key in tensors if key.startswith(stem)):
        yield f"{layer}{tensor}", value, parts, ", ".join(how)
