"""The competition's rules of 2026 for counterexamples, written anew from their description, for tests and benchmarks.

Nothing here reads a query as the verifiers do: VNN-LIB 2.0 is evaluated on the syntax tree of the package ``vnnlib``,
VNN-LIB 1.0 on its own lists of words. Outputs that a result file states are ignored; onnxruntime computes them of the
inputs, in its default run and operator by operator.
"""

from __future__ import annotations

import gzip
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import vnnlib

Files: TypeAlias = "str | Path | Mapping[str, str | Path]"
"""The file of the only network, or those of several by name."""
Tensors: TypeAlias = dict[str, np.ndarray]
"""Arrays by the names of declared tensors; in 1.0 ``X`` and ``Y``."""

INPUT_TOLERANCE = 1e-4
"""By how much a comparison of inputs alone may be missed for credit."""
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "LessEqual": operator.le, "GreaterEqual": operator.ge, "LessThan": operator.lt, "GreaterThan": operator.gt,
    "Equal": operator.eq, "NotEqual": operator.ne,
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip
HEADER = re.compile(r"(\w+) (\w+) \[([\d,]*)\]")
PAIR = re.compile(r"\(\s*([XY])_(\d+)\s+([^\s()]+)\s*\)")
DECIMAL = re.compile(r"-?\d+(\.\d+)?")
SHORT = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?")
"""Numbers of VNN-LIB 1.0."""


class Refused(Exception):
    """A result file that the rules do not take, with the reason."""


@dataclass(frozen=True)
class Score:
    """The rules' verdict on a counterexample that is well formed.

    Args:
        accepted: every comparison holds as the competition's code computes it: inputs and outputs are float32 and so is
            all arithmetic, nothing is forgiven; in onnxruntime's default run.
        exact: every comparison holds in exact arithmetic, of the decimals that the file states and of the outputs in
            either run of onnxruntime.
        exact32: so it does of the inputs as float32, which the networks are given.
        forgiven: it holds as the competition computes it once comparisons of inputs alone may be off by 1e-4.
    """

    accepted: bool
    exact: bool
    exact32: bool
    forgiven: bool


def score(query: str, result: str, networks: Files) -> Score:
    """Judge a result file about a query's text.

    Raises:
        Refused: the result is not of the form of the query's version.
    """
    asked = asked_by(query)
    stated, decimals = asked.read(result)
    runs = [asked.computed(stated, networks, optimised) for optimised in (True, False)]
    default = {**stated, **runs[0]}
    of_decimals = [{**decimals, **fractions(run)} for run in runs]
    of_floats = [{**fractions(stated), **fractions(run)} for run in runs]
    with np.errstate(over="ignore", invalid="ignore"):
        return Score(
            asked.holds(default),
            all(asked.holds(tensors) for tensors in of_decimals),
            all(asked.holds(tensors) for tensors in of_floats),
            asked.holds(default, INPUT_TOLERANCE),
        )


def witness(query: str, inputs: Tensors, networks: Files) -> bool:
    """Whether inputs, float32 by the names of the query's tensors, satisfy it, computed in each way that ``score``
    asks for."""
    asked = asked_by(query)
    runs = [asked.computed(inputs, networks, optimised) for optimised in (True, False)]
    exact = all(asked.holds({**fractions(inputs), **fractions(run)}) for run in runs)
    return exact and asked.holds({**inputs, **runs[0]})


def asked_by(query: str) -> Asked:
    """The query of a text, in the version that its header states."""
    return SecondAsked(query) if "vnnlib-version" in query else FirstAsked(query)


def fractions(tensors: Tensors) -> Tensors:
    """The exact values of floats."""
    exact = np.frompyfunc(lambda value: Fraction(float(value)), 1, 1)
    return {name: np.asarray(exact(tensor), object).reshape(tensor.shape) for name, tensor in tensors.items()}


class Asked:
    """A query, and the form of its counterexamples."""

    def read(self, result: str) -> tuple[Tensors, Tensors]:
        """The inputs of a result file, as float32 and as stated.

        Raises:
            Refused: another form.
        """
        raise NotImplementedError

    def computed(self, inputs: Tensors, networks: Files, optimised: bool) -> Tensors:
        """The outputs and hidden tensors that onnxruntime computes."""
        raise NotImplementedError

    def holds(self, tensors: Tensors, tolerance: float = 0.0) -> bool:
        """Whether all assertions hold, computed in the arithmetic of the tensors' entries."""
        raise NotImplementedError


