"""The cascade of stages: cheapest first, each batched over the images that are still open."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..bounds import LinfBall, PerturbationSet, UnsupportedOperation, checked_logits, memory, trace
from ..bounds.clock import OutOfTime, now, until
from ..bounds.folding import fold
from ..bounds.interval import check_pixels
from ..bounds.network import Network, NetworkModule
from ..bounds.operations import Input, Opaque
from ..bounds.overflow import fits
from ..bounds.rounding import check as check_rounding
from ..environment import peak_memory
from ..errors import InputError
from ..labels import as_labels, check_labels, classes_in, classes_of
from ..precision import full_float32
from ..typed import as_floats, as_ints
from .bounds_so_far import BoundsSoFar
from .limits import TOTAL_TIMEOUT, Limits, within_memory
from .problem import UNDECIDED, Problem, Specification, Status, Verdict
from .proofs import ProofWriter, Written
from .search_record import SearchRecord
from .search_statistics import SearchStatistics
from .settings import ROUNDINGS, Arithmetic, Certify
from .stage import Finding, Stage


@torch.no_grad()
@full_float32()
def run_cascade(
    problem: Problem,
    stages: Sequence[Stage],
    limits: Limits | None = None,
    watch: Callable[[str, int], object] = lambda stage, images: None,
    arithmetic: Arithmetic = "nearest",
    proofs: ProofWriter | None = None,
) -> list[Verdict]:
    """Run the stages on a batch of problems; return their verdicts in the same order.

    Each stage gets the problems that earlier ones left open. Lower bounds are the best of all stages. Where a stage
    runs out of memory its images continue in two halves; a single image that is still too large is ``unknown``.

    Args:
        limits: time limits. A stage has the rest of an image's seconds for each of its images and checks the clock
            within; its results so far are kept. A batch takes at most its number of images times an image's seconds.
        watch: called with each stage's name and the number of its images when it begins.
        arithmetic: arithmetic in which proofs hold. Counterexamples are always those of the network as it runs.
        proofs: writes a proof of each verified problem, in seconds of its own (``spent["proofs"]``).
    Raises:
        InputError: a network or a perturbation set without bounds in this arithmetic; a network whose outputs do not
            fit the specification, whose trace computes something else, or which mixes the images of a batch.
    """
    images = problem.region.images
    if not any(stage.traces for stage in stages):
        problem = replace(problem, network=_runnable(problem.network, problem.region.images.shape[1:]))
    wait = partial(torch.cuda.synchronize, images.device) if images.is_cuda else None
    with until(wait=wait):  # measures the pace of the work, by which later stages estimate times
        run = _BatchProgress(problem, (limits or Limits()).of(len(problem)), watch, proofs)  # traces the network anew
        if len(problem):
            network, dtype = _folded(problem, arithmetic)
            rows = images.new_full(problem.specification.offsets.shape, -math.inf, dtype=dtype)
            everything = torch.arange(len(problem), device=problem.index.device)
            record = None if proofs is None else SearchRecord()
            known, stages = BoundsSoFar(network, rows, {}, record=record), _stages_for_region(stages, problem)
            for part in torch.split(everything, _images_at_a_time(network, rows, problem.specification)):
                run.go(part, known.subset(part), stages)
    precision = str(images.dtype).removeprefix("torch.")
    return run.verdicts(f"nearest {precision}" if arithmetic == "nearest" else arithmetic)


def _images_at_a_time(network: Network, rows: Tensor, specification: Specification) -> int:
    """Number of images whose specification, bounds, slopes for ``rows`` (B, R) and intervals are kept together; at
    least 1."""
    outputs = sum(shape.numel() for shape in network.shapes)
    neurons = sum(network.shapes[place].numel() for place in network.nonlinear)
    numbers = 6 * outputs + (8 + rows.shape[1]) * neurons + specification.forms.numbers
    return max(1, memory.kept(rows) // max(1, numbers * rows.element_size()))


def _stages_for_region(stages: Sequence[Stage], problem: Problem) -> Sequence[Stage]:
    """The stages to run over the problem's region (``Stage.fitting``); a stage stays where its stand-in is listed
    itself."""
    names = {stage.name for stage in stages}
    fitting = [(stage, stage.fitting(problem)) for stage in stages]
    return [stage if other.name in names else other for stage, other in fitting]


def _runnable(network: nn.Module, shape: torch.Size) -> nn.Module:
    """The network, or, if it cannot be traced, a module of one opaque operation, which can be run but not bounded."""
    try:
        trace(network, shape)
    except UnsupportedOperation as why:
        return NetworkModule([Input("input", ()), Opaque("network", (0,), network, why)])
    return network


def _folded(problem: Problem, arithmetic: Arithmetic) -> tuple[Network, torch.dtype]:
    """(network, dtype): the folded network, and the precision in which it is bounded."""
    images = problem.region.images
    if arithmetic == "nearest":
        return _checked_outputs(problem, fold(problem.network, images.shape[1:])), images.dtype
    if not problem.region.is_box or images.dtype != torch.float32:
        found = f"{problem.region.kind} and {images.dtype}"
        raise InputError(f"arithmetic {arithmetic}: found {found}; accepted: a box (LinfBall) and torch.float32")
    network = fold(problem.network, images.shape[1:], dtype=torch.float64, as_written=True)
    network = replace(network, rounding=ROUNDINGS[arithmetic])
    check_rounding(network)
    return _checked_outputs(problem, network), torch.float64


def _checked_outputs(problem: Problem, network: Network) -> Network:
    """The network, after checking that its outputs fit the specification.

    Raises:
        InputError: they do not.
    """
    count, specification = len(problem), problem.specification
    found, wanted = (count, *network.shapes[-1]), (count, specification.forms.shape[2])
    if specification.labels is not None:
        classes_in(found)
    if found != wanted:
        raise InputError(f"model: found an output of shape {found}; accepted: {wanted}, as is specified")
    return network


class _BatchProgress:
    """State of a batch in the cascade, by number of the image."""

    def __init__(
        self, problem: Problem, limits: Limits, watch: Callable[[str, int], object], proofs: ProofWriter | None
    ):
        self.problem, self.limits, self.watch, self.proofs = problem, limits, watch, proofs
        self.written: dict[int, Written] = {}
        count = len(problem)
        self.predictions = _predictions(problem.network, problem.region.images)
        self.status: list[Status] = ["unknown"] * count
        self.stage = [""] * count
        self.lower = [-math.inf] * count
        self.spent: list[dict[str, float]] = [{} for _ in range(count)]
        self.counterexamples: list[Tensor | None] = [None] * count
        self.reasons: list[str | None] = [None] * count
        self.search: list[SearchStatistics | None] = [None] * count
        self.cut: dict[int, str] = {}  # images on which a stage ran out of time, and the reason to give

    def go(self, left: Tensor, known: BoundsSoFar, stages: Sequence[Stage]) -> None:
        """Run the stages on the images ``left`` (their numbers), with ``known`` for these images."""
        for place, stage in enumerate(stages):
            numbers = as_ints(left)
            if place and numbers:
                in_time = torch.tensor([self._in_time(number) for number in numbers], device=left.device)
                left, known = left[in_time], known.subset(in_time.nonzero().flatten())
                numbers = as_ints(left)
            if not numbers:
                return
            spent = max(sum(self.spent[number].values()) for number in numbers)
            limit, late = self.limits.share(spent, len(numbers))
            stage, own = stage.within(limit)
            late = "timeout" if own else late
            self.watch(stage.name, len(numbers))
            some, started = self.problem.subset(left), now()
            with until(started + max(0.0, limit) * len(numbers)) as clock:
                answer = within_memory(partial(_answer, stage, some, known))
            share = (now() - started) / len(numbers)
            for row, number in enumerate(numbers):
                seconds = share if answer is None or answer[0].seconds is None else float(answer[0].seconds[row])
                self.spent[number][stage.name] = self.spent[number].get(stage.name, 0.0) + seconds
                self.stage[number] = stage.name
            if answer is None and len(numbers) == 1:
                self.reasons[numbers[0]] = "out of memory"
                return
            if answer is None:
                for half in torch.arange(len(left), device=left.device).tensor_split(2):
                    self.go(left[half], known.subset(half), stages[place:])
                return
            still = torch.tensor(self._note(numbers, *answer, late), dtype=torch.int64, device=left.device)
            self._prove(numbers, answer[0])
            if clock.late:
                self.cut |= dict.fromkeys(numbers, late)
            elif answer[0].seconds is not None:  # a search that ended by itself: more time would not help
                self.cut = {number: why for number, why in self.cut.items() if number not in numbers}
            left, known = left[still], answer[0].known.subset(still)

    def _in_time(self, number: int) -> bool:
        why = self.limits.exceeded(sum(self.spent[number].values()))
        if why:
            self.status[number], self.reasons[number] = "timeout", why
        return why is None

    def _note(self, numbers: list[int], finding: Finding, worst: list[float], late: str) -> list[int]:
        """Store a stage's finding; return the rows that stay open."""
        open_: list[int] = []
        for row, number in enumerate(numbers):
            self.lower[number] = max(self.lower[number], worst[row])
            self.reasons[number] = finding.reasons[row] if finding.reasons else None
            if finding.search is not None:
                self.search[number] = finding.search[row] + (self.search[number] or SearchStatistics())
            status = finding.statuses[row]
            if status is None:
                open_.append(row)
                continue
            self.status[number] = status
            if status == "timeout" and late == TOTAL_TIMEOUT:
                self.reasons[number] = late
            if finding.counterexamples is not None and status != "verified":
                self.counterexamples[number] = finding.counterexamples[row]
        return open_

    def _prove(self, numbers: list[int], finding: Finding) -> None:
        """Write the proofs of the problems that a stage verified."""
        for row, number in enumerate(numbers):
            if self.proofs is not None and finding.statuses[row] == "verified":
                started, device = now(), self.problem.index.device
                one, own = (torch.tensor([at], device=device) for at in (number, row))
                self.written[number] = self.proofs.write(self.problem.subset(one), finding.known.subset(own), row)
                self.spent[number]["proofs"] = now() - started

    def verdicts(self, arithmetic: str) -> list[Verdict]:
        for number, why in self.cut.items():
            if self.status[number] == "unknown" and self.reasons[number] != "out of memory":
                self.status[number], self.reasons[number] = "timeout", why
        labels, memory = self.problem.specification.labels, peak_memory()
        return [
            Verdict(
                index=int(self.problem.index[number]),
                label=None if labels is None else int(labels[number]),
                prediction=self.predictions[number],
                status=status,
                stage=self.stage[number],
                lower_bound=self.lower[number] if math.isfinite(self.lower[number]) else None,
                seconds=sum(self.spent[number].values()),
                arithmetic=arithmetic,
                reason=self.reasons[number] if status in UNDECIDED else None,
                counterexample=self.counterexamples[number],
                spent=self.spent[number],
                search=self.search[number],
                peak_memory=memory,
                proof=self.written.get(number, Written()).file,
                no_proof=self.written.get(number, Written()).none,
            )
            for number, status in enumerate(self.status)
        ]


