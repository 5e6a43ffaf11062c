"""nn.Module → its folded form: one small rule per kind of node, the table last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import program as p
from .folded import (
    Concat,
    Convolution,
    Dense,
    Diagonal,
    Folded,
    Input,
    Nonlinear,
    Opaque,
    Operation,
    Rearrangement,
    Sum,
)
from .forward import Statistics, check_features, coefficients
from .tracing import trace


def fold(
    model: nn.Module,
    shape: torch.Size,
    statistics: Statistics | None = None,
    dtype: torch.dtype | None = None,
    *,
    whole_pools: bool = False,
    as_written: bool = False,
) -> Folded:
    """The folded form of a model for images of ``shape`` (without the batch dimension).

    Args:
        statistics: batch statistics instead of the running ones, with gradients, for training.
        dtype: of the weights; None keeps the model's. Weights keep their gradients.
        whole_pools: leave max pools as they are, which is good for evaluation alone.
        as_written: the operators of a network file stay what they are: batch norms are not folded, and constants are
            kept in float64, not rounded to float32. Goes with that dtype; says nothing to other models.
    Raises:
        UnsupportedNode: the model holds an operation without a rule.
        InputError: a weight is not finite.
    """
    return _Folding(model, torch.Size(shape), statistics, dtype, whole_pools, as_written).run()


class _Folding:
    def __init__(
        self,
        model: nn.Module,
        shape: torch.Size,
        statistics: Statistics | None,
        dtype: torch.dtype | None,
        whole_pools: bool,
        as_written: bool,
    ):
        self.program, self.statistics, self.dtype, self.whole_pools = trace(model), statistics, dtype, whole_pools
        self.as_written = as_written and isinstance(model, p.ProgramModule)
        parameter = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.model_dtype = torch.float32 if parameter is None else parameter.dtype
        self.operations: list[Operation] = [Input("input", ())]
        self.shapes = [shape]

    def run(self) -> Folded:
        place, nodes = {0: 0}, self.program.nodes  # place of each of the nodes among the operations
        needed = {len(nodes) - 1}  # what the logits do not depend on is left out
        for number in range(len(nodes) - 1, 0, -1):
            needed |= set(nodes[number].inputs) if number in needed else set()
        for number in sorted(needed - {0}):
            node = nodes[number]
            inputs = tuple(place[read] for read in node.inputs)
            place[number] = RULES[type(node)](self, node, number, *inputs)
        return Folded(tuple(self.operations), tuple(self.shapes))

    def append(self, operation: Operation) -> int:
        """Its position. A point is sent through it, to learn its shape."""
        points = [torch.zeros(1, *self.shapes[i], dtype=self.dtype or self.model_dtype, device=self.device)
                  for i in operation.inputs]  # fmt: skip
        with torch.no_grad():
            self.shapes.append(operation(*points).shape[1:])  # type: ignore[operator]
        self.operations.append(operation)
        return len(self.operations) - 1

    def tensor(self, value: Tensor | float, path: str) -> Tensor:
        found = torch.as_tensor(value, dtype=self.model_dtype, device=self.device)
        return self.finite(found.to(self.dtype or self.model_dtype), path)

    def finite(self, found: Tensor, path: str) -> Tensor:
        if self.statistics is None and not found.isfinite().all():  # a training step looks at its loss
            raise p.UnsupportedNode(f"{path}: found a weight that is not finite; accepted: finite weights")
        return found

    def coefficients(self, norm: p.BatchNorm | None, number: int) -> tuple[Tensor | None, Tensor | None]:
        if norm is None:
            return None, None
        return coefficients(norm, None if self.statistics is None else self.statistics.get(number))

    def activate(self, activation: p.Activation | None, path: str, source: int) -> int:
        return source if activation is None else self.append(Nonlinear(path, (source,), activation))


def _affine(run: _Folding, node: p.Affine, number: int, source: int) -> int:
    check_features(node, torch.empty(1, *run.shapes[source], device="meta"))
    if node.norm is not None and run.as_written:
        layer = _affine(run, replace(node, norm=None, activation=None), number, source)
        return run.activate(node.activation, node.path, _apart(run, node.norm, node.path, layer))
    layer, (scale, shift) = node.layer, run.coefficients(node.norm, number)
    weight, bias = layer.weight, layer.bias
    if scale is not None and shift is not None:  # in the model's own dtype: that network is the one that runs
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = shift if bias is None else bias * scale + shift
    weight = run.tensor(weight, node.path)
    bias = None if bias is None else run.tensor(bias, node.path)
    if isinstance(layer, nn.Linear):
        return run.activate(node.activation, node.path, run.append(Dense(node.path, (source,), weight, bias)))
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        around, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
        mode = "constant" if mode == "zeros" else mode
        source = run.append(Rearrangement(node.path, (source,), lambda x: F.pad(x, around, mode=mode)))
        padding = (0,) * (weight.ndim - 2)
    geometry = tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups
    done = run.append(Convolution(node.path, (source,), weight, bias, *geometry))
    return run.activate(node.activation, node.path, done)


def _apart(run: _Folding, norm: p.BatchNorm, path: str, source: int) -> int:
    """A batch norm as its operator: (x - mean) times a scale, plus a bias; computed in float64.

    onnxruntime 1.31 evaluates x s + (bias - mean s) with a rounded s = weight / sqrt(variance + epsilon), whose error
    acts on x - mean alone. Besides it, x is rounded twice, mean three times and bias twice; s is off by 4 roundings at
    most if its four steps round correctly, and 8 are paid for.
    """
    mean, variance, weight, bias = (
        run.finite(torch.as_tensor(value, dtype=torch.float64, device=run.device), path)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    vectors = -mean, weight / (variance + norm.eps).sqrt(), bias
    negative, scale, shift = (v.reshape(1, -1, *[1] * (len(run.shapes[source]) - 1)) for v in vectors)
    centred = run.append(Diagonal(path, (source,), torch.ones_like(negative), negative, rounds=3))
    return run.append(Diagonal(path, (centred,), run.finite(scale, path), shift, rounds=8))


def _norm(run: _Folding, node: p.Norm, number: int, source: int) -> int:
    if run.as_written:
        return run.activate(node.activation, node.path, _apart(run, node.norm, node.path, source))
    vectors = run.coefficients(node.norm, number)
    rest = [1] * (len(run.shapes[source]) - 1)
    scale, shift = (run.tensor(v, node.path).reshape(1, -1, *rest) for v in vectors if v is not None)
    return run.activate(node.activation, node.path, run.append(Diagonal(node.path, (source,), scale, shift)))


def _concat(run: _Folding, node: p.Concat, number: int, *sources: int) -> int:
    return run.append(Concat(node.path, sources, node.along(1 + len(run.shapes[sources[0]]))))


def _scale(run: _Folding, node: p.Scale, number: int, source: int) -> int:
    if node.exact is not None and run.as_written:
        scale, shift = (run.finite(torch.as_tensor(v, device=run.device), node.path) for v in node.exact())
    else:
        scale, shift = (run.tensor(value, node.path) for value in node.coefficients())
    return run.append(Diagonal(node.path, (source,), scale, shift, node.roundings))


def _pool(run: _Folding, node: p.Pool, number: int, source: int) -> int:
    if node.linear:
        return run.append(Rearrangement(node.path, (source,), node.function, reorders=False))
    if run.whole_pools:
        return run.append(Opaque(node.path, (source,), node.function, p.UnsupportedNode(f"{node.path}: a whole pool")))
    windows, shape = _windows(node, run.shapes[source])

    def pick(column: int) -> Callable[[Tensor], Tensor]:
        index = windows[:, column].to(run.device)
        return lambda x: x.flatten(-node.dimensions)[..., index].reshape(*x.shape[: -node.dimensions], *shape)

    def largest(first: int, last: int) -> int:
        """max over the windows' columns [first, last), half against half."""
        if last - first == 1:
            return run.append(Rearrangement(node.path, (source,), pick(first)))
        middle = (first + last) // 2
        left, right = largest(first, middle), largest(middle, last)
        above = run.append(Sum(node.path, (left, right), -1.0))
        above = run.append(Nonlinear(node.path, (above,), p.Activation("relu")))
        return run.append(Sum(node.path, (right, above), 1.0, largest=(left, right)))

    return largest(0, windows.shape[1])


