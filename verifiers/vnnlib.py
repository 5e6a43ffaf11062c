"""Properties in VNN-LIB, the format of VNN-COMP (https://www.vnnlib.org), and their writer in versions 1.0 and 2.0.

Assertions over inputs and outputs state the *unsafe* set. Decimals are read exactly and kept, for the replay of points;
conversion to floats, for proofs, rounds outward for boxes, to nearest for rows.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, check
from ..run_folder import write_atomically
from ..typed import as_floats, as_ints
from .constraints import Inequality, Monomial
from .free_inputs import FreeInputs
from .onnx_scores import Index
from .vnnlib_text import DIGITS, VnnlibText

NO_INDICES: Mapping[int, Index] = {}

ROUNDING = 1e-9
"""Bound of float64's rounding error of a row, relative to the sum of its terms' sizes; 1e-11 at 100,000 of them."""

VERSIONS = (1.0, 2.0)
"""Versions of VNN-LIB that are written; the first is what alpha-beta-CROWN reads."""


@dataclass(frozen=True)
class Case:
    """A box of inputs and its unsafe set: the points where in some clause every row has <row, outputs> + offset <= 0.
    Box, rows and set are closed, and of the free inputs alone; ``excluded`` and ``comparisons`` say which of their
    boundaries do not belong to the unsafe set as written.

    Args:
        lower, upper: (N,) float64, ends of the box of free inputs, rounded outward.
        ends: (lower, upper) of each free input, exactly as read.
        rows: (R, K) float64, for K columns, the outputs and the terms of the property behind them; offsets: (R,)
            float64.
        clauses: (R,) int64, the clause of each row, numbered from 0; there is at least one, and none is empty.
        excluded: the ends that are not in the box as read, since their comparisons are strict: (input, whether it is
            the upper end).
        comparisons: of each row the comparison in the file, exact, on all variables of the property.
        common: number of rows, the first ones, that stand in every clause.
    """

    lower: Tensor
    upper: Tensor
    ends: tuple[tuple[Fraction, Fraction], ...]
    rows: Tensor
    offsets: Tensor
    clauses: Tensor
    excluded: frozenset[tuple[int, bool]] = frozenset()
    comparisons: tuple[Inequality, ...] = ()
    common: int = 0

    @property
    def lower32(self) -> Tensor:
        """(N,) ``lower`` rounded down to float32; -inf where no float32 is that low."""
        return _outward32(self.lower, -math.inf)

    @property
    def upper32(self) -> Tensor:
        """(N,) ``upper`` rounded up to float32; inf where no float32 is that high."""
        return _outward32(self.upper, math.inf)

    @property
    def strict(self) -> bool:
        """Whether some row must be < 0, as written."""
        return any(comparison.strict for comparison in self.comparisons)

    @property
    def equalities(self) -> bool:
        """Whether some rows are the two of an equality."""
        pairs = zip(self.comparisons, self.comparisons[1:])
        return any(one.token is other.token and not (one.strict or other.strict) for one, other in pairs)

    def contains(
        self, inputs: Sequence[float | Fraction], outputs: Sequence[float | Fraction], closed: bool = False
    ) -> bool:
        """Whether a point, of finite values of all inputs and outputs of the property, lies in the unsafe set as
        written, or in its closed form: in some clause every row holds, in exact arithmetic. The box is not checked."""
        values, table = (*inputs, *outputs), self._near
        near = [math.prod(float(values[variable]) for variable in monomial) for monomial in table.monomials]
        parts = table.factors * torch.tensor(near, dtype=torch.float64)[table.columns]
        totals = table.constants.index_add(0, table.numbers, parts)
        sizes = table.constants.abs().index_add(0, table.numbers, parts.abs())
        fails = totals > ROUNDING * sizes
        for number in as_ints((~(fails | (totals < -ROUNDING * sizes))).nonzero()):
            fails[number] = not self.comparisons[number].holds(values, closed)
        return bool(torch.isin(self.clauses, self.clauses[fails], invert=True).any())

    @cached_property
    def _near(self) -> _Table:
        monomials = dict[Monomial, int]()
        entries = [
            (number, monomials.setdefault(monomial, len(monomials)), float(factor))
            for number, comparison in enumerate(self.comparisons)
            for monomial, factor in comparison.coefficients
        ]
        numbers, columns, factors = zip(*entries, strict=True) if entries else ((), (), ())
        constants = [float(comparison.constant) for comparison in self.comparisons]
        return _Table(
            tuple(monomials), torch.tensor(numbers, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64),
            *(torch.tensor(values, dtype=torch.float64) for values in (factors, constants)),
        )  # fmt: skip

    def written(self, point: Tensor) -> list[str] | None:
        """Decimals within the box as read, next to a point (N,) float64; None if an input has none.

        Each is the entry's shortest decimal where that lies within, else that of the first float32 within, else the end
        that it oversteps, with as many digits as needed.
        """
        texts = [repr(value) for value in as_floats(point + 0.0)]
        # two steps inside of a rounded end a float is within, and so is its decimal, which is less than half a step off
        least, most = (_next(_next(ends, way), way) for ends, way in ((self.lower, math.inf), (self.upper, -math.inf)))
        within = (least <= point) & (point <= most)
        floor, ceiling = (
            as_floats(_three(ends, way)) for ends, way in ((self.lower32, math.inf), (self.upper32, -math.inf))
        )
        for i in as_ints((~within).nonzero()):
            text = self._within(i, texts[i], floor[3 * i : 3 * i + 3], ceiling[3 * i : 3 * i + 3])
            if text is None:
                return None
            texts[i] = text
        return texts

    def _within(self, i: int, text: str, floor: Sequence[float], ceiling: Sequence[float]) -> str | None:
        """The decimal of input ``i``, whose entry's is ``text``. ``floor`` and ``ceiling`` are float32s at its ends and
        inside of them."""
        if self.allows(i, near := Fraction(text)):
            return text
        lower, upper = self.ends[i]
        end, rounding, inward = (lower, ROUND_CEILING, floor) if near <= lower else (upper, ROUND_FLOOR, ceiling)
        inside = (repr(number) for number in inward if math.isfinite(number))
        # a float32 stands for a decimal behind it, but not on the other side of a strict comparison
        strict = not self.excluded.isdisjoint(((i, False), (i, True)))
        candidates = itertools.chain(inside, () if strict else _decimals_at(end, rounding))
        return next((text for text in candidates if self.allows(i, Fraction(text))), None)

    def within(self, texts: Sequence[str]) -> bool:
        """Whether decimals of all free inputs lie in the box as read."""
        return all(self.allows(i, Fraction(text)) for i, text in enumerate(texts))

    def allows(self, i: int, value: Fraction) -> bool:
        """Whether the value lies in the box of free input ``i`` as read."""
        lower, upper = self.ends[i]
        above = value > lower or (value == lower and (i, False) not in self.excluded)
        return above and (value < upper or (value == upper and (i, True) not in self.excluded))


class _Table(NamedTuple):
    """Comparisons in float64: the factor of each entry, its row's number, and its monomial's among ``monomials``."""

    monomials: tuple[Monomial, ...]
    numbers: Tensor
    columns: Tensor
    factors: Tensor
    constants: Tensor


@dataclass(frozen=True)
class DeclaredTensor:
    """An input, output or hidden tensor as VNN-LIB 2.0 declares it.

    Args:
        name: its name in the file. kind: its element type, as written there. line: of its declaration.
        source: a hidden tensor's name in the ONNX graph; empty for others.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    line: int
    source: str = ""

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.kind} [{','.join(map(str, self.shape))}]"

    def fits(self, kind: str, shape: Sequence[int]) -> bool:
        """Whether it stands for a tensor of the element type ``kind`` and of this shape, dimensions of size 1 aside."""
        sizes, own = ([size for size in sizes if size != 1] for sizes in (shape, self.shape))
        return self.kind in (kind, "real") and sizes == own

    def assigned(self, values: Iterator[str]) -> list[str]:
        """The lines that assign the next of the values, decimals, to the entries in row-major order."""
        entries = itertools.islice(values, self.size)
        return [str(self), *(format(Decimal(value), "f") for value in entries)]