def _answer(stage: Stage, problem: Problem, known: BoundsSoFar) -> tuple[Finding, list[float]]:
    """(finding, lower): a stage's finding, and a lower bound of each problem's worst margin."""
    try:
        finding = _finite(stage(problem, known), problem)
    except OutOfTime:  # without results to keep
        finding = Finding([None] * len(problem), known)
    worst = problem.specification.worst(finding.known.rows)
    worst = worst if finding.lower is None else torch.maximum(worst, finding.lower)
    return finding, as_floats(worst)  # waits for the device: the time is the stage's own


def _finite(finding: Finding, problem: Problem) -> Finding:
    """Remove proofs for problems in which numbers of the network or of its bounds may overflow."""
    if "verified" not in finding.statuses:
        return finding
    known = finding.known
    good = fits(known.network, known.region_of(problem), known.bounds)
    if bool(good.all()):
        return finding
    statuses, reasons = list(finding.statuses), list(finding.reasons or [None] * len(problem))
    for row in as_ints((~good).nonzero()):
        if statuses[row] == "verified":
            statuses[row], reasons[row] = None, "overflow"
    rows = known.rows.masked_fill(~good.unsqueeze(1), -math.inf)
    lower = None if finding.lower is None else finding.lower.masked_fill(~good, -math.inf)
    return replace(finding, statuses=statuses, reasons=reasons, known=replace(known, rows=rows), lower=lower)