def _windows(node: p.Pool, shape: torch.Size) -> tuple[Tensor, torch.Size]:
    """Which of the H·W places each output of a max pool sees, (outputs, size); short windows repeat a place."""
    sizes = shape[-node.dimensions :]
    places = sizes.numel()
    probes = torch.full((places, 1, places), -1.0).diagonal_scatter(torch.ones(1, places), dim1=0, dim2=2)
    found = node.function(probes.reshape(places, 1, *sizes))
    seen = (found.reshape(places, -1) > 0).T
    columns = [row.nonzero().flatten() for row in seen]
    if not all(len(column) for column in columns):
        raise p.UnsupportedNode(f"{node.path}: found a window over padding alone; accepted: windows that see the image")
    size = max(len(column) for column in columns)
    return torch.stack([torch.cat([c, c[:1].expand(size - len(c))]) for c in columns]), found.shape[2:]


RULES: dict[type[p.Node], Callable[..., int]] = {
    p.Affine: _affine,
    p.Norm: _norm,
    p.Activate: lambda run, node, number, source: run.activate(node.activation, node.path, source),
    p.Pool: _pool,
    p.Reshape: lambda run, node, number, source: run.append(Rearrangement(node.path, (source,), node.function)),
    p.Add: lambda run, node, number, x, y: run.append(Sum(node.path, (x, y), node.sign)),
    p.Concat: _concat,
    p.Scale: _scale,
    p.Dropout: lambda run, node, number, source: source,
    p.Whole: lambda run, node, number, source: run.append(Opaque(node.path, (source,), node.module, node.why)),
}
