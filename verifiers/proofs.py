"""Proofs of verified problems, in the form that ``certtrain.checker`` checks (docs/proofs.md).

What is known of a problem when it is verified (bounds, slopes, the record of its search) becomes the goals of a proof,
by the cheapest rule that proves each disjunct. The checker's own bounds decide what does: a goal is written when they
are positive. Where a slope or multiplier is not good enough for them, it is optimised further.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from ..bounds.clock import OutOfTime
from ..checker.arithmetic import Numbers, Rejected
from ..checker.bounds import Enclosure
from ..checker.check import METHODS, BoxCheck, bounds_of
from ..checker.claim import Claim, robustness
from ..checker.network import CheckedNetwork, read_network
from ..checker.proof import FORMAT, VERSION, ProofFile
from ..checker.vnnlib import read_claim
from ..errors import InputError, Portable, writing
from ..run_folder import temporary_of, write_atomically
from ..typed import as_ints
from .bounds_so_far import BoundsSoFar
from .neurons import Neurons
from .optimise import BestParameters, Subproblems, ascents_at_a_time, maximise, starting_slopes
from .problem import Problem
from .search_record import (
    Concretised,
    CrossedBounds,
    Multipliers,
    Range,
    RecordedSubproblem,
    Relaxed,
    SearchRecord,
    Sign,
)
from .settings import Arithmetic
from .vnnlib import Property

STEPS = 60
"""Steps of the ascents on slopes and multipliers whose goals the checker does not accept as they are."""


CLEAR = 1e-4
"""Bound above which intervals' verdicts are not repeated with the checker's own, which differ by roundings of float64.
It takes half of the time of such a proof."""

MOST_PARTS = 50_000
"""Most parts of a box that is split at its inputs."""


class NoProof(Portable, Exception):
    """Why a verified problem gets no proof."""


@dataclass(frozen=True)
class BoxProof:
    """The part of a proof about one box: an object of the header, and arrays by name."""

    header: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


class Prover:
    """Proves boxes of a network.

    Args:
        model: the network's ONNX file.
        arithmetic: in which proofs hold.
    Raises:
        InputError: the checker does not know the network.
    """

    def __init__(self, model: Path, arithmetic: Arithmetic):
        self.numbers = Numbers(single=arithmetic == "float32")
        self.arithmetic = arithmetic
        try:
            self.network: CheckedNetwork = read_network(model, self.numbers)
        except Rejected as why:
            raise InputError(f"{model}: found what the checker does not know ({why}); accepted: no proofs") from why

    def prove(self, claim: Claim, number: int, clauses: Mapping[int, int], problem: Problem, known: BoundsSoFar,
              place: int = 0) -> BoxProof:  # fmt: skip
        """Prove a claim's box.

        Args:
            number: of the box in the claim.
            clauses: for each of its disjuncts, by number, the clause of the specification that it is.
            problem, known: of this box alone, after the stage that verified it.
            place: its position in the batch that ``known.record`` is about.
        Raises:
            NoProof: the checker's bounds prove a disjunct by nothing that is known.
        """
        sizes = [self.network.operations[at].size for at in self.network.relus]
        if sizes != Neurons.of(known.network).sizes:
            raise NoProof("the file's non-linear operators are not those that were bounded")
        with np.errstate(all="ignore"):
            return _BoxProver(self, claim, number, clauses, problem, known).run(place)

    def header(self, claim: Mapping[str, Any], boxes: Sequence[BoxProof], **more: Any) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, "network": self.network.sha256, "arithmetic": self.arithmetic,
            "claim": claim, **more, "boxes": [box.header for box in boxes],
        }  # fmt: skip


class _BoxProver:
    def __init__(
        self, prover: Prover, claim: Claim, number: int, clauses: Mapping[int, int], problem: Problem,
        known: BoundsSoFar,
    ):  # fmt: skip
        self.prover, self.claim, self.number, self.clauses = prover, claim, number, clauses
        self.problem, self.known, self.region = problem, known, known.region_of(problem)
        self.goals, self.arrays = list[dict[str, Any]](), dict[str, np.ndarray]()
        forms, offsets = known.rows_of(problem.specification)
        self.forms, self.offsets = forms[0], offsets[0]  # (R, K), (R,)
        self.members = [
            as_ints((problem.specification.clauses == clause).nonzero())
            for clause in range(int(problem.specification.clauses.max()) + 1)
        ]

    def run(self, place: int) -> BoxProof:
        left = sorted(self.clauses)
        if not self.known.bounds and float(self.problem.specification.worst(self.known.rows)) > CLEAR:
            return BoxProof({"bounds": "ibp", "goals": [{"disjuncts": left, "by": "interval"}]}, {})
        for bounds, rules in (("ibp", ("interval", "lines")), ("crown", ("lines",))):
            check = self._check(bounds)
            for by in rules:
                proved = [goal for goal, bound in zip(left, check.bounds(left, by, "")) if bound > 0]
                if len(proved) == len(left) or (proved and bounds == "crown"):
                    self.goals.append({"disjuncts": proved, "by": by})
                    left = [goal for goal in left if goal not in proved]
                if not left:
                    return BoxProof({"bounds": bounds, "goals": self.goals}, self.arrays)
        record = self.known.record
        roots = [] if record is None else record.roots(place)
        if record is not None and roots and _splits_inputs(roots[0], record):
            self._halves(check, left, roots[0], record)
            return BoxProof({"bounds": "crown", "goals": self.goals}, self.arrays)
        ends = self.known.bounds
        if not ends:
            raise NoProof("no bounds of the neurons are known")
        neurons = Neurons.of(self.known.network)
        lower, upper = neurons.ends(ends, self.known.rows)
        self.lower, self.upper = lower, upper
        self.unstable = ((lower < 0) & (upper > 0))[0].nonzero().flatten()
        trees = {root.goal: root for root in roots}
        plain = [goal for goal in left if self.clauses[goal] not in trees]
        for goal in left:
            if self.clauses[goal] in trees:
                self._signs(check, goal, trees[self.clauses[goal]])
        groups: dict[int, list[int]] = {}
        for goal in plain:
            groups.setdefault(len(self.members[self.clauses[goal]]), []).append(goal)
        for group in groups.values():
            self._slopes(check, group)
        return BoxProof({"bounds": "crown", "goals": self.goals}, self.arrays)

    def _check(self, bounds: str) -> BoxCheck:
        proof = ProofFile({}, self.arrays)
        return BoxCheck(
            self.prover.network, proof, self.claim, self.prover.numbers, self.number, {"bounds": bounds}
        )  # fmt: skip

    def _halves(self, check: BoxCheck, goals: list[int], root: RecordedSubproblem, record: SearchRecord) -> None:
        """A goal by the parts of the box that a search on inputs made. What it clipped from a part is split off first;
        a part that the checker does not prove is halved further."""
        disjuncts = [self.claim.disjuncts[goal] for goal in goals]
        tree, values, methods = list[int](), list[float](), list[int]()
        whole = check.ends[1] - check.ends[0]
        # parts in order of the walk, the next one last: (subproblem of the record, or None; ends)
        parts: list[tuple[RecordedSubproblem | None, Any, Any]] = [(root, *check.ends)]
        while parts:
            node, lower, upper = parts.pop()
            halves = [] if node is None else [record.subproblems[child] for child in node.children]
            if not halves:
                method = self._method(disjuncts, lower, upper)
                if method is not None:
                    tree.append(-1)
                    methods.append(method)
                    continue
                if len(methods) + len(parts) > MOST_PARTS:
                    raise NoProof(f"more than {MOST_PARTS} parts of the box")
                number = int(((upper - lower) / np.maximum(whole, 1e-300)).argmax())
                value = lower[number] + (upper[number] - lower[number]) / 2
                if not lower[number] < value < upper[number]:
                    raise NoProof("a part of the box that is too small to be halved")
                first, second = None, None
            else:
                decisions = [half.decision for half in halves if isinstance(half.decision, Range)]
                low, up = np.array(decisions[0].clip.lower), np.array(decisions[0].clip.upper)
                below, above = (lower < low) & (low < upper), (lower < up) & (up < upper)
                if below.any():
                    number, first, second = int(below.argmax()), None, node
                    value = low[number]
                elif above.any():
                    number, first, second = int(above.argmax()), node, None
                    value = up[number]
                else:
                    number, value = decisions[0].input, max(decision.lower for decision in decisions)
                    value = min(max(value, lower[number]), upper[number])
                    first, second = sorted(halves, key=lambda half: decisions[halves.index(half)].lower)
            tree.append(number)
            values.append(float(value))
            left, right = upper.copy(), lower.copy()
            left[number] = right[number] = value
            parts += [(second, right, upper), (first, lower, left)]
        name = self._name()
        self.arrays[f"{name}.tree"] = np.array(tree, dtype=np.int32)
        self.arrays[f"{name}.values"] = np.array(values, dtype=np.float64)
        self.arrays[f"{name}.methods"] = np.array(methods, dtype=np.uint8)
        self.goals.append({"disjuncts": goals, "by": "halves", "name": name})

    def _method(self, disjuncts: Sequence[Any], lower: Any, upper: Any) -> int | None:
        """The number of the checker's cheapest method that proves a part of the box."""
        for method, (bounds, lines) in enumerate(METHODS):
            part = Enclosure(self.prover.network, self.prover.numbers, lower, upper, bounds == "crown")
            if all(bound > 0 for bound in bounds_of(part, disjuncts, lines)):
                return method
        return None

    def _slopes(self, check: BoxCheck, goals: list[int]) -> None:
        """A goal by slopes, those of the best row of each disjunct."""
        rows = [max(self.members[self.clauses[goal]], key=lambda row: float(self.known.rows[0, row])) for goal in goals]
        if self.known.alphas is None:
            slopes = starting_slopes(self.lower, self.upper, len(rows))[0]
        else:
            slopes = self.known.alphas[0, rows]
        weights = np.array([
            [float(member == row) for member in self.members[self.clauses[goal]]] for goal, row in zip(goals, rows)
        ], dtype=np.float32)  # fmt: skip
        count = torch.zeros(len(rows), len(self.unstable), dtype=slopes.dtype, device=slopes.device)
        leaves = _Leaves(goals * 1, rows, [()] * len(goals), weights, slopes[:, self.unstable], count)
        self._add(check, goals, "slopes", leaves)

    def _signs(self, check: BoxCheck, goal: int, root: RecordedSubproblem) -> None:
        """A goal by a tree of signs."""
        record, members = self.known.record, self.members[self.clauses[goal]]
        assert record is not None
        tree, closed, paths = list[int](), list[RecordedSubproblem](), list[tuple[tuple[int, int], ...]]()
        stack: list[tuple[RecordedSubproblem, tuple[tuple[int, int], ...]]] = [(root, ())]
        while stack:
            node, path = stack.pop()
            halves = [record.subproblems[child] for child in node.children]
            signs = {half.decision.sign: half for half in halves if isinstance(half.decision, Sign)}
            if halves:
                decision = halves[0].decision
                assert isinstance(decision, Sign) and set(signs) == {1, -1}
                tree.append(decision.neuron)
                stack += [(signs[sign], (*path, (decision.neuron, sign))) for sign in (-1, 1)]
            else:
                tree.append(-1)
                closed.append(node)
                paths.append(path)
        self.arrays[f"{self._name()}.tree"] = np.array(tree, dtype=np.int32)
        place = {neuron: column for column, neuron in enumerate(as_ints(self.unstable))}
        like, count = self.known.rows, (len(closed), len(place))
        slopes, multipliers = like.new_zeros(count), like.new_zeros(count)
        weights, rows = np.zeros((len(closed), len(members)), dtype=np.float32), list[int]()
        for number, (node, path) in enumerate(zip(closed, paths, strict=True)):
            proof = node.proof
            row = members[0]
            if isinstance(proof, Relaxed):
                row = proof.row
                columns = torch.tensor([place[neuron] for neuron in as_ints(proof.neurons)], dtype=torch.int64)
                slopes[number, columns] = proof.slopes.to(like)
                multipliers[number, columns] = proof.multipliers.to(like)
                weights[number, members.index(row)] = 1.0
            elif isinstance(proof, Multipliers):
                columns = torch.tensor(sorted(place[neuron] for neuron, _ in path), dtype=torch.int64)
                multipliers[number, columns] = proof.constraints.clamp(min=0).to(like)
                weights[number] = proof.rows.clamp(min=0).numpy()
                row = members[int(proof.rows.argmax())]
            else:
                assert not isinstance(proof, CrossedBounds)
                raise NoProof(f"the search left a part of disjunct {goal} without a proof")
            rows.append(row)
        leaves = _Leaves([goal] * len(closed), rows, paths, weights, slopes, multipliers)
        self._add(check, [goal], "signs", leaves)

    def _name(self) -> str:
        return f"{self.number}.{len(self.goals)}"

    def _add(self, check: BoxCheck, goals: list[int], by: str, leaves: _Leaves) -> None:
        """Add a goal whose leaves the checker accepts, with numbers of as few bytes as that takes."""
        name = self._name()
        for slopes, multipliers in ((np.uint8, np.float16), (np.float16, np.float32), (np.float64, np.float64)):
            self.arrays.update(leaves.arrays(name, self.unstable, slopes, multipliers))
            bounds: list[float] = np.asarray(check.bounds(goals, by, name), dtype=np.float64).tolist()
            fails = torch.tensor([not bound > 0 for bound in bounds])
            if not bool(fails.any()):
                self.goals.append({"disjuncts": goals, "by": by, "name": name})
                return
            if slopes is np.float16:
                self._improve(leaves, fails.nonzero().flatten())
        raise NoProof(
            f"disjunct {goals[0] if by == 'signs' else goals[int(fails.nonzero()[0])]}: the checker's bound of "
            f"{int(fails.sum())} of {len(fails)} parts is not above 0, {min(bounds):.3g}"
        )

    def _improve(self, leaves: _Leaves, which: Tensor) -> None:
        """Ascend on the slopes and multipliers of some leaves."""
        network = self.known.network
        size = ascents_at_a_time(network, 1, self.lower)
        for part in torch.split(which, size) if size else ():
            numbers = as_ints(part)
            signs = torch.zeros(len(part), self.lower.shape[1], dtype=torch.int8, device=self.lower.device)
            for number, leaf in enumerate(numbers):
                for neuron, sign in leaves.paths[leaf]:
                    signs[number, neuron] = sign
            lower = torch.where(signs > 0, self.lower.clamp(min=0), self.lower)
            upper = torch.where(signs < 0, self.upper.clamp(max=0), self.upper)
            weights = torch.tensor(leaves.weights[numbers].tolist()).to(self.forms)
            members = torch.tensor([self.members[self.clauses[leaves.goals[leaf]]] for leaf in numbers])
            forms = (weights.unsqueeze(-1) * self.forms[members]).sum(1, keepdim=True)
            offsets = (weights * self.offsets[members]).sum(1, keepdim=True)
            zero = self.lower.new_zeros(len(part), 1, self.lower.shape[1])
            slopes, multipliers = zero + 1.0, zero.clone()
            slopes[:, 0, self.unstable] = leaves.slopes[part].to(zero)
            multipliers[:, 0, self.unstable] = leaves.multipliers[part].to(zero)
            sub = Subproblems(self.region.take(torch.zeros_like(part)), forms, offsets, lower, upper, signs)
            kept = BestParameters()
            try:
                maximise(network, sub, slopes, multipliers, steps=STEPS, rate=0.05, decay=0.98, kept=kept)
            except OutOfTime:
                return
            assert kept.alphas is not None and kept.betas is not None
            leaves.slopes[part] = kept.alphas[:, 0, self.unstable].to(leaves.slopes)
            leaves.multipliers[part] = kept.betas[:, 0, self.unstable].to(leaves.multipliers)


