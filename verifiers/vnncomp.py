"""Answers VNN-COMP instances: an ONNX network and a VNN-LIB property in, one word out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..bounds import Box
from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.folding import fold
from ..bounds.memory import within
from ..errors import InputError, Portable, check
from ..run_folder import write_atomically
from ..typed import as_floats, as_ints, unique
from .cascade import run_cascade
from .falsify import FalsifyStage
from .input_split import few_inputs
from .limits import Limits
from .onnx_network import OnnxNetwork, read_onnx, replay_session
from .problem import Problem, Specification, Verdict
from .search import Search
from .settings import Arithmetic
from .stage import Judge, Replay, Stage, holds
from .stages import AlphaStage, BabStage, CrownIbpStage, CrownStage, IbpStage, InputSplitStage
from .vnnlib import Case, Property
from .vnnlib_reader import read_property

Word = Literal["holds", "violated", "timeout", "unknown", "error"]

RESULTS: dict[Word, str] = {
    "holds": "unsat", "violated": "sat", "timeout": "timeout", "unknown": "unknown", "error": "error",
}  # fmt: skip
"""Words of VNN-COMP's result files, which answer whether an unsafe point exists."""

FALSIFYING_SHARE = 0.2
"""Largest share of the time for gradient descents before the last stage."""

READING_TOLERANCE = 1e-3
"""Largest difference between our network's outputs and onnxruntime's at a point, relative to max(1, largest output);
1e-6 is usual."""

RANDOM_POINTS = 3
"""Number of random corners of a box, and of random points inside, at which our network is compared with onnxruntime;
besides the lower and the upper corner and the middle, where a centred input is all zeros."""

MOST_ACTIVATIONS = 1 << 24
"""Most entries of the widest layer's output, over all boxes of one batch; a batch has at most 4096 boxes."""


WITHIN_TOLERANCE = "within tolerance"
"""Reason of a property left undecided because its answer depends on floating-point rounding."""


@dataclass(frozen=True)
class Answer:
    """The answer on a property.

    Args:
        word: ``holds``: proved for every point; ``violated``: a counterexample was replayed by onnxruntime.
        seconds: time since the start, reading included.
        arithmetic: arithmetic in which ``holds`` is proved.
        reason: why the property is undecided, or that it holds because no input satisfies it; None where not known.
        inputs: (N,) the counterexample as decimals, which lie within the property's box.
        outputs: (K,) onnxruntime's outputs, with its default optimisations, at the decimals rounded to float32.
    """

    word: Word
    seconds: float
    arithmetic: str
    reason: str | None = None
    inputs: Sequence[str] | None = None
    outputs: Tensor | None = None

    def __str__(self) -> str:
        """One line: the word, and the reason where it qualifies the word."""
        qualified = self.reason and (self.reason == WITHIN_TOLERANCE or self.word == "holds")
        return f"{self.word} ({self.reason})" if qualified else self.word

    def result(self) -> str:
        """The content of VNN-COMP's result file."""
        if self.inputs is None or self.outputs is None:
            return RESULTS[self.word] + "\n"
        outputs = map(repr, as_floats(self.outputs))
        pairs = [f"({letter}_{i} {value})" for letter, values in (("X", self.inputs), ("Y", outputs))
                 for i, value in enumerate(values)]  # fmt: skip
        return "sat\n(" + "\n".join(pairs) + ")\n"


def answer(
    network: str | Path,
    property: str | Path,
    timeout: float = 60.0,
    *,
    arithmetic: Arithmetic = "nearest",
    memory: int | str | None = None,
    results: str | Path | None = None,
) -> Answer:
    """Decide whether a property holds of a network. Both are files, plain or gzipped (``.gz`` may be left out).

    Args:
        timeout: seconds, including the reading of the files.
        arithmetic: arithmetic of proofs: ``nearest``, for the network with its batch norms folded in float32; the
            others, for each operator as the file has it.
        memory: limit of the process' memory, as in ``Certify``.
        results: file for the answer in VNN-COMP's form.
    Raises:
        InputError: a file that cannot be read, or does not fit the other; an operator without a rule; ``results`` that
            cannot be written.
    """
    check(0 < timeout < float("inf"), "timeout", timeout, "seconds > 0")
    if results is not None and (not Path(results).parent.is_dir() or Path(results).is_dir()):
        raise InputError(f"{results}: cannot be written; accepted: a file of results, in a folder that is there")
    started = now()
    with until(started + timeout), within(memory):
        try:
            read = read_onnx(present(network))
            case = read_property(present(property), read.shape.numel(), read.outputs)
            decided = check_property(read, case, started + timeout, arithmetic)
        except OutOfTime:
            decided = Answer("timeout", timeout, arithmetic, "timeout")
    decided = replace(decided, seconds=now() - started)
    if results is not None:
        try:
            write_atomically(Path(results), lambda temporary: temporary.write_text(decided.result()))
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise InputError(f"{results}: {why}; accepted: a file of results") from error
    return decided


