"""A frozen teacher network, of the student's architecture, that a loss learns from."""

import copy
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import safetensors
import safetensors.torch
from torch import nn

from ..errors import InputError
from ..run_folder import sha256

ACCEPTED = "accepted: weights of the same architecture, as a run's model.safetensors"
_LOADED: WeakKeyDictionary[nn.Module, tuple[Path | None, nn.Module]] = WeakKeyDictionary()


def load_teacher(model: nn.Module, path: Path | None) -> nn.Module:
    """A copy of ``model`` with a teacher's weights: frozen, in evaluation mode, on the model's device.

    The file is read once for each model.

    Args:
        path: a run's folder, or a ``.safetensors`` file.
    Raises:
        InputError: there are no weights of the same architecture.
    """
    found = _LOADED.get(model)
    if found is None or found[0] != path:
        found = _LOADED[model] = (path, _read(model, file_of(path)))
    return found[1].to(next(model.parameters()).device)  # the model may have moved since


def fingerprint(path: Path | None) -> Mapping[str, str]:
    """The entry of a teacher in ``Loss.files``.

    Raises:
        InputError: there are no weights.
    """
    return {"teacher": sha256(file_of(path))}


def file_of(path: Path | None) -> Path:
    """The file with a teacher's weights.

    Raises:
        InputError: there is none.
    """
    if path is None:
        raise InputError("loss.teacher: found none; accepted: a run's folder, or a .safetensors file")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"loss.teacher: {file}: cannot be read (no such file); {ACCEPTED}")
    return file


def _read(model: nn.Module, file: Path) -> nn.Module:
    try:
        weights = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"loss.teacher: {file}: cannot be read ({error}); {ACCEPTED}") from error
    teacher = copy.deepcopy(model)
    try:
        teacher.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"loss.teacher: {file}: {str(error).splitlines()[-1].strip()}; {ACCEPTED}") from error
    return teacher.eval().requires_grad_(False)
