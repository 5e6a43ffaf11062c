"""Time sPGD's loop without its network against its authors' released form, and an attack's gradient against that of a
training step, in one run.

    python scripts/benchmark_attacks.py [--quick] [--rounds 7] [--steps 20] [--threads 1] [--variant unprojected]
                                        [--device cpu] [--json FILE]

The loop: a stub without cost returns given logits and a given gradient. No image is ever misclassified, so that all
take every step; two in five points are a row's best so far; every other row has no gradient, so that its mask does not
change and is redrawn after 3 steps, a sixth of all rows in each step (against a small network of digits: a twentieth to
a fifth). Both loops draw their start, keep the best points and redraw masks. The released one is written from its
description: full sorts (one for the mask, two for whether it changed), autograd through the sigmoid and the mask, and
asserts that look at all values.

The gradient: of the images alone (``gradient_of``), and by ``loss.backward()`` with the weights' gradients; a
pre-activation ResNet-18 of the given width (published: 64) on images of CIFAR's size.

Contenders take turns in every round; ratios are medians over the rounds, after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from kernel_rivals import sort_scatter
from measuring import timed
from torch import Tensor, nn

from certtrain.attacks import SparsePgd, gradient_of, in_mode
from certtrain.bounds import SparseBall
from certtrain.models import PreActResNet
from certtrain.noise import Noise
from certtrain.run_folder import write_atomically
from certtrain.step import Batch, Step
from certtrain.streams import tolerant_streams

SHAPES = [(256, 32, 20), (128, 32, 120), (48, 224, 1200)]
"""Number of images, side and k: evaluation and training on CIFAR-10, training on ImageNet-100."""
LEAST_RATIO, LEAST_SAVING = 3.5, 0.39
PATIENCE, SIZE = 3, 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds, without the large images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variant", default="unprojected", choices=["unprojected", "projected"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="of the network's gradient")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.quick:
        options.rounds = min(options.rounds, 3)
    loops = []
    for images, side, k in SHAPES[:2] if options.quick else SHAPES:
        found = taken_in_turns(loop_runs(images, side, k, options), options)
        ratio = ratio_of(found, "released", "certtrain")
        loops.append({"images": images, "pixels": side * side, "k": k, "seconds": found, "ratio": ratio})
        own, other = (1000 * median(found[name]) / options.steps for name in ("certtrain", "released"))
        print(f"sPGD's loop, {images}x{side * side} k={k}: {own:.2f} ms a step, released {other:.2f} ms")
        print(f"  ratio {ratio:.2f}, {judged(ratio, LEAST_RATIO)}", flush=True)
    found = taken_in_turns(gradient_runs(options), options)
    saving = 1 - 1 / ratio_of(found, "with weights", "images alone")
    own, other = (1000 * median(found[name]) for name in ("images alone", "with weights"))
    print(f"gradient of the images alone: {own:.1f} ms, with the weights' {other:.1f} ms")
    print(f"  saving {saving:.2f}, {judged(saving, LEAST_SAVING)}")
    if options.json:
        where = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor()
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        gradient = {"seconds": found, "saving": saving}
        result = {**settings, "hardware": where, "torch": torch.__version__, "loops": loops, "gradient": gradient}
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(options.json, lambda temporary: temporary.write_text(text))


def taken_in_turns(runs: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contender in each round; contenders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            elapsed = timed(run, options.device)
            if number:
                seconds[name].append(elapsed)
    return seconds


def judged(found: float, least: float) -> str:
    return f"target {least}, {'met' if found >= least else 'MISSED'}"


def ratio_of(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    return median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


class GivenLogits(torch.autograd.Function):
    """Return given logits, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, onto: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.gradient, None, None


class Stub(nn.Module):
    """A network stub for a batch of class 0: always right, with a margin that fluctuates and shrinks from call to
    call."""

    def __init__(self, images: Tensor, calls: int):
        super().__init__()
        self.gradient, self.calls, self.at = torch.randn_like(images), calls, 0
        self.gradient[::2] = 0
        self.logits = torch.rand(calls, len(images), 10, device=images.device)
        self.logits[:, :, 0] += torch.linspace(3, 1, calls, device=images.device)[:, None]

    def forward(self, images: Tensor) -> Tensor:
        self.at = (self.at + 1) % self.calls
        return GivenLogits.apply(images, self.logits[self.at], self.gradient)


