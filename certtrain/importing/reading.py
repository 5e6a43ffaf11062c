"""Read a checkpoint's tensors. Nothing in the file is executed or trusted."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import InputError
from .computed import folded
from .layers import SPELLINGS

ACCEPTED = "accepted: a state dict of tensors as torch.save writes it, alone or in a checkpoint, or .safetensors"
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
PREFIXES = ("module", "_orig_mod", "bounded_model", "original_model", "model", "net", "network", "layers")
IGNORED = ("num_batches_tracked", "n_averaged")


@dataclass(frozen=True)
class Tensors:
    """The tensors of a network in a file, and how they were found.

    Args:
        by_name: the tensors, by their names in the file.
        wrapper: dotted path of keys to the state dict, such as ``state_dict``; empty for none.
        other_entries: keys of the checkpoint's other entries (an optimiser's state, the epoch), which are not read.
        ignored: names of bookkeeping tensors that no network's output depends on.
        prefix: the common prefix of all names.
        computed: the reparametrisation (pruned, weight_norm, spectral_norm) of each weight stored in parts, by name.
        ordered: whether the file keeps an order; else names are sorted, a normalisation's first.
    """

    by_name: dict[str, Tensor]
    wrapper: str
    other_entries: tuple[str, ...]
    ignored: tuple[str, ...]
    prefix: str
    computed: dict[str, str]
    ordered: bool


def read(path: Path) -> Tensors:
    """Read a checkpoint by ``torch.load(weights_only=True)``, or a .safetensors file.

    A .safetensors file keeps no order (safetensors 0.8 writes by dtype and name): names are then sorted, with numbers
    in numerical order. Weights that pruning, weight_norm or spectral_norm store in parts are computed.

    Raises:
        InputError: no such file; it cannot be read, or not without running code; it has no state dict; an entry is no
            floating-point tensor, or not finite.
    """
    loaded = _load(path)
    wrapper, other_entries = [], []
    while not _is_state_dict(loaded):
        key = next(
            (key for key in WRAPPERS if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)), ""
        )
        if not key:
            raise InputError(f"{path}: found {_described(loaded)}; {ACCEPTED}")
        other_entries += [str(name) for name in loaded if name != key]
        wrapper.append(key)
        loaded = loaded[key]
    ignored = tuple(name for name in loaded if name.rpartition(".")[2] in IGNORED)
    kept = {name: value for name, value in loaded.items() if name not in ignored}
    for name, value in kept.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            found = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{path}: {name}: found {found}; accepted: tensors of floating-point numbers")
    kept, computed = folded(kept)
    for name, value in kept.items():
        if "parametrizations" in name.split("."):
            raise InputError(
                f"{path}: found {name}, of a parametrisation of no known kind; accepted: weight_norm, "
                "spectral_norm and pruning, or weights after torch.nn.utils.parametrize.remove_parametrizations"
            )
        if not value.float().isfinite().all():
            raise InputError(f"{path}: {name}: found a value that is not finite in float32; accepted: finite weights")
    ordered = path.suffix != ".safetensors"
    prefix = _common_prefix(list(kept))
    return Tensors(kept, ".".join(wrapper), tuple(other_entries), ignored, prefix, computed, ordered)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            return {name: tensors[name] for name in sorted(tensors, key=_place)}
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {ACCEPTED}") from error
    except pickle.UnpicklingError as error:  # torch's message advises to run the file's code
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the Python object {named[1]}" if named else "Python objects"
        raise InputError(f"{path}: found {what}, which is not loaded because it could run code; {ACCEPTED}") from error
    except Exception as error:  # torch, zipfile and safetensors raise many kinds for a broken file
        said = (str(error).splitlines() or [""])[0]
        reason = said if " " in said else "nothing that torch.save writes"  # a bare number, of pickle's own
        raise InputError(f"{path}: cannot be read ({reason}); {ACCEPTED}") from error


def _is_state_dict(value: Any) -> bool:
    """Whether these are named tensors, perhaps among entries that do not belong there and are refused by name later."""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value) and any(
        isinstance(item, Tensor) and item.ndim > 1 for item in value.values()
    )  # fmt: skip


def _described(value: Any) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    return f"a mapping of {', '.join(map(str, list(value)[:8])) or 'nothing'} and no state dict in it"


def _place(name: str) -> tuple[bool, list[tuple[bool, int | str]]]:
    """A sort key that puts the mean and std of a normalisation first."""
    role = name.rpartition(".")[2]
    return SPELLINGS.get(role, role) not in ("mean", "std"), _natural(name)


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """A sort key that puts layers.10 after layers.2."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name) if part]


def _common_prefix(names: list[str]) -> str:
    prefix = ""
    while names:
        first = names[0][len(prefix) :].partition(".")[0]
        longer = f"{prefix}{first}."
        if first not in PREFIXES or not all(name.startswith(longer) for name in names):
            break
        prefix = longer
    return prefix
