"""Answers about small networks and boxes without certtrain's verifiers: zonotopes, mixed-integer programs, vertices,
and splitting with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import vnnlib
from query_networks import Mlp
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Values = Callable[[np.ndarray], np.ndarray]

ROUNDING = 1e-5
"""Allowance of splitting for float32's roundings: a comparison missed by less may hold."""


@dataclass(frozen=True)
class Affine:
    """Numbers centre + symbols @ generators, each symbol in [−1, 1]; the first symbols are the inputs'.

    Args:
        centre: (n,). generators: (g, n).
    """

    centre: np.ndarray
    generators: np.ndarray

    def through(self, weight: np.ndarray, bias: np.ndarray | float) -> Affine:
        return Affine(self.centre @ weight.T + bias, self.generators @ weight.T)

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.centre + other.centre, self.generators + other.generators)

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        radius = np.abs(self.generators).sum(0)
        return self.centre - radius, self.centre + radius

    @property
    def largest(self) -> np.ndarray:
        return np.abs(self.centre) + np.abs(self.generators).sum(0)


def scaled(value: Affine, slope: np.ndarray, shift: np.ndarray, radius: np.ndarray, symbols: int) -> Affine:
    """slope · value + shift ± radius, each radius with a symbol of its own; ``symbols`` of them in all, those of radius
    0 included."""
    fresh = np.zeros((symbols, len(slope)))
    picked = np.flatnonzero(radius)
    fresh[np.arange(len(picked)), picked] = radius[picked]
    return Affine(slope * value.centre + shift, np.vstack([value.generators * slope, fresh]))


def zonotopes(f: Mlp, g: Mlp | None, low: np.ndarray, high: np.ndarray) -> tuple[Affine, Affine]:
    """The outputs of f over a box, and those of g minus them, as zonotopes in the same symbols.

    A ReLU of z in [l, u] with l < 0 < u is λ z + [0, −λ l], λ = u / (u − l). Of the second network's ReLU minus the
    first's: z ↦ relu(z) − λ z has slopes −λ and 1 − λ, so it changes by max(λ, 1 − λ) times the change of z at most; or
    it is a number between 0 and the change of z, and between the differences of the ReLUs' ends.
    """
    centre, radius = (low + high) / 2, (high - low) / 2
    varying = np.flatnonzero(radius)
    own = Affine(centre, np.zeros((len(varying), len(centre))))
    own.generators[np.arange(len(varying)), varying] = radius[varying]
    difference = Affine(np.zeros(len(centre)), np.zeros_like(own.generators))
    other = f if g is None else g
    layers = list(zip(f.weights, f.biases, other.weights, other.biases, strict=True))
    for number, (weight, bias, weight_g, bias_g) in enumerate(layers):
        change = own.through(weight_g.astype(float) - weight, bias_g.astype(float) - bias)
        difference = difference.through(weight_g.astype(float), 0.0) + change
        own = own.through(weight.astype(float), bias)
        if number == len(layers) - 1:
            break
        low_f, high_f = own.ends
        low_g, high_g = (own + difference).ends
        unstable = (low_f < 0) & (high_f > 0)
        slope = np.where(unstable, high_f / np.where(unstable, high_f - low_f, 1.0), low_f >= 0)
        half = np.where(unstable, -slope * low_f / 2, 0.0)
        alike = ((low_f >= 0) & (low_g >= 0)) | ((high_f <= 0) & (high_g <= 0))
        off = np.where(alike, 0.0, np.maximum(slope, 1 - slope) * difference.largest)
        least, most = difference.ends
        least = np.maximum(np.minimum(least, 0), np.maximum(low_g, 0) - np.maximum(high_f, 0))
        most = np.minimum(np.maximum(most, 0), np.maximum(high_g, 0) - np.maximum(low_f, 0))
        flat = (most - least) / 2 < off
        off, kept = np.where(flat, (most - least) / 2, off), np.where(flat, 0.0, slope)
        shift = np.where(flat, (most + least) / 2, 0.0)
        first, second = int(np.count_nonzero(half)), int(np.count_nonzero(off))
        own = scaled(own, slope, half, half, first)
        difference = scaled(difference, kept, shift, off, second)
        # the symbols of f's ReLUs come first, then those of the difference
        own = Affine(own.centre, np.vstack([own.generators, np.zeros((second, len(slope)))]))
        old = len(difference.generators) - second
        parts = difference.generators[:old], np.zeros((first, len(slope))), difference.generators[old:]
        difference = Affine(difference.centre, np.vstack(parts))
    return own, difference