def _splits_inputs(root: RecordedSubproblem, record: SearchRecord) -> bool:
    """Whether a recorded search split inputs, not neurons."""
    if root.children:
        return isinstance(record.subproblems[root.children[0]].decision, Range)
    return isinstance(root.proof, Concretised)


@dataclass(frozen=True, eq=False)
class _Leaves:
    """L leaves of a goal.

    Args:
        goals: the disjunct of each; rows: its row of the specification; paths: its splits (neuron, sign).
        weights: (L, G) of the disjunct's rows; slopes, multipliers: (L, U) of the unstable neurons.
    """

    goals: list[int]
    rows: list[int]
    paths: Sequence[tuple[tuple[int, int], ...]]
    weights: np.ndarray
    slopes: Tensor
    multipliers: Tensor

    def arrays(self, name: str, unstable: Tensor, slopes: type, multipliers: type) -> dict[str, np.ndarray]:
        """The arrays of a goal, with slopes and multipliers of these types (bytes are multiples of 1/255)."""
        found: dict[str, np.ndarray] = {f"{name}.neurons": unstable.cpu().numpy().astype(np.int32)}
        given = self.slopes.double().cpu().numpy()
        given = np.rint(given * 255) if slopes is np.uint8 else given
        found[f"{name}.slopes"] = given.clip(0, 255 if slopes is np.uint8 else 1).astype(slopes)
        place = {neuron: column for column, neuron in enumerate(as_ints(unstable))}
        columns = [place[neuron] for path in self.paths for neuron, _ in path]
        leaf = [number for number, path in enumerate(self.paths) for _ in path]
        pushes = (
            self.multipliers.double().cpu().numpy()[leaf, columns].clip(0, 6e4 if multipliers is np.float16 else 1e38)
        )
        if columns:
            found[f"{name}.multipliers"] = pushes.astype(multipliers)
        if self.weights.shape[1] > 1 or not (self.weights == 1).all():
            found[f"{name}.weights"] = self.weights
        return found


