"""Time IBP forward + backward of CNN7 against auto_LiRPA and against plain passes, all in one process.

    python scripts/benchmark_ibp.py [--batch 32] [--rounds 7] [--threads 2] [--json FILE]

auto_LiRPA (0.7 or later, from its git) is timed where it can be imported. Both sides bound all margins of the
same network with running batch-norm statistics, the specification merged into the last layer. The contenders
take turns in every round, so that a drifting machine slows all of them; ratios are medians over the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from certtrain.bounds import LinfBall, compute_margins
from certtrain.models import Cnn7

EPSILON = 2 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Cnn7(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)).build((3, 32, 32), 10)
    model.eval().to(options.device)
    images = torch.rand(options.batch, 3, 32, 32, device=options.device)
    labels = torch.arange(options.batch, device=options.device) % 10
    contenders = {"plain": lambda: model(images).sum(), "certtrain": lambda: _ours(model, images, labels)}
    rival, absent = _auto_lirpa(model, images, labels)
    if rival:
        contenders["auto_LiRPA"] = rival
        difference = (rival() - contenders["certtrain"]()).abs() / contenders["certtrain"]().abs()
        print(f"relative difference of the summed bounds: {float(difference):.1e}")
    seconds = {name: [] for name in contenders}
    for round_number in range(options.rounds + 1):
        for name, forward in contenders.items():
            elapsed = _timed(model, forward)
            if round_number:  # the first round warms up
                seconds[name].append(elapsed)
    ours = seconds["certtrain"]
    result = {
        "torch": torch.__version__, "device": options.device, "threads": options.threads, "batch": options.batch,
        "rounds": options.rounds, "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": {
            f"certtrain / {name}": statistics.median(a / b for a, b in zip(ours, times, strict=True))
            for name, times in seconds.items() if name != "certtrain"
        },
    }  # fmt: skip
    for name, times in seconds.items():
        print(f"{name:12s} {statistics.median(times):8.3f} s   ({min(times):.3f} to {max(times):.3f})")
    for name, ratio in result["ratio"].items():
        print(f"{name}: {ratio:.3f}")
    if not rival:
        print(f"auto_LiRPA was not timed: {absent}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _timed(model: nn.Module, forward: Callable[[], torch.Tensor]) -> float:
    model.zero_grad()
    started = time.perf_counter()
    forward().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _ours(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return compute_margins(model, LinfBall(EPSILON).region(images), labels)[0].sum()


def _auto_lirpa(model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore[import-not-found]
    except ImportError as error:
        return None, error
    bounded = BoundedModule(model, torch.empty_like(images), device=images.device)
    for node in bounded.nodes():  # training mode lets gradients through, but the batch norms are to stay fixed
        node.train("BatchNorm" not in type(node).__name__)
    rows = torch.stack([
        torch.stack([torch.eye(10)[label] - torch.eye(10)[other] for other in range(10) if other != label])
        for label in labels.tolist()
    ]).to(images.device)  # fmt: skip

    def forward() -> torch.Tensor:
        lower, upper = (images - EPSILON).clamp(min=0), (images + EPSILON).clamp(max=1)
        box = BoundedTensor(images, PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper))
        return bounded.compute_bounds(x=(box,), C=rows, method="IBP", bound_upper=False)[0].sum()

    return forward, None


if __name__ == "__main__":
    main()
