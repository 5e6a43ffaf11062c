"""Choice of the backend.

A backend is chosen inside an op, when it runs, so that compiled graphs follow the choice too. It is a module of plain
functions on tensors (listed in ``reference/backend.py``), imported at its first use.
"""

import importlib
import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

ENVIRONMENT = "CERTTRAIN_BACKEND"
_MODULES = {"gpu": ".gpu", "cpu": ".cpu", "reference": ".reference.backend"}
_DTYPES = {
    "gpu": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "cpu": (torch.float32, torch.float64),
}
_chosen: str | None = None


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None if it is available, otherwise the reason why not.

    ``gpu`` is Triton, ``cpu`` numba, ``reference`` plain torch (any device and dtype).
    """
    return {name: _missing(name) for name in _MODULES}


@contextmanager
def use_backend(name: str | None) -> Generator[None]:
    """Context manager that makes every op use the backend ``name``; None chooses automatically.

    The choice applies to the whole process, because the backward pass may run in other threads. The environment
    variable CERTTRAIN_BACKEND sets it too. The automatic choice is ``gpu`` for CUDA tensors, ``cpu`` for CPU tensors in
    float32 and float64, and ``reference`` for the rest; small intervals on the CPU use the plain formula, which is
    faster than calling an op.

    Raises:
        ValueError: the backend is unknown or not available; the message lists the available ones. An op raises it
            if the backend does not support its tensors' device or dtype.
    """
    global _chosen
    _check_choice(name, "use_backend")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen() -> str | None:
    """The backend chosen by ``use_backend`` or the environment, if any."""
    return _chosen or os.environ.get(ENVIRONMENT) or None


def backend_for(tensor: Tensor) -> ModuleType:
    """The backend module for an op on ``tensor``.

    Raises:
        ValueError: the chosen backend does not support the tensor.
    """
    name = chosen()
    if not name:
        return _load(_automatic(tensor.device.type, tensor.dtype))
    _check_choice(name, ENVIRONMENT)
    reason = _refusal(name, tensor.device.type, tensor.dtype)
    if reason:
        others = [other for other in _MODULES if not _refusal(other, tensor.device.type, tensor.dtype)]
        raise ValueError(f"backend {name!r} was asked for: {reason}; accepted for these tensors: {', '.join(others)}")
    return _load(name)


@cache
def _automatic(device: str, dtype: torch.dtype) -> str:
    return next(name for name in _MODULES if not _refusal(name, device, dtype) and not _only_by_name(name, device))


def _only_by_name(name: str, device: str) -> bool:
    return name == "gpu" and device != "cuda"  # Triton's interpreter is for tests


def _check_choice(name: str | None, where: str) -> None:
    if name is None:
        return
    if name not in _MODULES:
        raise ValueError(f"{where}: found {name!r}; accepted: {', '.join(_MODULES)}")
    reason = _missing(name)
    if reason:
        others = [other for other in _MODULES if not _missing(other)]
        raise ValueError(f"{where}: backend {name!r} is not available: {reason}; accepted here: {', '.join(others)}")


@cache
def _missing(name: str) -> str | None:
    package = {"gpu": "triton", "cpu": "numba"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if name == "gpu" and not interpreting():
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"the device has compute capability {torch.cuda.get_device_capability()}; needed: (8, 0) or above"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which needs no GPU (and is slow)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    missing = _missing(name)
    if missing or name == "reference":
        return missing
    devices = ("cuda", "cpu") if name == "gpu" and interpreting() else ("cuda",) if name == "gpu" else ("cpu",)
    if device not in devices:
        return f"found tensors on {device}"
    if dtype not in _DTYPES[name]:
        return f"found {dtype}"
    return None


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name], __package__)