class SecondAsked(Asked):
    """A query in VNN-LIB 2.0."""

    def __init__(self, text: str):
        self.query = vnnlib.parse_query_string(text)
        self.inputs = {tensor.name for network in self.query.networks for tensor in network.inputs}

    def read(self, result: str) -> tuple[Tensors, Tensors]:
        lines = [line.strip() for line in result.splitlines() if line.strip()]
        _expect(lines and lines.pop(0) == "sat", "no sat in the first line")
        floats, decimals = Tensors(), Tensors()
        for network in self.query.networks:
            for tensor in (*network.inputs, *network.hidden, *network.outputs):
                match = HEADER.fullmatch(lines.pop(0)) if lines else None
                _expect(match and match[1] == tensor.name, f"no header of {tensor.name} where it is expected")
                assert match is not None
                _expect(match[2] in (str(tensor).split()[2].lower(), "real"), f"{match[0]}: another type")
                shape = [int(size) for size in match[3].split(",") if size]
                _expect(shape == list(tensor.shape), f"{match[0]}: another shape")
                count = math.prod(shape)
                _expect(len(lines) >= count, f"too few values of {tensor.name}")
                own, lines = lines[:count], lines[count:]
                if tensor.name in self.inputs:
                    floats[tensor.name], decimals[tensor.name] = _values(own, shape)
                else:
                    _values(own, shape)
        _expect(not lines, f"{lines[:1]} behind the last value")
        return floats, decimals

    def computed(self, inputs: Tensors, networks: Files, optimised: bool) -> Tensors:
        found = Tensors()
        for network in self.query.networks:
            name = network.equal_to or network.name
            file = networks[name] if isinstance(networks, Mapping) else networks
            hidden = [(tensor.onnx_name or "")[1:-1] for tensor in network.hidden]
            outputs = run(file, [inputs[tensor.name] for tensor in network.inputs], hidden, optimised)
            for tensor, values in zip((*network.outputs, *network.hidden), outputs, strict=True):
                found[tensor.name] = values.reshape(tensor.shape)
        return found

    def holds(self, tensors: Tensors, tolerance: float = 0.0) -> bool:
        return all(
            _formula(assertion.expr, tensors, tolerance if _names(assertion.expr) <= self.inputs else 0.0)
            for assertion in self.query.assertions
        )


def _names(node: vnnlib.Node) -> set[str]:
    """The names of the tensors in an expression."""
    if isinstance(node, vnnlib.Var):
        return {node.name}
    return set[str]().union(*map(_names, node.children()))


def _formula(node: vnnlib.Node, tensors: Tensors, tolerance: float) -> bool:
    if isinstance(node, vnnlib.And):
        return all(_formula(part, tensors, tolerance) for part in node.args)
    if isinstance(node, vnnlib.Or):
        return any(_formula(part, tensors, tolerance) for part in node.args)
    assert isinstance(node, vnnlib.Comparison)
    return _compare(type(node).__name__, _term(node.lhs, tensors), _term(node.rhs, tensors), tolerance)


def _compare(sign: str, left: Any, right: Any, tolerance: float) -> bool:
    if tolerance and sign in ("Equal", "NotEqual", "="):
        return bool(abs(left - right) <= tolerance) == (sign != "NotEqual")
    if tolerance:
        right = right + (tolerance if sign in ("LessEqual", "LessThan", "<", "<=") else -tolerance)
    return bool(SIGNS[sign](left, right))


def _term(node: vnnlib.Node, tensors: Tensors) -> Any:
    """The value of a term: a Fraction where the tensors hold Fractions, else by numpy's rules, in which a float32 stays
    one whatever decimals it meets."""
    match node:
        case vnnlib.Var():
            return tensors[node.name][tuple(node.indices)]
        case vnnlib.Literal():
            exact = any(tensor.dtype == object for tensor in tensors.values())
            return Fraction(node.lexeme) if exact else float(node.lexeme)
        case vnnlib.Negate():
            return -_term(node.expr, tensors)
        case vnnlib.Plus():
            return sum(_term(part, tensors) for part in node.args)
        case vnnlib.Minus():
            return _term(node.head, tensors) - sum(_term(part, tensors) for part in node.rest)
        case vnnlib.Multiply():
            return math.prod(_term(part, tensors) for part in node.args)
        case _:
            raise AssertionError(f"{node}: no term of VNN-LIB 2.0")


Words: TypeAlias = "str | list[Words]"


