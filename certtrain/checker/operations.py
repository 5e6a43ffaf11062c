"""The network's operations. Values are flat vectors; forms are matrices with a row for each form.

A linear operation y = W x + b gives W x, |W| x and A -> A W. A ReLU gives two lines.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class CheckedOperation(ABC):
    """An operation: positions of the operations that it reads, and the size of its output."""

    inputs: tuple[int, ...] = ()
    size: int = 0
    name: str = ""

    @property
    def roundings(self) -> int:
        """Relative error of an evaluation in floating point: gamma of so many terms."""
        return 0

    @abstractmethod
    def magnitude(self, sizes) -> Any:
        """A bound of all terms' absolute values, from those of the inputs."""


class InputVector(CheckedOperation):
    def __init__(self, size):
        self.size = size

    def magnitude(self, sizes):
        raise NotImplementedError


class LinearMap(CheckedOperation):
    """y = W x + b. x is the concatenation of all inputs.

    Attributes:
        bias: of the output, or None. terms: most numbers in a row of W; backward: in a column.
        inexact: roundings in which the coefficients themselves differ from the network's.
    """

    bias: Any = None
    terms = backward = 1
    inexact = 0

    @abstractmethod
    def product(self, x, absolute=False) -> Any:
        """W x, or |W| x."""

    @abstractmethod
    def adjoint(self, forms) -> list[Any]:
        """The forms A W of each input."""

    def magnitude(self, sizes):
        size = self.product(np.concatenate(sizes), absolute=True)
        return size if self.bias is None else size + np.abs(self.bias)

    @property
    def roundings(self) -> int:
        return self.terms + 1


class MatrixMap(LinearMap):
    """A matrix (outputs, inputs), applied to each of ``batch`` rows of a value."""

    def __init__(self, weight, bias, batch=1):
        self.weight, self.bias, self.batch = weight, bias, batch
        self.size, self.terms, self.backward = batch * len(weight), weight.shape[1], len(weight)

    def product(self, x, absolute=False):
        weight = np.abs(self.weight) if absolute else self.weight
        return (x.reshape(self.batch, -1) @ weight.T).reshape(-1)

    def adjoint(self, forms):
        parts = forms.reshape(len(forms) * self.batch, -1) @ self.weight
        return [parts.reshape(len(forms), -1)]


