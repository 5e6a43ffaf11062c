"""Bounds of small vision transformers beside auto_LiRPA's, both by CROWN, at a radius where half the images are proved.

    python scripts/benchmark_attention.py [CASE…] [--images 16] [--epsilon 0.01] [--rounds 3] [--json FILE]

batch-relu  batch norms and ReLU, as the networks of VNN-COMP's benchmark vit
layer-relu  layer norms and ReLU
layer-gelu  layer norms and GELU, which auto_LiRPA does not take

Each has two blocks of 48 features and three heads over four patches of an 8×8 image, attention written out in matrix
products, because auto_LiRPA refuses torch's own; it is trained here, by PGD-2 on scikit-learn's digits, for half a
minute. The bounds of all intermediate values are CROWN's on either side, too. Contenders take turns in every round;
times are CPU seconds of one thread, ratios medians of rounds. "distance" is the mean over images and margins between
bound and clean margin, which exploding bounds may fill alone; "alpha" the same after --steps steps on slopes and
planes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from measuring import peak_memory
from torch import Tensor, nn

from certtrain.bounds import Bounds, LinfBall
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.data.digits import Digits
from certtrain.run_folder import write_atomically
from certtrain.verifiers import Specification
from certtrain.verifiers.neurons import Neurons
from certtrain.verifiers.optimise import Subproblems, maximise, starting_slopes

DIM, HEADS, PATCH, SIDE = 48, 3, 4, 8


class BatchNorm(nn.Module):
    """Batch norm of features, which are the last dimension."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        query, key, value = (
            layer(x).reshape(-1, tokens, HEADS, DIM // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        shares = torch.softmax(torch.matmul(query, key.transpose(-1, -2)) * (DIM // HEADS) ** -0.5, dim=-1)
        return self.out(torch.matmul(shares, value).transpose(1, 2).reshape(-1, tokens, DIM))


class Block(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], activation: Callable[[], nn.Module]):
        super().__init__()
        self.first, self.second, self.attention = norm(), norm(), Attention()
        self.perceptron = nn.Sequential(nn.Linear(DIM, 2 * DIM), activation(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.perceptron(self.second(x))


class Transformer(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], activation: Callable[[], nn.Module]):
        super().__init__()
        self.embedding = nn.Conv2d(1, DIM, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, DIM) / 50)
        self.blocks = nn.Sequential(*(Block(norm, activation) for _ in range(2)))
        self.norm, self.head = norm(), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