def write_proof(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a proof's file, whole or not at all."""
    content = _content(header, arrays)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _content(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"proof": json.dumps(header)})


@dataclass(frozen=True)
class Written:
    """The name of a verified problem's proof ``file``, or the reason why there is ``none``."""

    file: str | None = None
    none: str | None = None


class ProofWriter(ABC):
    """Receives verified problems, each with what is known of it."""

    @abstractmethod
    def write(self, problem: Problem, known: BoundsSoFar, place: int) -> Written:
        """Prove one problem.

        Args:
            problem, known: of one box, after the stage that verified it.
            place: its position in the batch that ``known.record`` is about.
        """


@dataclass(frozen=True, eq=False)
class ImageProofs(ProofWriter):
    """Writes a file ``NNNNN.safetensors`` for each verified image.

    Args:
        folder: of the files, created when the first is written.
        data: checksum of the data set that the images' numbers are about.
    """

    prover: Prover
    folder: Path
    data: str
    _written: list[Path] = field(default_factory=list[Path])

    def write(self, problem: Problem, known: BoundsSoFar, place: int) -> Written:
        assert problem.specification.labels is not None
        number, label = int(problem.index[0]), int(problem.specification.labels[0])
        hull = problem.region.hull
        lower, upper = (end[0].flatten().cpu().numpy() for end in (hull.lower, hull.upper))
        outputs = self.prover.network.outputs
        try:
            claim = robustness(lower, upper, label, outputs, self.prover.numbers)
            clauses = {clause: clause for clause in range(outputs - 1)}
            box = self.prover.prove(claim, 0, clauses, problem, known, place)
        except (NoProof, Rejected) as why:
            return Written(none=str(why))
        image = {"number": number, "data": self.data}
        header = self.prover.header({"label": label}, [box], image=image)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / proof_name(number)
        arrays = {"box.lower": lower, "box.upper": upper, **box.arrays}
        with writing(path, temporary := temporary_of(path)):
            temporary.write_bytes(_content(header, arrays))
            os.replace(temporary, path)
        self._written.append(path)
        return Written(path.name)

    def flush(self) -> None:
        """Make the files written so far durable. All at once: one at a time took 24 ms each, ten times their proof."""
        for path in self._written:
            with writing(path), path.open("rb") as file:
                os.fsync(file.fileno())
        self._written.clear()

    def lacks(self, line: Mapping[str, Any]) -> bool:
        """Whether the proof of a verified image was not written, or is no longer there."""
        if line.get("no_proof"):
            return False
        return "proof" not in line or not (self.folder / proof_name(line["index"])).exists()


