"""Tracing rules of functions and modules that move, select, repeat or pad entries and keep the batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from .base import Folding, Function, LinearOperation, UnsupportedOperation
from .options import REQUIRED, behind_batch, beyond_batch, kept_batch, options, refuse, several
from .rearrangement import Copies, Rearrangement, Selection
from .registry import BatchSize, Constant, ModuleRule, Pieces, Tracing, from_function, from_module
from .scale import Scale


def _appended(
    tracing: Tracing, node: fx.Node, source: int, function: Callable[[Tensor], Tensor], *, ordered: bool = False
) -> int:
    """Append a selection, or, if entries keep their order and none is repeated, a rearrangement."""
    kind = Rearrangement if ordered else Copies
    return tracing.append(kind(node.name, (source,), lambda x: kept_batch(node, x, function(x))))


@from_function("permute")
def _permute(tracing: Tracing, node: fx.Node, source: int) -> int:
    dims = several(tracing, node, "dims")

    def permute(x: Tensor) -> Tensor:
        if not dims or dims[0] not in (0, -x.ndim):
            refuse(node, f"dimensions {dims}", "the batch's, 0, first")
        return x.permute(*dims)

    return _appended(tracing, node, source, permute)


@from_function("transpose", "swapaxes", "swapdims")
def _transpose(tracing: Tracing, node: fx.Node, source: int) -> int:
    names = {"dim0": REQUIRED, "dim1": REQUIRED}
    if "axis0" in node.kwargs or "axis1" in node.kwargs:
        names = {"axis0": REQUIRED, "axis1": REQUIRED}
    dims = options(tracing, node, **names)
    return _appended(tracing, node, source, lambda x: x.transpose(*beyond_batch(node, dims, x.ndim)))


@from_function("movedim", "moveaxis")
def _movedim(tracing: Tracing, node: fx.Node, source: int) -> int:
    start, end = options(tracing, node, source=REQUIRED, destination=REQUIRED)
    return _appended(
        tracing, node, source,
        lambda x: x.movedim(beyond_batch(node, start, x.ndim), beyond_batch(node, end, x.ndim)),
    )  # fmt: skip


@from_function("flip")
def _flip(tracing: Tracing, node: fx.Node, source: int) -> int:
    dims = several(tracing, node, "dims")
    return _appended(tracing, node, source, lambda x: x.flip(beyond_batch(node, dims, x.ndim)))


@from_function("roll")
def _roll(tracing: Tracing, node: fx.Node, source: int) -> int:
    shifts, dims = options(tracing, node, shifts=REQUIRED, dims=None)
    if dims is None:
        refuse(node, "no dims", "dims behind the batch's, which is 0")
    return _appended(tracing, node, source, lambda x: x.roll(shifts, beyond_batch(node, dims, x.ndim)))


@from_function("squeeze")
def _squeeze(tracing: Tracing, node: fx.Node, source: int) -> int:
    (dims,) = options(tracing, node, dim=None)
    if dims is None:
        refuse(node, "no dim, so that a batch of one would vanish", "dim, one behind the batch's")
    return _appended(
        tracing, node, source, lambda x: x.squeeze(tuple(beyond_batch(node, dims, x.ndim))), ordered=True
    )  # fmt: skip


@from_function("unsqueeze")
def _unsqueeze(tracing: Tracing, node: fx.Node, source: int) -> int:
    (dim,) = options(tracing, node, dim=REQUIRED)
    return _appended(
        tracing, node, source, lambda x: x.unsqueeze(behind_batch(node, dim, x.ndim + 1)), ordered=True
    )  # fmt: skip


@from_function("unflatten")
def _unflatten(tracing: Tracing, node: fx.Node, source: int) -> int:
    dim, sizes = options(tracing, node, dim=REQUIRED, sizes=REQUIRED)
    if any(isinstance(size, BatchSize) for size in sizes):
        refuse(node, "the batch's size", "numbers")
    return _appended(
        tracing, node, source, lambda x: torch.unflatten(x, behind_batch(node, dim, x.ndim), sizes), ordered=True
    )  # fmt: skip


@from_module(nn.Unflatten)
def _unflatten_module(tracing: Tracing, path: str, source: int, module: Any) -> int | None:
    if not isinstance(module.dim, int) or module.dim < 1:
        return None
    return tracing.append(Rearrangement(path, (source,), module))


@from_function("narrow")
def _narrow(tracing: Tracing, node: fx.Node, source: int) -> int:
    dim, start, length = options(tracing, node, dim=REQUIRED, start=REQUIRED, length=REQUIRED)
    return _appended(
        tracing, node, source, lambda x: x.narrow(behind_batch(node, dim, x.ndim), start, length), ordered=True
    )  # fmt: skip


@from_function("select")
def _select(tracing: Tracing, node: fx.Node, source: int) -> int:
    dim, index = options(tracing, node, dim=REQUIRED, index=REQUIRED)
    return _appended(
        tracing, node, source, lambda x: x.select(behind_batch(node, dim, x.ndim), index), ordered=True
    )  # fmt: skip


@from_function("index_select")
def _index_select(tracing: Tracing, node: fx.Node, source: int) -> int:
    names = "dim", "index"
    given = {**dict(zip(names, node.args[1:])), **{k: v for k, v in node.kwargs.items() if k != "input"}}
    place, dim = given.get("index"), given.get("dim")
    index = tracing.values.get(place) if isinstance(place, fx.Node) else None
    if given.keys() != set(names) or not isinstance(index, Constant) or not isinstance(dim, int):
        refuse(node, f"arguments {', '.join(given)}", "dim, a number, and index, a buffer")
    return _appended(
        tracing, node, source, lambda x: x.index_select(behind_batch(node, dim, x.ndim), index.value().to(x.device))
    )  # fmt: skip


@from_function("unfold")
def _unfold(tracing: Tracing, node: fx.Node, source: int) -> int:
    names = {"kernel_size": REQUIRED, "dilation": 1, "padding": 0, "stride": 1}
    if isinstance(node.target, str):
        names = {"dimension": REQUIRED, "size": REQUIRED, "step": REQUIRED}
    settings = options(tracing, node, **names)

    def patches(x: Tensor) -> Tensor:
        if isinstance(node.target, str):
            dimension, size, step = settings
            return x.unfold(behind_batch(node, dimension, x.ndim), size, step)
        if x.ndim != 4:  # torch takes three dimensions for one image
            refuse(node, f"{x.ndim} dimensions", "(B, channels, height, width)")
        return F.unfold(x, *settings)

    return _appended(tracing, node, source, patches)


def _expanded(x: Tensor, sizes: list[Any]) -> Tensor:
    """``x.expand`` with the batch's size, 1 or -1 at the batch's place, or with fewer sizes than dimensions."""
    return x.expand(*(x.shape[0] if isinstance(size, BatchSize) else size for size in sizes))


@from_function("expand")
def _expand(tracing: Tracing, node: fx.Node, source: int) -> int:
    sizes = several(tracing, node, "size", "sizes")
    if any(isinstance(size, BatchSize) for size in sizes[1:]):
        refuse(node, f"sizes {sizes}", "the batch's size first")

    def expand(x: Tensor) -> Tensor:
        if len(sizes) != x.ndim or not (isinstance(sizes[0], BatchSize) or sizes[0] == -1):
            refuse(node, f"sizes {sizes} of {x.ndim} dimensions", "one for each, x.size(0) or -1 first")
        return _expanded(x, sizes)

    return _appended(tracing, node, source, expand)


@from_function("repeat", "tile")
def _repeat(tracing: Tracing, node: fx.Node, source: int) -> int:
    counts = several(tracing, node, "repeats", "dims")

    def repeat(x: Tensor) -> Tensor:
        if len(counts) != x.ndim or counts[0] != 1 or any(isinstance(count, BatchSize) for count in counts):
            refuse(node, f"repeats {counts} of {x.ndim} dimensions", "one for each, 1 first")
        return x.repeat(*counts)

    return _appended(tracing, node, source, repeat)


@from_function("repeat_interleave")
def _repeat_interleave(tracing: Tracing, node: fx.Node, source: int) -> int:
    repeats, dim = options(tracing, node, repeats=REQUIRED, dim=REQUIRED)
    if type(repeats) is not int or dim is None:
        refuse(node, f"repeats={repeats}, dim={dim}", "two numbers")
    return _appended(
        tracing, node, source, lambda x: x.repeat_interleave(repeats, behind_batch(node, dim, x.ndim))
    )  # fmt: skip


_PIECES: dict[str, tuple[str, ...]] = {
    "chunk": ("chunks", "dim"), "split": ("split_size_or_sections", "dim"),
    "tensor_split": ("indices_or_sections", "dim"), "unbind": ("dim",),
}  # fmt: skip


@from_function("chunk", "split", "tensor_split", "unbind")
def _pieces(tracing: Tracing, node: fx.Node, source: int) -> Pieces:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    *counts, dim = options(
        tracing, node, **{option: 0 if option == "dim" else REQUIRED for option in _PIECES[name]}
    )  # fmt: skip
    function: Any = getattr(torch, name)
    return Pieces(source, lambda x: function(x, *counts, behind_batch(node, dim, x.ndim)))


@dataclass(frozen=True, eq=False)
class ConstantPad(LinearOperation):
    """Padding of the last dimensions with a number; a negative width takes entries away.

    Args:
        around: two widths for each dimension, the last dimension first, as ``F.pad`` takes them.
    """

    around: tuple[int, ...]
    value: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.pad(x, self.around, value=self.value)

    def interval(self, x: Interval) -> Interval:
        return Interval(self(x.center), F.pad(x.radius, self.around))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        return (F.pad(forms, [-width for width in self.around]),)

    def constant(self, forms: Tensor) -> Tensor:
        inside = F.pad(torch.zeros_like(forms[0, 0, ...], dtype=torch.bool), [-max(width, 0) for width in self.around])
        outside = F.pad(inside, [max(width, 0) for width in self.around], value=True)
        return self.value * (forms * outside).flatten(2).sum(-1)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        lines = inputs[0].map(lambda x: F.pad(x, self.around))
        return lines.shifted(self(torch.zeros_like(inputs[0].lower[:1, -1])))

    def entries(self, *numbers: Tensor) -> Tensor:
        return F.pad(numbers[0], self.around)

    def magnitude(self, x: Tensor) -> Tensor:
        return F.pad(x, self.around, value=abs(self.value))

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)

    def fold(self, folding: Folding, *sources: int) -> int:
        return folding.append(replace(self, inputs=sources, value=float(folding.tensor(self.value, self.path))))


def _padded(tracing: Tracing, path: str, source: int, around: Sequence[int], mode: str, value: float) -> int:
    """Append padding of the last dimensions, the last first."""
    widths: list[int] = list(around)
    if not all(type(width) is int for width in widths):
        raise UnsupportedOperation(f"pad at {path!r}: found widths {around}; accepted: numbers")

    def pad(x: Tensor) -> Tensor:
        if len(widths) >= 2 * x.ndim and any(widths[2 * x.ndim - 2 :]):
            raise UnsupportedOperation(
                f"pad at {path!r}: found {widths} around {x.ndim} dimensions; accepted: dimensions behind the batch's"
            )
        return F.pad(x, widths, mode=mode)

    if mode != "constant":
        return tracing.append(Copies(path, (source,), pad))
    if value != 0:
        return tracing.append(ConstantPad(path, (source,), tuple(widths), value))
    return tracing.append(Rearrangement(path, (source,), pad))


@from_function("pad")
def _pad(tracing: Tracing, node: fx.Node, source: int) -> int:
    around, mode, value = options(tracing, node, pad=REQUIRED, mode="constant", value=None)
    return _padded(tracing, node.name, source, around, mode, value or 0.0)


def _padding(mode: str) -> ModuleRule:
    """The rule of padding modules of one mode."""

    def rule(tracing: Tracing, path: str, source: int, module: Any) -> int:
        return _padded(tracing, path, source, module.padding, mode, getattr(module, "value", 0.0))

    return rule


from_module(nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d)(_padding("constant"))
from_module(nn.ReflectionPad1d, nn.ReflectionPad2d)(_padding("reflect"))
from_module(nn.ReplicationPad1d, nn.ReplicationPad2d)(_padding("replicate"))
from_module(nn.CircularPad1d, nn.CircularPad2d)(_padding("circular"))


@from_module(nn.PixelShuffle, nn.PixelUnshuffle)
def _shuffle(tracing: Tracing, path: str, source: int, module: nn.Module) -> int:
    return tracing.append(Selection(path, (source,), module))


@from_function("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffled(tracing: Tracing, node: fx.Node, source: int) -> int:
    name = getattr(node.target, "__name__", "")
    option = {"pixel_shuffle": "upscale_factor", "pixel_unshuffle": "downscale_factor", "channel_shuffle": "groups"}
    (factor,) = options(tracing, node, **{option[name]: REQUIRED})
    function: Any = getattr(F, name)

    def shuffle(x: Tensor) -> Tensor:
        if x.ndim < 4 and name != "channel_shuffle":  # torch takes three dimensions for one image
            refuse(node, f"{x.ndim} dimensions", "(B, channels, height, width)")
        return function(x, factor)

    return _appended(tracing, node, source, shuffle)


@from_function("contiguous", "clone", "float", "positive")
def _same(tracing: Tracing, node: fx.Node, source: int) -> int:
    """Float32 is what models of float32 compute in; a model moved to float64 refuses ``float`` itself."""
    return source


@from_function("to", "type")
def _cast(tracing: Tracing, node: fx.Node, source: int) -> int:
    (dtype,) = options(tracing, node, dtype=REQUIRED)
    if dtype != torch.float32:
        refuse(node, f"{dtype}", "torch.float32")
    return source


@from_function("neg", "negative")
def _negated(tracing: Tracing, node: fx.Node, source: int) -> int:
    options(tracing, node)
    return tracing.append(Scale(node.name, (source,), lambda: (-1.0, 0.0)))
