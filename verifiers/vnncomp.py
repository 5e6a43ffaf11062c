"""Answers VNN-COMP instances: an ONNX network and a VNN-LIB property in, one word out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from ..bounds import Box, Region
from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.folding import fold
from ..bounds.memory import within
from ..environment import peak_memory
from ..errors import InputError, Portable, check
from ..run_folder import write_atomically, write_json
from ..typed import as_floats, as_ints, unique
from .cascade import run_cascade
from .difference_stage import DifferenceStage
from .differences import difference_network
from .input_split import few_inputs
from .joint_network import JointNetwork
from .limits import Limits, out_of_memory
from .polytope import Polytope
from .problem import Problem, Specification, Verdict
from .proofs import PropertyProof, Prover
from .queries import Networks, present, read_question
from .search_statistics import SearchStatistics, gathered, record_of_search, rounded
from .settings import Arithmetic, Certify
from .stage import Judge, Replay, Stage
from .terms import with_terms
from .vnnlib import Case, Declarations, Property

Word = Literal["holds", "violated", "timeout", "unknown", "error"]

RESULTS: dict[Word, str] = {
    "holds": "unsat", "violated": "sat", "timeout": "timeout", "unknown": "unknown", "error": "error",
}  # fmt: skip
"""Words of VNN-COMP's result files, which answer whether an unsafe point exists."""

STAGES = ("ibp", "crown_ibp", "falsify", "crown", "alpha", "bab")
"""Stages of a property, cheapest first."""
STAGES_OF_FEW_INPUTS = ("ibp", "crown_ibp", "falsify", "crown", "input_split")
"""Stages that stand for ``STAGES`` where few inputs vary."""

PROPERTY = Certify(stages=STAGES, batch_size=4096, falsifying_share=0.2)
"""Settings of a property where none are given; its boxes are the images of the section."""

READING_TOLERANCE = 1e-3
"""Largest difference between our network's outputs and onnxruntime's at a point, relative to max(1, largest output);
1e-6 is usual."""

RANDOM_POINTS = 3
"""Number of random corners of a box, and of random points inside, at which our network is compared with onnxruntime;
besides the lower and the upper corner and the middle, where a centred input is all zeros."""

POLYTOPE = 1 << 22
"""Most coefficients of rows of inputs alone, over all boxes of one batch, that searches for points respect."""

MOST_ACTIVATIONS = 1 << 24
"""Most entries of the widest layer's output, over all boxes of one batch."""


WITHIN_TOLERANCE = "within tolerance"
"""Reason of a property left undecided because its answer depends on floating-point rounding."""

ONLY_TIES = "only ties found, which its strict comparisons exclude"
"""Reason of a property left undecided whose closed form is violated, while no point is known that violates the property
as written."""

UNWRITTEN = "points found whose inputs are no decimals, as its equalities ask of them"
"""Reason of a property left undecided because the inputs of all points that violate it have no end as decimals."""

UNMET = "its equalities hold exactly at no point that was tried"
"""Reason of a property left undecided that has equalities, which no bounds exclude."""

QUALIFYING = (WITHIN_TOLERANCE, ONLY_TIES, UNWRITTEN, UNMET)
"""Reasons that stand beside ``unknown`` in the one line of an answer."""


