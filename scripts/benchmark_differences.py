"""Equivalence queries of two similar networks of ACAS Xu's size, decided with and without bounds of their difference.

    OMP_NUM_THREADS=1 PYTHONPATH=scripts/processor_clock python scripts/benchmark_differences.py --seconds 20

Each query asks whether all outputs of a network of 6 hidden layers of 50 and of a copy of it that was rounded, pruned
or trained on differ by less than a tolerance on a box of five inputs. Both sides run the stages of a property of few
inputs (``verifiers/vnncomp.py``) on the two networks beside each other; one of them has the stage ``difference``
besides. With the path above, limits are CPU seconds. ``--networks FOLDER`` takes ACAS Xu's own networks, ONNX files,
instead of trained ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certtrain.bounds import Box, trace
from certtrain.bounds.network import NetworkModule
from certtrain.bounds.operations import Affine, Concat, Weights
from certtrain.verifiers import Judge, Limits, Problem, Specification, run_cascade
from certtrain.verifiers.onnx_network import read_onnx
from certtrain.verifiers.vnncomp import PROPERTY, STAGES_OF_FEW_INPUTS

INPUTS, OUTPUTS, WIDTH, DEPTH = 5, 5, 50, 6
STEPS, BATCH, RATE = 600, 512, 2e-3
DECIDED = ("verified", "falsified")
QUERIES = [(kind, radius, factor) for kind in ("float16", "int8", "pruned", "trained on")
           for radius, factor in ((0.02, 3.0), (0.05, 2.0), (0.05, 4.0), (0.1, 3.0), (0.1, 6.0))]  # fmt: skip
"""Kind of the copy, radius of the box (inputs range over [-1/2, 1/2]), and tolerance in terms of the largest difference
that sampling finds in the box: once for each of two networks."""


@dataclass(frozen=True)
class Query:
    """A pair of networks, a box, and how far apart their outputs may be."""

    name: str
    problem: Problem


def side_by_side(programs: Sequence[NetworkModule]) -> NetworkModule:
    """One program of the programs' common input; its output is theirs, (B, K) each, concatenated."""
    operations, outputs = list(programs[0].network.operations[:1]), list[int]()
    for program in programs:
        places = [0]
        for operation in program.network.operations[1:]:
            operations.append(replace(operation, inputs=tuple(places[read] for read in operation.inputs)))
            places.append(len(operations) - 1)
        outputs.append(places[-1])
    return NetworkModule([*operations, Concat("beside", tuple(outputs), 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of a query (default: 20)")
    parser.add_argument("--queries", metavar="START:STOP", default="0:40", help="some of the 40 (default: all)")
    parser.add_argument("--networks", type=Path, help="folder of ONNX files with 5 inputs and 5 outputs")
    parser.add_argument("--json", type=Path, help="file of results")
    options = parser.parse_args()
    first, last = map(int, options.queries.split(":"))
    plain, difference = STAGES_OF_FEW_INPUTS, list[str](STAGES_OF_FEW_INPUTS)
    difference.insert(difference.index("crown") + 1, "difference")
    lines = list[dict[str, Any]]()
    for number, query in enumerate(queries(options.networks)):
        if not first <= number < last:
            continue
        line: dict[str, Any] = {"query": number, "name": query.name}
        for side, stages in (("plain", plain), ("difference", tuple(difference))):
            started = time.perf_counter()
            run = replace(PROPERTY, stages=stages, timeout=options.seconds).stages_for(0, Judge())
            (found,) = run_cascade(query.problem, run, Limits(options.seconds))
            line[side] = found.status
            line[f"{side} seconds"] = round(time.perf_counter() - started, 2)
        lines.append(line)
        print(*line.values(), sep="\t", flush=True)
        if {line["plain"], line["difference"]} == set(DECIDED):
            raise SystemExit(f"query {number}: found two answers; one of them is wrong")
    for side in ("plain", "difference"):
        print(side, sum(line[side] in DECIDED for line in lines), dict(Counter(line[side] for line in lines)))
    if options.json is not None:
        options.json.write_text(json.dumps({"seconds": options.seconds, "queries": lines}, indent=1))


def queries(folder: Path | None) -> Iterator[Query]:
    """The 40 queries, in an order that mixes them."""
    draw, pairs = torch.Generator().manual_seed(0), dict[tuple[int, str], tuple[NetworkModule, torch.Size]]()
    for number in range(2):
        first, shape, others = from_files(folder, number) if folder else trained(number)
        for kind, other in others.items():
            pairs[number, kind] = side_by_side([first, other]), shape
    for number, (kind, radius, factor) in ((n, one) for one in QUERIES for n in range(2)):
        pair, shape = pairs[number, kind]
        lower, upper, largest = drawn_box(pair, shape, radius, draw)
        yield Query(
            f"network {number}, {kind}, radius {radius}, {factor} x {largest:.2g}",
            equivalence(pair, Box(*(end.reshape(1, *shape) for end in (lower, upper))), factor * largest),
        )


def drawn_box(
    pair: NetworkModule, shape: torch.Size, radius: float, draw: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """(lower, upper, largest): the ends (5,) of a box, and the largest difference that sampling finds in it, which is
    not 0: ACAS Xu's networks are constant far away."""
    while True:
        center = (torch.rand(INPUTS, generator=draw) - 0.5) * (1 - 2 * radius)
        lower, upper = center - radius, center + radius
        points = lower + torch.rand(20000, INPUTS, generator=draw) * (upper - lower)
        with torch.no_grad():
            outputs = pair(points.reshape(-1, *shape))
        largest = float((outputs[:, OUTPUTS:] - outputs[:, :OUTPUTS]).abs().max())
        if largest > 0:
            return lower, upper, largest


def equivalence(pair: NetworkModule, box: Box, tolerance: float) -> Problem:
    """Whether no output differs by the tolerance or more anywhere in the box."""
    unit = torch.eye(OUTPUTS)
    change = torch.cat([-unit, unit], 1)
    rows = torch.cat([change, -change])[None]
    offsets = torch.full((1, 2 * OUTPUTS), tolerance)
    return Problem(
        pair, box, Specification(rows, offsets, torch.arange(2 * OUTPUTS)), torch.zeros(1, dtype=torch.int64)
    )


def trained(number: int) -> tuple[NetworkModule, torch.Size, dict[str, NetworkModule]]:
    """A network trained on costs of an encounter, and its copies."""
    torch.manual_seed(number)
    sizes = [INPUTS, *[WIDTH] * DEPTH, OUTPUTS]
    model = nn.Sequential()
    for size, after in pairwise(sizes):
        layer = nn.Linear(size, after)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        model.extend([layer, nn.ReLU()])
    model = model[:-1]
    train(model, STEPS, RATE)
    later = copy.deepcopy(model)
    train(later, 20, RATE / 100)
    shape = torch.Size((INPUTS,))
    first, fine = (NetworkModule(trace(one.eval(), shape).operations) for one in (model, later))
    return first, shape, {**copies(first), "trained on": fine}


def from_files(folder: Path, number: int) -> tuple[NetworkModule, torch.Size, dict[str, NetworkModule]]:
    """One of the folder's networks, and its copies; a little noise stands for training."""
    files = sorted([*folder.glob("*.onnx"), *folder.glob("*.onnx.gz")])
    network = read_onnx(files[len(files) * (1 + 2 * number) // 4])
    draw = torch.Generator().manual_seed(number)
    fine = changed(network.module, lambda weight: weight + 1e-4 * torch.randn(weight.shape, generator=draw))
    return network.module, network.shape, {**copies(network.module), "trained on": fine}


def copies(module: NetworkModule) -> dict[str, NetworkModule]:
    """The network with its weights rounded, and without the smallest ones."""
    return {
        "float16": changed(module, lambda weight: weight.half().float()),
        "int8": changed(module, eight_bits),
        "pruned": changed(module, pruned),
    }


def changed(module: NetworkModule, function: Any) -> NetworkModule:
    return NetworkModule([
        replace(one, layer=Weights(function(one.weight.detach()), one.bias)) if isinstance(one, Affine) else one
        for one in module.network.operations
    ])  # fmt: skip


def eight_bits(weight: Tensor) -> Tensor:
    """Each row rounded to 255 multiples of a step."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def pruned(weight: Tensor) -> Tensor:
    """Without the smallest 3 % of the weights."""
    least = weight.abs().flatten().kthvalue(max(1, round(0.03 * weight.numel()))).values
    return torch.where(weight.abs() <= least, 0.0, weight)


def train(model: nn.Module, steps: int, rate: float) -> None:
    """Fit the costs of five advisories: how far each turns an intruder's bearing at the closest approach."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    turns = torch.tensor([0.0, -0.15, 0.15, -0.3, 0.3])
    for _ in range(steps):
        inputs = torch.rand(BATCH, INPUTS) - 0.5
        distance, bearing, heading, own, other = inputs.unsqueeze(-1).unbind(1)
        angle = 2 * torch.pi * (bearing + turns)
        ahead, aside = (0.6 + distance) * angle.cos(), (0.6 + distance) * angle.sin()
        drift = (0.5 + other) * (2 * torch.pi * heading).sin() - (0.5 + own) * angle.sin()
        risk = torch.exp(-4 * ((aside + drift * ahead).square() + 0.2 * ahead.square()))
        loss = (model(inputs) - risk - 0.1 * turns.abs()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main()
