"""Further operators of ONNX, by the rules of those in ``network``."""

import math
from typing import Any

import numpy as np

from .arithmetic import Rejected
from .operations import GroupSums, ScaleMap


class MoreOperators:
    """Methods of the reader of ONNX files, in a file of their own."""

    node: Any
    arithmetic: Any
    attribute: Any
    numbers: Any
    weights: Any
    select: Any
    constant: Any
    append: Any
    linear: Any
    scaled: Any
    same_shape: Any

    def on_Dropout(self, x, ratio=None):
        for name in ("seed", "ratio"):
            self.attribute(name, None)
        self.select([x], lambda a: a)

    def on_Shape(self, x):
        self.constant(self.node.output[0], np.array(x.shape, dtype=np.int64))

    def on_Squeeze(self, x, axes=None):
        axes = self._axes(axes)
        self.select([x], lambda a: a.squeeze(tuple(axes) if axes else None))

    def on_Unsqueeze(self, x, axes=None):
        axes = self._axes(axes)
        self.select([x], lambda a: np.expand_dims(a, tuple(axes)))

    def on_Split(self, x, sizes=None):
        axis, count = self.attribute("axis", 0), self.attribute("num_outputs", 0)
        sizes = self.attribute("split", None) if sizes is None else self.numbers(sizes, "sizes")
        whole, parts = x.shape[axis], len(self.node.output)
        each = -(-whole // parts)
        sizes = sizes or [min(each, whole - each * i) for i in range(parts)]
        if sum(sizes) != whole or min(sizes) < 0 or len(sizes) != parts or count not in (0, parts):
            raise Rejected(f"Split: {whole} numbers into {sizes}")
        ends = np.cumsum(sizes).tolist()
        for name, start, stop in zip(self.node.output, [0, *ends], ends):
            self.select([x], lambda a, s=start, e=stop: a.take(range(s, e), axis), name)

    def on_Slice(self, x, starts, ends, axes=None, steps=None):
        starts, ends = self.numbers(starts, "starts"), self.numbers(ends, "ends")
        axes = list(range(len(starts))) if axes is None else self.numbers(axes, "axes")
        steps = [1] * len(starts) if steps is None else self.numbers(steps, "steps")
        if min(steps, default=1) < 1:
            raise Rejected("Slice: steps below 1")
        index = [slice(None)] * len(x.shape)
        for axis, *ends_of in zip(axes, starts, ends, steps, strict=True):
            index[axis] = slice(*ends_of)
        self.select([x], lambda a: a[tuple(index)])

    def on_Gather(self, x, places):
        axis, chosen = self.attribute("axis", 0), places.constant
        self.numbers(places, "places")
        self.select([x], lambda a: a.take(chosen, axis))

    def on_Pad(self, x, pads, value=None, axes=None):
        mode, half = self.attribute("mode", b"constant"), len(x.shape)
        pads = self.numbers(pads, "pads")
        filled = value is not None and (value.constant is None or np.any(value.constant))
        if mode != b"constant" or filled or axes is not None or min(pads) < 0:
            raise Rejected("Pad: other than zeros around all dimensions")
        self.select([x], lambda a: np.pad(a, list(zip(pads[:half], pads[half:]))))

    def on_ReduceMean(self, x, axes=None):
        axes = self._axes(axes)
        if self.attribute("noop_with_empty_axes", 0) and not axes:
            raise Rejected("ReduceMean: over no axes")
        self.mean(x, axes or list(range(len(x.shape))), bool(self.attribute("keepdims", 1)))

    def on_GlobalAveragePool(self, x):
        self.mean(x, list(range(2, len(x.shape))), True)

    def _axes(self, axes):
        return self.attribute("axes", None) if axes is None else self.numbers(axes, "axes")

    def mean(self, x, axes, keep):
        axes = tuple(axis % len(x.shape) for axis in axes)
        small = [1 if i in axes else size for i, size in enumerate(x.shape)]
        shape = small if keep else [size for i, size in enumerate(x.shape) if i not in axes]
        size = math.prod(small)
        group = np.broadcast_to(np.arange(size).reshape(small), x.shape).reshape(-1)
        name = f"{self.node.output[0]} sum"
        total = self.append(name, shape, GroupSums(group, size), [x])
        share = self.arithmetic.numbers(np.ones(size)) / (len(group) // size)
        self.linear(total, shape, ScaleMap(share, None, inexact=1))

    def on_BatchNormalization(self, x, scale, bias, mean, variance):
        epsilon, _ = self.attribute("epsilon", 1e-5), self.attribute("momentum", 0)
        s, b, m, v = (self.weights(part) for part in (scale, bias, mean, variance))
        trains = self.attribute("training_mode", 0)
        if self.arithmetic.exact or trains:
            raise Rejected("BatchNormalization: in training mode, or in fractions")
        whole = [1, -1, *[1] * (len(x.shape) - 2)]
        factor = s / np.sqrt(v + np.float64(np.float32(epsilon)))
        factor, m, b = (
            np.broadcast_to(part.reshape(whole), x.shape).reshape(-1) for part in (factor, m, b)
        )
        centred = self.append(
            f"{self.node.output[0]} centred", x.shape, ScaleMap(np.ones_like(m), -m), [x]
        )
        self.linear(centred, x.shape, ScaleMap(factor, b, inexact=6))

    def on_Neg(self, x):
        self.scaled(x, -1, 0)

    def on_Mul(self, first, second):
        x, factor = (second, first) if first.constant is not None else (first, second)
        if x.constant is not None or factor.constant is None:
            raise Rejected("Mul: of other things than one constant and one value")
        self.same_shape(x, factor)
        self.scaled(x, self.weights(factor), 0)

    def on_Div(self, x, divisor):
        if x.constant is not None or divisor.constant is None or not np.all(divisor.constant):
            raise Rejected("Div: of other things than a value by a constant")
        self.same_shape(x, divisor)
        self.scaled(x, 1 / self.weights(divisor), 0, inexact=1)