@dataclass(frozen=True)
class DeclaredNetwork:
    """A network as VNN-LIB 2.0 declares it.

    Args:
        name: its name in the file. line: of its declaration.
        equal_to: name of the network that it equals; None for one with a file of its own.
        isomorphic_to: name of a network with the same graph; None without.
    """

    name: str
    line: int
    inputs: tuple[DeclaredTensor, ...]
    hidden: tuple[DeclaredTensor, ...]
    outputs: tuple[DeclaredTensor, ...]
    equal_to: str | None = None
    isomorphic_to: str | None = None


@dataclass(frozen=True)
class Declarations:
    """The networks that a query in VNN-LIB 2.0 declares, and their tensors, in order.

    Variables are numbered tensor by tensor: the inputs of all networks, then their outputs, then their hidden tensors.
    """

    networks: tuple[DeclaredNetwork, ...]

    @property
    def inputs(self) -> tuple[DeclaredTensor, ...]:
        return tuple(tensor for network in self.networks for tensor in network.inputs)

    @property
    def outputs(self) -> tuple[DeclaredTensor, ...]:
        return tuple(tensor for network in self.networks for tensor in network.outputs)

    @property
    def hidden(self) -> tuple[DeclaredTensor, ...]:
        return tuple(tensor for network in self.networks for tensor in network.hidden)

    def assigned(self, inputs: Sequence[str], outputs: Sequence[str]) -> list[str]:
        """The lines that assign decimals to all entries of all tensors, in the order of declaration. ``outputs`` are
        those of all networks, their hidden tensors behind them."""
        values = iter((*inputs, *outputs))
        lines = {tensor.name: tensor.assigned(values) for tensor in (*self.inputs, *self.outputs, *self.hidden)}
        tensors = [tensor for one in self.networks for tensor in (*one.inputs, *one.hidden, *one.outputs)]
        return [line for tensor in tensors for line in lines[tensor.name]]