@dataclass(frozen=True)
class Answer:
    """The answer on a property.

    Args:
        word: ``holds``: proved for every point; ``violated``: a counterexample was replayed by onnxruntime.
        seconds: time since the start, reading included.
        arithmetic: arithmetic in which ``holds`` is proved.
        reason: why the property is undecided, or that it holds because no input satisfies it; None where not known.
        inputs: (N,) the counterexample as decimals, which lie within the property's box.
        outputs: (K,) onnxruntime's outputs, with its default optimisations, at the decimals rounded to the models'
            element types; the hidden tensors behind the outputs of all networks.
        stage: the last stage that ran; empty where none did.
        spent: seconds by stage.
        search: counts and times of all searches; None without one.
        peak_memory: largest resident memory of the process so far, in bytes; None where the system does not tell.
        remark: what was repaired in the property's file; None where nothing was.
        declared: the tensors that a property in VNN-LIB 2.0 declares, which its result file lists.
        no_proof: why no proof of ``holds`` was written; None where it was, or where none was wanted.
    """

    word: Word
    seconds: float
    arithmetic: str
    reason: str | None = None
    inputs: Sequence[str] | None = None
    outputs: Tensor | None = None
    stage: str = ""
    spent: Mapping[str, float] = field(default_factory=dict[str, float])
    search: SearchStatistics | None = None
    peak_memory: int | None = None
    remark: str | None = None
    declared: Declarations | None = None
    no_proof: str | None = None

    def record(self) -> dict[str, Any]:
        """The answer as JSON, without the counterexample: entries as in a verdict's line."""
        return {
            "answer": str(self.word), "stage": self.stage, "seconds": round(self.seconds, 6),
            "arithmetic": self.arithmetic, "reason": self.reason, "spent": rounded(self.spent),
            **record_of_search(self.search), "peak_memory": self.peak_memory, "remark": self.remark,
            **({} if self.no_proof is None else {"no_proof": self.no_proof}),
        }  # fmt: skip

    def finished(self, started: float) -> Answer:
        """The answer with the seconds since ``started``, and the memory so far."""
        return replace(self, seconds=now() - started, peak_memory=peak_memory())

    def __str__(self) -> str:
        """One line: the word, and the reason where it qualifies the word."""
        qualified = self.reason and (
            self.reason in (WITHIN_TOLERANCE, ONLY_TIES, UNWRITTEN, UNMET) or self.word == "holds"
        )
        return f"{self.word} ({self.reason})" if qualified else self.word

    def assigned(self) -> list[str]:
        """The lines that state the counterexample, in the form of the property's version of VNN-LIB; none without one.

        In 2.0 they are a line ``NAME TYPE [SHAPE]`` for each declared tensor and one for each of its entries, in the
        order of declaration: of each network its inputs, hidden tensors and outputs.
        """
        if self.inputs is None or self.outputs is None:
            return []
        outputs = [repr(value) for value in as_floats(self.outputs)]
        if self.declared is not None:
            return self.declared.assigned(self.inputs, outputs)
        pairs = [f"({letter}_{i} {value})" for letter, values in (("X", self.inputs), ("Y", outputs))
                 for i, value in enumerate(values)]  # fmt: skip
        pairs[0], pairs[-1] = f"({pairs[0]}", f"{pairs[-1]})"
        return pairs

    def result(self) -> str:
        """The content of VNN-COMP's result file, in the form of the property's version of VNN-LIB."""
        return "\n".join([RESULTS[self.word], *self.assigned(), ""])


def answer(
    networks: Networks,
    property: str | Path,
    timeout: float | None = None,
    *,
    arithmetic: Arithmetic | None = None,
    results: str | Path | None = None,
    record: str | Path | None = None,
    certify: Certify = PROPERTY,
    proof: str | Path | None = None,
) -> Answer:
    """Decide whether a property holds of a network, or of several. All are files, plain or gzipped (``.gz`` may be left
    out). Where memory runs out the answer is ``unknown``.

    Args:
        networks: the file of the only network; or files by the names that a query in VNN-LIB 2.0 declares, without
            those that are ``equal-to`` others.
        timeout: seconds, including the reading of the files; None for those of ``certify``.
        arithmetic: arithmetic of proofs: ``nearest``, for the network with its batch norms folded in float32; the
            others, for each operator as the file has it; None for that of ``certify``.
        results: file for the answer in VNN-COMP's form.
        record: file for the answer, its times and its search's counts (``Answer.record``) as JSON.
        certify: stages and their settings. ``timeout`` and ``batch_size`` are of the property and its boxes; ``images``
            and ``enabled`` do not count.
        proof: file for the proof that the property holds, in ``real`` or ``float32`` arithmetic; ``nearest`` stands for
            ``real`` then.
    Raises:
        InputError: a file that cannot be read, or does not fit the other; an operator without a rule; ``results`` or
            ``record`` that cannot be written.
    """
    settings = replace(with_limits(certify, timeout, arithmetic), proofs=proof is not None)
    files = networks.values() if isinstance(networks, Mapping) else (networks,)
    check_files(results, record, (property, *files), proof)
    started = now()
    with until(started + settings.timeout):
        try:
            network, asked = read_question(networks, property)
            proofs = None if proof is None else _proofs_of(networks, property, asked, settings.arithmetic)
            decided = check_property(network, asked, started + settings.timeout, settings, proofs)
            if proof is not None and proofs is not None and decided.word == "holds":
                decided = replace(decided, no_proof=proofs.save(Path(proof).resolve()))
        except OutOfTime:
            decided = Answer("timeout", settings.timeout, settings.arithmetic, "timeout")
        except Exception as error:
            if isinstance(error, InputError) or not out_of_memory(error):
                raise
            decided = Answer("unknown", 0.0, settings.arithmetic, "out of memory")
    decided = decided.finished(started)
    file = results
    try:
        if results is not None:
            write_atomically(Path(results).resolve(), lambda temporary: temporary.write_text(decided.result()))
        if (file := record) is not None:
            write_json(Path(record).resolve(), {"onnx": named(networks), "vnnlib": str(property), **decided.record()})
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); accepted: a file of results") from error
    return decided