def largest_difference(f: Mlp, g: Mlp, low: np.ndarray, high: np.ndarray, cells: int) -> float:
    """An upper bound of |g − f| over a box and all outputs: the worst cell is halved until there are ``cells``."""

    def bound(low: np.ndarray, high: np.ndarray) -> tuple[float, int]:
        difference = zonotopes(f, g, low, high)[1]
        output, varying = int(difference.largest.argmax()), np.flatnonzero(high - low)
        widths = np.abs(difference.generators[: len(varying), output]) + 1e-3 * (high - low)[varying]
        return float(difference.largest[output]), int(varying[widths.argmax()]) if len(varying) else 0

    boxes = [(low, high, *bound(low, high))]
    while len(boxes) < cells:
        worst = max(range(len(boxes)), key=lambda number: boxes[number][2])
        low, high, _, axis = boxes.pop(worst)
        middle = (low[axis] + high[axis]) / 2
        for side in (0, 1):
            half = low.copy(), high.copy()
            half[side][axis] = middle
            boxes.append((*half, *bound(*half)))
    return max(box[2] for box in boxes)


def climb(value: Values, gradient: Values, low: np.ndarray, high: np.ndarray, draw: np.random.Generator,
          starts: int = 64, steps: int = 60) -> np.ndarray:  # fmt: skip
    """The best point found in a box, (N,) of float32's numbers: random starts, then steps along the gradient's sign."""
    x = low + (high - low) * draw.random((8 * starts, len(low)))
    x = x[np.argsort(-value(x))[:starts]]
    best, kept = value(x), x
    for step in range(steps):
        x = np.clip(x + np.sign(gradient(x)) * (high - low) * 0.25 * 0.93**step, low, high)
        now = value(x)
        kept, best = np.where((now > best)[:, None], x, kept), np.maximum(now, best)
        x = kept
    found = np.clip(kept[best.argmax()].astype(np.float32).astype(float), low, high)
    return found


def vertices(low: np.ndarray, high: np.ndarray, row: np.ndarray | None = None, most: float = 0.0,
             tight: bool = False) -> np.ndarray:  # fmt: skip
    """(V, N): the vertices of a box, or of its part where <row, x> <= most, or == most where ``tight``."""
    corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
    if row is None:
        return corners
    kept = [] if tight else [corner for corner in corners if corner @ row <= most]
    for corner in corners:
        for axis in np.flatnonzero((corner == low) & (low < high) & (row != 0)):
            place = corner[axis] + (most - corner @ row) / row[axis]
            if low[axis] <= place <= high[axis]:
                kept.append(np.where(np.arange(len(low)) == axis, place, corner))
    return np.array(kept)


