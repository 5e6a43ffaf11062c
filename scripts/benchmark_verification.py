"""Time the verifier beside others, in one run: ratios, and what both answer.

    python scripts/benchmark_verification.py [crown] [full_width] [stream] [planted] [--rounds 3] [--json FILE]
    python scripts/benchmark_verification.py run --run RUN_DIR [--images 200]

crown       CROWN on all margins, CNN7 at a quarter of its width, 8 images of CIFAR's size; beside auto_LiRPA where it
            can be imported (0.7 or later, from its git), with its patches
full_width  the same, CNN7 as published and one image
stream      10,000 images of MNIST's size through the IBP stage of CNN7, beside the plain pass of the same images by the
            network with its batch norms folded
planted     tiny networks with a counterexample that gradients do not see, and robust twins, through the whole cascade
run         the first test images of a finished run, up to 60 s each, once as usual and once with every image attacked;
            loading the network and the kernels, and a first image, are not counted

Contenders take turns in every round; ratios are medians of time / certtrain's. Weights are initialised for IBP and not
trained: time depends on how many neurons are open, which the output says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from measuring import peak_memory, timed
from torch import Tensor

from certtrain.bounds import LinfBall
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.models import Cnn7, initialise_for_ibp
from certtrain.run_folder import write_atomically
from certtrain.runs import load_model
from certtrain.streams import lasting_streams
from certtrain.verifiers import Certify, Specification, certify
from certtrain.verifiers.cascade import robustness
from certtrain.verifiers.known import Known

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from planted import planted_pairs  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "run" in options.cases and not options.run:
        parser.error("run wants --run RUN_DIR, the folder of a finished run")
    torch.set_num_threads(options.threads)
    found = {}
    with torch.no_grad():
        for name in options.cases or [case for case in CASES if case != "run" or options.run]:
            found[name] = CASES[name](options)
            print(name, *(f"\n  {key:24s} {value}" for key, value in found[name].items()), flush=True)
    if options.json:
        text = json.dumps({"threads": options.threads, **found}, indent=2) + "\n"
        write_atomically(options.json, lambda temporary: temporary.write_text(text))


def _network(shape: tuple[int, int, int], **options):
    torch.manual_seed(0)
    model = Cnn7(**options).build(shape, 10)
    initialise_for_ibp(model)
    return model.eval()


def _race(contenders: dict[str, Callable[[], object]], rounds: int, memory: bool = True) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            elapsed = timed(run, "cpu")
            if number:
                seconds[name].append(elapsed)
    found = {}
    for name, times in seconds.items():
        ratio = median(t / ours for t, ours in zip(times, seconds["certtrain"], strict=True))
        found[name] = {"seconds": round(median(times), 3), "ratio": round(ratio, 2)}
        if memory:
            found[name]["peak_mib"] = round(peak_memory(contenders[name], "cpu") / 2**20, 1)
    return found


def _crown(rounds: int, count: int, **options) -> dict:
    model, images, labels = _network((3, 32, 32), **options), torch.rand(count, 3, 32, 32), torch.arange(count)
    network, region = fold(model, images.shape[1:]), LinfBall(2 / 255).region(images)
    rows, kept = Specification.robust(labels, 10).rows, {}

    def ours() -> None:
        kept["bounds"] = crown_bounds(network, region)
        kept["certtrain"] = bound_forms(network, region, rows, kept["bounds"])

    contenders: dict[str, Callable[[], object]] = {"certtrain": ours}
    try:
        contenders["auto_LiRPA"] = _auto_lirpa(model, images, region.hull.lower, region.hull.upper, rows, kept)
    except ImportError as error:
        print(f"auto_LiRPA was not timed: {error}")
    found = _race(contenders, rounds)
    found["open neurons"] = sum(int(((b.lower < 0) & (b.upper > 0)).sum()) for b in kept["bounds"].values())
    if "auto_LiRPA" in kept:
        found["largest difference of the bounds"] = float((kept["auto_LiRPA"] - kept["certtrain"]).abs().max())
    return found


def _auto_lirpa(model, images: Tensor, lower: Tensor, upper: Tensor, rows: Tensor, kept: dict) -> Callable[[], None]:
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore[import-not-found]

    bounded = BoundedModule(model, torch.empty_like(images), bound_opts={"conv_mode": "patches"})

    def run() -> None:
        box = BoundedTensor(images, PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper))
        kept["auto_LiRPA"] = bounded.compute_bounds(x=(box,), C=rows, method="CROWN", bound_upper=False)[0]

    return run


def _stream(rounds: int) -> dict:
    model, count, size = _network((1, 28, 28)), 10_000, 250
    images = torch.rand(count, 1, 28, 28)
    network = fold(model, images.shape[1:])
    labels = torch.cat([network(part).argmax(1) for part in images.split(size)])
    parts, stage = torch.arange(count).split(size), Certify(stages=("ibp",)).build(0)[-1]

    def ours() -> None:
        for part in parts:
            problem = robustness(model, images[part], labels[part], part, 10, LinfBall(0.01))
            stage(problem, Known(network, torch.full((len(part), 9), -torch.inf), {}))

    def plain() -> None:
        for part in parts:
            network(images[part])

    return _race({"certtrain": ours, "plain": plain}, rounds, memory=False)


def _planted(count: int = 100) -> dict:
    seconds, decided = [], 0
    for case, twin in planted_pairs(count, seed=9000, kinds=("dense",)):
        for one in (case, twin):
            started = time.perf_counter()
            label = torch.tensor([one.label])
            (verdict,) = certify(one.model, one.image[None], label, one.epsilon, Certify(timeout=60.0))
            seconds.append(time.perf_counter() - started)
            expected = ("falsified", "misclassified") if one.counterexample is not None else ("verified",)
            if verdict.status not in (*expected, "timeout", "unknown"):
                raise AssertionError(f"seed {9000 + len(seconds) // 2}: {verdict.status}")
            decided += verdict.status in expected
    return {
        "networks": len(seconds), "decided": decided, "median seconds": round(median(seconds), 3),
        "longest": round(max(seconds), 2),
    }  # fmt: skip


def _run(path: Path, count: int) -> dict:
    model, config = load_model(path)
    test, index = config.data.load().test, torch.arange(count)
    images, labels, ball = test.pixels(index), test.labels[:count], config.perturbation
    orders = {"as usual": Certify().stages, "attack first": ("attack", "ibp", "crown_ibp", "crown", "alpha", "bab")}
    certify(model, images, labels, ball, Certify(stages=("ibp",)))  # loads the compiled kernels
    found = {}
    for name, stages in orders.items():
        settings = Certify(stages=stages, timeout=60.0)
        certify(model, images[:1], labels[:1], ball, settings)
        started = time.perf_counter()
        verdicts = certify(model, images, labels, ball, settings)
        decided = [v for v in verdicts if v.status in ("verified", "falsified")]
        found[name] = {
            "statuses": dict(Counter(v.status for v in verdicts)), "wall": round(time.perf_counter() - started, 2),
            "median seconds of the decided": round(median(v.seconds for v in decided), 6),
        }  # fmt: skip
    return found


CASES: dict[str, Callable[[argparse.Namespace], dict]] = {
    "crown": lambda options: _crown(options.rounds, 8, width=16, hidden=128),
    "full_width": lambda options: _crown(options.rounds, 1),
    "stream": lambda options: _stream(options.rounds),
    "planted": lambda options: _planted(),
    "run": lambda options: _run(options.run, options.images),
}

if __name__ == "__main__":
    with lasting_streams():
        main()
