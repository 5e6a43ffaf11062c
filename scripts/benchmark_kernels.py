"""Time the kernels against other implementations of the same computations, all in one run.

    python scripts/benchmark_kernels.py [--op ibp_margins] [--shape B=256,K=1000,D=512] [--dtype float32] [--device cpu]
                                        [--rounds 11] [--no-compile] [--json FILE] [--against COMMIT]

Contenders take turns in every round, so that a drifting machine slows all of them; ratios are medians over the
rounds of time / certtrain's time: above 1 is slower than certtrain. Peak memory is the most that one pass allocates
beyond what was allocated before. ``floor`` is two plain products with gradients, or bytes over this run's copy
bandwidth. auto_LiRPA (0.7 or later, from its git) is timed where it can be imported. ``--against`` times the same op of
another commit, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from kernel_cases import CASES, ON_GPU, Case, Maker
from measuring import peak_memory, timed
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PASSES = ("forward", "forward + backward")
SAMPLE = 0.01
"""Seconds for which a short pass is repeated in each round: a single call runs with another contender's caches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=CASES, help="default: all")
    parser.add_argument("--shape", help="for one --op, for example B=256,K=1000,D=512")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.shape and len(options.op or ()) != 1:
        parser.error("--shape wants exactly one --op")
    if options.serve:
        return _serve(_cases(options, compiled=False))
    bandwidth = _bandwidth(options.device)
    results = []
    with _other_commit(options) as other:
        for case in _cases(options, compiled=not options.no_compile):
            for kind in PASSES[: 1 + bool(case.leaves)]:
                results.append(_measure(case, kind, options, bandwidth, other))
                _print(results[-1], case)
    if options.json:
        machine = {"torch": torch.__version__, "device": _device_name(options.device), "threads": options.threads}
        options.json.write_text(json.dumps({**machine, "dtype": options.dtype, "results": results}, indent=2) + "\n")


def _cases(options: argparse.Namespace, compiled: bool):
    make = Maker(getattr(torch, options.dtype), options.device, compiled)
    for op in options.op or CASES:
        build, shapes = CASES[op]
        if options.device != "cpu":
            shapes = ON_GPU.get(op, shapes)
        if options.shape:
            shapes = [{name: int(value) for name, value in (part.split("=") for part in options.shape.split(","))}]
        for shape in shapes:
            yield build(make, **shape)


def _measure(case: Case, kind: str, options: argparse.Namespace, bandwidth: float, other) -> dict:
    runs = {name: _pass(forward, case.leaves, kind) for name, forward in case.contenders.items()}
    clocks: dict[str, Callable[[], float]] = {name: partial(timed, run, options.device) for name, run in runs.items()}
    if other:
        clocks[options.against] = partial(other, case, kind)
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    calls = {name: [clock() for _ in range(2)][1] for name, clock in clocks.items()}  # the first compiles
    calls = {name: max(1, round(SAMPLE / elapsed)) for name, elapsed in calls.items()}
    for _ in range(options.rounds):
        for name, clock in clocks.items():
            seconds[name].append(sum(clock() for _ in range(calls[name])) / calls[name])
    ours = seconds["certtrain"]
    result = {
        "op": case.op, "shape": case.shape, "pass": kind,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "ratio": {name: median(a / b for a, b in zip(times, ours, strict=True)) for name, times in seconds.items()},
        "peak_memory": {name: peak_memory(run, options.device) for name, run in runs.items()},
        "notes": case.notes,
    }  # fmt: skip
    if case.touched and kind == PASSES[0]:
        result["seconds"]["floor"] = case.touched / bandwidth
        result["ratio"]["floor"] = case.touched / bandwidth / median(ours)
    return result


def _pass(forward: Callable, leaves: Sequence[Tensor], kind: str) -> Callable[[], None]:
    def run() -> None:
        if kind == PASSES[0]:
            with torch.no_grad():
                forward()
            return
        found = forward()
        outputs = [t for t in ((found,) if isinstance(found, Tensor) else found) if t.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)

    return run


def _bandwidth(device: str) -> float:
    """Bytes read and written in a second when copying 256 MB."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(7))


def _device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def _print(result: dict, case: Case) -> None:
    print(f"\n{result['op']}  {result['shape']}  {result['pass']}")
    for name, ratio in sorted(result["ratio"].items(), key=lambda item: item[1]):
        memory = result["peak_memory"].get(name)
        held = "" if memory is None else f"{memory / 2**20:10.1f} MiB"
        print(f"  {name:20s} {result['seconds'][name] * 1e3:10.3f} ms  {ratio:8.2f}x {held}")
    for note in case.notes:
        print(f"  {note}")
    sys.stdout.flush()


@contextmanager
def _other_commit(options: argparse.Namespace):
    """A function that times a case's op of another commit in a separate process; None without --against."""
    if not options.against:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, options.against], cwd=ROOT, check=True)
        try:
            arguments = [a for a in sys.argv[1:] if a not in ("--against", options.against)]
            command = [sys.executable, __file__, *arguments, "--serve"]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(tree)},
            ) as child:  # fmt: skip
                ask, answer = child.stdin, child.stdout
                assert ask and answer

                def clock(case: Case, kind: str) -> float:
                    print(json.dumps([case.op, case.shape, kind]), file=ask, flush=True)
                    return float(answer.readline())

                yield clock
                ask.close()
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def _serve(cases) -> None:
    """The child process of --against: read the case to time, print seconds."""
    ready = {(case.op, case.shape): case for case in cases}
    for line in sys.stdin:
        op, shape, kind = json.loads(line)
        case = ready[op, shape]
        run = _pass(case.contenders["certtrain"], case.leaves, kind)
        device = str(case.leaves[0].device.type) if case.leaves else "cpu"
        print(timed(run, device), flush=True)


if __name__ == "__main__":
    if "--serve" in sys.argv:  # with the certtrain of another commit, which may not have the streams
        main()
    else:
        from certtrain.streams import tolerant_streams

        with tolerant_streams():
            main()