@dataclass
class MixedProgram:
    """A mixed-integer program over inputs, networks and what linear rows ask of both; HiGHS solves it up to 1e-6."""

    ends: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    binary: list[bool] = field(default_factory=list[bool])
    rows: list[tuple[Mapping[int, float], float, float]] = field(
        default_factory=list[tuple[Mapping[int, float], float, float]]
    )

    def variables(self, low: np.ndarray, high: np.ndarray, binary: bool = False) -> list[int]:
        first = len(self.ends)
        self.ends += [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
        self.binary += [binary] * len(low)
        return list(range(first, len(self.ends)))

    def row(self, factors: Mapping[int, float], low: float, high: float) -> None:
        """low <= the sum of factor · variable <= high."""
        self.rows.append((factors, low, high))

    def network(self, mlp: Mlp, inputs: Sequence[int]) -> list[list[int]]:
        """The variables of what each affine layer of a network gives."""
        given, found = list(inputs), list[list[int]]()
        for number, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
            low, high = (np.array([self.ends[one][side] for one in given]) for side in (0, 1))
            centre, radius = weight @ (low + high) / 2 + bias, np.abs(weight) @ (high - low) / 2
            below, above = centre - radius, centre + radius
            before = self.variables(below, above)
            for one, line, shift in zip(before, weight, bias, strict=True):
                self.row({one: -1.0, **dict(zip(given, map(float, line), strict=True))}, -float(shift), -float(shift))
            found.append(before)
            if number == len(mlp.weights) - 1:
                break
            given = self.variables(np.maximum(below, 0), np.maximum(above, 0))
            signs = self.variables(below >= 0, above > 0, binary=True)
            for z, y, sign, least, most in zip(before, given, signs, below, above, strict=True):
                self.row({y: 1.0, z: -1.0}, 0.0, np.inf)
                self.row({y: 1.0, z: -1.0, sign: -min(least, 0.0)}, -np.inf, -min(least, 0.0))
                self.row({y: 1.0, sign: -max(most, 0.0)}, -np.inf, 0.0)
        return found

    def maximise(self, factors: Mapping[int, float]) -> tuple[float, np.ndarray]:
        """The upper bound of a linear function, and the variables at its largest.

        Raises:
            AssertionError: not solved within a minute, or no point satisfies the rows.
        """
        table = csr_array((len(self.rows), len(self.ends))).tolil()
        for number, (row, _, _) in enumerate(self.rows):
            for variable, factor in row.items():
                table[number, variable] += factor
        objective = np.zeros(len(self.ends))
        for variable, factor in factors.items():
            objective[variable] -= factor
        low, high = (np.array([ends[side] for ends in self.ends]) for side in (0, 1))
        found = milp(
            objective, integrality=np.array(self.binary, int), bounds=Bounds(low, high),
            constraints=LinearConstraint(
                csr_array(table), [row[1] for row in self.rows], [row[2] for row in self.rows]
            ),
            options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
        )  # fmt: skip
        assert found.status == 0 and found.mip_dual_bound is not None
        return -float(found.mip_dual_bound), found.x


Ends = tuple[np.ndarray, np.ndarray]


def impossible(
    assertions: Sequence[vnnlib.Assertion], networks: Sequence[tuple[Mlp, str, str]], low: np.ndarray, high: np.ndarray,
    cells: int,
) -> bool:  # fmt: skip
    """Whether splitting a box with intervals proves that no point satisfies all assertions.

    Args:
        networks: each with the names of its input and its output; all read the whole box, in the tensors' order.
        cells: most of them looked at.
    """
    low, high, seen = low[None], high[None], 0
    while len(low) and seen < cells:
        seen += len(low)
        tensors: dict[str, Ends] = {}
        for mlp, given, name in networks:
            tensors |= {given: (low, high), name: _outputs(mlp, low, high)}
        may = np.ones(len(low), bool)
        for assertion in assertions:
            may &= _may_hold(assertion.expr, tensors)
        low, high = low[may], high[may]
        axis = (high - low).argmax(1)
        rows, middle = np.arange(len(low)), (low + high) / 2
        left, right = high.copy(), low.copy()
        left[rows, axis] = right[rows, axis] = middle[rows, axis]
        low, high = np.concatenate([low, right]), np.concatenate([left, high])
    return not len(low)


def _outputs(mlp: Mlp, low: np.ndarray, high: np.ndarray) -> Ends:
    """(B, K) ends, first by intervals, then cut by the mean-value form with interval slopes."""
    centre, radius = (low + high) / 2, (high - low) / 2
    at, spread, slopes = centre, radius, None
    for number, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        weight = weight.astype(float)
        at, spread = at @ weight.T + bias, spread @ np.abs(weight).T
        if slopes is None:
            slopes = np.broadcast_to(weight, (len(low), *weight.shape)), np.zeros((len(low), *weight.shape))
        else:
            slopes = weight @ slopes[0], np.abs(weight) @ slopes[1]
        if number < len(mlp.weights) - 1:
            below, above = at - spread, at + spread
            factor = ((below > 0) + (above > 0))[..., None] / 2.0
            unsure = ((below <= 0) & (above > 0))[..., None] / 2.0
            slopes = slopes[0] * factor, slopes[1] * factor + np.abs(slopes[0]) * unsure + slopes[1] * unsure
            below, above = np.maximum(below, 0), np.maximum(above, 0)
            at, spread = (below + above) / 2, (above - below) / 2
    assert slopes is not None
    middle, reach = mlp(centre), ((np.abs(slopes[0]) + slopes[1]) @ radius[..., None])[..., 0]
    return np.maximum(at - spread, middle - reach), np.minimum(at + spread, middle + reach)


def _may_hold(node: vnnlib.Node, tensors: Mapping[str, Ends]) -> np.ndarray:
    if isinstance(node, vnnlib.And):
        return np.logical_and.reduce([_may_hold(part, tensors) for part in node.args])
    if isinstance(node, vnnlib.Or):
        return np.logical_or.reduce([_may_hold(part, tensors) for part in node.args])
    assert isinstance(node, vnnlib.Comparison)
    (low, high), (low_r, high_r) = _ends(node.lhs, tensors), _ends(node.rhs, tensors)
    match type(node).__name__:
        case "LessEqual" | "LessThan":
            return low <= high_r + ROUNDING
        case "GreaterEqual" | "GreaterThan":
            return high >= low_r - ROUNDING
        case "Equal":
            return (low <= high_r + ROUNDING) & (high >= low_r - ROUNDING)
        case _:
            return np.ones(len(next(iter(tensors.values()))[0]), bool)


def _ends(node: vnnlib.Node, tensors: Mapping[str, Ends]) -> Ends:
    match node:
        case vnnlib.Var():
            low, high = tensors[node.name]
            return low[:, node.indices[-1]], high[:, node.indices[-1]]
        case vnnlib.Literal():
            number = np.full(len(next(iter(tensors.values()))[0]), float(node.lexeme))
            return number, number
        case vnnlib.Negate():
            low, high = _ends(node.expr, tensors)
            return -high, -low
        case vnnlib.Plus():
            parts = [_ends(part, tensors) for part in node.args]
            return sum(part[0] for part in parts), sum(part[1] for part in parts)  # type: ignore[return-value]
        case vnnlib.Minus():
            low, high = _ends(node.head, tensors)
            for part in node.rest:
                least, most = _ends(part, tensors)
                low, high = low - most, high - least
            return low, high
        case vnnlib.Multiply():
            low, high = _ends(node.args[0], tensors)
            for part in node.args[1:]:
                least, most = _ends(part, tensors)
                products = [a * b for a in (low, high) for b in (least, most)]
                low, high = np.minimum.reduce(products), np.maximum.reduce(products)
            return low, high
        case _:
            raise AssertionError(f"{node}: no term")