def named(networks: Networks) -> str | dict[str, str]:
    """The networks' files as in JSON records: a name, or names by those of the networks."""
    return {name: str(file) for name, file in networks.items()} if isinstance(networks, Mapping) else str(networks)


def _proofs_of(networks: Networks, property: str | Path, asked: Property, arithmetic: Arithmetic) -> PropertyProof:
    """
    Raises:
        InputError: the checker does not read the files; several networks.
    """
    files = list(networks.values()) if isinstance(networks, Mapping) else [networks]
    if len(files) > 1:
        raise InputError(f"--proof: found {len(files)} networks; accepted: one")
    for path in (files[0], property):
        if present(path) != Path(path) or present(path).suffix == ".gz":
            raise InputError(f"{path}: found a compressed file; accepted with a proof: plain ones, which checkers read")
    return PropertyProof(Prover(Path(files[0]), arithmetic), asked, Path(property).read_bytes())


def check_files(
    results: str | Path | None, record: str | Path | None, read: Iterable[str | Path] = (),
    proof: str | Path | None = None,
) -> None:  # fmt: skip
    """
    Args:
        read: files that are read, with or without ``.gz``.
    Raises:
        InputError: a place where no file can be, a folder or a device; one file for two of them; one that is read.
    """
    kept = {present(file).resolve() for file in read}
    for file in (results, record, proof):
        if file is not None and (not Path(file).parent.is_dir() or (Path(file).exists() and not Path(file).is_file())):
            raise InputError(f"{file}: cannot be written; accepted: a file of results, in a folder that is there")
        if file is not None and Path(file).resolve() in kept:
            raise InputError(f"{file}: found as a file of the query, which is read; accepted: another file of results")
    if results is not None and record is not None and Path(results).resolve() == Path(record).resolve():
        raise InputError(f"{record}: found as the file of results and of records; accepted: two files")
    if proof is not None and Path(proof).resolve() in [Path(file).resolve() for file in (results, record) if file]:
        raise InputError(f"{proof}: found as the file of the proof and of results; accepted: two files")


def with_limits(certify: Certify, timeout: float | None, arithmetic: Arithmetic | None) -> Certify:
    """The settings with another timeout and arithmetic, where given.

    Raises:
        InputError: they are out of range, or there is no stage.
    """
    check(bool(certify.stages), "certify.stages", certify.stages, "one stage or more")
    timeout, arithmetic = timeout if timeout is not None else certify.timeout, arithmetic or certify.arithmetic
    return replace(certify, timeout=timeout, arithmetic=arithmetic)


