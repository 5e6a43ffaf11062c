"""Unwrap models and layers that other tools have wrapped.

DataParallel, DistributedDataParallel, AveragedModel and ``torch.compile`` wrap a module; pruning and the old
``weight_norm`` and ``spectral_norm`` compute a layer's weight in a hook. ``torch.nn.utils.parametrizations`` need
no unwrapping: they compute the layer's ``weight`` when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from ..typed import children, forward_pre_hooks


def inner(module: nn.Module) -> nn.Module:
    """The module inside all its wrappers; a module without wrappers itself."""
    while is_wrapper(module):
        module = module.get_submodule("_orig_mod" if "_orig_mod" in children(module) else "module")
    return module


def is_wrapper(module: nn.Module | None) -> bool:
    """Whether the module is one of torch's wrappers: compiled, data-parallel or an averaged model."""
    compiled = module is not None and [name for name, _ in module.named_children()] == ["_orig_mod"]
    return compiled or isinstance(module, (nn.DataParallel, DistributedDataParallel, AveragedModel))


@contextmanager
def unwrapped(model: nn.Module) -> Generator[nn.Module]:
    """Context manager that removes wrappers from the model and its submodules, and restores them."""
    wrapped = [
        (parent, name, child)
        for parent in list(model.modules()) for name, child in children(parent).items()
        if child is not None and is_wrapper(child)
    ]  # fmt: skip
    for parent, name, child in wrapped:
        children(parent)[name] = inner(child)
    try:
        yield inner(model)
    finally:
        for parent, name, child in wrapped:
            children(parent)[name] = child


def computed(module: nn.Module) -> dict[str, Callable[[Any], Any]]:
    """The functions, by tensor name, by which hooks compute a module's tensors before each call."""
    functions: dict[str, Callable[[Any], Any]] = {}
    for hook in forward_pre_hooks(module):
        if isinstance(hook, BasePruningMethod):
            pruning: Any = hook
            functions[pruning._tensor_name] = pruning.apply_mask
        elif isinstance(hook, WeightNorm):
            functions[hook.name] = hook.compute_weight
        elif isinstance(hook, SpectralNorm):
            functions[hook.name] = partial(hook.compute_weight, do_power_iteration=False)
    return functions


class ComputedLayer:
    """A view of a layer that computes its tensors when they are read."""

    def iterate(self) -> None:
        """Do one step of spectral norms' power iteration, as before each pass in training mode."""


def with_computed_tensors(module: nn.Module) -> nn.Module:
    """The layer, or, if hooks compute some of its tensors, a view that computes them at each read, with gradients.

    The view shares everything else with the layer.
    """
    tensors = computed(module)
    if not tensors:
        return module
    iterated = [hook for hook in forward_pre_hooks(module) if isinstance(hook, SpectralNorm)]

    def iterate(view: nn.Module) -> None:
        for hook in iterated if view.training else ():
            hook.compute_weight(view, do_power_iteration=True)

    properties = {name: property(compute) for name, compute in tensors.items()}
    kind = type(type(module).__name__, (ComputedLayer, type(module)), {**properties, "iterate": iterate})
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view
