"""CROWN and a search on wide networks in little memory: the case memory of ``benchmark_verification``."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch

from certtrain.bounds import LinfBall
from certtrain.bounds.clock import until
from certtrain.bounds.folding import fold
from certtrain.bounds.memory import within
from certtrain.models import Cnn7
from certtrain.verifiers import Certify
from certtrain.verifiers.bounds_so_far import BoundsSoFar
from certtrain.verifiers.cascade import robustness

LIMITS = {64: "2GiB", 128: "4GiB"}
"""Limits of memory by the width of the CNN7."""

RADIUS = {64: 6 / 255, 128: 5 / 255}
"""Radius by width at which about half of the neurons are unstable by CROWN, with torch's initial weights."""


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument("--crown-seconds", type=float, default=float("inf"), help="limit of CROWN (default: none)")
    group.add_argument("--search-seconds", type=float, default=60.0, help="limit of alpha-CROWN, and of the search")
    group.add_argument("--widths", type=int, nargs="+", choices=[*LIMITS], default=[*LIMITS])


def memory(options: argparse.Namespace) -> dict[str, Any]:
    found = dict[str, Any]()
    for width in options.widths:
        limits = (options.crown_seconds, options.search_seconds, options.search_seconds)
        with ProcessPoolExecutor(1, get_context("spawn")) as processes:
            measured = processes.submit(_measured, width, limits, options.threads, options.clock)
            found[f"CNN7 of width {width} in {LIMITS[width]}"] = measured.result()
    return found


def _measured(width: int, limits: tuple[float, ...], threads: int, clock: str) -> dict[str, Any]:
    """Seconds and peak memory of this process after each stage."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model, image, found = Cnn7(width=width).build((3, 32, 32), 10).eval(), torch.rand(1, 3, 32, 32), dict[str, Any]()
    seconds = time.process_time if clock == "processor" else time.perf_counter
    with torch.no_grad(), within(LIMITS[width]), until(now=seconds):
        problem = robustness(model, image, model(image).argmax(1), torch.arange(1), 10, LinfBall(RADIUS[width]))
        known, finding = BoundsSoFar(fold(model, image.shape[1:]), torch.full((1, 9), -torch.inf), {}), None
        for name, limit in zip(("crown", "alpha", "bab"), limits, strict=True):
            (stage,) = Certify(stages=(name,), timeout=limits[-1]).build(0)[1:]
            started, begun = time.perf_counter(), time.process_time()
            with until(seconds() + limit):
                finding = stage(problem, known)
            known = finding.known
            found[f"{name}: wall, processor, peak GiB"] = (
                round(time.perf_counter() - started, 1),
                round(time.process_time() - begun, 1),
                round(getrusage(RUSAGE_SELF).ru_maxrss / 2**20, 2),
            )
        unstable = [(bounds.lower < 0) & (bounds.upper > 0) for bounds in known.bounds.values()]
        found["unstable"] = f"{sum(int(part.sum()) for part in unstable)} of {sum(part.numel() for part in unstable)}"
        if finding is not None and finding.search:
            found["children"] = finding.search[0].children
        found["lower bound"] = round(float(known.rows.min()), 4)
    return found
