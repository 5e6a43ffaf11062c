"""Time the verifier against others in one run: ratios, and both sides' answers.

    python scripts/benchmark_verification.py [CASE…] [--rounds 3] [--json FILE]
    python scripts/benchmark_verification.py run --run RUN_DIR [--images 200]

crown       CROWN on all margins, CNN7 at a quarter of its width, 8 images of CIFAR's size; beside auto_LiRPA where it
            can be imported (0.7 or later, from its git), with its patches
full_width  the same, CNN7 as published and one image
stream      10,000 images of MNIST's size through the IBP stage of CNN7, beside the plain pass of the same images by the
            network with its batch norms folded
planted     tiny networks with a counterexample that gradients do not see, and robust twins, through the whole cascade
limits      time of hard questions under limits of 1, 2, 5 and 12 s: VNN-COMP's front door on convolutional networks,
            and certify on images of a ResNet-18; wall seconds, CPU seconds of the process, and wall / allowed, which is
            n images · limit + 10 % + 1 s. The code that a process' first verification loads is loaded before
first_verdict
            CPU seconds of a process that answers a property of a tiny network by scripts/verify.py, beside one that
            only imports torch, onnx and onnxruntime; medians. Both have their bytecode cached by a first round
run         the first test images of a finished run, up to 60 s each, once as usual and once with every image attacked;
            loading the network and the kernels, and a first image, are not counted
hard        a table of VNN-COMP instances (--instances) at --limits 30 120: decided, late, CPU time over the others'
closed      of the same (--only 6638 …): subproblems closed per CPU second, start-up aside
networks    the first --images of finished runs (--runs), --seconds each: certified, undecided, total seconds
easy        samples of tables of easy instances (--folders), --seconds each, --rounds times: what the other checkout
            decides and this one does not, CPU time over the other's

The last four are contests between processes on one core (--core): this checkout, another one (--tree), and α-β-CROWN
where CERTTRAIN_ABCROWN_PYTHON and CERTTRAIN_ABCROWN_HOME say where it is. They print a line for each process with its
CPU seconds, wall seconds and peak memory; on a busy machine --clock processor makes all their clocks count CPU
seconds. Opposite answers make the exit code 1. scripts/extract_instances.py writes the eleven hard instances from
clones of the public repositories; docs/vnncomp.md says what is compared.

Contenders take turns in every round; ratios are medians of time / certtrain's. Weights are initialised for IBP and not
trained: time depends on how many neurons are open, which the output says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from contests import add_options, closed, easy, hard, networks
from measuring import peak_memory, timed
from torch import Tensor, nn

import certtrain
from certtrain.bounds import LinfBall
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.models import Cnn7, PreActResNet, initialise_for_ibp
from certtrain.run_folder import write_atomically
from certtrain.streams import tolerant_streams
from certtrain.verifiers import Certify, Specification, certify
from certtrain.verifiers.bounds_so_far import BoundsSoFar
from certtrain.verifiers.cascade import robustness
from certtrain.verifiers.vnncomp import answer
from certtrain.verifiers.vnnlib import write_property
from certtrain.workflows.run import load_model

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
    add_options(parser)
    options = parser.parse_args()
    ready = {name for name in CASES if name not in NEEDS or getattr(options, NEEDS[name].split()[0])}
    for name in options.cases:
        if name not in ready:
            parser.error(f"{name} wants --{NEEDS[name]}")
    torch.set_num_threads(options.threads)
    found = {}
    with torch.no_grad():
        for name in options.cases or [case for case in CASES if case in ready]:
            try:
                found[name] = CASES[name](options)
            except InputError as error:
                parser.error(str(error))
            lines = {key: value for key, value in found[name].items() if key != "rows"}
            print(name, *(f"\n  {key:24s} {value}" for key, value in lines.items()), flush=True)
            if options.json:
                text = json.dumps({"threads": options.threads, **found}, indent=2, ensure_ascii=False) + "\n"
                write_atomically(options.json, lambda temporary, text=text: temporary.write_text(text))
    if any(result.get("contradictions") for result in found.values()):
        raise SystemExit(1)


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
            stage(problem, BoundsSoFar(network, torch.full((len(part), 9), -torch.inf), {}))

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


def _convolutions(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before in (3, channels, channels, channels, channels):
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 1024, 10)).eval()


def _limits() -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for channels, epsilon in ((4, 2 / 255), (16, 2 / 255), (32, 1 / 255), (64, 0.5 / 255)):
            model = _convolutions(channels)
            image = torch.rand(1, 3, 32, 32)
            with torch.enable_grad():  # as exporters want it
                certtrain.export_onnx(model, folder / f"{channels}.onnx", image)
            lower, upper = (image - epsilon).clamp(0, 1), (image + epsilon).clamp(0, 1)
            write_property(folder / f"{channels}.vnnlib", lower[0], upper[0], int(model(image).argmax()), 10)
        files = {c: (folder / f"{c}.onnx", folder / f"{c}.vnnlib") for c in (4, 16, 32, 64)}
        answer(*files[4], 1000.0)
        for limit in (1.0, 2.0, 5.0, 12.0):
            for channels in (16, 32, 64):
                asked = f"5 convolutions of {channels}, {limit:g} s"
                found[asked] = _taken(limit, lambda c=channels, s=limit: answer(*files[c], s).word)
    torch.manual_seed(0)
    model, images = PreActResNet().build((3, 32, 32), 10).eval(), torch.rand(3, 3, 32, 32)
    labels = model(images).argmax(1)
    for limit, count in ((1.0, 1), (1.0, 2), (5.0, 1), (5.0, 2), (5.0, 3)):

        def ask(limit: float = limit, count: int = count) -> str:
            verdicts = certify(model, images[:count], labels[:count], 2 / 255, Certify(timeout=limit))
            return ", ".join(f"{verdict.status} ({verdict.stage})" for verdict in verdicts)

        found[f"ResNet-18, {count} images, {limit:g} s"] = _taken(limit * count, ask)
    return found


def _taken(limit: float, ask: Callable[[], str]) -> dict:
    wall, processor = time.perf_counter(), time.process_time()
    said = ask()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    ratio = round(wall / (1.1 * limit + 1), 2)
    return {"answer": said, "wall": round(wall, 2), "processor": round(processor, 2), "wall / allowed": ratio}


def _first_verdict(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
        image = torch.rand(1, 5)
        with torch.enable_grad():  # as exporters want it
            certtrain.export_onnx(model, folder / "tiny.onnx", image)
        write_property(folder / "tiny.vnnlib", image[0] - 1e-3, image[0] + 1e-3, int(model(image).argmax()), 3)
        script = str(Path(__file__).with_name("verify.py"))
        asked = [script, "--onnx", str(folder / "tiny.onnx"), "--vnnlib", str(folder / "tiny.vnnlib")]
        contenders = {"imports": ["-c", "import torch, onnx, onnxruntime"], "verify.py": asked}
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
        seconds: dict[str, list[float]] = {one: [] for one in contenders}
        for number in range(rounds + 1):
            for one, words in contenders.items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, check=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                if number:
                    seconds[one].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    above = median(ours - theirs for theirs, ours in zip(*seconds.values(), strict=True))
    return {**{one: round(median(times), 3) for one, times in seconds.items()}, "verify.py above": round(above, 3)}


CASES: dict[str, Callable[[argparse.Namespace], dict]] = {
    "crown": lambda options: _crown(options.rounds, 8, width=16, hidden=128),
    "full_width": lambda options: _crown(options.rounds, 1),
    "stream": lambda options: _stream(options.rounds),
    "planted": lambda options: _planted(),
    "limits": lambda options: _limits(),
    "first_verdict": lambda options: _first_verdict(options.rounds),
    "run": lambda options: _run(options.run, options.images),
    "hard": hard,
    "closed": closed,
    "networks": networks,
    "easy": easy,
}
NEEDS = {
    "run": "run RUN_DIR, the folder of a finished run", "hard": "instances CSV", "closed": "instances CSV",
    "networks": "runs DIR…, folders of finished runs", "easy": "folders DIR…, with an instances.csv each",
}  # fmt: skip
"""The option that a case needs; by default the cases that have what they need are run."""

if __name__ == "__main__":
    with tolerant_streams():
        main()
