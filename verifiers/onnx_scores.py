"""Networks that end with an ArgMax: they are read up to its scores, and constraints on its index become comparisons of
these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import TensorProto
from torch import Tensor

from ..bounds.clock import looking
from ..bounds.operations import UnsupportedOperation
from .constraints import (
    CONSTANT,
    ONE,
    Conjunction,
    Constraint,
    Disjunction,
    Inequality,
    Limit,
    Monomial,
    Term,
    added,
    compare,
)
from .vnnlib_text import Token

BEHIND = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators that leave a single index as it is; casts where their type holds it."""

MOST: dict[int, int] = {
    TensorProto.INT8: 2**7 - 1, TensorProto.UINT8: 2**8 - 1, TensorProto.INT16: 2**15 - 1,
    TensorProto.UINT16: 2**16 - 1, TensorProto.INT32: 2**31 - 1, TensorProto.UINT32: 2**32 - 1,
    TensorProto.INT64: 2**63 - 1, TensorProto.UINT64: 2**64 - 1, TensorProto.BFLOAT16: 2**8,
    TensorProto.FLOAT16: 2**11, TensorProto.FLOAT: 2**24, TensorProto.DOUBLE: 2**53,
}  # fmt: skip
"""By element type the number up to which it holds all natural ones."""


class ArgMax(NamedTuple):
    """The place of the largest of some scores: the first of equal ones, or the last where ``last``."""

    last: bool

    def of(self, scores: Tensor) -> int:
        """The index at scores (K,)."""
        places = (scores == scores.max()).nonzero().flatten()
        return int(places[-1 if self.last else 0])


class Index(NamedTuple):
    """An output that is the place of the largest of ``size`` scores, which the program gives in its place."""

    size: int
    rule: ArgMax


@dataclass(frozen=True)
class EndingAtScores:
    """A model that ends before its ArgMax.

    Args:
        place: the ArgMax, for errors.
        axis: of its input.
        casts: the element types that its index is cast to.
    """

    model: onnx.ModelProto
    place: str
    axis: int
    rule: ArgMax
    casts: tuple[int, ...]

    def check(self, shape: Sequence[int], path: Path) -> None:
        """
        Raises:
            UnsupportedOperation: scores of this shape have several indices, or one that a cast changes.
        """
        before = "a network that ends before it (onnx.utils.extract_model)"
        indices = math.prod(shape) // shape[self.axis]
        if indices != 1:
            raise UnsupportedOperation(
                f"{path}: {self.place}: found {indices} indices; accepted: a single one, or {before}"
            )
        for kind in self.casts:
            if shape[self.axis] - 1 > MOST.get(kind, 0):
                found = f"an index below {shape[self.axis]} that is cast to {TensorProto.DataType.Name(kind)}"
                accepted = f"a type that holds it, or {before}"
                raise UnsupportedOperation(f"{path}: {self.place}: found {found}; accepted: {accepted}")


def ending_at_scores(model: onnx.ModelProto) -> EndingAtScores | None:
    """The model without the ArgMax, and the casts and reshapes behind it, that give its only output; None without."""
    made = {output: node for node in model.graph.node for output in node.output}
    names = [output.name for output in model.graph.output]
    if len(names) != 1:
        return None
    node, casts = made.get(names[0]), list[int]()
    while node is not None and node.op_type in BEHIND and node.input:
        casts += [one.i for one in node.attribute if node.op_type == "Cast" and one.name == "to"]
        node = made.get(node.input[0])
    if node is None or node.op_type != "ArgMax" or node.domain not in ("", "ai.onnx"):
        return None
    options = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[:]
    cut.graph.output.append(onnx.ValueInfoProto(name=node.input[0]))
    place = f"ArgMax {node.name or node.output[0]!r}"
    rule = ArgMax(bool(options.get("select_last_index", 0)))
    return EndingAtScores(cut, place, int(options.get("axis", 0)), rule, tuple(casts))