def check_property(
    network: JointNetwork, property: Property, deadline: float, settings: Certify = PROPERTY,
    proofs: PropertyProof | None = None,
) -> Answer:  # fmt: skip
    """As ``answer``, for a network and a property already read. ``deadline``, by ``time.perf_counter``, stands for the
    timeout of ``settings``; ``proofs`` collects the proofs of boxes."""
    started = now()
    if not property.cases:
        return Answer("holds", 0.0, "exact", property.remark, remark=property.repaired)
    settings = replace(settings, timeout=max(deadline - started, 1e-9))
    clock = _StageClock()
    with until(deadline), within(settings.memory), gathered() as searches:
        try:
            found = _check_cases(network, property, deadline, settings, started, clock, proofs)
        except OutOfTime:
            found = Answer("timeout", now() - started, settings.arithmetic, "timeout")
    search = sum(searches, SearchStatistics()) if searches else None
    return replace(
        found, stage=clock.stage, spent=clock.seconds(), search=search, remark=property.repaired,
        declared=property.declared,
    )  # fmt: skip


class _StageClock:
    """Seconds by stage, each from its beginning to that of the next; ``stage`` is the last that began."""

    def __init__(self) -> None:
        self.stage = ""
        self._spent: dict[str, float] = {}
        self._since = perf_counter()

    def __call__(self, stage: str, images: int) -> None:
        self.seconds()
        self.stage = stage

    def seconds(self) -> Mapping[str, float]:
        """The seconds so far."""
        before, self._since = self._since, perf_counter()
        if self.stage:
            self._spent[self.stage] = self._spent.get(self.stage, 0.0) + self._since - before
        return self._spent


