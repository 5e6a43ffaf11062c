"""Networks extended by what a property reads beside their outputs: inputs and products of variables behind them, and
the map from its free inputs to all inputs in front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..bounds.network import NetworkModule, with_inputs
from ..bounds.operations import Concat, Copies, Input, Operation, Power, Product, Rearrangement, Scale, Selection, Sum
from ..typed import as_ints
from .constraints import Monomial
from .free_inputs import FreeInputs
from .joint_network import JointNetwork
from .vnnlib import Property


def with_terms(network: JointNetwork, property: Property) -> JointNetwork:
    """The network of the property's free inputs, which gives its terms behind its outputs. Copies are exact in every
    arithmetic; a square is bounded as such, never as a product of independent values."""
    if property.free is not None:
        network = _of_free_inputs(network, property.free)
    if not property.terms:
        return network
    operations, inputs = list(network.module.operations), network.shape.numel()
    variables = len(operations) - 1

    def append(operation: Operation) -> int:
        operations.append(operation)
        return len(operations) - 1

    def of_degree(factors: int, different: int) -> list[Monomial]:
        return [one for one in property.terms if (len(one), len(set(one))) == (factors, different)]

    alone, products, squares = of_degree(1, 1), of_degree(2, 2), of_degree(2, 1)
    read = sorted({variable for one in property.terms for variable in one if variable < inputs})
    parts = [variables]
    if read:
        picked = append(Selection("inputs of the property", (0,), _picks(read)))
        variables = append(Concat("variables of the property", (variables, picked), 1))
    # numbers of variables among the outputs and the inputs behind them
    place = {variable: network.outputs + number for number, variable in enumerate(read)}
    place |= {inputs + output: output for output in range(network.outputs)}

    def factors(monomials: Sequence[Monomial], number: int) -> int:
        index = [place[one[number]] for one in monomials]
        return append(Copies("factors of the property", (variables,), _picks(index)))

    if alone:
        parts.append(factors(alone, 0))
    if products:
        parts.append(append(Product("products of the property", (factors(products, 0), factors(products, 1)))))
    if squares:
        parts.append(append(Power("squares of the property", (factors(squares, 0),), 2.0)))
    append(Concat("terms of the property", tuple(parts), 1))
    return replace(network, module=NetworkModule(operations), outputs=network.outputs + len(property.terms))


def _of_free_inputs(network: JointNetwork, free: FreeInputs) -> JointNetwork:
    """The network with its inputs computed of the free ones (F,)."""
    given, *others = network.module.operations
    operations: list[Operation] = [Input(given.path, ())]
    shape, total = network.shape, 0
    for number, (index, factor) in enumerate(free.parts):
        operations.append(Copies("inputs of free inputs", (0,), _picks(as_ints(index))))
        shift = free.shift if number == 0 else torch.zeros_like(free.shift)
        if not free.copies:
            factor, shift = factor.unsqueeze(0), shift.unsqueeze(0)
            near = factor.to(network.dtype), shift.to(network.dtype)
            # a decimal's rounding to float64 is below the 8 units that every operation is charged with
            operations.append(
                Scale("factors of free inputs", (len(operations) - 1,), _always(*near), _always(factor, shift), 3)
            )
        if number:
            operations.append(Sum("sums of free inputs", (total, len(operations) - 1)))
        total = len(operations) - 1
    operations.append(Rearrangement("inputs", (total,), lambda x: x.reshape(-1, *shape)))
    first = len(operations) - 1
    operations += [with_inputs(operation, *(first + read for read in operation.inputs)) for operation in others]
    return replace(network, module=NetworkModule(operations), shape=torch.Size((free.count,)))


def _always(factor: Tensor, shift: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (factor, shift)


def _picks(index: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Selects entries (B, len(index)) of values, which are flattened."""
    numbers = torch.tensor(index)
    return lambda x: x.flatten(1).gather(1, numbers.to(x.device).expand(x.shape[0], -1))
