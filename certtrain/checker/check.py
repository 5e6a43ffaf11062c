"""The rules by which the goals of a proof are proved."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from .arithmetic import Numbers, Rejected, demand
from .bounds import Enclosure, chunks
from .claim import robustness
from .network import read_network
from .proof import read_proof
from .vnnlib import read_claim

METHODS = (("ibp", False), ("ibp", True), ("crown", True))
"""How the neurons are bounded in a part of a split box, and whether lines bound the rows."""


def check(model: Path, proof: Path, property: Path | None = None, single=False, exact=False) -> Any:
    """Check a proof of a network; paths.

    Args:
        property: the file of the property, if the claim is not in the proof.
        single: whether the claim must hold in float32 too; exact: compute in fractions.
    Returns:
        the least lower bound of all goals, > 0.
    Raises:
        Rejected: the file does not prove its claim, with the reason.
    """
    arithmetic = Numbers(exact, single)
    try:
        found = read_proof(proof)
        network = read_network(model, arithmetic)
        return prove(network, found, claim_of(network, found, property, arithmetic), arithmetic)
    except (Rejected, OSError):
        raise
    except Exception as error:  # whatever a damaged file leads to, nothing was proved
        raise Rejected(f"cannot be checked ({type(error).__name__}: {error})") from error


def claim_of(network, proof, property, arithmetic):
    """The claim of the proof about this network."""
    same = proof.header["network"] == network.sha256
    demand(same, "the proof is about another network, by its checksum")
    claim = proof.entry("claim", dict)
    if "vnnlib" not in claim:
        demand(property is None, "the proof is about a box of its own, not about a property")
        low, up = (proof.array(f"box.{end}", "f", (network.inputs,)) for end in ("lower", "upper"))
        return robustness(low, up, claim.get("label"), network.outputs, arithmetic)
    demand(property is not None, "the proof is about a property; its file was not given")
    content = property.read_bytes()
    same = hashlib.sha256(content).hexdigest() == claim["vnnlib"]
    demand(same, "the proof is about another property, by its checksum")
    text = content.decode("utf-8", "replace")
    return read_claim(text, network.inputs, network.outputs, arithmetic)


@np.errstate(all="ignore")  # infinite and undefined numbers prove nothing
def prove(network, proof, claim, arithmetic):
    """The least bound of all disjuncts' goals; all must be positive, none may be missing."""
    boxes, margin = proof.objects("boxes"), math.inf
    count = len(claim.boxes)
    demand(len(boxes) == count, f"the proof has {len(boxes)} boxes, the claim {count}")
    for number, box in enumerate(boxes):
        own = BoxCheck(network, proof, claim, arithmetic, number, box)
        missing = {i for i, one in enumerate(claim.disjuncts) if one.box == number}
        for goal in proof.objects("goals", box):
            found, numbers = own.goal(goal)
            margin, missing = min(margin, found), missing - set(numbers)
        demand(not missing, f"box {number}: nothing is said about the disjuncts {sorted(missing)}")
    return margin