def _check_cases(
    network: JointNetwork, property: Property, deadline: float, settings: Certify, started: float, clock: _StageClock,
    proofs: PropertyProof | None,
) -> Answer:  # fmt: skip
    look()
    replay = network.replay()
    look()
    judge = _ExactJudge(property=property, replay=replay, read=network.read)
    verdicts: list[Verdict] = []
    try:
        points = _points(property.cases[0])
        inputs = points if property.free is None else property.free.at(points).float()
        _check_reading(network, inputs.reshape(-1, *network.shape), replay)
        for point in points:
            judge.refute(property.cases[0], point)
        program = with_terms(network, property)
        widest = max(shape.numel() for shape in fold(program.module, program.shape).shapes)
        most = max(1, min(settings.batch_size, MOST_ACTIVATIONS // widest))
        for numbers in _grouped_by_clauses(property.cases, most):
            verdicts += _verdicts_of(program, property, numbers, judge, deadline, settings, clock, proofs)
    except _Refuted as end:
        seconds, precision = now() - started, str(end.outputs.dtype).removeprefix("torch.")
        outputs = network.shown(end.outputs)
        return Answer("violated", seconds, f"onnxruntime {precision}", None, end.inputs, outputs)
    seconds = now() - started
    if judge.disputed:
        return Answer("unknown", seconds, verdicts[0].arithmetic, WITHIN_TOLERANCE)
    if judge.ties:
        return Answer("unknown", seconds, verdicts[0].arithmetic, ONLY_TIES)
    if judge.unwritten:
        return Answer("unknown", seconds, verdicts[0].arithmetic, UNWRITTEN)
    open_ = [verdict for verdict in verdicts if verdict.status != "verified"]
    if not open_:
        return Answer("holds", seconds, verdicts[0].arithmetic, property.remark)
    late = any(verdict.status == "timeout" for verdict in open_)
    first = next((verdict for verdict in open_ if verdict.status == "timeout"), open_[0])
    unmet = any(property.cases[verdict.index].equalities for verdict in open_)
    reason = "timeout" if late else UNMET if unmet else first.reason
    return Answer("timeout" if late else "unknown", seconds, first.arithmetic, reason)


def _points(case: Case) -> Tensor:
    """(P, F) float32 points of a box: middle, lower and upper corner, random corners, random points inside."""
    lower, upper = case.lower32.double(), case.upper32.double()
    noise = torch.Generator().manual_seed(0)
    corners = torch.randint(2, (RANDOM_POINTS, len(lower)), generator=noise).double()
    inside = torch.rand(RANDOM_POINTS, len(lower), generator=noise, dtype=torch.float64)
    shares = torch.cat(
        [torch.tensor([[0.5], [0.0], [1.0]], dtype=torch.float64).expand(3, len(lower)), corners, inside]
    )
    points = (lower * (1 - shares) + upper * shares).float()  # no difference of ends: it may overflow
    return unique(torch.minimum(torch.maximum(points, case.lower32), case.upper32), dim=0)


def _check_reading(network: JointNetwork, points: Tensor, replay: Replay) -> None:
    """Compare our network's outputs with onnxruntime's at points (P, *shape).

    Raises:
        InputError: they differ by more than ``READING_TOLERANCE``.
    """
    with torch.no_grad():
        for point in points:
            ours, theirs = network.module(point[None].to(network.dtype))[0], replay(point)[0]
            difference = float((ours - theirs).abs().max())
            if not difference <= READING_TOLERANCE * max(1.0, float(theirs.abs().max())):
                raise InputError(
                    f"network: found outputs that differ from onnxruntime's by {difference:.3g} at a point of the box; "
                    f"accepted: at most {READING_TOLERANCE:g} of their size, as float32 rounding gives"
                )


def _verdicts_of(
    network: JointNetwork,
    property: Property,
    numbers: list[int],
    judge: _ExactJudge,
    deadline: float,
    settings: Certify,
    clock: _StageClock,
    proofs: PropertyProof | None,
) -> list[Verdict]:
    """Verdicts of the cases ``numbers``. Each case gets an equal share of the time; the rest then goes to those that
    timed out, with the last stage alone, or with bounds of differences before it, unless its own timeout is what ended
    it."""
    arithmetic = settings.arithmetic
    late = [Verdict(number, None, None, "timeout", "", None, 0.0, arithmetic, "timeout") for number in numbers]
    latest = {verdict.index: verdict for verdict in late}
    stages: list[Stage] = []
    while numbers and (left := deadline - now()) > 0:
        problem = _problem(network, property, numbers)
        again, stages = bool(stages), _stages(problem, judge, settings)
        if again:
            if stages[-1].within(left)[1]:
                break
            stages = stages[-2:] if stages[-2:][0].name == DifferenceStage.name else stages[-1:]
        verdicts = run_cascade(problem, stages, Limits(left, deadline), clock, arithmetic, proofs)
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
    """Judges points exactly: within the property as it was read, strict comparisons included, with the outputs of each
    of onnxruntime's runs. A counterexample ends the search by ``_Refuted``.

    A box's float32 ends are rounded outward, so a point at them is first moved into the box; onnxruntime is given its
    decimals rounded to the model's element type, as every reader of the counterexample would do.

    Args:
        read: rounds a point (N,) float64 to the element types of the models' inputs.
        disputed: the first point that is unsafe in some of the runs only.
        ties: the first point that is unsafe in all runs, were it not for strict comparisons.
        unwritten: the first point that is unsafe once its inputs are rounded, and that no decimals state.
    """

    property: Property | None = None
    read: Callable[[Tensor], Tensor] = Tensor.float
    disputed: list[Tensor] = field(default_factory=list[Tensor])
    ties: list[Tensor] = field(default_factory=list[Tensor])
    unwritten: list[Tensor] = field(default_factory=list[Tensor])

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        assert self.property is not None
        self.refute(self.property.cases[int(problem.index[number])], image)
        return False

    def refute(self, case: Case, image: Tensor) -> None:
        """Replay a point (*shape) of the free inputs, and before it one at which float32 holds all inputs exactly.

        Raises:
            _Refuted: the point is a counterexample.
            OutOfTime: the time is up: a batch of points that only tie may take seconds.
        """
        look()
        assert self.property is not None
        # of float32s where they lie within: then models in float64 read the same numbers
        point = image.float().double().flatten().cpu()
        free = self.property.free
        near = None if free is None else free.on_grid(point)
        for decimals in (near if near is not None and case.within(near) else None, case.written(point)):
            if decimals is not None:
                self._replay(case, decimals)

    def _replay(self, case: Case, own: list[str]) -> None:
        """Replay a point by the decimals of the free inputs."""
        assert self.replay is not None and self.property is not None
        free = self.property.free
        decimals = own if free is None else free.written(own, case.allows)
        if free is not None and decimals is None:
            point = free.at(torch.tensor([[float(text) for text in own]], dtype=torch.float64))[0]
        else:
            point = torch.tensor([float(text) for text in decimals or ()], dtype=torch.float64)
        point = self.read(point)
        runs, given = self.replay(point), as_floats(point)
        closed = [bool(run.isfinite().all()) and case.contains(given, as_floats(run), closed=True) for run in runs]
        if not any(closed):
            return
        if decimals is None:
            self.unwritten.append(point)
            return
        # an input has two values where no float is what was written: the decimal, and what is replayed
        read = [value if float(text) == value else Fraction(text) for text, value in zip(decimals, given, strict=True)]
        unsafe = [
            one and case.contains(given, values := as_floats(run)) and case.contains(read, values)
            for one, run in zip(closed, runs, strict=True)
        ]
        if all(unsafe):
            raise _Refuted(decimals, runs[-1])
        kept = self.ties if all(closed) and not any(unsafe) and case.strict else self.disputed
        if not kept:
            kept.append(point)


def _grouped_by_clauses(cases: Sequence[Case], most: int) -> Iterator[list[int]]:
    """Yield the cases' numbers, at most ``most`` at a time, all with the same clauses."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(tuple(as_ints(case.clauses)), []).append(number)
    for numbers in groups.values():
        yield from (numbers[first : first + most] for first in range(0, len(numbers), most))


def _problem(network: JointNetwork, property: Property, numbers: Sequence[int]) -> Problem:
    cases = [property.cases[number] for number in numbers]
    lower, upper = (torch.stack(ends) for ends in zip(*((case.lower32, case.upper32) for case in cases), strict=True))
    if not (lower.isfinite().all() and upper.isfinite().all()):
        raise InputError("property: found an end that is infinite in float32; accepted: ends of float32's range")
    shape = (len(cases), *network.shape)
    rows, offsets = torch.stack([case.rows for case in cases]), torch.stack([case.offsets for case in cases])
    size = torch.exp2(rows.abs().amax(-1).frexp().exponent.double())  # a power of 2, so exact: float32 loses no row
    specification = Specification(rows / size.unsqueeze(-1), offsets / size, cases[0].clauses)
    box = Box(*(end.reshape(shape).to(network.dtype) for end in (lower, upper)))
    region = _within_common_rows(network, property, box, specification, min(case.common for case in cases))
    return Problem(network.module, region, specification, torch.tensor(numbers))


def _within_common_rows(
    network: JointNetwork, property: Property, box: Box, specification: Specification, common: int
) -> Region:
    """The boxes with those of the first rows that are linear in the inputs alone; the boxes themselves without any."""
    inputs, outputs = network.shape.numel(), network.outputs - len(property.terms)
    column = {place: outputs + number for number, (place, *more) in enumerate(property.terms)
              if not more and place < inputs}  # fmt: skip
    others = torch.ones(network.outputs, dtype=torch.bool)
    others[list(column.values())] = False
    rows, offsets = specification.rows[:, :common], specification.offsets[:, :common]
    linear = (rows[..., others] == 0).flatten(2).all(-1).all(0) & (rows != 0).any(-1).any(0)
    count = int(linear.sum())
    if not count or len(rows) * count * inputs > POLYTOPE:
        return box
    normals = rows.new_zeros(len(rows), count, inputs)
    normals[..., list(column)] = rows[:, linear][..., list(column.values())]
    return Polytope(box, normals.reshape(len(rows), count, *network.shape), offsets[:, linear])


def _stages(problem: Problem, judge: Judge, settings: Certify) -> list[Stage]:
    """The stages for a problem; by default those for what its network and its sets are."""
    if settings.stages != STAGES:
        return settings.stages_for(0, judge)
    stages = STAGES_OF_FEW_INPUTS if few_inputs(problem) else STAGES
    if difference_network(fold(problem.network, problem.region.images.shape[1:])) is not None:
        behind = stages.index("crown") + 1
        stages = (*stages[:behind], DifferenceStage.name, *stages[behind:])
    return replace(settings, stages=stages).stages_for(0, judge)