@dataclass(frozen=True)
class Property:
    """A property, which is violated if and only if, for some case, a point of the box has unsafe outputs. A tie is
    unsafe under ``<=``, safe under ``<``.

    Args:
        cases: the cases; empty where no point is unsafe, whatever the network.
        terms: what the cases' rows read beside the outputs: inputs, then products of two different variables, then
            squares, as monomials of the program's variables, which are its inputs, then its outputs.
        free: all inputs by those that the program and the cases' boxes have; None where these are all inputs.
        remark: a note on disjuncts that no input satisfies, which are left out; None without any.
        declared: the networks and tensors as declared; None in VNN-LIB 1.0.
        repaired: a note on what was repaired in the file; None where nothing was.
    """

    cases: tuple[Case, ...]
    terms: tuple[Monomial, ...] = ()
    free: FreeInputs | None = None
    remark: str | None = None
    declared: Declarations | None = None
    repaired: str | None = None


class VnnlibQuery(ABC):
    """A query in a file, of which the networks are still to be read.

    Args:
        source: its text.
    """

    source: VnnlibText

    @property
    @abstractmethod
    def declared(self) -> Declarations | None:
        """The networks and tensors as declared; None in VNN-LIB 1.0."""

    @abstractmethod
    def property(self, inputs: int, outputs: int, indices: Mapping[int, Index] = NO_INDICES) -> Property:
        """The unsafe set that it states, for networks with so many inputs and outputs in all, flattened; hidden tensors
        count as outputs; ``indices`` are those of the outputs that end with an ArgMax.

        Raises:
            InputError: the file states no such set.
        """

    @abstractmethod
    def check_outputs_asserted(self) -> None:
        """
        Raises:
            InputError: no assertion names an output or a hidden tensor; of VNN-LIB 2.0 alone.
        """


def write_property(
    path: str | Path, lower: Tensor, upper: Tensor, label: int, classes: int, version: float = 1.0
) -> None:
    """Write the property that class ``label`` wins against every other on a box: Y_j >= Y_label is unsafe, j != label.

    Ends are written with nine digits. Neither the decimals nor the float32 that they round to lie inside the given
    ends: each rounds to the end itself where that is a float32, else to the next one outside.

    Args:
        lower, upper: ends of the box, floats of one shape, flattened in order (C, H, W).
        version: of VNN-LIB, one of ``VERSIONS``. In 2.0 network ``f`` has the input ``X`` float32 [1, *shape] and the
            output ``Y`` float32 [1, classes], and decimals are written in full, because its numbers have no exponents.
    Raises:
        InputError: ends that are not finite in float32, of different shapes, or crossed; a label that is no class;
            another version.
    """
    if lower.shape != upper.shape or not lower.numel() or not (lower.is_floating_point() and upper.is_floating_point()):
        found = f"{lower.dtype} {(*lower.shape,)} and {upper.dtype} {(*upper.shape,)}"
        raise InputError(f"box: found {found}; accepted: two tensors of floats of one shape, not empty")
    if classes < 2 or label not in range(classes):  # a fraction is not in the range either
        raise InputError(f"label: found {label} of {classes} classes; accepted: 0 to classes - 1, of 2 classes or more")
    check_version("version", version)
    low, high = lower.detach().double().flatten().cpu(), upper.detach().double().flatten().cpu()
    ends32 = torch.stack([_outward32(low, -math.inf), _outward32(high, math.inf)])
    if not (ends32.isfinite().all() and (low <= high).all()):
        raise InputError("box: found ends that are crossed, or infinite or NaN in float32; accepted: lower <= upper")
    # nine digits are finer than half a float32 step: the decimals round back to the very float32
    down, up = (Context(prec=9, rounding=rounding) for rounding in (ROUND_FLOOR, ROUND_CEILING))
    floors, ceilings = (as_floats(end) for end in ends32 + 0.0)  # + 0.0: there is no -0
    ends = [
        (down.create_decimal_from_float(least), up.create_decimal_from_float(most))
        for least, most in zip(floors, ceilings, strict=True)
    ]
    others = [j for j in range(classes) if j != label]
    if version == 1.0:
        lines = _first(ends, int(label), others, classes)
    else:
        lines = _second(ends, int(label), others, classes, lower.shape)
    write_atomically(Path(path), lambda temporary: temporary.write_text("\n".join([*lines, ""])))


