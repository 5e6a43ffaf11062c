"""Checks of labels and logits: labels are whole numbers 0 to K - 1, logits have K >= 2 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import devices
from .errors import InputError

ACCEPTED = "whole numbers, one for each image"
LARGEST = 2**53
"""Largest number up to which float64 holds every whole number."""


def as_labels(
    labels: Any, count: int | None = None, *, device: torch.device | None = None, where: str = "labels"
) -> Tensor:
    """Convert labels to (B,) int64: tensors, arrays and lists of whole numbers of any dtype.

    Tensors with integer dtypes are converted without reading their values, so that a training step does not wait for
    the device. The range of the labels is checked by ``check_labels`` where data enter.

    Args:
        count: B, if it is known.
        device: device of the result; None leaves a tensor on its own.
        where: name of the labels in messages.
    Raises:
        InputError: boolean or other dtypes, fractions, NaN, or another shape than (B,).
    """
    found = labels if isinstance(labels, Tensor) else _tensor(labels, where)
    if found.is_nested or found.layout != torch.strided:
        raise InputError(f"{where}: found a tensor that is nested or sparse; accepted: {ACCEPTED}, in a dense one")
    if found.ndim != 1 or count not in (None, len(found)):
        expected = "(B,)" if count is None else f"({count},)"
        raise InputError(f"{where}: found shape {tuple(found.shape)}; accepted: {expected}, {ACCEPTED}")
    if found.dtype == torch.bool or found.is_complex() or found.is_quantized:
        raise InputError(f"{where}: found {found.dtype}; accepted: {ACCEPTED}")
    if found.is_floating_point():
        values = found.double()
        wrong = ~((values == values.round()) & (values.abs() <= LARGEST))  # NaN too
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise InputError(f"{where}: found {float(values[at]):g} at image {at}; accepted: {ACCEPTED}")
    return found.to(device, torch.int64) if device is not None else found.to(torch.int64)


def _tensor(labels: Any, where: str) -> Tensor:
    if isinstance(labels, (list, tuple)):
        labels = [label.item() if isinstance(label, Tensor) and not label.ndim else label for label in labels]
        if any(isinstance(label, (bool, np.bool_)) for label in labels):  # numpy would make them numbers among numbers
            raise InputError(f"{where}: found bool; accepted: {ACCEPTED}")
    elif np.ma.is_masked(labels):
        raise InputError(f"{where}: found masked entries; accepted: {ACCEPTED}")
    try:
        array = np.array(labels)
    except (TypeError, ValueError, OverflowError) as error:  # numpy's own, of ragged lists for instance
        raise InputError(f"{where}: found {type(labels).__name__} ({error}); accepted: {ACCEPTED}") from error
    if not array.size and array.ndim == 1:
        return torch.empty(0, dtype=torch.int64)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{where}: found {array.dtype}; accepted: {ACCEPTED}")
    beyond = np.flatnonzero(array > LARGEST) if array.dtype.kind == "u" else np.empty(0, int)
    if len(beyond):
        found = f"found {array.flat[beyond[0]]} at image {beyond[0]}"
        raise InputError(f"{where}: {found}; accepted: {ACCEPTED}")
    return torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))


def check_labels(labels: Tensor, classes: int, where: str = "labels") -> None:
    """Check that labels are classes, 0 to ``classes`` - 1. Waits for the labels' device.

    Raises:
        InputError: a label is outside that range.
    """
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise InputError(f"{where}: found label {int(labels[at])} at image {at}; accepted: 0 to {classes - 1}")


def classes_of(logits: Any, where: str = "model") -> int:
    """The number of classes K of logits (B, K). Reads the shape only.

    Raises:
        InputError: the output is not a tensor, or as ``classes_in``.
    """
    if not isinstance(logits, Tensor):
        raise InputError(f"{where}: found an output that is a {type(logits).__name__}; accepted: one tensor of logits")
    return classes_in(logits.shape, where)


def classes_in(shape: Sequence[int], where: str = "model") -> int:
    """The number of classes K of logits with this shape.

    A single output has no competitor, so that every statement about its margins would hold and mean nothing.

    Raises:
        InputError: any shape but (B, K) with K >= 2.
    """
    if len(shape) == 2 and shape[1] >= 2:
        return shape[1]
    accepted = "logits (B, K) of two classes or more"
    if len(shape) == 2 and shape[1] == 1:
        accepted += ", which certtrain.BinaryScore(model) makes of one score"
    raise InputError(f"{where}: found an output of shape {tuple(shape)}; accepted: {accepted}")


def check_logits(logits: Any, labels: Tensor) -> None:
    """Check that logits and labels fit each other. Labels whose reading waits for a device are not read.

    Raises:
        InputError: as ``classes_of`` and ``check_labels``.
    """
    classes = classes_of(logits)
    if not devices.reading_waits(labels):
        check_labels(labels, classes)