def scores_compared(
    constraint: Conjunction, inputs: int, outputs: int, indices: Mapping[int, Index], limit: Limit
) -> Conjunction:
    """The constraint on the inputs and the program's outputs, without indices.

    Args:
        constraint: on ``inputs`` inputs and ``outputs`` declared outputs.
        indices: those of the outputs that are indices, by their numbers; where others stand among the program's
            outputs follows from them.
        limit: called with the numbers of choices of all indices' values, and of comparisons of scores in all of them.
    Raises:
        OutOfTime: the clock ran out.
    """
    places, place = dict[int, int](), inputs
    for number in range(outputs):
        places[inputs + number] = place
        place += indices[number].size if number in indices else 1
    starts = {inputs + number: (places[inputs + number], index) for number, index in indices.items()}
    return _Rewriting(places, starts).of(constraint, limit)


class _Rewriting:
    """
    Args:
        places: by declared output the number of its first program output.
        starts: by index the number of its first score.
    """

    def __init__(self, places: Mapping[int, int], starts: Mapping[int, tuple[int, Index]]):
        self.places, self.starts = places, starts

    def of(self, constraint: Conjunction, limit: Limit) -> Conjunction:
        """The parts without an index, and one disjunct for each choice of the values of all indices that are read."""
        reads = [self._read(part) for part in constraint.parts]
        alone = [self._with(part, {}) for part, read in zip(constraint.parts, reads, strict=True) if not read]
        chosen, read = list[Constraint](), sorted(set[int]().union(*reads))
        sizes = [self.starts[variable][1].size for variable in read]
        limit(constraint.token, math.prod(sizes), math.prod(sizes) * sum(sizes))
        wins = {(variable, value): self._wins(constraint.token, variable, value)
                for variable, size in zip(read, sizes, strict=True) for value in range(size)}  # fmt: skip
        for values in looking(itertools.product(*map(range, sizes))):
            known = dict(zip(read, values, strict=True))
            rest = [self._with(part, known) for part, own in zip(constraint.parts, reads, strict=True) if own]
            chosen.append(Conjunction(constraint.token, (*rest, *(wins[one] for one in known.items()))))
        return Conjunction(constraint.token, (*alone, Disjunction(constraint.token, tuple(chosen))))

    def _read(self, constraint: Constraint) -> set[int]:
        """The indices that a constraint reads."""
        if isinstance(constraint, Inequality):
            return {one for monomial, _ in constraint.coefficients for one in monomial} & self.starts.keys()
        assert isinstance(constraint, (Conjunction, Disjunction))
        return set[int]().union(*map(self._read, constraint.parts))

    def _with(self, constraint: Constraint, known: Mapping[int, int]) -> Constraint:
        """The constraint on the program's variables, where indices have these values."""
        if not isinstance(constraint, Inequality):
            assert isinstance(constraint, (Conjunction, Disjunction))
            return type(constraint)(constraint.token, tuple(self._with(part, known) for part in constraint.parts))
        total: Term = {CONSTANT: constraint.constant}
        for monomial, factor in constraint.coefficients:
            rest: Monomial = tuple(sorted(self.places.get(one, one) for one in monomial if one not in known))
            added(total, {rest: factor * math.prod(Fraction(known.get(one, 1)) for one in monomial)}, 1)
        return compare(constraint.token, "<" if constraint.strict else "<=", total, {})

    def _wins(self, token: Token, variable: int, value: int) -> Constraint:
        """The score with the number ``value`` is the largest; where others are equal, the first or the last of them."""
        first, index = self.starts[variable]
        parts = list[Constraint]()
        for other in range(index.size):
            if other != value:
                sign = "<" if (other > value) == index.rule.last else "<="
                parts.append(compare(token, sign, {(first + other,): ONE}, {(first + value,): ONE}))
        return Conjunction(token, tuple(parts))


def shown(outputs: Tensor, count: int, indices: Mapping[int, Index]) -> Tensor:
    """``count`` declared outputs from the program's, (K,): indices from their scores."""
    values, place = list[float | int](), 0
    for number in range(count):
        index = indices.get(number)
        size = 1 if index is None else index.size
        own = outputs[place : place + size]
        values.append(own.item() if index is None else index.rule.of(own))
        place += size
    return outputs.new_tensor(values) if indices else outputs