def check_version(name: str, version: float) -> None:
    """
    Raises:
        InputError: no version of VNN-LIB that is written; names the field.
    """
    check(version in VERSIONS, name, version, " or ".join(map(str, VERSIONS)))


def _first(ends: Sequence[tuple[Decimal, Decimal]], label: int, others: Sequence[int], classes: int) -> Iterator[str]:
    """The lines of a property in VNN-LIB 1.0."""
    yield from (f"(declare-const X_{i} Real)" for i in range(len(ends)))
    yield from (f"(declare-const Y_{j} Real)" for j in range(classes))
    for i, (least, most) in enumerate(ends):
        yield f"(assert (>= X_{i} {least}))".replace("E", "e")
        yield f"(assert (<= X_{i} {most}))".replace("E", "e")
    losses = " ".join(f"(and (<= Y_{label} Y_{j}))" for j in others)
    yield f"(assert (or {losses}))"


def _second(
    ends: Sequence[tuple[Decimal, Decimal]], label: int, others: Sequence[int], classes: int, shape: Sequence[int]
) -> Iterator[str]:
    """The lines of a property in VNN-LIB 2.0, for inputs of this shape behind a batch of one."""
    yield "(vnnlib-version <2.0>)"
    yield "(declare-network f"
    yield f"  (declare-input X float32 [{','.join(map(str, (1, *shape)))}])"
    yield f"  (declare-output Y float32 [1,{classes}]))"
    for place, (least, most) in zip(itertools.product(*map(range, shape)), ends, strict=True):
        entry = f"X[{','.join(map(str, (0, *place)))}]"
        yield f"(assert (and (>= {entry} {_in_full(least)}) (<= {entry} {_in_full(most)})))"
    losses = " ".join(f"(<= Y[0,{label}] Y[0,{j}])" for j in others)
    yield f"(assert (or {losses}))"


def _in_full(value: Decimal) -> str:
    """The decimal without exponent and with a decimal point, without which it would be an integer."""
    text = format(value, "f")
    return text if "." in text else f"{text}.0"


def _outward32(ends: Tensor, direction: float) -> Tensor:
    """Float64 ``ends`` as float32, rounded in the direction of ±inf."""
    near = ends.float()
    inside = near.double() > ends if direction < 0 else near.double() < ends
    return torch.where(inside, torch.nextafter(near, torch.full_like(near, direction)), near)


def _next(ends: Tensor, direction: float) -> Tensor:
    """The next floats in the direction of ±inf."""
    return torch.nextafter(ends, torch.full_like(ends, direction))


def _three(ends: Tensor, direction: float) -> Tensor:
    """(N, 3) the ``ends`` (N,) and their next two neighbours in the direction of ±inf."""
    second = _next(ends, direction)
    return torch.stack([ends, second, _next(second, direction)], 1) + 0.0  # + 0.0: there is no -0


def _decimals_at(end: Fraction, rounding: str) -> Iterator[str]:
    """Decimals at ``end``, or next to it in the direction of rounding, of more and more digits."""
    for digits in (16, 17, 20, 50, 4 * DIGITS):  # the last holds whatever decimal was read
        context = Context(prec=digits, rounding=rounding)
        yield str(context.divide(Decimal(end.numerator), Decimal(end.denominator))).replace("E", "e")
