"""Reader of VNN-LIB 1.0: text → expressions → conjunctions of bounds and rows → cases."""

from __future__ import annotations

import gzip
import math
import re
import sys
import zlib
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ..bounds.clock import looking
from ..errors import InputError
from .vnnlib import DIGITS, Case, Property

DEPTH = 200  # most nested parentheses: formulas are walked recursively, two frames a level
DISJUNCTS = 1_000_000
SIZE = 20_000_000  # most literals of a normal form, and most entries of the tensors made from it
# an end of line, a comment, a string, a quoted symbol, a parenthesis, a word
TOKEN = re.compile(r'\n|;[^\n]*|"[^"]*"|\|[^|]*\||[()]|[^\s()";|]+|["|]')
# SMT-LIB commands to solvers, which state nothing about the property
IGNORED_COMMANDS = {"check-sat", "echo", "get-info", "get-model", "get-value", "set-info", "set-logic", "set-option"}
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")
VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")


def read_property(path: str | Path, inputs: int, outputs: int) -> Property:
    """Read the property in a VNN-LIB 1.0 file, plain or gzipped, for a network with so many inputs and outputs.

    Accepted are ``(declare-const X_i Real)`` or ``(declare-fun X_i () Real)``, likewise ``Y_j``, and ``(assert F)``,
    with F built from ``and``, ``or``, ``not``, ``true``, ``false`` and comparisons of linear terms (decimals,
    variables, ``+``, ``-``, ``(* NUMBER TERM)``). ``<`` and ``>`` count as ``<=`` and ``>=``: ``(not (<= a b))`` is
    ``(>= a b)``. SMT-LIB commands to solvers (``set-logic``, ``check-sat``, …) are ignored; ``exit`` ends the file.
    Disjuncts with the same box become the clauses of one case. A disjunct without outputs gets a row of zeros, which
    always holds; one with an empty box is left out, with a remark.

    Raises:
        InputError: another syntax; names or numbers that do not fit; products of variables; an X that is compared with
            a variable, or has no lower or upper end in some disjunct; too many disjuncts.
    """
    return _Reader(Path(path), inputs, outputs).read()


def _outward64(value: Fraction, direction: float) -> float:
    """``value`` as float64, rounded in the direction of ±inf."""
    near = float(value)  # to nearest
    return math.nextafter(near, direction) if (near > value if direction < 0 else near < value) else near


class _Token(NamedTuple):
    text: str
    line: int


class _Bound(NamedTuple):
    token: _Token
    variable: int
    upper: bool  # X_variable <= value, else >=
    value: Fraction
    end: float  # the value rounded outward


_Node = _Token | list[Any]  # a list holds its opening parenthesis, then nodes
_Term = dict[str, Fraction]  # coefficients by variable; the constant's name is ""
_Row = dict[str, float]  # a term that is <= 0
_Conjunction = tuple[_Bound | _Row, ...]
_Box = dict[tuple[int, bool], _Bound]  # by variable, and whether it is the upper end


