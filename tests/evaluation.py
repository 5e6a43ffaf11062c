"""Networks evaluated in other arithmetics than torch's, and one on which they disagree."""

from fractions import Fraction

import numpy as np
import torch
from torch import nn

from certtrain.bounds.operations import Convolution, Dense, Nonlinear, Rearrangement


def exactly(network, x: list[Fraction]) -> tuple[dict[int, list[Fraction]], list[Fraction]]:
    """(inputs of the non-linear operations, logits) of a chain of dense layers, in rational arithmetic."""
    seen = {}
    for number, operation in enumerate(network.operations[1:], start=1):
        if isinstance(operation, Dense):
            weight = [[Fraction(w) for w in row] for row in operation.weight.tolist()]
            bias = [Fraction(b) for b in operation.bias.tolist()]
            x = [sum((w * v for w, v in zip(row, x)), b) for row, b in zip(weight, bias)]
        elif isinstance(operation, Nonlinear):
            seen[number] = x
            slope = Fraction(operation.kink)
            x = [v if v > 0 else slope * v for v in x]
        else:
            assert isinstance(operation, Rearrangement)
    return seen, x


def in_some_order(network, x: np.ndarray, generator) -> np.ndarray:
    """Logits in float32, every dot product summed in a random order or tree."""

    def total(products: np.ndarray) -> np.ndarray:
        products = products[generator.permutation(len(products))]
        if generator.random() < 0.5:
            return np.add.reduce(products.astype(np.float32), axis=0, dtype=np.float32)
        while len(products) > 1:
            half = len(products) // 2
            products = np.concatenate([products[:half] + products[half : 2 * half], products[2 * half :]])
        return products[0]

    for operation in network.operations[1:]:
        if isinstance(operation, Dense):
            weight, bias = (
                operation.weight.detach().numpy().astype(np.float32),
                operation.bias.detach().numpy().astype(np.float32),
            )
            x = total(np.concatenate([weight.T * x[:, None], bias[None]]))
        elif isinstance(operation, Convolution):
            weight, bias = (
                operation.weight.detach().numpy().astype(np.float32),
                operation.bias.detach().numpy().astype(np.float32),
            )
            patches = torch.nn.functional.unfold(
                torch.from_numpy(x)[None], weight.shape[2:], operation.dilation, operation.padding, operation.stride
            )[0].numpy()
            products = weight.reshape(len(weight), -1).T[:, :, None] * patches[:, None]
            full = np.broadcast_to(bias[:, None], (1, *products.shape[1:]))
            side = network.shapes[network.operations.index(operation)]
            x = total(np.concatenate([products, full])).reshape(side)
        elif isinstance(operation, Nonlinear):
            x = np.where(x > 0, x, np.float32(operation.kink) * x).astype(np.float32)
        else:
            x = operation(torch.from_numpy(x)[None])[0].numpy()
    return x


def cancelling() -> nn.Sequential:
    """Class 0 wins by 0.75 - x1 in exact arithmetic; in float32 and float64 a huge number swallows x1."""
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    huge = 2.0**54
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[huge, 1.0], [1.0, 0.0]])), first.bias.zero_()
        last.weight.copy_(torch.tensor([[-1.0, huge], [0.0, 0.0]])), last.bias.copy_(torch.tensor([0.75, 0.0]))
    return nn.Sequential(first, nn.ReLU(), last).eval().requires_grad_(False)
