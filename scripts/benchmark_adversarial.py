"""Time one training step of each adversarial method in one run, and compare the ratios with the published ones.

    python scripts/benchmark_adversarial.py [--width 16] [--batch 128] [--rounds 7] [--device cpu] [--json FILE]

A pre-activation ResNet-18 (of the given width; published: 64) on random images of CIFAR's size, with SGD, whole steps
as the training loop makes them: attack, passes, backward, update. Methods take turns in every round; a method's time is
the median over rounds, after one that does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import median

import torch
from measuring import timed

from certtrain.bounds import LinfBall
from certtrain.losses import (
    Fait,
    FastBat,
    Fgsm,
    FgsmCkpt,
    FgsmGa,
    FgsmPgi,
    FgsmRs,
    Loss,
    Mer,
    NFgsm,
    PgdAt,
    Qub,
    Trades,
)
from certtrain.models import PreActResNet
from certtrain.noise import Noise
from certtrain.run_folder import write_atomically
from certtrain.step import Batch, State, Step
from certtrain.streams import tolerant_streams
from certtrain.training import Descend, Sgd

METHODS: dict[str, Loss] = {
    "FGSM": Fgsm(), "FGSM-RS": FgsmRs(), "N-FGSM": NFgsm(), "FGSM-CKPT": FgsmCkpt(), "FGSM-GA": FgsmGa(),
    "FGSM-PGI": FgsmPgi(), "PGD-10": PgdAt(), "TRADES": Trades(), "FAIT": Fait(), "FAIT-MER": Mer(base=Fait()),
    "Fast-BAT": FastBat(), "FGSM-RS + QUB": Qub(base=FgsmRs()), "N-FGSM + QUB": Qub(base=NFgsm()),
    "FGSM-CKPT + QUB": Qub(base=FgsmCkpt()), "FGSM-GA + QUB": Qub(base=FgsmGa()), "PGD-10 + QUB": Qub(base=PgdAt()),
}  # fmt: skip
RATIOS: list[tuple[str, str, float | None, str]] = [
    ("FGSM-RS + QUB", "FGSM-RS", 1.7, "by the count of passes 1.6"),
    ("N-FGSM + QUB", "N-FGSM", 1.7, "published 1.21"),
    ("FGSM-CKPT + QUB", "FGSM-CKPT", None, "published 1.29"),
    ("FGSM-GA + QUB", "FGSM-GA", None, "published 1.08"),
    ("PGD-10 + QUB", "PGD-10", 1.2, "published 1.13"),
    ("Fast-BAT", "FGSM-RS", 2.7, "published 2.66"),
    ("FGSM-GA", "FGSM-RS", 3.3, "published 3.26"),
    ("FAIT", "TRADES", 1.15, ""),
]
"""Method, reference, largest accepted ratio of their times, and the ratio that the source reports."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {name: stepper(loss, options) for name, loss in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            elapsed = timed(step, options.device)
            if number:
                seconds[name].append(elapsed)
    for name, times in seconds.items():
        print(f"{name:18s} {1000 * median(times):8.1f} ms")
    ratios = {}
    for name, base, most, source in RATIOS:
        ratios[f"{name} / {base}"] = found = median(seconds[name]) / median(seconds[base])
        target = "" if most is None else f"target {most:.2f}, {'met' if found <= most else 'MISSED'}"
        print(f"{name + ' / ' + base:30s} {found:5.2f}  {target:20s} {source}")
    if options.json:
        where = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor()
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        found = {**settings, "hardware": where, "torch": torch.__version__, "seconds": seconds, "ratios": ratios}
        text = json.dumps(found, indent=2) + "\n"
        write_atomically(options.json, lambda temporary: temporary.write_text(text))


def stepper(loss: Loss, options: argparse.Namespace):
    """A function that takes one training step of its own network at each call."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = PreActResNet(width=options.width).build((3, 32, 32), 10).to(device).train()
    index = torch.arange(options.batch, device=device)
    batch = Batch(torch.rand(options.batch, 3, 32, 32, device=device), index % 10, index)
    epsilon = torch.tensor(8 / 255, device=device)
    specs = loss.declare_state((3, 32, 32), 10)
    tensors = {name: spec.allocate(options.batch, options.batch, device) for name, spec in specs.items()}
    step = Step(LinfBall(8 / 255).with_epsilon(epsilon), epsilon, epsilon, 0.5, Noise(0, index), State(tensors, specs))
    optimizer = Sgd(lr=0.01, weight_decay=5e-4).build(model)

    def run() -> None:
        Descend()(model, optimizer, loss, [(batch, step)], clip=None)

    return run


if __name__ == "__main__":
    with tolerant_streams():
        main()
