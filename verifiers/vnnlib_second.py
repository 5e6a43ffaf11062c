"""Reader of VNN-LIB 2.0, by the standard's own parser and type checker (the package ``vnnlib``): syntax tree →
constraint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from .onnx_scores import Index
from .vnnlib import NO_INDICES, Declarations, DeclaredNetwork, DeclaredTensor, Property, VnnlibQuery
from .vnnlib_text import DEPTH, Token, VnnlibText

TYPES = ("float32", "real")
"""Element types that are read."""

REAL = re.compile(r"(\(\s*declare-(?:input|hidden|output)\s+\w+\s+)Real\b")
"""``real`` as the standard's own examples write it: to the package an unknown type, beside which it takes no constant
as the first factor of a product."""

COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|;[^\n]*')
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
ESCAPES = {r"\n": "\n", r"\t": "\t"}
INDICES = re.compile(r"\[([^\]\[()]*)\]")
NUMBERS = re.compile(r"\s*(?:[0-9]{1,9}\s*(?:,\s*[0-9]{1,9}\s*)*)?")
SYNTAX_ERROR = re.compile(r"Parse error: syntax error at line (\d+), column \d+: '(.*)'", re.DOTALL)
PRODUCTS = 1_000_000
"""Most products of variables of one term: of sums, as many as their lengths multiplied."""
GRAMMAR = "VNN-LIB 2.0, in which numbers are 1 or 1.5, without an exponent, and equality is =="

MINOR_VERSION = "an input without it: it is of VNN-LIB 2.1, which the package vnnlib does not read yet"

_Definition: TypeAlias = vnnlib.InputDefinition | vnnlib.OutputDefinition | vnnlib.HiddenDefinition
_SIGNS: dict[type[vnnlib.Comparison], str] = {
    vnnlib.LessEqual: "<=", vnnlib.GreaterEqual: ">=", vnnlib.LessThan: "<", vnnlib.GreaterThan: ">",
    vnnlib.Equal: "==", vnnlib.NotEqual: "!=",
}  # fmt: skip


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
    for match in INDICES.finditer(_without_strings(source.text)):
        if not NUMBERS.fullmatch(match[1]):
            accepted = "natural numbers with commas between them, of 9 digits at most"
            source.refuse(_token_at(source, match[0], match.start()), accepted)
    return source


def _without_strings(text: str) -> str:
    """The text with underscores in place of what its strings, the names of hidden tensors, contain."""
    return STRING.sub(lambda match: re.sub(r"[^\n]", "_", match[0]), text)


def _token_at(source: VnnlibText, text: str, position: int) -> Token:
    return Token(text, 1 + source.text.count("\n", 0, position))


@dataclass(frozen=True)
class _Tensor:
    """A declared tensor, and the number of its first entry among the variables."""

    declared: DeclaredTensor
    first: int

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


class SecondQuery(VnnlibQuery):
    """The query in a VNN-LIB 2.0 file, about one network or several.

    Each may have several inputs, outputs and hidden tensors, which are flattened and concatenated: the inputs of all
    networks, their outputs, their hidden tensors, in the order of declaration. Accepted are the element types of
    ``TYPES``, and comparisons of terms of degree 2 at most over all of these alike.

    Raises:
        InputError: syntax, types and scopes that the package refuses; another element type, or two; an index or size
            that is no natural number, or a name declared twice, which the package takes. ``property`` also raises it
            for: other counts than those declared; products of more than two variables; an input without a lower or
            upper end in some disjunct; too many disjuncts.
    """

    def __init__(self, source: VnnlibText):
        self.source = _checked(source)
        query = self._parsed()
        self.assertions = query.assertions
        self._declared = Declarations(tuple(self._network(network) for network in query.networks))
        self._check_declarations()
        self.tensors, start = dict[str, _Tensor](), 0
        for tensor in (*self.declared.inputs, *self.declared.outputs, *self.declared.hidden):
            self.tensors[tensor.name] = _Tensor(tensor, start)
            start += tensor.size

    @property
    def declared(self) -> Declarations:
        return self._declared

    def property(self, inputs: int, outputs: int, indices: Mapping[int, Index] = NO_INDICES) -> Property:
        self._check_size("input", self.declared.inputs, inputs)
        self._check_size("output", (*self.declared.outputs, *self.declared.hidden), outputs)
        assertions = tuple(self._constraint(assertion.expr) for assertion in looking(self.assertions))
        last = Token("assert", 1 + self.source.text.rstrip().count("\n"))
        variables = Variables(inputs, outputs, self._declaration, indices)
        found = normal_form(self.source, Conjunction(last, assertions), variables)
        return replace(found, declared=self.declared, repaired=self.source.repaired)

    def check_outputs_asserted(self) -> None:
        text = _without_strings(self.source.text)
        first = re.search(r"\(\s*assert\b", text)
        assert first is not None  # the grammar has one or more
        names = [tensor.name for tensor in (*self.declared.outputs, *self.declared.hidden)]
        if not re.compile(rf"\b(?:{'|'.join(names)})\b").search(text, first.end()):
            accepted = f"a constraint on an output or hidden tensor: {', '.join(names)}"
            self.source.refuse(_token_at(self.source, "assertions about inputs alone", first.start()), accepted)

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
            accepted = MINOR_VERSION if syntax[2] == "initialized" else GRAMMAR
            self.source.refuse(Token(syntax[2] or "the end of the file", int(syntax[1])), accepted)
        try:
            first = json.loads(message)["errors"][0]
            token, hint = Token(first["offendingSymbol"], int(first["line"])), "{message}: {hint}".format_map(first)
        except (ValueError, LookupError, TypeError):  # another form of message, or of another version
            token, hint = Token("vnnlib", 1), message
        self.source.refuse(token, f"what vnnlib's type checker takes ({' '.join(hint.split())})")

    def _network(self, network: vnnlib.Network) -> DeclaredNetwork:
        inputs, hidden, outputs = (
            tuple(self._tensor(what, definition) for definition in definitions)
            for what, definitions in (
                ("input", network.inputs), ("hidden", network.hidden), ("output", network.outputs)
            )
        )  # fmt: skip
        line = self._place("network", network.name).line
        equal, isomorphic = network.equal_to or None, network.isometric_to or None
        return DeclaredNetwork(network.name, line, inputs, hidden, outputs, equal, isomorphic)

    def _tensor(self, what: str, definition: _Definition) -> DeclaredTensor:
        """
        Raises:
            InputError: an element type that is not read.
        """
        token = self._place(what, definition.name)
        kind = str(definition).split()[2]  # the package knows no name of a type that it does not know
        if kind not in TYPES:
            self.source.refuse(Token(f"{token.text} {kind}", token.line), f"elements of type {' or '.join(TYPES)}")
        quoted = (definition.onnx_name or "") if isinstance(definition, vnnlib.HiddenDefinition) else ""
        source = re.sub(r"\\.", lambda match: ESCAPES.get(match[0], match[0][1]), quoted[1:-1])
        return DeclaredTensor(definition.name, kind, tuple(definition.shape), token.line, source)

    def _check_declarations(self) -> None:
        """
        Raises:
            InputError: a network's name that is declared twice; a network both equal and isomorphic to others; several
                element types.
        """
        networks = self.declared.networks
        tensors = (*self.declared.inputs, *self.declared.hidden, *self.declared.outputs)
        taken = {tensor.name for tensor in tensors}
        for network in networks:
            if network.name in taken:
                token = self._place("network", network.name, last=True)
                self.source.refuse(token, "a name for each network and tensor, of its own")
            taken.add(network.name)
            if network.equal_to and network.isomorphic_to:
                found = f"{network.name} equal-to {network.equal_to} isomorphic-to {network.isomorphic_to}"
                self.source.refuse(Token(found, network.line), "one of the two")
        kinds = {tensor.kind for tensor in tensors}
        if len(kinds) > 1:
            other = next(tensor for tensor in tensors if tensor.kind != tensors[0].kind)
            self.source.refuse(Token(" and ".join(sorted(kinds)), other.line), "one element type in a query")

    def _check_size(self, what: str, tensors: Sequence[DeclaredTensor], size: int) -> None:
        if (found := sum(tensor.size for tensor in tensors)) != size:
            last = tensors[-1]
            kind = "hidden" if last in self.declared.hidden else what
            token = Token(f"{found} {what}s up to declare-{kind} {last.name}", last.line)
            self.source.refuse(token, f"{size} {what}s in all, as the network has them")

    def _place(self, what: str, name: str, *, last: bool = False) -> Token:
        """The declaration of a name: the first one, or the last."""
        text = _without_strings(self.source.text)
        places = [match.start() for match in re.finditer(rf"\(\s*declare-{what}\s+{name}\b", text)]
        return _token_at(self.source, f"declare-{what} {name}", places[-last] if places else 0)

    def _declaration(self, variable: int) -> Token:
        """The name of a variable, and the line that declares it."""
        tensor = next(one for one in self.tensors.values() if one.first <= variable < one.first + one.declared.size)
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
