"""Reader of VNN-LIB 2.0, by the standard's own parser and type checker (the package ``vnnlib``): syntax tree →
constraint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn, TypeAlias

import vnnlib

from ..bounds.clock import looking
from .constraints import (
    CONSTANT,
    DEGREE,
    ONE,
    Conjunction,
    Constraint,
    Disjunction,
    Term,
    added,
    compare,
    degree,
    multiplied,
)
from .normal_form import Variables, normal_form
from .vnnlib import Declarations, DeclaredTensor, Property
from .vnnlib_text import DEPTH, Token, VnnlibText

TYPES = ("float32", "real")
"""Element types that are read."""

REAL = re.compile(r"(\(\s*declare-(?:input|hidden|output)\s+\w+\s+)Real\b")
"""``real`` as the standard's own examples write it: to the package an unknown type, beside which it takes no constant
as the first factor of a product."""

COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|;[^\n]*')
INDICES = re.compile(r"\[([^\]\[()]*)\]")
NUMBERS = re.compile(r"\s*(?:[0-9]{1,9}\s*(?:,\s*[0-9]{1,9}\s*)*)?")
SYNTAX_ERROR = re.compile(r"Parse error: syntax error at line (\d+), column \d+: '(.*)'", re.DOTALL)
PRODUCTS = 1_000_000
"""Most products of variables of one term: of sums, as many as their lengths multiplied."""
GRAMMAR = "VNN-LIB 2.0, in which numbers are 1 or 1.5, without an exponent, and equality is =="

_Definition: TypeAlias = vnnlib.InputDefinition | vnnlib.OutputDefinition
_SIGNS: dict[type[vnnlib.Comparison], str] = {
    vnnlib.LessEqual: "<=", vnnlib.GreaterEqual: ">=", vnnlib.LessThan: "<", vnnlib.GreaterThan: ">",
    vnnlib.Equal: "==", vnnlib.NotEqual: "!=",
}  # fmt: skip


def read_second(source: VnnlibText, inputs: int, outputs: int) -> Property:
    """Read the query in a VNN-LIB 2.0 file for one network with so many inputs and outputs.

    The network may have several inputs and outputs, which are flattened and concatenated in their order. Accepted are
    the element types of ``TYPES``, and comparisons of terms over inputs and outputs alike, of degree 2 at most.

    Raises:
        InputError: syntax, types and scopes that the package refuses; another element type; an index or size that is
            no natural number, which the package takes; several networks, hidden tensors; products of more than two
            variables; an input without a lower or upper end in some disjunct; too many disjuncts.
    """
    return _Query(_checked(source), inputs, outputs).read()


def _checked(source: VnnlibText) -> VnnlibText:
    """The text as the package reads it rightly: without comments, ``real`` in small letters, and with nothing that it
    passes over.

    Raises:
        InputError: other characters than ASCII's, or NUL, at which it stops reading; too deep nesting; an index or a
            size that is no natural number: it reads 1.9 as 1, and 4294967296 as 0.
    """
    source = replace(source, text=REAL.sub(r"\1real", COMMENT.sub(lambda match: match[1] or "", source.text)))
    if other := re.search(r"[^\t\n\r -~]", source.text):
        source.refuse(_token_at(source, other[0], other.start()), "ASCII characters outside of comments")
    depth = 0
    for token in source.tokens():
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        if depth > DEPTH:
            source.refuse(token, f"at most {DEPTH} levels of parentheses")
    for match in INDICES.finditer(source.text):
        if not NUMBERS.fullmatch(match[1]):
            accepted = "natural numbers with commas between them, of 9 digits at most"
            source.refuse(_token_at(source, match[0], match.start()), accepted)
    return source


def _token_at(source: VnnlibText, text: str, position: int) -> Token:
    return Token(text, 1 + source.text.count("\n", 0, position))


@dataclass(frozen=True)
class _Tensor:
    """A declared tensor, and the number of its first entry among the variables."""

    declared: DeclaredTensor
    first: int

    @cached_property
    def size(self) -> int:
        return math.prod(self.declared.shape)

    def entry(self, indices: Sequence[int]) -> int:
        """The number of an entry among the variables."""
        place = 0
        for index, size in zip(indices, self.declared.shape, strict=True):
            place = place * size + index
        return self.first + place

    def name(self, variable: int) -> str:
        """The name of one of its entries, by its number among the variables."""
        place, indices = variable - self.first, list[int]()
        for size in reversed(self.declared.shape):
            place, index = divmod(place, size)
            indices.insert(0, index)
        return self.declared.name + (f"[{','.join(map(str, indices))}]" if indices else "")


class _Query:
    def __init__(self, source: VnnlibText, inputs: int, outputs: int):
        self.source, self.inputs, self.outputs = source, inputs, outputs
        self.tensors: dict[str, _Tensor] = {}

    def read(self) -> Property:
        query = self._parsed()
        declared = self._declare(query.networks)
        assertions = tuple(self._constraint(assertion.expr) for assertion in looking(query.assertions))
        last = Token("assert", 1 + self.source.text.rstrip().count("\n"))
        variables = Variables(self.inputs, self.outputs, self._declaration)
        return replace(normal_form(self.source, Conjunction(last, assertions), variables), declared=declared)

    def _parsed(self) -> vnnlib.Query:
        try:
            return vnnlib.parse_query_string(self.source.text)
        except vnnlib.VNNLibException as error:
            self._refuse(str(error))
        except IndexError as error:  # from C++'s stoll and stod, without a place
            accepted = "integers of 18 digits at most, and decimals of float64's normal range"
            self.source.refuse(Token(f"a number at which {error} fails", 1), accepted)

    def _refuse(self, message: str) -> NoReturn:
        """Refuse the file for the package's reason: a syntax error, or the first of its type checker's errors."""
        if syntax := SYNTAX_ERROR.fullmatch(message):
            self.source.refuse(Token(syntax[2] or "the end of the file", int(syntax[1])), GRAMMAR)
        try:
            first = json.loads(message)["errors"][0]
            token, hint = Token(first["offendingSymbol"], int(first["line"])), "{message}: {hint}".format_map(first)
        except (ValueError, LookupError, TypeError):  # another form of message, or of another version
            token, hint = Token("vnnlib", 1), message
        self.source.refuse(token, f"what vnnlib's type checker takes ({' '.join(hint.split())})")

    def _declare(self, networks: Sequence[vnnlib.Network]) -> Declarations:
        """Number the tensors' entries.

        Raises:
            InputError: several networks, hidden tensors, an unknown element type, sizes that are not the network's.
        """
        network, *others = networks
        for other in others:
            self.source.refuse(self._place("network", other.name), "one network")
        for hidden in network.hidden:
            self.source.refuse(self._place("hidden", hidden.name), "inputs and outputs of the network")
        inputs = self._number("input", network.inputs, 0, self.inputs)
        outputs = self._number("output", network.outputs, self.inputs, self.outputs)
        kinds = {tensor.kind for tensor in (*inputs, *outputs)}
        if len(kinds) > 1:
            token = Token(" and ".join(sorted(kinds)), self._place("network", network.name).line)
            self.source.refuse(token, "one element type in a query")
        return Declarations(inputs, outputs)

    def _number(
        self, what: str, definitions: Iterable[_Definition], first: int, size: int
    ) -> tuple[DeclaredTensor, ...]:
        """The declared tensors, whose entries are numbered from ``first``; there must be ``size``."""
        start, declared = first, list[DeclaredTensor]()
        for definition in definitions:
            token = self._place(what, definition.name)
            kind = str(definition).split()[2]  # the package knows no name of a type that it does not know
            if kind not in TYPES:
                self.source.refuse(Token(f"{token.text} {kind}", token.line), f"elements of type {' or '.join(TYPES)}")
            tensor = DeclaredTensor(definition.name, kind, tuple(definition.shape), token.line)
            self.tensors[tensor.name] = _Tensor(tensor, start)
            start += self.tensors[tensor.name].size
            declared.append(tensor)
        if start - first != size:
            token = self._place(what, declared[-1].name)
            found = Token(f"{start - first} {what}s up to {token.text}", token.line)
            self.source.refuse(found, f"{size} {what}s in all, as the network has them")
        return tuple(declared)

    def _place(self, what: str, name: str) -> Token:
        """The declaration of a name."""
        match = re.search(rf"\(\s*declare-{what}\s+{name}\b", self.source.text)
        return _token_at(self.source, f"declare-{what} {name}", match.start() if match else 0)

    def _declaration(self, variable: int) -> Token:
        """The name of a variable, and the line that declares it."""
        tensor = next(one for one in self.tensors.values() if one.first <= variable < one.first + one.size)
        return Token(tensor.name(variable), tensor.declared.line)

    def _constraint(self, node: vnnlib.BoolExpr) -> Constraint:
        if isinstance(node, vnnlib.Comparison):
            sign, line = _SIGNS[type(node)], _line(node)
            return compare(Token(sign, line), sign, self._term(node.lhs), self._term(node.rhs))
        assert isinstance(node, vnnlib.Connective)
        parts = tuple(self._constraint(part) for part in node.args)
        if isinstance(node, vnnlib.And):
            return Conjunction(Token("and", _line(node)), parts)
        return Disjunction(Token("or", _line(node)), parts)

    def _term(self, node: vnnlib.ArithExpr) -> Term:
        match node:
            case vnnlib.Var():
                return {(self.tensors[node.name].entry(node.indices),): ONE}
            case vnnlib.Literal():
                return {CONSTANT: self.source.number(Token(node.lexeme, node.line))}
            case vnnlib.Negate():
                return added({}, self._term(node.expr), -1)
            case vnnlib.Plus():
                return self._sum({}, node.args, 1)
            case vnnlib.Minus():
                return self._sum(self._term(node.head), node.rest, -1)
            case vnnlib.Multiply():
                return self._product(node)
            case _:
                self.source.refuse(Token(str(node), _line(node)), "numbers, variables, and +, -, * of them")

    def _sum(self, total: Term, nodes: Iterable[vnnlib.ArithExpr], sign: int) -> Term:
        for node in nodes:
            added(total, self._term(node), sign)
        return total

    def _product(self, node: vnnlib.Multiply) -> Term:
        """
        Raises:
            InputError: a product of more than two variables; of two sums that are too long.
        """
        total: Term = {CONSTANT: ONE}
        for term in map(self._term, node.args):
            if degree(total) + degree(term) > DEGREE:
                self.source.refuse(Token(str(node), _line(node)), f"terms of degree {DEGREE} at most")
            if min(len(total), len(term)) > 1 and len(total) * len(term) > PRODUCTS:
                self.source.refuse(Token("*", _line(node)), f"at most {PRODUCTS} products in one term")
            total = multiplied(total, term)
        return total


def _line(node: vnnlib.Node) -> int:
    """The line of a node's first variable or number: operators have none."""
    while not isinstance(node, (vnnlib.Var, vnnlib.Literal)):
        node = node.children()[0]
    return node.line