CASES: dict[str, Callable[[], Transformer]] = {
    "batch-relu": lambda: Transformer(BatchNorm, nn.ReLU),
    "layer-relu": lambda: Transformer(lambda: nn.LayerNorm(DIM), nn.ReLU),
    "layer-gelu": lambda: Transformer(lambda: nn.LayerNorm(DIM), nn.GELU),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epsilon", type=float, help="radius; default: one at which half the images are proved")
    parser.add_argument("--updates", type=int, default=400, help="of the training (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, found = Digits().load(), {}
    for name in options.cases or CASES:
        train, test = ((split.pixels(torch.arange(len(split))), split.labels) for split in (data.train, data.test))
        model, (images, labels) = trained(CASES[name], *train, options.updates), test
        with torch.no_grad():
            right = model(images).argmax(1) == labels
            chosen = right.nonzero().flatten()[: options.images]
            found[name] = {"accuracy": round(float(right.float().mean()), 3)}
            found[name] |= compared(model, images[chosen], labels[chosen], options)
        print(name, *(f"\n  {key:12s} {value}" for key, value in found[name].items()), flush=True)
        if options.json:
            text = json.dumps(found, indent=2) + "\n"
            write_atomically(options.json, lambda temporary, text=text: temporary.write_text(text))


def trained(make: Callable[[], Transformer], images: Tensor, labels: Tensor, updates: int) -> Transformer:
    torch.manual_seed(0)
    model, epsilon = make(), 0.05
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates)
    for _ in range(updates):
        at = torch.randint(0, len(images), (128,))
        x, y, moved = images[at], labels[at], (2 * torch.rand(128, 1, SIDE, SIDE) - 1) * epsilon
        for _ in range(2):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + moved), y), moved)
            moved = (moved + 0.75 * epsilon * gradient.sign()).clamp(-epsilon, epsilon)
        optimizer.zero_grad()
        F.cross_entropy(model((x + moved.detach()).clamp(0, 1)), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@dataclass
class Bounding:
    """Our bounds of all margins over a radius around images; ``bounds`` are those of the last run's neurons."""

    model: nn.Module
    images: Tensor
    rows: Tensor
    bounds: dict[int, Bounds] | None = None

    def __post_init__(self) -> None:
        self.network = fold(self.model, self.images.shape[1:])

    def __call__(self, epsilon: float) -> Tensor:
        region = LinfBall(epsilon).region(self.images)
        self.bounds = crown_bounds(self.network, region)
        return bound_forms(self.network, region, self.rows, self.bounds)

    def optimised(self, epsilon: float, steps: int) -> Tensor:
        """Over the bounds of the last run, with optimised parameters."""
        assert self.bounds is not None
        lower, upper = Neurons.of(self.network).ends(self.bounds, self.rows)
        region, offsets = LinfBall(epsilon).region(self.images), torch.zeros(self.rows.shape[:2])
        sub = Subproblems(region, self.rows, offsets, lower, upper)
        return maximise(self.network, sub, starting_slopes(lower, upper, self.rows.shape[1]), steps=steps).best


def compared(model: Transformer, images: Tensor, labels: Tensor, options) -> dict:
    rows = Specification.robust(labels, 10).rows
    ours, clean = Bounding(model, images, rows), (rows @ model(images).unsqueeze(2)).squeeze(2)
    epsilon, high = (1e-4, 0.1) if options.epsilon is None else (options.epsilon, 0.0)
    while high > 1.03 * epsilon:
        middle = (epsilon * high) ** 0.5
        if float((ours(middle).amin(1) > 0).float().mean()) > 0.5:
            epsilon = middle
        else:
            high = middle
    contenders: dict[str, Callable[[], Tensor]] = {"certtrain": lambda: ours(epsilon)}
    try:
        contenders["auto_LiRPA"] = auto_lirpa(model, images, epsilon, rows)
    except ImportError as error:
        print(f"auto_LiRPA was not timed: {error}")
    except NotImplementedError as error:
        print(f"auto_LiRPA refuses: {error}")
    found: dict = {"images": len(images), "epsilon": round(epsilon, 5)}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    lower: dict[str, Tensor] = {}
    for number in range(options.rounds + 1):
        for name, run in contenders.items():
            started = time.process_time()
            lower[name] = run()
            if number:
                seconds[name].append(time.process_time() - started)
    for name, run in contenders.items():
        pairs = zip(seconds["certtrain"], seconds[name], strict=True)
        found[name] = {
            "proved": int((lower[name].amin(1) > 0).sum()), "distance": float((clean - lower[name]).mean()),
            "our distance over it": float((clean - lower["certtrain"]).mean() / (clean - lower[name]).mean()),
            "median of ratios": float(((clean - lower["certtrain"]) / (clean - lower[name])).median()),
            "seconds": median(seconds[name]), "our time over it": median(own / other for own, other in pairs),
            "peak_mib": round(peak_memory(run, "cpu") / 2**20, 1),
        }  # fmt: skip
    started = time.process_time()
    best = ours.optimised(epsilon, options.steps)
    found["alpha"] = {
        "proved": int((best.amin(1) > 0).sum()), "distance": float((clean - best).mean()),
        "seconds": time.process_time() - started,
    }  # fmt: skip
    return found


def auto_lirpa(model: nn.Module, images: Tensor, epsilon: float, rows: Tensor) -> Callable[[], Tensor]:
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore[import-not-found]

    hull = LinfBall(epsilon).region(images).hull
    bounded = BoundedModule(model, torch.empty_like(images))

    def run() -> Tensor:
        box = BoundedTensor(images, PerturbationLpNorm(norm=float("inf"), x_L=hull.lower, x_U=hull.upper))
        return bounded.compute_bounds(x=(box,), C=rows, method="CROWN", bound_upper=False)[0]

    return run


if __name__ == "__main__":
    main()