def proof_name(number: int) -> str:
    """The name of an image's proof in its folder."""
    return f"{number:05d}.safetensors"


@dataclass(eq=False)
class PropertyProof(ProofWriter):
    """Collects proofs of a property's boxes, and writes them as one file.

    Args:
        text: the property's file, without compression.
    """

    prover: Prover
    property: Property
    text: bytes
    _boxes: dict[int, BoxProof] = field(default_factory=dict[int, BoxProof])
    why: str = ""

    def __post_init__(self) -> None:
        network = self.prover.network
        try:
            text = self.text.decode("utf-8", "replace")
            self.claim = read_claim(text, network.inputs, network.outputs, self.prover.numbers)
        except Rejected as why:
            raise InputError(f"--proof: found {why}; accepted: a property that the checker reads") from why

    def write(self, problem: Problem, known: BoundsSoFar, place: int) -> Written:
        try:
            number, clauses = self._place_of(int(problem.index[0]))
            self._boxes[number] = self.prover.prove(self.claim, number, clauses, problem, known, place)
        except (NoProof, Rejected) as why:
            self.why = self.why or str(why)
            return Written(none=str(why))
        return Written(f"box {number}")

    def _place_of(self, number: int) -> tuple[int, dict[int, int]]:
        """(number, clauses): of the claim's box that is the property's case ``number``, and as ``Prover.prove``."""
        case = self.property.cases[number]
        ends = case.lower.numpy(), case.upper.numpy()
        box = next((i for i, own in enumerate(self.claim.boxes) if all(map(np.array_equal, own, ends))), None)
        if box is None:
            raise NoProof("the checker reads other boxes in the property")
        rows = np.concatenate([case.rows.numpy(), case.offsets.numpy()[:, None]], 1)
        own = {
            clause: _normal(rows[np.asarray(case.clauses) == clause]) for clause in set(as_ints(case.clauses))
        }  # fmt: skip
        found = dict[int, int]()
        for place, disjunct in enumerate(self.claim.disjuncts):
            if disjunct.box == box:
                wanted = _normal(np.concatenate([disjunct.rows, disjunct.offsets[:, None]], 1))
                same = (c for c, r in own.items() if r.shape == wanted.shape and np.allclose(r, wanted, 1e-9, 1e-9))
                if (clause := next(same, None)) is None:
                    raise NoProof("the checker reads other rows in the property")
                found[place] = clause
        return box, found

    def save(self, path: Path) -> str | None:
        """Write the file; return the reason where that was not possible.

        Raises:
            Unwritable: the file cannot be written.
        """
        if len(self._boxes) < len(self.claim.boxes):
            return self.why or "a part was verified by a stage that leaves nothing to prove it by"
        boxes = [self._boxes[number] for number in range(len(self.claim.boxes))]
        arrays = {name: array for box in boxes for name, array in box.arrays.items()}
        claim = {"vnnlib": hashlib.sha256(self.text).hexdigest()}
        write_proof(path, self.prover.header(claim, boxes), arrays)
        return None


def _normal(rows: np.ndarray) -> np.ndarray:
    """Rows in units of their largest entry, in an order of their own."""
    rows = rows / np.maximum(np.abs(rows).max(1, keepdims=True), 1e-300)
    return rows[np.lexsort(np.round(rows, 6).T)]
