"""Small networks for made queries: random, trained, pruned, quantised and fine-tuned ones, and ones whose extremes are
known by construction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Mlp:
    """Affine layers with ReLUs between them.

    Args:
        weights: (out, in) float32 of each layer; biases: (out,) float32.
        inputs: the shapes of the inputs, which are flattened and concatenated; of the default (1, N) alone, none is
            needed.
        half: whether the file holds the weights as float16, behind which stands a Cast. They must be numbers of it.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    inputs: Shapes = ()
    half: bool = False

    @property
    def shapes(self) -> Shapes:
        return self.inputs or ((1, self.weights[0].shape[1]),)

    @property
    def outputs(self) -> int:
        return len(self.biases[-1])

    def layers(self, x: np.ndarray) -> list[np.ndarray]:
        """(B, N) → what each affine layer gives, (B, width) float64; the last are the outputs."""
        found = list[np.ndarray]()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = (np.maximum(x, 0.0) if found else x) @ weight.T.astype(float) + bias
            found.append(x)
        return found

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(B, N) → (B, K) float64."""
        return self.layers(x)[-1]

    def gradient(self, x: np.ndarray, row: np.ndarray) -> np.ndarray:
        """(B, N): the gradient of <row, outputs> at each x."""
        found = self.layers(x)
        back = np.broadcast_to(row, found[-1].shape)
        for number in range(len(found) - 1, 0, -1):
            back = (back @ self.weights[number].astype(float)) * (found[number - 1] > 0)
        return back @ self.weights[0].astype(float)

    def save(self, path: Path) -> None:
        """Write an ONNX file: inputs ``x0``, …, output ``y``; layer k gives ``h<k>`` before its ReLU and ``r<k>``
        behind it, k from 1."""
        nodes, constants, parts = list[onnx.NodeProto](), dict[str, np.ndarray](), list[str]()
        for number, shape in enumerate(self.shapes):
            parts.append(f"x{number}")
            if len(shape) != 2:
                nodes.append(helper.make_node("Flatten", [parts[-1]], [f"flat{number}"], axis=1))
                parts[-1] = f"flat{number}"
        if len(parts) > 1:
            nodes.append(helper.make_node("Concat", parts, ["joined"], axis=1))
        last = parts[0] if len(parts) == 1 else "joined"
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
            names = f"w{number}", f"b{number}"
            constants |= dict(zip(names, (weight, bias), strict=True))
            if self.half:
                nodes += [helper.make_node("Cast", [f"{n}_half"], [n], to=TensorProto.FLOAT) for n in names]
            ends = "y" if number == len(self.weights) else f"h{number}"
            nodes.append(helper.make_node("Gemm", [last, *names], [ends], transB=1))
            if ends != "y":
                last = f"r{number}"
                nodes.append(helper.make_node("Relu", [ends], [last]))
        kept = [
            numpy_helper.from_array(value.astype(np.float16), f"{name}_half") if self.half
            else numpy_helper.from_array(value, name)
            for name, value in constants.items()
        ]  # fmt: skip
        given = [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, s) for n, s in enumerate(self.shapes)]
        ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, self.outputs))]
        graph = helper.make_graph(nodes, "made", given, ends, kept)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        path.write_bytes(model.SerializeToString())


def random(sizes: Sequence[int], draw: np.random.Generator, inputs: Shapes = ()) -> Mlp:
    """He initialisation, and small biases."""
    pairs = list(itertools.pairwise(sizes))
    weights = tuple((draw.normal(size=(out, of)) * math.sqrt(2 / of)).astype(np.float32) for of, out in pairs)
    biases = tuple((draw.normal(size=out) / 10).astype(np.float32) for _, out in pairs)
    return Mlp(weights, biases, inputs)


def convex(sizes: Sequence[int], draw: np.random.Generator, inputs: Shapes = (), signs: bool = False) -> Mlp:
    """A network whose outputs, and whatever its layers give, are convex functions of its inputs: behind the first layer
    no weight is negative. Of the sizes of a random one.

    Args:
        signs: each input's weights in the first layer have one sign, so that all is monotone in it.
    """
    network = random(sizes, draw, inputs)
    first, *others = network.weights
    if signs:
        first = np.abs(first) * np.sign(first.sum(0, keepdims=True) + 1e-9) / np.float32(math.sqrt(first.shape[1]))
    own = [np.abs(weight) * np.float32(1.3 / math.sqrt(weight.shape[1])) for weight in others]
    return replace(network, weights=(first.astype(np.float32), *own))


def rising(network: Mlp, slope: float) -> Mlp:
    """A convex network made monotone in input 0, of slope ``slope`` at least where input 0 is above −1: its first
    neurons hand x0 + 1 down to every output."""
    weights, biases = [weight.copy() for weight in network.weights], [bias.copy() for bias in network.biases]
    weights[0][:, 0] = np.abs(weights[0][:, 0])
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if number < len(weights) - 1:
            weight[0], bias[0] = 0.0, 1.0 if number == 0 else 0.0
            weight[0, 0] = 1.0
        else:
            weight[:, 0] = slope
    return replace(network, weights=tuple(weights), biases=tuple(biases))


def with_bump(network: Mlp, centre: np.ndarray, radius: float, height: float, output: int) -> Mlp:
    """The network plus ``height`` · relu(1 − |x − centre|₁ / radius) at an output, in further neurons of each layer."""
    weights, biases, inputs = list[np.ndarray](), list[np.ndarray](), len(centre)
    last = len(network.weights) - 1
    for number, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        rows, columns = (2 * inputs if number == 0 else 1), (0 if number == 0 else 2 * inputs if number == 1 else 1)
        rows = 0 if number == last else rows
        wide = np.zeros((len(weight) + rows, weight.shape[1] + columns), np.float32)
        wide[: len(weight), : weight.shape[1]] = weight
        own = np.zeros(rows, np.float32)
        if number == 0:
            eye = np.eye(inputs, dtype=np.float32)
            wide[len(weight) :], own = np.vstack([eye, -eye]), np.concatenate([-centre, centre]).astype(np.float32)
        elif number == last:
            wide[output, -1] = height
        elif number == 1:
            wide[-1, -columns:], own[:] = -1 / radius, 1.0
        else:
            wide[-1, -1] = 1.0
        weights.append(wide)
        biases.append(np.concatenate([bias, own]).astype(np.float32))
    return replace(network, weights=tuple(weights), biases=tuple(biases))


def saturated(network: Mlp, shift: np.ndarray) -> Mlp:
    """1 − relu(1 − h) for each output h of the network, shifted."""
    eye, one = -np.eye(network.outputs, dtype=np.float32), np.ones(network.outputs, np.float32)
    last = (one - network.biases[-1] - shift).astype(np.float32)
    weights = (*network.weights[:-1], -network.weights[-1], eye)
    return replace(network, weights=weights, biases=(*network.biases[:-1], last, one))


def permuted(network: Mlp, draw: np.random.Generator) -> Mlp:
    """The same function, its hidden neurons in another order."""
    weights, biases = list(network.weights), list(network.biases)
    for number in range(len(weights) - 1):
        order = draw.permutation(len(biases[number]))
        weights[number], biases[number] = weights[number][order], biases[number][order]
        weights[number + 1] = weights[number + 1][:, order]
    return replace(network, weights=tuple(weights), biases=tuple(biases))


def pruned(network: Mlp, share: float) -> Mlp:
    """The smallest weights of each layer set to 0."""
    return replace(network, weights=tuple(
        np.where(np.abs(weight) <= np.quantile(np.abs(weight), share), np.float32(0), weight)
        for weight in network.weights
    ))  # fmt: skip


def quantised(network: Mlp) -> Mlp:
    """All numbers rounded to float16."""

    def near(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(array.astype(np.float16).astype(np.float32) for array in arrays)

    return replace(network, weights=near(network.weights), biases=near(network.biases))


def trained(
    network: Mlp, inputs: np.ndarray, targets: np.ndarray, steps: int, rate: float, seed: int, batch: int = 128
) -> Mlp:
    """The network after steps of Adam: of cross-entropy where the targets are integers, else of the squared error."""
    modules = list[torch.nn.Module]()
    for weight, bias in zip(network.weights, network.biases, strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
        modules += [layer, torch.nn.ReLU()]
    model, order = torch.nn.Sequential(*modules[:-1]), np.random.default_rng(seed)
    integers = np.issubdtype(targets.dtype, np.integer)
    loss: Callable[..., torch.Tensor] = torch.nn.functional.cross_entropy if integers else torch.nn.functional.mse_loss
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        picked = order.integers(len(inputs), size=batch)
        wanted = torch.from_numpy(targets[picked])
        optimizer.zero_grad()
        loss(model(torch.from_numpy(inputs[picked]).float()), wanted if integers else wanted.float()).backward()
        optimizer.step()
    layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    weights, biases = ([value.detach().numpy().copy() for value in values]
                       for values in ([one.weight for one in layers], [one.bias for one in layers]))  # fmt: skip
    return replace(network, weights=tuple(weights), biases=tuple(biases))
