"""Typed wrappers of untyped functions of torch, for the folders that are checked strictly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn


def as_ints(values: Tensor) -> list[int]:
    """The flattened entries of a tensor of integers. Waits for the device."""
    return cast(Any, values.flatten()).tolist()


def as_floats(values: Tensor) -> list[float]:
    """The flattened entries of a tensor of floats. Waits for the device."""
    return cast(Any, values.flatten()).tolist()


def as_bools(values: Tensor) -> list[bool]:
    """The flattened entries of a tensor of booleans. Waits for the device."""
    return cast(Any, values.flatten()).tolist()


def broadcast_shape(*shapes: torch.Size | tuple[int, ...]) -> torch.Size:
    """The shape of values of these shapes that broadcast against each other."""
    return cast(Any, torch).broadcast_shapes(*shapes)


def split(values: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    """Parts of ``size`` entries along a dimension, the last of the rest."""
    return cast(Any, values).split(size, dim)


def is_integers(value: object) -> TypeGuard[Collection[int]]:
    """Whether it is a non-empty list or tuple of whole numbers."""
    values = cast(list[object], value) if isinstance(value, (list, tuple)) else []
    return len(values) > 0 and all(type(one) is int for one in values)


def norm(values: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """The Euclidean norm along a dimension."""
    return cast(Any, values).norm(dim=dim, keepdim=keepdim)


def unique(values: Tensor, dim: int | None = None) -> Tensor:
    """The distinct entries, or slices along ``dim``, in increasing order. Waits for the device."""
    return cast(Any, torch).unique(values, dim=dim)


def is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(value, tuple)


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_slice(value: object) -> TypeGuard[slice[Any, Any, Any]]:
    return isinstance(value, slice)


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def is_sequence_or_set(value: object) -> TypeGuard[Collection[Any]]:
    return isinstance(value, (list, tuple, set, frozenset))


def map_arg(arguments: Any, function: Callable[[fx.Node], Any]) -> Any:
    """As ``torch.fx.map_arg``: nested arguments with each step of a graph replaced."""
    return cast(Any, fx).map_arg(arguments, function)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As ``nn.Module.named_modules``."""
    return cast(Any, model).named_modules(remove_duplicate=remove_duplicate)


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The mutable table of a module's direct children: entries written to it are registered."""
    return cast(Any, module)._modules


def reversed_padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """The padding of a convolution on either side, last dimension first, as ``F.pad`` takes it."""
    return list(cast(Any, module)._reversed_padding_repeated_twice)


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks called after a module's forward."""
    return list(cast(Any, module)._forward_hooks.values())


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks called before a module's forward."""
    return list(cast(Any, module)._forward_pre_hooks.values())


def has_global_forward_hooks() -> bool:
    """Whether hooks are registered around every module's forward."""
    every = cast(Any, torch.nn.modules.module)
    return bool(every._global_forward_hooks or every._global_forward_pre_hooks)