def check_property(network: OnnxNetwork, property: Property, deadline: float, arithmetic: Arithmetic) -> Answer:
    """As ``answer``, for a network and a property already read. ``deadline`` is by ``time.perf_counter``."""
    started = now()
    if not property.cases:
        return Answer("holds", 0.0, "exact", property.remark)
    with until(deadline):
        try:
            return _check_cases(network, property, deadline, arithmetic, started)
        except OutOfTime:
            return Answer("timeout", now() - started, arithmetic, "timeout")


def _check_cases(
    network: OnnxNetwork, property: Property, deadline: float, arithmetic: Arithmetic, started: float
) -> Answer:
    look()
    replay = replay_session(network.model)
    look()
    judge = _ExactJudge(cases=property.cases, replay=replay)
    verdicts: list[Verdict] = []
    try:
        points = _points(property.cases[0], network.shape)
        _check_reading(network, points, replay)
        for point in points:
            judge.refute(property.cases[0], point)
        widest = max(shape.numel() for shape in fold(network.module, network.shape).shapes)
        most = max(1, min(4096, MOST_ACTIVATIONS // widest))
        for numbers in _grouped_by_clauses(property.cases, most):
            verdicts += _verdicts_of(network, property, numbers, judge, deadline, arithmetic)
    except _Refuted as end:
        seconds, precision = now() - started, str(end.outputs.dtype).removeprefix("torch.")
        return Answer("violated", seconds, f"onnxruntime {precision}", None, end.inputs, end.outputs)
    seconds = now() - started
    if judge.disputed:
        return Answer("unknown", seconds, verdicts[0].arithmetic, WITHIN_TOLERANCE)
    open_ = [verdict for verdict in verdicts if verdict.status != "verified"]
    if not open_:
        return Answer("holds", seconds, verdicts[0].arithmetic, property.remark)
    late = any(verdict.status == "timeout" for verdict in open_)
    first = next((verdict for verdict in open_ if verdict.status == "timeout"), open_[0])
    return Answer("timeout" if late else "unknown", seconds, first.arithmetic, "timeout" if late else first.reason)


def _points(case: Case, shape: torch.Size) -> Tensor:
    """(P, *shape) float32 points of a box: middle, lower and upper corner, random corners, random points inside."""
    lower, upper = case.lower32.double(), case.upper32.double()
    noise = torch.Generator().manual_seed(0)
    corners = torch.randint(2, (RANDOM_POINTS, len(lower)), generator=noise).double()
    inside = torch.rand(RANDOM_POINTS, len(lower), generator=noise, dtype=torch.float64)
    shares = torch.cat(
        [torch.tensor([[0.5], [0.0], [1.0]], dtype=torch.float64).expand(3, len(lower)), corners, inside]
    )
    points = (lower * (1 - shares) + upper * shares).float()  # no difference of ends: it may overflow
    return unique(torch.minimum(torch.maximum(points, case.lower32), case.upper32), dim=0).reshape(-1, *shape)


def _check_reading(network: OnnxNetwork, points: Tensor, replay: Replay) -> None:
    """Compare our network's outputs with onnxruntime's at points (P, *shape).

    Raises:
        InputError: they differ by more than ``READING_TOLERANCE``.
    """
    with torch.no_grad():
        for point in points:
            ours, theirs = network.module(point[None])[0], replay(point)[0]
            difference = float((ours - theirs).abs().max())
            if not difference <= READING_TOLERANCE * max(1.0, float(theirs.abs().max())):
                raise InputError(
                    f"network: found outputs that differ from onnxruntime's by {difference:.3g} at a point of the box; "
                    f"accepted: at most {READING_TOLERANCE:g} of their size, as float32 rounding gives"
                )


def present(path: str | Path) -> Path:
    """The path itself, or with ``.gz`` appended where only that file exists."""
    plain, zipped = Path(path), Path(f"{path}.gz")
    return zipped if zipped.exists() and not plain.exists() else plain


def _verdicts_of(
    network: OnnxNetwork,
    property: Property,
    numbers: list[int],
    judge: _ExactJudge,
    deadline: float,
    arithmetic: Arithmetic,
) -> list[Verdict]:
    """Verdicts of the cases ``numbers``. Each case gets an equal share of the time; the rest then goes to those that
    timed out, with the last stage alone."""
    late = [Verdict(number, None, None, "timeout", "", None, 0.0, arithmetic, "timeout") for number in numbers]
    latest = {verdict.index: verdict for verdict in late}
    stages: list[Stage] = []
    while numbers and (left := deadline - now()) > 0:
        problem = _problem(network, [property.cases[number] for number in numbers], numbers)
        stages = [_last_stage(problem, judge, left)] if stages else _stages(problem, judge, left)
        verdicts = run_cascade(problem, stages, Limits(left, deadline), arithmetic=arithmetic)
        latest |= {verdict.index: verdict for verdict in verdicts}
        numbers = [verdict.index for verdict in verdicts if verdict.status == "timeout"]
    return list(latest.values())


class _Refuted(Portable, Exception):
    """A replayed counterexample, which ends the search of all cases."""

    def __init__(self, inputs: Sequence[str], outputs: Tensor):
        super().__init__("a counterexample")
        self.inputs, self.outputs = inputs, outputs


@dataclass(frozen=True)
class _ExactJudge(Judge):
    """Judges points exactly: within the box as it was read, and unsafe in float64 arithmetic on the outputs of each of
    onnxruntime's runs. A counterexample ends the search by ``_Refuted``.

    A box's float32 ends are rounded outward, so a point at them is first moved into the box; onnxruntime is given its
    decimals rounded to float32, as every reader of the counterexample would do.

    Args:
        disputed: the first point that is unsafe in some of the runs only.
    """

    cases: Sequence[Case] = ()
    disputed: list[Tensor] = field(default_factory=list[Tensor])

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        self.refute(self.cases[int(problem.index[number])], image)
        return False

    def refute(self, case: Case, image: Tensor) -> None:
        """Replay a point (*shape).

        Raises:
            _Refuted: the point is a counterexample.
        """
        assert self.replay is not None
        decimals = case.written(image.double().flatten().cpu().clamp(case.lower, case.upper))
        if decimals is None:
            return
        point = torch.tensor([float(text) for text in decimals], dtype=torch.float64).float().reshape(image.shape)
        outputs = self.replay(point)
        specification = Specification(case.rows[None], case.offsets[None], case.clauses)
        unsafe = [bool(run.isfinite().all()) and not bool(holds(specification, run.double())[0])
                  for run in torch.split(outputs, 1)]  # fmt: skip
        if all(unsafe):
            raise _Refuted(decimals, outputs[-1])
        if any(unsafe) and not self.disputed:
            self.disputed.append(point)


def _grouped_by_clauses(cases: Sequence[Case], most: int) -> Iterator[list[int]]:
    """Yield the cases' numbers, at most ``most`` at a time, all with the same clauses."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(tuple(as_ints(case.clauses)), []).append(number)
    for numbers in groups.values():
        yield from (numbers[first : first + most] for first in range(0, len(numbers), most))


def _problem(network: OnnxNetwork, cases: Sequence[Case], numbers: Sequence[int]) -> Problem:
    lower, upper = (torch.stack(ends) for ends in zip(*((case.lower32, case.upper32) for case in cases), strict=True))
    if not (lower.isfinite().all() and upper.isfinite().all()):
        raise InputError("property: found an end that is infinite in float32; accepted: ends of float32's range")
    shape = (len(cases), *network.shape)
    rows, offsets = torch.stack([case.rows for case in cases]), torch.stack([case.offsets for case in cases])
    size = torch.exp2(rows.abs().amax(-1).frexp().exponent.double())  # a power of 2, so exact: float32 loses no row
    specification = Specification(rows / size.unsqueeze(-1), offsets / size, cases[0].clauses)
    return Problem(
        network.module, Box(lower.reshape(shape), upper.reshape(shape)), specification, torch.tensor(numbers)
    )


def _stages(problem: Problem, judge: Judge, seconds: float) -> list[Stage]:
    """The stages for a problem, cheapest first; ``seconds`` are left for the property."""
    stages: list[Stage] = [
        IbpStage(), CrownIbpStage(),
        FalsifyStage(seconds=FALSIFYING_SHARE * seconds, judge=judge), CrownStage(),
    ]  # fmt: skip
    if not few_inputs(problem):
        stages += [AlphaStage(judge=judge)]
    return [*stages, _last_stage(problem, judge, seconds)]


def _last_stage(problem: Problem, judge: Judge, seconds: float) -> Stage:
    return InputSplitStage(seconds, judge) if few_inputs(problem) else BabStage(Search(), seconds, judge)