def loop_runs(count: int, side: int, k: int, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    index = torch.arange(count, device=options.device)
    batch = Batch(torch.rand(count, 3, side, side, device=options.device), torch.zeros_like(index), index)
    ball, model = SparseBall(k), Stub(batch.images, options.steps + 2)
    step = Step.evaluation(ball, Noise(0, index))
    attack = SparsePgd(steps=options.steps, alpha=SIZE, beta=SIZE, patience=PATIENCE, variant=options.variant)
    return {
        "certtrain": lambda: attack(model, batch, ball, step),
        "released": lambda: released_loop(model, batch, k, options.steps, options.variant == "projected"),
    }


class Masked(torch.autograd.Function):
    """p on the k pixels with the largest sigmoids; the backward pass treats the mask as the sigmoids themselves."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, s: Tensor, k: int, projected: bool) -> Tensor:
        mask = sort_scatter(s, k)
        ctx.save_for_backward(p, s, mask)
        ctx.projected = projected
        return p * mask[:, None]

    @staticmethod
    def backward(ctx: Any, onto: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        p, s, mask = ctx.saved_tensors
        return onto * (mask if ctx.projected else s)[:, None], (onto * p).sum(1), None, None


def released_loop(model: nn.Module, batch: Batch, k: int, steps: int, projected: bool) -> Tensor:
    """sPGD as released, from its description: every step sorts three times and reads values five times."""
    x, y = batch.images.flatten(2), batch.labels
    factor = SIZE * x.shape[2] ** 0.5
    p = torch.min(torch.max(2 * torch.rand_like(x) - 1, -x), 1 - x)
    m = torch.randn_like(x[:, 0])
    still = torch.zeros_like(y)
    with torch.no_grad():
        best, best_loss = x.clone(), F.cross_entropy(model(batch.images), y, reduction="none")
    for number in range(steps + 1):
        p, m = p.detach().requires_grad_(), m.detach().requires_grad_()
        points = x + Masked.apply(p, torch.sigmoid(m), k, projected)
        logits = model(points.reshape(batch.images.shape))
        loss = F.cross_entropy(logits, y, reduction="none")
        with torch.no_grad():
            better = (loss >= best_loss) | (logits.argmax(1) != y)
            best[better], best_loss[better] = points[better], loss[better]
        if number == steps:
            break
        for_p, for_m = torch.autograd.grad(loss.sum(), (p, m))
        with torch.no_grad():
            p, moved = updated(p, m, x, for_p, for_m, factor)
            changed = (sort_scatter(moved, k) != sort_scatter(m, k)).any(1)
            still = torch.where(changed, 0, still + 1)
            stuck = torch.nonzero(still >= PATIENCE).flatten()
            if len(stuck):
                moved[stuck], still[stuck] = torch.randn_like(moved[stuck]), 0
            m = moved
        assert bool(((points.detach() - x).abs().sum(1) > 0).sum(1).max() <= k)
    return best


def updated(p: Tensor, m: Tensor, x: Tensor, for_p: Tensor, for_m: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    p = (p + SIZE * for_p.sign()).clamp(-1, 1)
    p = torch.min(torch.max(p, -x), 1 - x)
    norm = torch.norm(for_m, p=2, dim=1, keepdim=True)
    m = torch.where(norm < 2e-10, m, m + factor * for_m / (norm + 1e-10))
    assert not torch.isnan(p).any()
    assert not torch.isnan(m).any()
    return p, m


def gradient_runs(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    device = torch.device(options.device)
    model = PreActResNet(width=options.width).build((3, 32, 32), 10).to(device).eval()
    images, labels = (
        torch.rand(options.batch, 3, 32, 32, device=device),
        torch.arange(options.batch, device=device) % 10,
    )

    def alone() -> None:
        with in_mode(model, training=False):  # as the frame of every attack has it
            gradient_of(model, images, lambda logits: F.cross_entropy(logits, labels, reduction="none"))

    def with_weights() -> None:
        points = images.clone().requires_grad_()
        F.cross_entropy(model(points), labels, reduction="sum").backward()
        model.zero_grad()

    return {"images alone": alone, "with weights": with_weights}


if __name__ == "__main__":
    with tolerant_streams():
        main()
