"""The checkpoint ``resume.pt``, from which a run continues bit for bit. Written atomically, read without code."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..run_folder import write_atomically

FORMAT = 1


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a nested mapping of tensors, numbers, text and lists, with its fingerprint."""
    whole = {"format": FORMAT, "fingerprint": fingerprint(content), "content": dict(content)}
    buffer = io.BytesIO()  # torch's own writer to a file does not name the error
    torch.save(whole, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint written by ``save``.

    Raises:
        InputError: the file is truncated, changed, of another format or not a checkpoint.
    """
    try:
        whole = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(whole, dict):
            raise ValueError(f"found {type(whole).__name__}")
        found = whole["fingerprint"], whole["format"]
        content = whole["content"]
    except Exception as error:  # torch and pickle raise many kinds for a broken file
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}: cannot be read as a checkpoint ({reason}); accepted: the file as written") from error
    if found != (fingerprint(content), FORMAT):
        raise InputError(f"{path}: its content does not match its fingerprint; accepted: the file as written")
    return content


def fingerprint(content: Any) -> str:
    """The sha256 of a nested structure, including the place, type and shape of each value."""
    digest = hashlib.sha256()

    def update(place: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                update(f"{place}/{key!r}", item)
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                update(f"{place}/{number}", item)
        elif isinstance(value, Tensor):
            digest.update(f"{place}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{place}={value!r}".encode())

    update("", content)
    return digest.hexdigest()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Load weights into a model of the same architecture.

    Raises:
        InputError: a tensor is missing, unknown or of another shape; names the first one.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{where}: {name}: found {found.get(name, 'nothing')}; accepted: {wanted.get(name, 'nothing')} "
                "(the checkpoint is of another architecture)"
            )
    model.load_state_dict(weights)