class FirstAsked(Asked):
    """A query in VNN-LIB 1.0, in the form of the competition: linear, without ``not``."""

    def __init__(self, text: str):
        words = iter(re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text)))
        parsed = list(_lists(words))
        self.counts = {letter: sum(part[0] in ("declare-const", "declare-fun") and part[1][0] == letter
                                   for part in parsed) for letter in "XY"}  # fmt: skip
        self.assertions = [part[1] for part in parsed if part[0] == "assert"]

    def read(self, result: str) -> tuple[Tensors, Tensors]:
        first, _, rest = result.strip().partition("\n")
        _expect(first.strip() == "sat", "no sat in the first line")
        _expect(re.fullmatch(r"\(\s*(?:\([^()]*\)\s*)*\)", rest.strip()), "no list of pairs")
        pairs = PAIR.findall(rest)
        _expect(len(pairs) == rest.count("(") - 1, "another pair than of a variable and a number")
        places = [(letter, int(number)) for letter, number, _ in pairs]
        expected = [(letter, number) for letter in "XY" for number in range(self.counts[letter])]
        _expect(places == expected, "other variables than declared, or in another order")
        texts = [text for _, _, text in pairs]
        floats, decimals = (values[: self.counts["X"]] for values in _values(texts, [len(texts)], SHORT))
        return {"X": floats}, {"X": decimals}

    def computed(self, inputs: Tensors, networks: Files, optimised: bool) -> Tensors:
        file = next(iter(networks.values())) if isinstance(networks, Mapping) else networks
        return {"Y": np.concatenate([one.ravel() for one in run(file, [inputs["X"]], (), optimised)])}

    def holds(self, tensors: Tensors, tolerance: float = 0.0) -> bool:
        def inputs_alone(part: Words) -> bool:
            return not part.startswith("Y_") if isinstance(part, str) else all(map(inputs_alone, part))

        return all(_formula_of_words(part, tensors, tolerance if inputs_alone(part) else 0.0)
                   for part in self.assertions)  # fmt: skip


def _lists(words: Iterator[str]) -> Iterator[Words]:
    for word in words:
        if word == ")":
            return
        yield list(_lists(words)) if word == "(" else word


def _formula_of_words(part: Words, tensors: Tensors, tolerance: float) -> bool:
    sign, *parts = part
    if sign in ("and", "or"):
        values = [_formula_of_words(one, tensors, tolerance) for one in parts]
        return all(values) if sign == "and" else any(values)
    assert isinstance(sign, str)
    left, right = (_term_of_words(one, tensors) for one in parts)
    return _compare(sign, left, right, tolerance)


def _term_of_words(part: Words, tensors: Tensors) -> Any:
    if isinstance(part, str):
        if part[:2] in ("X_", "Y_"):
            return tensors[part[0]][int(part[2:])]
        return Fraction(part) if tensors["X"].dtype == object else float(part)
    sign, *parts = part
    values = [_term_of_words(one, tensors) for one in parts]
    if sign == "*":
        return math.prod(values)
    return sum(values) if sign == "+" else -values[0] if len(values) == 1 else values[0] - sum(values[1:])


def _expect(condition: object, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def _values(texts: Sequence[str], shape: Sequence[int], form: re.Pattern[str] = DECIMAL) -> tuple[np.ndarray, ...]:
    """Numbers as float32 and as Fractions."""
    for text in texts:
        _expect(form.fullmatch(text), f"{text!r}: no number of the form")
    exact = np.array([Fraction(text) for text in texts] or [Fraction()], object)[: len(texts)]
    return np.array([float(text) for text in texts]).astype(np.float32).reshape(shape), exact.reshape(shape)


_SESSIONS: dict[tuple[bytes, tuple[str, ...], bool], onnxruntime.InferenceSession] = {}


def run(file: str | Path, inputs: Sequence[np.ndarray], hidden: Sequence[str], optimised: bool) -> list[np.ndarray]:
    """onnxruntime's outputs of a file, plain or gzipped, and its tensors named ``hidden`` behind them. Inputs are given
    in the file's order; shapes are the file's, 1 where they are open."""
    data = gzip.decompress(Path(file).read_bytes()) if str(file).endswith(".gz") else Path(file).read_bytes()
    key = sha256(data).digest(), tuple(hidden), optimised
    if key not in _SESSIONS:
        _SESSIONS[key] = _session(data, hidden, optimised)
    session = _SESSIONS[key]
    given = {
        place.name: tensor.reshape([size if isinstance(size, int) else 1 for size in place.shape])
        for place, tensor in zip(session.get_inputs(), inputs, strict=True)
    }
    found = dict(zip((one.name for one in session.get_outputs()), session.run(None, given), strict=True))
    own = list(found)[: len(found) - len(set(hidden) & set(found))] if hidden else list(found)
    return [np.asarray(found[name]) for name in (*own, *hidden)]


def _session(data: bytes, hidden: Sequence[str], optimised: bool) -> onnxruntime.InferenceSession:
    """A session whose last outputs are the hidden tensors, which must not be outputs of the model itself."""
    if hidden:
        model = onnx.load_from_string(data)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(hidden))
        data = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
