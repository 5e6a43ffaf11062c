"""The cascade: cheapest stage first, each batched over the images that are still open."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..attacks import Attack, Pgd
from ..bounds import LinfBall, PerturbationSet, forward
from ..data import Split, in_order
from ..errors import InputError, check
from ..precision import full_float32
from .problem import Problem, Specification, Status, Verdict
from .stages import AttackStage, CleanStage, IbpStage, Replay, Stage


@dataclass(frozen=True)
class Certify:
    """The recipe's ``certify`` section: what is proved of the test split, and how.

    Args:
        stages: after the clean prediction, in this order.
        attack: of the attack stage.
        images: the first so many test images; null for all.
        batch_size: images that share a batch.
    """

    stages: tuple[Literal["attack", "ibp"], ...] = ("attack", "ibp")
    attack: Attack = Pgd(steps=40, step_size=0.1, objective="margin")
    images: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        check(len(set(self.stages)) == len(self.stages), "stages", self.stages, "each stage once")
        check(self.images is None or self.images >= 1, "images", self.images, "a whole number >= 1, or null")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")

    def build(self, seed: int, replay: Replay | None = None) -> list[Stage]:
        later: dict[str, Stage] = {"attack": AttackStage(self.attack, seed, replay), "ibp": IbpStage()}
        return [CleanStage(), *(later[name] for name in self.stages)]


@torch.no_grad()
@full_float32()
def run_cascade(problem: Problem, stages: Sequence[Stage]) -> list[Verdict]:
    """The verdicts of a batch of problems, in their order.

    Each stage sees only what the earlier ones left open. A lower bound is the best that any stage found.
    """
    count, device = len(problem), problem.index.device
    status: list[Status] = ["unknown"] * count
    decided_by = [stages[-1].name] * count
    lower = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
    seconds = [0.0] * count
    counterexamples: list[Tensor | None] = [None] * count
    predictions = forward(problem.network, problem.region.images).logits.argmax(1).tolist()
    left = torch.arange(count, device=device)
    for stage in stages:
        if not len(left):
            break
        started = time.perf_counter()
        finding = stage(problem.subset(left))
        decided = finding.decided.tolist()  # waits for the device: the time is the stage's own
        share = (time.perf_counter() - started) / len(left)
        if finding.lower_bound is not None:
            lower[left] = torch.maximum(lower[left], finding.lower_bound.double())
        for row, (number, done) in enumerate(zip(left.tolist(), decided, strict=True)):
            seconds[number] += share
            if done:
                status[number], decided_by[number] = finding.status, stage.name
                if finding.counterexamples is not None:
                    counterexamples[number] = finding.counterexamples[row]
        left = left[~finding.decided]
    labels = problem.specification.labels
    arithmetic = f"nearest {str(problem.region.images.dtype).removeprefix('torch.')}"
    return [
        Verdict(
            index=int(problem.index[number]),
            label=None if labels is None else int(labels[number]),
            prediction=predictions[number],
            status=status[number],
            stage=decided_by[number],
            lower_bound=float(lower[number]) if math.isfinite(lower[number]) else None,
            seconds=seconds[number],
            arithmetic=arithmetic,
            counterexample=counterexamples[number],
        )
        for number in range(count)
    ]


def certify_split(
    network: nn.Module, split: Split, classes: int, ball: PerturbationSet, settings: Certify, seed: int, start: int = 0
) -> Iterator[list[Verdict]]:
    """Verdicts of the test images from number ``start`` on, a batch at a time.

    Args:
        network: put into evaluation mode by the caller.
        start: a multiple of ``settings.batch_size``, so that a resumed run forms the same batches.
    """
    stages = settings.build(seed)
    stop = len(split) if settings.images is None else min(settings.images, len(split))
    for batch in in_order(split, settings.batch_size, start, stop):
        specification = Specification.robust(batch.labels, classes)
        yield run_cascade(Problem(network, ball.region(batch.images), specification, batch.index), stages)


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | PerturbationSet,
    settings: Certify | None = None,
    *,
    seed: int = 0,
) -> list[Verdict]:
    """Prove or refute that no perturbation changes the model's choice, for each of a batch of images.

    Args:
        model: maps (B, C, H, W) in [0, 1] to logits, its normalisation inside. Judged in evaluation mode.
        x: (B, C, H, W) in [0, 1]; y: (B,) int64.
        epsilon: radius of the l-infinity ball in pixel units, or any perturbation set.
        settings: stages and attack; the default attacks, then bounds.
        seed: of the attack.
    Returns:
        one ``Verdict`` an image. ``verified`` holds in the arithmetic that the verdict names.
    Raises:
        InputError: pixels outside [0, 1] or NaN; labels outside the logits' range.
        UnsupportedNode: the model holds an operation without a rule.
    """
    if not ((x >= 0) & (x <= 1)).all():
        raise InputError("x: found pixels outside [0, 1] or NaN; accepted: images in [0, 1]")
    ball = epsilon if isinstance(epsilon, PerturbationSet) else LinfBall(epsilon)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            classes = forward(model, x[:1]).logits.shape[1] if len(x) else 1
        if len(y) != len(x) or (len(y) and not (0 <= int(y.min()) and int(y.max()) < classes)):
            raise InputError(
                f"y: found {len(y)} labels {y.unique().tolist()[:5]}…; accepted: {len(x)} of 0 to {classes - 1}"
            )
        verdicts: list[Verdict] = []
        chosen = settings or Certify()
        for first in range(0, len(x), chosen.batch_size):
            rows = slice(first, first + chosen.batch_size)
            index = torch.arange(first, first + len(x[rows]), device=x.device)
            problem = Problem(model, ball.region(x[rows]), Specification.robust(y[rows], classes), index)
            verdicts += run_cascade(problem, chosen.build(seed))
        return verdicts
    finally:
        for module, training in modes.items():
            module.training = training