class BoxCheck:
    """One box of the claim, with the bounds on it by which its goals are proved."""

    def __init__(self, network: Any, proof: Any, claim: Any, own: Any, number: int, header: Any):
        self.network, self.proof, self.claim, self.own = network, proof, claim, own
        self.number, self.ends, bounds = number, claim.boxes[number], header.get("bounds")
        demand(bounds in ("ibp", "crown"), f"box {number}: bounds {str(bounds)[:20]!r}")
        steps = dict(self._step(step) for step in proof.objects("steps", header, optional=True))
        lower, upper = self.ends
        self.enclosure = Enclosure(network, own, lower, upper, bounds == "crown", steps)

    def _step(self, step):
        """(position, arguments of ``Enclosure.tighten``) of one step of the header."""
        place, name = self.proof.entry("relu", int, step), self.proof.entry("name", str, step)
        demand(0 <= place < len(self.network.relus), f"step {name}: no ReLU number {place}")
        position, neurons = self.network.relus[place], self._places(f"{name}.neurons")
        entries = self._places(f"{name}.entries", self.network.operations[position].size)
        shape = len(entries), len(neurons)
        below, above = (self._numbers(f"{name}.{end}", shape) for end in ("below", "above"))
        return position, (entries, neurons, below, above)

    def _places(self, name, count=None):
        """An array of numbers of neurons, or of other things of which there are ``count``."""
        found = self.proof.array(name, "iu", (None,)).astype(np.int64)
        count = self.network.neurons if count is None else count
        demand(((found >= 0) & (found < count)).all(), f"{name}: numbers beyond {count}")
        return found

    def _numbers(self, name, shape):
        """Slopes, multipliers or weights; bytes are multiples of 1/255."""
        found = self.proof.array(name, "uf", shape)
        numbers = self.own.numbers(found)
        return numbers / 255 if found.dtype.kind == "u" else numbers

    def goal(self, goal):
        """(bound, numbers of the disjuncts) of one goal.

        Raises:
            Rejected: the bound is not above 0, or there is none.
        """
        numbers, by = self.proof.entry("disjuncts", list, goal), goal.get("by")
        bounds = self.bounds(numbers, by, str(goal.get("name")))
        worst = int(np.argmin(bounds))
        where = f"box {self.number}, disjuncts {str(numbers)[:40]}, by {by}: part {worst}"
        positive = all(bound > 0 for bound in bounds)  # false of what is undefined, too
        demand(positive, f"{where} has the bound {float(bounds[worst]):.6g}, which is not above 0")
        return bounds[worst], numbers

    def bounds(self, numbers: list[int], by: Any, name: str) -> Any:
        """The bounds that a goal needs to be above 0."""
        own = {i for i, one in enumerate(self.claim.disjuncts) if one.box == self.number}
        known = numbers and all(type(i) is int and i in own for i in numbers)
        demand(known, f"box {self.number}: a goal about the disjuncts {str(numbers)[:40]}")
        disjuncts = [self.claim.disjuncts[i] for i in numbers]
        if by in ("interval", "lines"):
            return bounds_of(self.enclosure, disjuncts, by == "lines")
        if by == "slopes":  # a tree without splits for each disjunct
            return self._leaves(disjuncts, name, [()] * len(disjuncts))
        if by == "signs" and len(numbers) == 1:
            leaves = walk(self.proof, name, signs, self.network.neurons, ())
            return self._leaves(disjuncts * len(leaves), name, leaves)
        demand(by == "halves", f"box {self.number}: {len(numbers)} disjuncts by {str(by)[:20]!r}")
        return self._halves(disjuncts, name)

    def _leaves(self, disjuncts, name, leaves):
        """Bounds of leaves, each of its disjunct's rows, by slopes and multipliers.

        Args:
            leaves: of each the (neuron, sign) of the splits on the way from the root.
        """
        neurons, count = self._places(f"{name}.neurons"), len(leaves)
        slopes = self._numbers(f"{name}.slopes", (count, len(neurons)))
        (sizes,) = {len(one.rows) for one in disjuncts}
        weights = self.own.numbers(np.ones((count, 1)))
        if sizes > 1 or f"{name}.weights" in self.proof.arrays:
            weights = np.maximum(self._numbers(f"{name}.weights", (count, sizes)), 0)
        ends = np.cumsum([0, *map(len, leaves)])
        pushes = self._numbers(f"{name}.multipliers", (ends[-1],)) if ends[-1] else weights[0, :0]
        found = []
        for part in chunks(count, self.enclosure.rows_at_a_time(4)):
            rows = weights[part, :, None] * np.stack([one.rows for one in disjuncts[part]])
            offsets = weights[part] * np.stack([one.offsets for one in disjuncts[part]])
            own = np.maximum(pushes[ends[part.start] : ends[part.stop]], 0)
            clamped, pushed, empty = self._assumed(leaves[part], own)
            lines = self.enclosure.lines((neurons, slopes[part]), clamped)
            bounds = bound_rows(self.enclosure, rows.sum(1), offsets.sum(1), lines, pushed)
            bounds[empty] = math.inf
            found.append(bounds)
        return np.concatenate(found)

    def _assumed(self, leaves, pushes):
        """(ends, forms, empty): by position of the ReLUs, their inputs' ends under the leaves'
        signs, and minus sign times multiplier of each; the leaves that no point satisfies."""
        leaf = np.repeat(np.arange(len(leaves)), [*map(len, leaves)])
        splits = [split for one in leaves for split in one]
        split, sign = np.array(splits, dtype=np.int64).reshape(-1, 2).T
        clamped, pushed, empty = {}, {}, np.zeros(len(leaves), dtype=bool)
        for place in self.network.relus:
            operation, first = self.network.operations[place], self.network.first[place]
            here = (split >= first) & (split < first + operation.size)
            if not here.any():
                continue
            lower, upper = (
                np.repeat(ends[operation.inputs[0]][None], len(leaves), 0)
                for ends in (self.enclosure.lower, self.enclosure.upper)
            )
            at, entry, positive = leaf[here], split[here] - first, sign[here] > 0
            low, up = (at[positive], entry[positive]), (at[~positive], entry[~positive])
            lower[low], upper[up] = np.maximum(lower[low], 0), np.minimum(upper[up], 0)
            empty |= (lower > upper).any(1)
            clamped[place], pushed[place] = (lower, upper), self.own.zeros(*lower.shape)
            np.add.at(pushed[place], (at, entry), -sign[here] * pushes[here])
        return clamped, pushed, empty

    def _halves(self, disjuncts, name):
        """Bounds of the parts of the box that splits of its inputs leave."""
        values = iter(self.own.numbers(self.proof.array(f"{name}.values", "f", (None,))))

        def halves(number, ends):
            (lower, upper), value = ends, next(values, math.nan)
            within = lower[number] <= value <= upper[number]
            demand(within, f"{name}.values: {value} is not within the part that it splits")
            first, second = upper.copy(), lower.copy()
            first[number] = second[number] = value
            return (lower, first), (second, upper)

        parts, found = walk(self.proof, name, halves, self.network.inputs, self.ends), []
        methods = self.proof.array(f"{name}.methods", "u", (len(parts),)).tolist()
        demand(max(methods) < len(METHODS), f"{name}.methods: {max(methods)}")
        for (lower, upper), method in zip(parts, methods):
            bounds, lines = METHODS[method]
            part = Enclosure(self.network, self.own, lower, upper, bounds == "crown")
            found.append(bounds_of(part, disjuncts, lines).min())
        return np.array(found)