def _predictions(network: nn.Module, images: Tensor) -> list[int | None]:
    """The network's predictions, after its trace was compared with it; None for a single image too large for memory."""
    choices = within_memory(lambda: as_ints(checked_logits(network, images).argmax(1))) if len(images) else []
    if choices is None and len(images) > 1:
        return [choice for half in images.tensor_split(2) for choice in _predictions(network, half)]
    return [None] if choices is None else [*choices]


def robustness(
    network: nn.Module, images: Tensor, labels: Tensor, index: Tensor, classes: int, ball: PerturbationSet
) -> Problem:
    """The problem whether each label wins against every other class on the whole set around its image."""
    return Problem(network, ball.region(images), Specification.robust(labels, classes), index)


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | PerturbationSet,
    settings: Certify | None = None,
    *,
    seed: int = 0,
) -> list[Verdict]:
    """Prove or refute, image by image, that the model predicts the label under every perturbation within epsilon.

    Args:
        model: maps (B, C, H, W) in [0, 1] to logits (B, K), with its normalisation inside; run in evaluation mode.
        x: (B, C, H, W) in [0, 1], float32 or float64 as the model; y: (B,) whole numbers: a tensor, an array
            or a list.
        epsilon: radius of the l-infinity ball in pixel units of [0, 1], or radii (B,), one for each image; or any
            perturbation set, which may have a size for each image too.
        settings: stages, attack and limits; ``Certify()`` by default.
        seed: seed of the attack.
    Returns:
        one ``Verdict`` an image. ``verified`` holds in the arithmetic that the verdict names.
    Raises:
        InputError: pixels outside [0, 1], NaN, or of another dtype; labels outside the range; a set that does not fit
            the images: a radius below 0 or above 1, or a number of radii other than 1 or B; a network of one output
            (see ``certtrain.BinaryScore``), or of anything but logits (B, K).
        UnsupportedOperation: the model contains an operation without a rule.
    """
    if x.dtype not in (torch.float32, torch.float64):
        # with fewer digits the rounding error, which ``nearest`` leaves out, is as large as margins are
        raise InputError(f"x: found {x.dtype}; accepted: images, and a model, of torch.float32 or torch.float64")
    check_pixels(x, "x")
    if isinstance(epsilon, Tensor) and not epsilon.ndim and epsilon.is_floating_point():
        epsilon = epsilon.item()
    ball = epsilon if isinstance(epsilon, PerturbationSet) else LinfBall(epsilon)  # type: ignore[arg-type]  # floats (B,) too
    ball.region(x).check()
    labels = as_labels(y, len(x), device=x.device, where="y")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            classes = classes_of(model(x[:1])) if len(x) else 2
        check_labels(labels, classes, "y")
        verdicts: list[Verdict] = []
        chosen = settings or Certify()
        for first in range(0, len(x), chosen.batch_size):
            rows = slice(first, first + chosen.batch_size)
            index = torch.arange(first, first + len(x[rows]), device=x.device)
            problem = robustness(model, x[rows], labels[rows], index, classes, ball.take(index))
            with memory.within(chosen.memory):
                verdicts += run_cascade(
                    problem, chosen.build(seed), Limits(chosen.timeout), arithmetic=chosen.arithmetic
                )
        return verdicts
    finally:
        for module, training in modes.items():
            module.training = training