class _Reader:
    """One file: text → expressions → conjunctions of bounds and rows → cases."""

    def __init__(self, path: Path, inputs: int, outputs: int):
        self.path, self.counts = path, {"X": inputs, "Y": outputs}
        self.ranges = " and ".join(f"{letter}_0 to {letter}_{count - 1}" for letter, count in self.counts.items())
        self.declared: dict[str, int] = {}  # names, and their lines

    def refuse(self, token: _Token, accepted: str) -> NoReturn:
        raise InputError(f"{self.path}, line {token.line}: found {token.text[:60]!r}; accepted: {accepted}")

    def read(self) -> Property:
        factors, head = list[list[_Conjunction]](), _Token("", 1)
        for expression in looking(self._expressions()):
            head, arguments = self._command(expression)
            if head.text in IGNORED_COMMANDS:
                continue
            if head.text == "exit":
                break
            if head.text in ("declare-const", "declare-fun"):
                self._declare(head, arguments)
            elif head.text == "assert" and len(arguments) == 1:
                factors.append(self._alternatives(arguments[0]))
            else:
                accepted = "(declare-const NAME Real), (declare-fun NAME () Real) and (assert FORMULA)"
                self.refuse(head, f"{accepted}, which are VNN-LIB 1.0")
        if len(self.declared) < sum(self.counts.values()):
            self.refuse(head, f"a file that declares {self.ranges}, as the network has them")
        return self._property(head, *self._product(head, factors))

    def _expressions(self) -> Iterator[_Node]:
        """The expressions of the outermost level, one after the other."""
        try:
            content = self.path.read_bytes()
            text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: found {error}; accepted: VNN-LIB 1.0, as text or gzipped") from error
        unclosed: list[list[Any]] = []
        for token in _tokens(text):
            if not unclosed and token.text != "(":
                self.refuse(token, "an opening parenthesis")
            if token.text == "(":
                unclosed.append([token])
                if len(unclosed) > DEPTH:
                    self.refuse(token, f"at most {DEPTH} levels of parentheses")
            elif token.text != ")":
                unclosed[-1].append(token)
            elif len(unclosed) == 1:
                yield unclosed.pop()
            else:
                unclosed[-2].append(unclosed.pop())
        if unclosed:
            self.refuse(unclosed[-1][0], "parentheses that are closed")

    def _command(self, node: _Node) -> tuple[_Token, list[_Node]]:
        if isinstance(node, _Token) or len(node) < 2 or not isinstance(node[1], _Token):
            self.refuse(node if isinstance(node, _Token) else node[0], "(NAME ARGUMENT ...)")
        return node[1], node[2:]

    def _operation(self, node: _Node) -> tuple[_Token, list[_Node]]:
        if isinstance(node, _Token) or len(node) < 3 or not isinstance(node[1], _Token):
            self.refuse(node if isinstance(node, _Token) else node[0], "(NAME ARGUMENT ...)")
        return node[1], node[2:]

    def _declare(self, head: _Token, arguments: list[_Node]) -> None:
        words = [argument.text if isinstance(argument, _Token) else "()" if len(argument) == 1 else "(…)"
                 for argument in arguments]  # fmt: skip
        name = VARIABLE.fullmatch(words[0]) if words else None
        kind = ["Real"] if head.text == "declare-const" else ["()", "Real"]
        if not name or int(name[2]) >= self.counts[name[1]] or words[0] in self.declared or words[1:] != kind:
            accepted = f"{self.ranges}, as the network has them, each declared once as Real"
            self.refuse(_Token(" ".join(words), head.line), accepted)
        self.declared[words[0]] = head.line

    def _alternatives(self, node: _Node, holds: bool = True) -> list[_Conjunction]:
        """The disjunctive normal form of a formula, or of its negation where ``holds`` is False."""
        if isinstance(node, _Token) and node.text in ("true", "false"):
            return [()] if (node.text == "true") == holds else []
        head, arguments = self._operation(node)
        if head.text == "not" and len(arguments) == 1:
            return self._alternatives(arguments[0], not holds)
        if head.text in ("<=", ">=", "<", ">") and len(arguments) == 2:
            terms = [self._term(argument) for argument in arguments]
            least, most = terms if (head.text in ("<=", "<")) == holds else reversed(terms)
            return [(self._literal(head, _add(least, most, -1)),)]
        if head.text == "=" and len(arguments) == 2:
            if not holds:  # a closed form of "not equal" would be every point
                self.refuse(head, "not of <=, >=, <, >, and, or, not, true, false")
            difference = _add(self._term(arguments[0]), self._term(arguments[1]), -1)
            return [(self._literal(head, difference), self._literal(head, _add({}, difference, -1)))]
        if head.text not in ("and", "or"):
            self.refuse(head, "and, or, not, true, false, and <=, >=, <, >, = of two terms")
        parts = [self._alternatives(argument, holds) for argument in arguments]
        together = [literals for part in parts for literals in part]
        shared, rest = self._product(head, parts) if (head.text == "and") == holds else ((), together)
        self._limit(head, len(rest), sum(map(len, rest)) + len(rest) * len(shared))
        return [shared + literals for literals in rest]

    def _product(self, head: _Token, factors: list[list[_Conjunction]]) -> tuple[_Conjunction, list[_Conjunction]]:
        """(shared, disjuncts): the conjunction of normal forms, as the literals that all disjuncts share, which may be
        too many to copy, and the disjuncts without them."""
        disjuncts: list[_Conjunction] = [()] if all(factors) else []
        for factor in (factor for factor in factors if len(factor) > 1):
            literals = len(disjuncts) * sum(map(len, factor)) + len(factor) * sum(map(len, disjuncts))
            self._limit(head, len(disjuncts) * len(factor), literals)
            disjuncts = [left + right for left in disjuncts for right in factor]
        return tuple(literal for factor in factors if len(factor) == 1 for literal in factor[0]), disjuncts

    def _limit(self, head: _Token, disjuncts: int, size: int) -> None:
        if disjuncts > DISJUNCTS or size > SIZE:
            self.refuse(head, f"at most {DISJUNCTS} disjuncts, and {SIZE} literals or numbers in all of them")

    def _term(self, node: _Node) -> _Term:
        if isinstance(node, _Token):
            return {node.text: Fraction(1)} if node.text in self.declared else {"": self._number(node)}
        head, arguments = self._operation(node)
        first, *others = (self._term(argument) for argument in arguments)
        if head.text == "*" and len(others) == 1:
            factor, term = (first, others[0]) if first.keys() <= {""} else (others[0], first)
            if factor.keys() <= {""}:
                return _add({}, term, factor.get("", Fraction(0)))
        if head.text not in ("+", "-"):
            self.refuse(head, "(+ TERM ...), (- TERM ...), (* NUMBER TERM)")
        sign = 1 if head.text == "+" else -1
        total = first if others else _add({}, first, sign)
        for term in others:
            _add(total, term, sign)
        return total

    def _number(self, token: _Token) -> Fraction:
        if len(token.text) <= DIGITS and NUMBER.fullmatch(token.text):
            value = Decimal(token.text)
            if value.is_zero() or (value.adjusted() >= -DIGITS and value.copy_abs() <= sys.float_info.max):
                return Fraction(value or 0)
        self.refuse(token, f"a declared variable, or a decimal number of float64's range and {DIGITS} digits at most")

    def _literal(self, head: _Token, term: _Term) -> _Bound | _Row:
        term = {name: value for name, value in term.items() if value}
        among = next((name for name in term if name.startswith("X")), None)
        try:
            if among is None:
                return {name: float(value) for name, value in term.items()}
            token, value, upper = _Token(among, head.line), -term.get("", Fraction(0)) / term[among], term[among] > 0
            if term.keys() - {among, ""}:
                self.refuse(token, "an X that is compared with a number, not with other variables")
            return _Bound(token, int(among[2:]), upper, value, _outward64(value, math.inf if upper else -math.inf))
        except OverflowError:
            self.refuse(head, "coefficients and ends of float64's range")

    def _property(self, last: _Token, shared: _Conjunction, alternatives: list[_Conjunction]) -> Property:
        """The property; disjuncts whose boxes differ from the shared one in the same way become one case."""
        box = _tightest(shared, {})
        rows = [literal for literal in shared if not isinstance(literal, _Bound)]
        groups: dict[frozenset[tuple[tuple[int, bool], Fraction]], tuple[_Box, list[list[_Row]]]] = {}
        for literals in alternatives:
            own = _tightest(literals, box)
            clause = [literal for literal in literals if not isinstance(literal, _Bound)]
            key = frozenset((place, bound.value) for place, bound in own.items())
            groups.setdefault(key, (own, []))[1].append(clause)
        lengths = sum(len(rows) + len(clause) for _, clauses in groups.values() for clause in clauses)
        self._limit(last, len(alternatives), lengths * self.counts["Y"] + 2 * self.counts["X"] * len(groups))
        cases, remark = list[Case](), None if groups else "no input satisfies the asserts"
        for own, clauses in groups.values():
            self._check_bounded(box | own)
            crossed = self._crossed(box | own)
            if crossed is None:
                cases.append(self._case(box | own, [rows + clause or [{}] for clause in clauses]))
            remark = remark or crossed
        return Property(tuple(cases), remark)

    def _check_bounded(self, box: _Box) -> None:
        for name in (f"X_{i}" for i in range(self.counts["X"]) if not {(i, False), (i, True)} <= box.keys()):
            self.refuse(_Token(name, self.declared[name]), "an X that has a lower and an upper end in every disjunct")

    def _crossed(self, box: _Box) -> str | None:
        """Why no input lies in a box; None where one does."""
        for i in range(self.counts["X"]):
            lower, upper = box[i, False], box[i, True]
            if lower.value > upper.value:
                later = max(lower, upper, key=lambda bound: bound.token.line)
                place = f"{self.path}, line {later.token.line}"
                return f"{place}: an empty box: X_{i} >= {float(lower.value)!r} and <= {float(upper.value)!r}"
        return None

    def _case(self, box: _Box, clauses: list[list[_Row]]) -> Case:
        names = [*(f"Y_{j}" for j in range(self.counts["Y"])), ""]
        rows = [[row.get(name, 0.0) for name in names] for clause in clauses for row in clause]
        table = torch.tensor(rows, dtype=torch.float64)
        numbers = torch.tensor([number for number, clause in enumerate(clauses) for _ in clause])
        pairs = [(box[i, False], box[i, True]) for i in range(self.counts["X"])]
        ends = torch.tensor([(lower.end, upper.end) for lower, upper in pairs], dtype=torch.float64)
        exact = tuple((lower.value, upper.value) for lower, upper in pairs)
        return Case(ends[:, 0], ends[:, 1], exact, table[:, :-1], table[:, -1], numbers)


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in TOKEN.finditer(text):
        word = match[0]
        if word == "\n":
            line += 1
        elif word[0] != ";":
            yield _Token(word, line)
            line += word.count("\n")


def _tightest(literals: _Conjunction, known: _Box) -> _Box:
    """The tightest ends among the literals, where these are tighter than those in ``known``."""
    box: _Box = {}
    for bound in (literal for literal in literals if isinstance(literal, _Bound)):
        place = (bound.variable, bound.upper)
        other = box.get(place, known.get(place))
        if other is None or (bound.value < other.value if bound.upper else bound.value > other.value):
            box[place] = bound
    return box


def _add(total: _Term, term: _Term, factor: Fraction | int) -> _Term:
    """Add factor · term, in place."""
    total.update((name, total.get(name, 0) + factor * value) for name, value in term.items())
    return total
