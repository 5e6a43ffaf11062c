"""Argument checks of ops; every error names the argument, what was found and what was expected."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}
_values = False


@contextmanager
def check_values() -> Generator[None]:
    """Context manager that also checks values, such as a negative radius, and raises ValueError.

    Each check waits for the device. The setting applies to the whole process, but not inside compiled graphs.
    """
    global _values
    before, _values = _values, True
    try:
        yield
    finally:
        _values = before


def interval(center: Tensor, radius: Tensor) -> None:
    same_as("radius", radius, center, "center")
    floating("center", center)
    if radius.shape != center.shape:
        raise ValueError(f"radius: found shape {tuple(radius.shape)}; expected that of center, {tuple(center.shape)}")
    if _values and not torch.compiler.is_compiling() and bool((radius < 0).any()):
        raise ValueError(f"radius: found {float(radius.min()):g}; expected radius >= 0")


def floating(name: str, values: Tensor) -> None:
    if not values.dtype.is_floating_point:
        raise TypeError(f"{name}: found {values.dtype}; expected a floating-point dtype")


def same_as(name: str, values: Tensor, like: Tensor, like_name: str) -> None:
    """Check for equal dtype and device; under autocast, which casts to float32, half types may meet float32."""
    if values.dtype != like.dtype and not ({values.dtype, like.dtype} <= AUTOCAST and _autocasts(like.device.type)):
        raise TypeError(f"{name}: found {values.dtype}; expected that of {like_name}, {like.dtype}")
    same_device(name, values, like, like_name)


def _autocasts(device: str) -> bool:
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def same_device(name: str, values: Tensor, like: Tensor, like_name: str) -> None:
    if values.device != like.device:
        raise ValueError(f"{name}: found device {values.device}; expected that of {like_name}, {like.device}")


def shape(name: str, values: Tensor, expected: tuple[int, ...]) -> None:
    if values.shape != expected:
        raise ValueError(f"{name}: found shape {tuple(values.shape)}; expected {expected}")


def features(name: str, values: Tensor | None, count: int, like: Tensor, like_name: str = "center") -> None:
    """Check for one value per feature, or None."""
    if values is not None:
        same_as(name, values, like, like_name)
        shape(name, values, (count,))


def parameters(center: Tensor, weight: Tensor, *vectors: Tensor | None) -> None:
    """Check a layer's weight, and its bias, scale and shift: one value per output each, or None."""
    same_as("weight", weight, center, "center")
    for name, values in zip(("bias", "scale", "shift"), vectors, strict=True):
        features(name, values, len(weight), center)


def channels(name: str, values: Tensor) -> int:
    if values.ndim < 2:
        raise ValueError(f"{name}: found {values.ndim} dimensions; expected (B, C, *spatial)")
    return values.shape[1]


def labels(name: str, values: Tensor, like: Tensor) -> None:
    if values.dtype != torch.int64:
        raise TypeError(f"{name}: found {values.dtype}; expected torch.int64")
    same_device(name, values, like, "center")
    shape(name, values, (len(like),))


def label_values(values: Tensor, classes: int) -> None:
    """Check labels for the range [0, classes), inside an op, where tensors are real.

    On a GPU only under ``check_values``, since it waits for the device.
    """
    if len(values) and (_values or values.device.type == "cpu"):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels: found {low if low < 0 else high}; expected 0 to {classes - 1}")


def budget(k: object, rows: Tensor, rows_name: str) -> None:
    """Check k: an int for all rows, or int64 (B,) with one per row, later clamped to [0, N]."""
    if isinstance(k, Tensor):
        if k.dtype != torch.int64:
            raise TypeError(f"k: found {k.dtype}; expected an int or torch.int64")
        same_device("k", k, rows, rows_name)
        shape("k", k, (len(rows),))
    elif isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: found {type(k).__name__}; expected an int or an int64 tensor")
    elif k < 0:
        raise ValueError(f"k: found {k}; expected k >= 0")


def row_numbers(name: str, rows: Tensor, like: Tensor, items: int) -> None:
    """Check (P, K) int64 numbers of rows."""
    if rows.dtype != torch.int64:
        raise TypeError(f"{name}: found {rows.dtype}; expected torch.int64")
    same_device(name, rows, like, "forms")
    if rows.ndim != 2 or len(rows) != items:
        raise ValueError(f"{name}: found shape {tuple(rows.shape)}; expected ({items}, K)")


def row_values(name: str, rows: Tensor, count: int) -> None:
    """Check numbers of rows for the range [-1, count), inside an op, as ``label_values`` does."""
    if rows.numel() and (_values or rows.device.type == "cpu"):
        low, high = int(rows.min()), int(rows.max())
        if low < -1 or high >= count:
            raise ValueError(f"{name}: found {low if low < -1 else high}; expected -1 to {count - 1}")
