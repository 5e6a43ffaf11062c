"""VNN-COMP's front door: an ONNX network and a VNN-LIB property in, one word out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..bounds import Box
from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.folding import fold
from ..errors import InputError, Portable, check
from ..run_folder import write_atomically
from .cascade import run_cascade
from .falsify import FalsifyStage
from .input_split import few_inputs
from .limits import Limits
from .onnx_network import OnnxNetwork, read_onnx, replay_session
from .problem import Problem, Specification, Verdict
from .search import Search
from .settings import Arithmetic
from .stages import AlphaStage, BabStage, CrownStage, IbpStage, InputSplitStage, Judge, Replay, Stage, holds
from .vnnlib import Case, Property, read_property

Word = Literal["holds", "violated", "timeout", "unknown", "error"]

RESULTS: dict[Word, str] = {
    "holds": "unsat", "violated": "sat", "timeout": "timeout", "unknown": "unknown", "error": "error",
}  # fmt: skip
"""What VNN-COMP's result files call each answer: of the question whether an unsafe point exists."""

FALSIFYING = 0.2
"""Of the time at most goes into descents before the last stage."""

READING = 1e-3
"""Of the outputs' size: by how much our reading of a file may differ from onnxruntime's at one point; 1e-6 is usual."""

TOGETHER = 1 << 24
"""Numbers of the widest layer, over the boxes of a property that share a batch; 4096 boxes at most."""


@dataclass(frozen=True)
class Answer:
    """What is known of a property.

    Args:
        word: ``holds``: proved for every point; ``violated``: a counterexample was replayed by onnxruntime.
        seconds: from reading the files on.
        arithmetic: in which ``holds`` is proved.
        reason: why it is undecided, where there is something to say.
        inputs: (N,) float64, the counterexample, within the property's box; outputs: (K,) what onnxruntime makes of it.
    """

    word: Word
    seconds: float
    arithmetic: str
    reason: str | None = None
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def __str__(self) -> str:
        """One line: the word, and what to know of it."""
        return "unknown (within tolerance)" if self.reason == "within tolerance" else self.word

    def result(self) -> str:
        """The content of VNN-COMP's result file."""
        if self.inputs is None or self.outputs is None:
            return RESULTS[self.word] + "\n"
        pairs = [f"({letter}_{i} {value!r})" for letter, values in (("X", self.inputs), ("Y", self.outputs))
                 for i, value in enumerate(values.tolist())]  # fmt: skip
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
        arithmetic: in which a proof is to hold: of the network with its batch norms folded in float32.
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
    with until(deadline):
        try:
            return _checked(network, property, deadline, arithmetic, started)
        except OutOfTime:
            return Answer("timeout", now() - started, arithmetic, "timeout")


