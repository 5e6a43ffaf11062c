"""VNN-COMP's front door: an ONNX network and a VNN-LIB property in, one word out."""

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
"""What VNN-COMP's result files call each answer: of the question whether an unsafe point exists."""

FALSIFYING_SHARE = 0.2
"""Of the time at most goes into descents before the last stage."""

READING_TOLERANCE = 1e-3
"""Of the outputs' size: by how much our reading of a file may differ from onnxruntime's at one point; 1e-6 is usual."""

RANDOM_POINTS = 3
"""Random corners of a box, and as many random points inside, at which the reading is compared: with the two outermost
corners and the middle, where a centred input is all zeros."""

MOST_ACTIVATIONS = 1 << 24
"""Numbers of the widest layer, over the boxes of a property that share a batch; 4096 boxes at most."""


WITHIN_TOLERANCE = "within tolerance"
"""The reason of what floating point alone decides."""


@dataclass(frozen=True)
class Answer:
    """What is known of a property.

    Args:
        word: ``holds``: proved for every point; ``violated``: a counterexample was replayed by onnxruntime.
        seconds: from reading the files on.
        arithmetic: in which ``holds`` is proved.
        reason: why it is undecided, or holds for want of inputs, where there is something to say.
        inputs: (N,) the counterexample in decimals, which lie within the property's; outputs: (K,) what onnxruntime
            makes, by its defaults, of what float32 makes of them.
    """

    word: Word
    seconds: float
    arithmetic: str
    reason: str | None = None
    inputs: Sequence[str] | None = None
    outputs: Tensor | None = None

    def __str__(self) -> str:
        """One line: the word, and what to know of it."""
        told = self.reason and (self.reason == WITHIN_TOLERANCE or self.word == "holds")
        return f"{self.word} ({self.reason})" if told else self.word

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
    results: str | Path | None = None,
) -> Answer:
    """Whether a property holds of a network; both are files, plain or gzipped (``.gz`` may be left out of the name).

    Args:
        timeout: seconds, from reading the files on. Reading, and every stage, look at the clock within.
        arithmetic: in which a proof is to hold: ``nearest`` of the network with its batch norms folded in float32, the
            others of each operator of the file as it stands there.
        results: a file for VNN-COMP's form of the answer.
    Raises:
        InputError: a file that cannot be read, or does not fit the other; an operator without a rule.
    """
    check(0 < timeout < float("inf"), "timeout", timeout, "seconds > 0")
    if results is not None and (not Path(results).parent.is_dir() or Path(results).is_dir()):
        raise InputError(f"{results}: cannot be written; accepted: a file of results, in a folder that is there")
    started = now()
    with until(started + timeout):
        try:
            read = read_onnx(present(network))
            case = read_property(present(property), read.shape.numel(), read.outputs)
            found = check_property(read, case, started + timeout, arithmetic)
        except OutOfTime:
            found = Answer("timeout", timeout, arithmetic, "timeout")
    found = replace(found, seconds=now() - started)
    if results is not None:
        try:
            write_atomically(Path(results), lambda temporary: temporary.write_text(found.result()))
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise InputError(f"{results}: {why}; accepted: a file of results") from error
    return found


def check_property(network: OnnxNetwork, property: Property, deadline: float, arithmetic: Arithmetic) -> Answer:
    """As ``answer``, of what was read. ``deadline`` is on the clock of ``time.perf_counter``."""
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
    except _Refuted as found:
        seconds, precision = now() - started, str(found.outputs.dtype).removeprefix("torch.")
        return Answer("violated", seconds, f"onnxruntime {precision}", None, found.inputs, found.outputs)
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
    """(P, *shape) float32 points of a box: its middle, its outermost corners, random ones and random points inside."""
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
    """
    Raises:
        InputError: what we read is not the network that onnxruntime runs, by some point's outputs.
    """
    with torch.no_grad():
        for point in points:
            ours, theirs = network.module(point[None])[0], replay(point)[0]
            difference = float((ours - theirs).abs().max())
            if not difference <= READING_TOLERANCE * max(1.0, float(theirs.abs().max())):
                raise InputError(
                    f"network: found outputs that differ from onnxruntime's by {difference:.3g} at a point of the box; "
                    f"accepted: {READING_TOLERANCE:g} of their size, whatever float32 rounds"
                )


def present(path: str | Path) -> Path:
    """The file, or its gzipped form where only that is there."""
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
    """Verdicts of some cases. Each gets its share of the time; what is left then goes to those that are still open."""
    late = [Verdict(number, None, None, "timeout", "", None, 0.0, arithmetic, "timeout") for number in numbers]
    found = {verdict.index: verdict for verdict in late}
    stages: list[Stage] = []
    while numbers and (left := deadline - now()) > 0:
        problem = _problem(network, [property.cases[number] for number in numbers], numbers)
        stages = [_last_stage(problem, judge, left)] if stages else _stages(problem, judge, left)
        verdicts = run_cascade(problem, stages, Limits(left, deadline), arithmetic=arithmetic)
        found |= {verdict.index: verdict for verdict in verdicts}
        numbers = [verdict.index for verdict in verdicts if verdict.status == "timeout"]
    return list(found.values())


class _Refuted(Portable, Exception):
    """One counterexample is enough: it ends the search of all cases."""

    def __init__(self, inputs: Sequence[str], outputs: Tensor):
        super().__init__("a counterexample")
        self.inputs, self.outputs = inputs, outputs


@dataclass(frozen=True)
class _ExactJudge(Judge):
    """Within the ends as they were read, and unsafe in float64 arithmetic on the outputs of each of onnxruntime's runs.

    A box's float32 ends lie outside those that were read, by a rounding: a point there is moved inside, and onnxruntime
    is given what float32 makes of its decimals, as every reader of the counterexample would.

    Args:
        disputed: points that are unsafe in some of the runs only.
    """

    cases: Sequence[Case] = ()
    disputed: list[Tensor] = field(default_factory=list[Tensor])

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        self.refute(self.cases[int(problem.index[number])], image)
        return False

    def refute(self, case: Case, image: Tensor) -> None:
        """
        Raises:
            _Refuted: by this point.
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
    """The cases' numbers, those of the same clauses together, so many at a time."""
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
    size = torch.exp2(rows.abs().amax(-1).frexp().exponent.double())  # exactly scaled, so that float32 loses no row
    specification = Specification(rows / size.unsqueeze(-1), offsets / size, cases[0].clauses)
    return Problem(
        network.module, Box(lower.reshape(shape), upper.reshape(shape)), specification, torch.tensor(numbers)
    )


def _stages(problem: Problem, judge: Judge, seconds: float) -> list[Stage]:
    stages: list[Stage] = [
        IbpStage(), CrownIbpStage(),
        FalsifyStage(seconds=FALSIFYING_SHARE * seconds, judge=judge), CrownStage(),
    ]  # fmt: skip
    if not few_inputs(problem):
        stages += [AlphaStage(judge=judge)]
    return [*stages, _last_stage(problem, judge, seconds)]


def _last_stage(problem: Problem, judge: Judge, seconds: float) -> Stage:
    return InputSplitStage(seconds, judge) if few_inputs(problem) else BabStage(Search(), seconds, judge)
