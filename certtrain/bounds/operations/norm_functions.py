"""Normalisations called as functions, with weights of the model or without."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...typed import is_list, is_tuple
from .layer_functions import Arguments
from .normalisation import Learned, OfChannels, normalise
from .options import refuse
from .registry import Tracing, from_function
from .rows import Groups, LastOnes
from .scale import Scale


def _over_last_ones(tracing: Tracing, node: fx.Node, source: int, given: Arguments, centered: bool) -> int:
    """Append a layer or RMS norm, over the dimensions of ``normalized_shape``."""
    shape, missing = given["normalized_shape"], 1e-5 if centered else 0.0
    if not (is_tuple(shape) or is_list(shape)) or not shape:
        refuse(node, f"normalized_shape={shape}", "the sizes of the last dimensions")
    rows = LastOnes(len(shape))
    source = normalise(tracing.append, node.name, source, rows, given.number("eps", missing), centered=centered)
    operands = given.operands(needs_weight=False)
    learned = operands.weights is not None or operands.biases is not None
    return tracing.append(Scale(node.name, (source,), Learned(operands))) if learned else source


@from_function("layer_norm")
def _layer_norm(tracing: Tracing, node: fx.Node, source: int) -> int:
    given = Arguments(tracing, node, "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    return _over_last_ones(tracing, node, source, given, centered=True)


@from_function("rms_norm")
def _rms_norm(tracing: Tracing, node: fx.Node, source: int) -> int:
    given = Arguments(tracing, node, "normalized_shape", "weight", "eps")
    return _over_last_ones(tracing, node, source, given, centered=False)


def _over_groups(tracing: Tracing, node: fx.Node, source: int, given: Arguments, count: int) -> int:
    """Append a norm over groups of channels, or over each channel where there are 0."""
    operands: Any = given.operands(needs_weight=False)
    learned = operands.weights is not None or operands.biases is not None
    rows = Groups(count, 2 if learned else None, node.name)
    source = normalise(tracing.append, node.name, source, rows, given.number("eps", 1e-5), centered=True)
    return tracing.append(Scale(node.name, (source,), OfChannels(operands, 2))) if learned else source


@from_function("group_norm")
def _group_norm(tracing: Tracing, node: fx.Node, source: int) -> int:
    given = Arguments(tracing, node, "num_groups", "weight", "bias", "eps", "cudnn_enabled")
    (count,) = given.sizes("num_groups", 0, 1)
    if count < 1:
        refuse(node, f"num_groups={count}", "a number >= 1")
    return _over_groups(tracing, node, source, given, count)


@from_function("instance_norm")
def _instance_norm(tracing: Tracing, node: fx.Node, source: int) -> int:
    names = "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"
    given = Arguments(tracing, node, *names)
    if given["use_input_stats"] not in (None, True):
        refuse(node, f"use_input_stats={given['use_input_stats']}", "True")
    return _over_groups(tracing, node, source, given, 0)