def _checked(
    network: OnnxNetwork, property: Property, deadline: float, arithmetic: Arithmetic, started: float
) -> Answer:
    look()
    replay = replay_session(network.model)
    look()
    _check_reading(network, property.cases[0], replay)
    judge = _Exact(cases=property.cases, replay=replay)
    verdicts: list[Verdict] = []
    widest = max(shape.numel() for shape in fold(network.module, network.shape).shapes)
    most = max(1, min(4096, TOGETHER // widest))
    try:
        for numbers in _alike(property.cases, most):
            verdicts += _search(network, property, numbers, judge, deadline, arithmetic)
    except _Refuted as found:
        seconds, precision = now() - started, str(found.outputs.dtype).removeprefix("torch.")
        return Answer("violated", seconds, f"onnxruntime {precision}", None, found.inputs, found.outputs)
    seconds = now() - started
    open_ = [verdict for verdict in verdicts if verdict.status != "verified"]
    if not open_:
        return Answer("holds", seconds, verdicts[0].arithmetic)
    late = any(verdict.status == "timeout" for verdict in open_)
    first = next((verdict for verdict in open_ if verdict.status == "timeout"), open_[0])
    return Answer("timeout" if late else "unknown", seconds, first.arithmetic, "timeout" if late else first.reason)


def _check_reading(network: OnnxNetwork, case: Case, replay: Replay) -> None:
    """
    Raises:
        InputError: what we read is not the network that onnxruntime runs, by one point's outputs.
    """
    point = ((case.lower + case.upper) / 2).float().reshape(1, *network.shape)
    with torch.no_grad():
        ours, theirs = network.module(point)[0], replay(point[0])
    difference = float((ours - theirs).abs().max())
    if not difference <= READING * max(1.0, float(theirs.abs().max())):
        raise InputError(
            f"network: found outputs that differ from onnxruntime's by {difference:.3g} in the middle of the box; "
            f"accepted: {READING:g} of their size, whatever float32 rounds"
        )


def present(path: str | Path) -> Path:
    """The file, or its gzipped form where only that is there."""
    plain, zipped = Path(path), Path(f"{path}.gz")
    return zipped if zipped.exists() and not plain.exists() else plain


def _search(
    network: OnnxNetwork,
    property: Property,
    numbers: list[int],
    judge: _Exact,
    deadline: float,
    arithmetic: Arithmetic,
) -> list[Verdict]:
    """Verdicts of some cases. Each gets its share of the time; what is left then goes to those that are still open."""
    late = [Verdict(number, None, None, "timeout", "", None, 0.0, arithmetic, "timeout") for number in numbers]
    found = {verdict.index: verdict for verdict in late}
    stages: list[Stage] = []
    while numbers and (left := deadline - now()) > 0:
        problem = _problem(network, [property.cases[number] for number in numbers], numbers)
        stages = [_last(problem, judge, left)] if stages else _stages(problem, judge, left)
        verdicts = run_cascade(problem, stages, Limits(left, deadline), arithmetic=arithmetic)
        found |= {verdict.index: verdict for verdict in verdicts}
        numbers = [verdict.index for verdict in verdicts if verdict.status == "timeout"]
    return list(found.values())


class _Refuted(Portable, Exception):
    """One counterexample is enough: it ends the search of all cases."""

    def __init__(self, inputs: Tensor, outputs: Tensor):
        super().__init__("a counterexample")
        self.inputs, self.outputs = inputs, outputs


@dataclass(frozen=True)
class _Exact(Judge):
    """Within the ends as they were read, and unsafe in float64 arithmetic on onnxruntime's outputs.

    A box's float32 ends lie outside those that were read, by a rounding: a point there is moved inside, and onnxruntime
    is given what float32 makes of it, as every reader of the counterexample would.
    """

    cases: Sequence[Case] = ()

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        assert self.replay is not None
        case = self.cases[int(problem.index[number])]
        lower = torch.tensor([_as_read(end, math.inf) for end in case.lower.tolist()], dtype=torch.float64)
        upper = torch.tensor([_as_read(end, -math.inf) for end in case.upper.tolist()], dtype=torch.float64)
        inputs = image.double().flatten().cpu().clamp(lower, upper) + 0.0  # there is no -0
        outputs = self.replay(inputs.float().reshape(image.shape)).flatten()
        specification = Specification(case.rows[None], case.offsets[None], case.clauses)
        if not outputs.isfinite().all() or bool(holds(specification, outputs.double()[None])[0]):
            return False
        raise _Refuted(inputs, outputs)


def _as_read(outward: float, inside: float) -> float:
    """An end, given that float64 rounded it outward: ``outward``, or between that and the next float inside.

    Of these two the one that has 15 digits at most prints as the very decimal, if that has no more.
    """
    return outward if float(f"{outward:.15g}") == outward else math.nextafter(outward, inside)


def _alike(cases: Sequence[Case], most: int) -> Iterator[list[int]]:
    """The cases' numbers, those of the same clauses together, so many at a time."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(tuple(case.clauses.tolist()), []).append(number)
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
        IbpStage(), CrownStage("crown_ibp", refine=False),
        FalsifyStage(seconds=FALSIFYING * seconds, judge=judge), CrownStage(),
    ]  # fmt: skip
    if not few_inputs(problem):
        stages += [AlphaStage(judge=judge)]
    return [*stages, _last(problem, judge, seconds)]


def _last(problem: Problem, judge: Judge, seconds: float) -> Stage:
    return InputSplitStage(seconds, judge) if few_inputs(problem) else BabStage(Search(), seconds, judge)
