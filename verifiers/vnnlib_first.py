"""Reader of VNN-LIB 1.0: text → expressions → constraint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NoReturn, TypeAlias

from ..bounds.clock import looking
from .constraints import CONSTANT, NEGATED, ONE, Conjunction, Constraint, Disjunction, Term, added, compare
from .normal_form import Variables, normal_form
from .onnx_scores import Index
from .vnnlib import NO_INDICES, Property, VnnlibQuery
from .vnnlib_text import DEPTH, Token, VnnlibText

# SMT-LIB commands to solvers, which state nothing about the property
IGNORED_COMMANDS = {"check-sat", "echo", "get-info", "get-model", "get-value", "set-info", "set-logic", "set-option"}
VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")
COMPARISONS = {"<=": "<=", ">=": ">=", "<": "<", ">": ">", "=": "=="}

_Node: TypeAlias = Token | list[Any]  # a list holds its opening parenthesis, then nodes


class FirstQuery(VnnlibQuery):
    """The query in a VNN-LIB 1.0 file, which is about one network.

    Accepted are ``(declare-const X_i Real)`` or ``(declare-fun X_i () Real)``, likewise ``Y_j``, and ``(assert F)``,
    with F built from ``and``, ``or``, ``not``, ``true``, ``false`` and comparisons of linear terms (decimals,
    variables, ``+``, ``-``, ``(* NUMBER TERM)``). SMT-LIB commands to solvers (``set-logic``, ``check-sat``, …) are
    ignored; ``exit`` ends the file.

    ``property`` raises:
        InputError: another syntax; names or numbers that do not fit; products of variables; an X without a lower or
            upper end in some disjunct; too many disjuncts.
    """

    def __init__(self, source: VnnlibText):
        self.source = source

    @property
    def declared(self) -> None:
        """None: its variables are those of one network."""

    def property(self, inputs: int, outputs: int, indices: Mapping[int, Index] = NO_INDICES) -> Property:
        return _Reader(self.source, inputs, outputs).read(indices)

    def check_outputs_asserted(self) -> None:
        """Accept a file of this version without one."""


class _Reader:
    """One file: text → expressions → constraint."""

    def __init__(self, source: VnnlibText, inputs: int, outputs: int):
        self.source, self.counts = source, {"X": inputs, "Y": outputs}
        self.ranges = " and ".join(f"{letter}_0 to {letter}_{count - 1}" for letter, count in self.counts.items())
        self.declared: dict[str, int] = {}  # names, and their lines

    def refuse(self, token: Token, accepted: str) -> NoReturn:
        self.source.refuse(token, accepted)

    def read(self, indices: Mapping[int, Index]) -> Property:
        assertions, head = list[Constraint](), Token("", 1)
        for expression in looking(self._expressions()):
            head, arguments = self._command(expression)
            if head.text in IGNORED_COMMANDS:
                continue
            if head.text == "exit":
                break
            if head.text in ("declare-const", "declare-fun"):
                self._declare(head, arguments)
            elif head.text == "assert" and len(arguments) == 1:
                assertions.append(self._constraint(arguments[0]))
            else:
                accepted = "(declare-const NAME Real), (declare-fun NAME () Real) and (assert FORMULA)"
                self.refuse(head, f"{accepted}, which are VNN-LIB 1.0")
        if len(self.declared) < sum(self.counts.values()):
            self.refuse(head, f"a file that declares {self.ranges}, as the network has them")
        variables = Variables(self.counts["X"], self.counts["Y"], self._declaration, indices)
        return normal_form(self.source, Conjunction(head, tuple(assertions)), variables)

    def _declaration(self, variable: int) -> Token:
        """The name of a variable, and the line that declares it."""
        inputs = self.counts["X"]
        name = f"X_{variable}" if variable < inputs else f"Y_{variable - inputs}"
        return Token(name, self.declared[name])

    def _expressions(self) -> Iterator[_Node]:
        """The expressions of the outermost level, one after the other."""
        unclosed: list[list[Any]] = []
        for token in self.source.tokens():
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

    def _command(self, node: _Node) -> tuple[Token, list[_Node]]:
        if isinstance(node, Token) or len(node) < 2 or not isinstance(node[1], Token):
            self.refuse(node if isinstance(node, Token) else node[0], "(NAME ARGUMENT ...)")
        return node[1], node[2:]

    def _operation(self, node: _Node) -> tuple[Token, list[_Node]]:
        if isinstance(node, Token) or len(node) < 3 or not isinstance(node[1], Token):
            self.refuse(node if isinstance(node, Token) else node[0], "(NAME ARGUMENT ...)")
        return node[1], node[2:]

    def _declare(self, head: Token, arguments: list[_Node]) -> None:
        words = [argument.text if isinstance(argument, Token) else "()" if len(argument) == 1 else "(…)"
                 for argument in arguments]  # fmt: skip
        name = VARIABLE.fullmatch(words[0]) if words else None
        kind = ["Real"] if head.text == "declare-const" else ["()", "Real"]
        if not name or int(name[2]) >= self.counts[name[1]] or words[0] in self.declared or words[1:] != kind:
            accepted = f"{self.ranges}, as the network has them, each declared once as Real"
            self.refuse(Token(" ".join(words), head.line), accepted)
        self.declared[words[0]] = head.line

    def _constraint(self, node: _Node, holds: bool = True) -> Constraint:
        """The constraint of a formula, or of its negation where ``holds`` is False."""
        if isinstance(node, Token) and node.text in ("true", "false"):
            return Conjunction(node, ()) if (node.text == "true") == holds else Disjunction(node, ())
        head, arguments = self._operation(node)
        if head.text == "not" and len(arguments) == 1:
            return self._constraint(arguments[0], not holds)
        if head.text in COMPARISONS and len(arguments) == 2:
            left, right = (self._term(argument) for argument in arguments)
            sign = COMPARISONS[head.text]
            return compare(head, sign if holds else NEGATED[sign], left, right)
        if head.text not in ("and", "or"):
            self.refuse(head, "and, or, not, true, false, and <=, >=, <, >, = of two terms")
        parts = tuple(self._constraint(argument, holds) for argument in arguments)
        return Conjunction(head, parts) if (head.text == "and") == holds else Disjunction(head, parts)

    def _term(self, node: _Node) -> Term:
        if isinstance(node, Token):
            if node.text in self.declared:
                return {(self._variable(node.text),): ONE}
            return {CONSTANT: self.source.number(node, "a declared variable, or ")}
        head, arguments = self._operation(node)
        first, *others = (self._term(argument) for argument in arguments)
        if head.text == "*" and len(others) == 1:
            factor, term = (first, others[0]) if first.keys() <= {CONSTANT} else (others[0], first)
            if factor.keys() <= {CONSTANT}:
                return added({}, term, factor.get(CONSTANT, Fraction(0)))
        if head.text not in ("+", "-"):
            self.refuse(head, "(+ TERM ...), (- TERM ...), (* NUMBER TERM)")
        sign = 1 if head.text == "+" else -1
        total = first if others else added({}, first, sign)
        for term in others:
            added(total, term, sign)
        return total

    def _variable(self, name: str) -> int:
        """The number of a declared variable: inputs first, then outputs."""
        return int(name[2:]) + (self.counts["X"] if name[0] == "Y" else 0)