class ConvolutionMap(LinearMap):
    """A convolution over two dimensions.

    Args:
        weight: (outputs, inputs / groups, height, width); bias: (outputs,) or None.
        shape: (inputs, height, width) of the image; pads: (top, left, bottom, right).
    """

    def __init__(self, weight, bias, shape, strides, pads, dilations, groups):
        channels, height, width = shape
        outputs, own, *self.kernel = weight.shape
        self.weight = weight.reshape(groups, outputs // groups, own, *self.kernel)
        self.groups, self.strides, self.dilations, self.pads = groups, strides, dilations, pads
        self.padded = height + pads[0] + pads[2], width + pads[1] + pads[3]
        self.inner = slice(pads[0], pads[0] + height), slice(pads[1], pads[1] + width)
        self.image = groups, channels // groups, height, width
        self.out = tuple(
            (whole - dilation * (kernel - 1) - 1) // stride + 1
            for whole, kernel, stride, dilation in zip(self.padded, self.kernel, strides, dilations)
        )
        self.size = outputs * self.out[0] * self.out[1]
        self.bias = None if bias is None else np.repeat(bias, self.out[0] * self.out[1])
        taps = self.kernel[0] * self.kernel[1]
        self.terms, self.backward = own * taps, outputs // groups * taps

    def _taps(self, padded):
        """(weights (groups, outputs, inputs), view of the padded image) for each kernel entry."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                first = i * self.dilations[0], j * self.dilations[1]
                rows, columns = (
                    slice(start, start + stride * (count - 1) + 1, stride)
                    for start, stride, count in zip(first, self.strides, self.out)
                )
                yield self.weight[..., i, j], padded[..., rows, columns]

    def product(self, x, absolute=False):
        image = np.zeros((*self.image[:2], *self.padded), dtype=x.dtype)
        image[..., self.inner[0], self.inner[1]] = x.reshape(self.image)
        total: Any = 0
        for weight, part in self._taps(image):
            weight = np.abs(weight) if absolute else weight
            total = total + weight @ part.reshape(*part.shape[:2], -1)
        return total.reshape(-1)

    def adjoint(self, forms):
        image = np.zeros((len(forms), *self.image[:2], *self.padded), dtype=forms.dtype)
        forms = forms.reshape(len(forms), self.groups, -1, self.out[0] * self.out[1])
        for weight, part in self._taps(image):
            part += (weight.swapaxes(1, 2) @ forms).reshape(part.shape)
        return [image[..., self.inner[0], self.inner[1]].reshape(len(forms), -1)]


class ScaleMap(LinearMap):
    """y = factor x + bias, entry by entry."""

    terms = 2

    def __init__(self, factor, bias, inexact=0):
        self.factor, self.bias, self.size, self.inexact = factor, bias, len(factor), inexact

    def product(self, x, absolute=False):
        return (np.abs(self.factor) if absolute else self.factor) * x

    def adjoint(self, forms):
        return [forms * self.factor]


class SumMap(LinearMap):
    """y = first + sign second."""

    terms, backward = 2, 1

    def __init__(self, size, sign):
        self.size, self.sign = size, sign

    def product(self, x, absolute=False):
        first, second = x[: self.size], x[self.size :]
        return first + (second if absolute else self.sign * second)

    def adjoint(self, forms):
        return [forms, self.sign * forms]


class SelectionMap(LinearMap):
    """y_i = x_number(i), or 0 where the number is -1: reshaping, slicing, padding, joining, ..."""

    @property
    def roundings(self) -> int:
        return 0

    def __init__(self, numbers, sizes):
        self.numbers, self.sizes, self.size = numbers, sizes, len(numbers)
        whole = sum(sizes)
        self.order = np.argsort(numbers, kind="stable")
        self.order = self.order[np.searchsorted(numbers[self.order], 0) :]  # without zeros
        self.read, self.first, counts = np.unique(
            numbers[self.order], return_index=True, return_counts=True
        )
        self.backward = int(counts.max()) if len(counts) else 1
        self.same = len(numbers) == whole and bool((numbers == np.arange(whole)).all())

    def product(self, x, absolute=False):
        if self.same:
            return x
        return np.where(self.numbers < 0, 0 * x[:1], x[self.numbers])

    def adjoint(self, forms):
        whole = forms
        if not self.same:
            whole = np.zeros((len(forms), sum(self.sizes)), dtype=forms.dtype)
            if len(self.read):
                sums = np.add.reduceat(forms[:, self.order], self.first, axis=1)
                whole[:, self.read] = sums
        return np.split(whole, np.cumsum(self.sizes)[:-1], axis=1)


class GroupSums(LinearMap):
    """y_g = the sum of all x_i with group(i) = g."""

    def __init__(self, group, size):
        self.select, self.size = SelectionMap(group, [size]), size  # the transposed matrix
        self.terms = self.select.backward + 1

    def product(self, x, absolute=False):
        return self.select.adjoint(x[None])[0][0]

    def adjoint(self, forms):
        return [forms[:, self.select.numbers]]


class Kink(CheckedOperation):
    """max(x, slope x) for 0 <= slope <= 1."""

    def __init__(self, size, slope):
        self.size, self.slope = size, slope

    @property
    def roundings(self) -> int:
        return 1 if self.slope else 0

    def magnitude(self, sizes):
        return sizes[0]

    def interval(self, lower, upper):
        return np.maximum(lower, self.slope * lower), np.maximum(upper, self.slope * upper)

    def chosen(self, lower, upper):
        """CROWN's slope below: of the line that encloses the smaller area."""
        return np.where(upper > -lower, 1, self.slope)

    def lines(self, lower, upper, slopes, arithmetic):
        """(below, above, intercept): below x <= y <= above x + intercept on [lower, upper].

        Any slope between the function's own is valid below. The line above has any slope too; its
        intercept is what the function, which is convex, needs at both ends.
        """
        slope, unstable = self.slope, (lower < 0) & (upper > 0)
        stable = np.where(lower >= 0, 1, slope)
        width = np.where(unstable, upper - lower, 1)
        above = np.where(unstable, (upper - slope * lower) / width, stable)
        above = np.minimum(np.maximum(above, slope), 1)
        least = np.maximum((slope - above) * lower, (1 - above) * upper)
        least, _ = arithmetic.outward(-least, -least)
        intercept = np.where(unstable, np.maximum(-least, 0), 0)
        below = np.where(unstable, np.minimum(np.maximum(slopes, slope), 1), stable)
        return below, above, intercept