def signs(neuron, path):
    """The halves in which a neuron's input is >= 0, and <= 0."""
    return [(*path, (neuron, 1)), (*path, (neuron, -1))]


def walk(proof, name, halves, count, root) -> list[Any]:
    """The leaves of a tree, whose splits stand in order of a walk from the root: first all below a
    split's first half, then all below its second. Any complete list is a tree of such halves."""
    leaves, open_ = [], [root]
    for split in proof.array(f"{name}.tree", "i", (None,)).tolist():
        demand(open_, f"{name}.tree: goes on after its last leaf")
        demand(split < count, f"{name}.tree: found {split}; there are {count}")
        above = open_.pop()
        if split < 0:
            leaves.append(above)
        else:
            open_ += halves(split, above)[::-1]
    demand(not open_, f"{name}.tree: {len(open_)} leaves are missing")
    return leaves


def bounds_of(enclosure: Any, disjuncts: Any, lines: bool) -> Any:
    """(D,) the largest bound of each disjunct's rows by intervals, or by lines as well."""
    rows = np.concatenate([one.rows for one in disjuncts])
    offsets = np.concatenate([one.offsets for one in disjuncts])
    bounds = bound_rows(enclosure, rows, offsets)
    if lines:
        own, parts = enclosure.lines(), chunks(len(rows), enclosure.rows_at_a_time())
        found = [bound_rows(enclosure, rows[part], offsets[part], own) for part in parts]
        bounds = np.maximum(bounds, np.concatenate(found))
    ends = np.cumsum([0, *(len(one.rows) for one in disjuncts)])[:-1]
    return np.maximum.reduceat(bounds, ends)


def bound_rows(enclosure, rows, offsets, lines=None, pushed=None):
    """Bounds of rows of the output plus offsets; the rows themselves may be rounded."""
    own, last = enclosure.arithmetic, len(enclosure.network.operations) - 1
    if lines is None:
        bounds = enclosure.intervals(rows)
    else:
        bounds = enclosure.backward(last, rows, lines, pushed)
    size = np.abs(rows) @ enclosure.sizes[last] + np.abs(offsets) + np.abs(bounds)
    return bounds + offsets - own.gamma(rows.shape[1] + 8) * size
