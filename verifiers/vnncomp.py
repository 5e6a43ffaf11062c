"""VNN-COMP's front door: an ONNX network and a VNN-LIB property in, one word out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..bounds import Box
from ..errors import InputError, check
from ..run_folder import write_atomically
from .cascade import Arithmetic, run_cascade
from .falsify import FalsifyStage
from .input_split import few_inputs
from .limits import Limits
from .onnx_network import OnnxNetwork, read_onnx, replay_session
from .problem import Problem, Specification, Verdict
from .search import Search
from .stages import AlphaStage, BabStage, CrownStage, IbpStage, InputSplitStage, Judge, Stage, holds
from .vnnlib import Case, Property, read_property

Word = Literal["holds", "violated", "timeout", "unknown", "error"]

RESULTS: dict[Word, str] = {
    "holds": "unsat", "violated": "sat", "timeout": "timeout", "unknown": "unknown", "error": "error",
}  # fmt: skip
"""What VNN-COMP's result files call each answer: of the question whether an unsafe point exists."""

FALSIFYING = 0.2
"""Of the time at most goes into descents before the last stage."""

CASES = 256
"""Boxes of a property that share a batch."""


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
        timeout: seconds, from reading the files on. A stage that has begun is finished.
        arithmetic: in which a proof is to hold: of the network with its batch norms folded in float32.
        results: a file for VNN-COMP's form of the answer.
    Raises:
        InputError: a file that cannot be read, or does not fit the other; an operator without a rule.
    """
    check(0 < timeout < float("inf"), "timeout", timeout, "seconds > 0")
    started = time.perf_counter()
    read = read_onnx(present(network))
    found = check_property(
        read, read_property(present(property), read.shape.numel(), read.outputs), started + timeout, arithmetic
    )
    found = replace(found, seconds=time.perf_counter() - started)
    if results is not None:
        write_atomically(Path(results), lambda temporary: temporary.write_text(found.result()))
    return found


def check_property(network: OnnxNetwork, property: Property, deadline: float, arithmetic: Arithmetic) -> Answer:
    """As ``answer``, of what was read. ``deadline`` is on the clock of ``time.perf_counter``."""
    started = time.perf_counter()
    judge = _Exact(cases=property.cases, replay=replay_session(network.model))
    verdicts: list[Verdict] = []
    for numbers in _alike(property.cases):
        problem = _problem(network, [property.cases[number] for number in numbers], numbers)
        left = deadline - time.perf_counter()
        if left <= 0:
            return Answer("timeout", time.perf_counter() - started, arithmetic, "timeout")
        stages = _stages(problem, judge, left)
        verdicts += run_cascade(problem, stages, Limits(left, deadline), arithmetic=arithmetic)
        if judge.found:
            break
    seconds = time.perf_counter() - started
    if judge.found:
        inputs, outputs = judge.found[0]
        return Answer("violated", seconds, f"onnxruntime {outputs.dtype}".replace("torch.", ""), None, inputs, outputs)
    open_ = [verdict for verdict in verdicts if verdict.status != "verified"]
    if not open_:
        return Answer("holds", seconds, verdicts[0].arithmetic)
    late = next((verdict for verdict in open_ if verdict.status == "timeout"), None)
    first = late or open_[0]
    return Answer("timeout" if late else "unknown", seconds, first.arithmetic, first.reason)


def present(path: str | Path) -> Path:
    """The file, or its gzipped form where only that is there."""
    plain, zipped = Path(path), Path(f"{path}.gz")
    return zipped if zipped.exists() and not plain.exists() else plain


@dataclass(frozen=True)
class _Exact(Judge):
    """Within the ends as they were read, and unsafe in float64 arithmetic on onnxruntime's outputs.

    A box's float32 ends lie outside those that were read, by a rounding: a point there is moved inside, and onnxruntime
    is given what float32 makes of it, as every reader of the counterexample would.
    """

    cases: Sequence[Case] = ()
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        assert self.replay is not None
        case = self.cases[int(problem.index[number])]
        inputs = image.double().flatten().clamp(case.lower, case.upper)
        outputs = self.replay(inputs.float().reshape(image.shape)).flatten()
        specification = Specification(case.rows[None], case.offsets[None], case.clauses)
        if not outputs.isfinite().all() or bool(holds(specification, outputs.double()[None])[0]):
            return False
        self.found.append((inputs, outputs))
        return True


def _alike(cases: Sequence[Case]) -> Iterator[list[int]]:
    """The cases' numbers, those of the same clauses together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(tuple(case.clauses.tolist()), []).append(number)
    for numbers in groups.values():
        yield from (numbers[first : first + CASES] for first in range(0, len(numbers), CASES))


def _problem(network: OnnxNetwork, cases: Sequence[Case], numbers: Sequence[int]) -> Problem:
    lower, upper = (torch.stack(ends) for ends in zip(*((case.lower32, case.upper32) for case in cases), strict=True))
    if not (lower.isfinite().all() and upper.isfinite().all()):
        raise InputError("property: found an end that is infinite in float32; accepted: ends of float32's range")
    shape = (len(cases), *network.shape)
    rows, offsets = torch.stack([case.rows for case in cases]), torch.stack([case.offsets for case in cases])
    specification = Specification(rows, offsets, cases[0].clauses)
    return Problem(
        network.module, Box(lower.reshape(shape), upper.reshape(shape)), specification, torch.tensor(numbers)
    )


def _stages(problem: Problem, judge: Judge, seconds: float) -> list[Stage]:
    stages: list[Stage] = [
        IbpStage(), CrownStage("crown_ibp", refine=False),
        FalsifyStage(seconds=FALSIFYING * seconds, judge=judge), CrownStage(),
    ]  # fmt: skip
    if few_inputs(problem):
        stages += [InputSplitStage(seconds, judge)]
    else:
        stages += [AlphaStage(judge=judge), BabStage(Search(), seconds, judge)]
    return stages
