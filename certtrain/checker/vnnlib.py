"""Properties in VNN-LIB 1.0: asserts about inputs X_i and outputs Y_j, all of them together the
unsafe set. Strict comparisons count as those with equality."""

import re
from fractions import Fraction
from itertools import chain, product
from typing import Any

import numpy as np

from .arithmetic import Numbers, Rejected
from .claim import Claim, Disjunct

TOKEN = re.compile(r"\s+|;[^\n]*|([()]|[^\s();]+)")
MOST = 100_000
"""Most disjuncts of a property."""
PASSED = ("declare-const", "declare-fun", "set-logic", "set-info", "check-sat", "get-model", "exit")


def read_claim(text: str, inputs: int, outputs: int, arithmetic: Numbers) -> Claim:
    """The claim that no point satisfies the asserts of a property, of a network of this size."""
    disjuncts = [[]]
    for command in _parsed(text):
        head = command[0] if isinstance(command, list) and command else command
        if head == "assert" and len(command) == 2:
            disjuncts = _both([disjuncts, _formula(command[1], False)])
        elif head not in PASSED:
            raise Rejected(f"the property: command {str(head)[:40]!r} is not known here")
    boxes, found = {}, []
    for literals in disjuncts:
        box, rows = _split(literals, inputs, outputs)
        if box is not None:
            found.append((boxes.setdefault(box, len(boxes)), rows))
    return Claim(
        [_ends(box, arithmetic) for box in boxes],
        [Disjunct(box, *_rows(rows, outputs, arithmetic)) for box, rows in found],
    )


def _parsed(text):
    """Nested lists of words."""
    stack: list[list[Any]] = [[]]
    for match in TOKEN.finditer(text):
        word = match[1]
        if word == "(":
            stack.append([])
        elif word == ")":
            if len(stack) == 1:
                raise Rejected("the property: a bracket that was not opened")
            inner = stack.pop()
            stack[-1].append(inner)
        elif word is not None:
            stack[-1].append(word)
        if len(stack) > 100:
            raise Rejected("the property: nested too deeply")
    if len(stack) > 1:
        raise Rejected("the property: a bracket that is not closed")
    return stack[0]


def _both(parts):
    """The disjuncts of a conjunction of formulas."""
    size = 1
    for part in parts:
        size *= len(part)
        if size > MOST:
            raise Rejected(f"the property: more than {MOST} disjuncts")
    return [list(chain(*choice)) for choice in product(*parts)]


def _formula(formula, negated):
    """The disjuncts of a formula or its negation: lists of forms that are <= 0."""
    if formula in ("true", "false"):
        return [[]] if (formula == "true") != negated else []
    if not isinstance(formula, list) or not formula:
        raise Rejected(f"the property: {str(formula)[:40]!r} is no formula")
    head, *rest = formula
    if head == "not" and len(rest) == 1:
        return _formula(rest[0], not negated)
    if head in ("and", "or"):
        parts = [_formula(part, negated) for part in rest]
        if (head == "and") != negated:
            return _both(parts)
        return list(chain(*parts))
    if head not in ("<=", "<", ">=", ">", "=") or len(rest) != 2 or (head == "=" and negated):
        raise Rejected(f"the property: {str(formula)[:60]} is no comparison known here")
    first, second = map(_term, rest)
    less = _added(first, second, -1)
    more = _added(second, first, -1)
    if head == "=":
        return [[less, more]]
    return [[less if (head[0] == "<") != negated else more]]


def _term(term):
    """A linear form: coefficients by variable, the constant by None."""
    if isinstance(term, str):
        if re.fullmatch(r"[XY]_\d{1,9}", term):
            return {(term[0], int(term[2:])): Fraction(1)}
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", term):
            return {None: Fraction(term)}
        raise Rejected(f"the property: {term[:40]!r} is no number or variable")
    head, *rest = term or [None]
    parts = [_term(part) for part in rest]
    if head in ("+", "-") and parts:
        sign, whole = 1 if head == "+" else -1, dict(parts[0])
        if len(parts) == 1:
            return _added({}, whole, sign)
        for part in parts[1:]:
            whole = _added(whole, part, sign)
        return whole
    if head == "*" and parts:
        whole = parts[0]
        for part in parts[1:]:
            if set(whole) - {None} and set(part) - {None}:
                raise Rejected("the property: a product of variables")
            form, factor = (whole, part) if not set(part) - {None} else (part, whole)
            whole = {key: value * factor.get(None, 0) for key, value in form.items()}
        return whole
    raise Rejected(f"the property: {str(term)[:40]} is no linear term")


def _added(first, second, sign):
    whole = dict(first)
    for key, value in second.items():
        whole[key] = whole.get(key, 0) + sign * value
    return whole


def _split(literals, inputs, outputs):
    """(box, rows): the ends of all inputs, None if they cross; the forms of outputs."""
    lower: list[Any] = [None] * inputs
    upper, rows = list(lower), []
    for form in literals:
        form: dict[Any, Any] = {key: value for key, value in form.items() if value or not key}
        constant = form.pop(None, Fraction(0))
        kinds = {kind for kind, _ in form}
        for kind, number in form:
            if number >= (inputs if kind == "X" else outputs):
                raise Rejected(f"the property: {kind}_{number}, which the network does not have")
        if kinds == {"X"} and len(form) == 1:
            (((_, number), factor),) = form.items()
            end, upward = -constant / factor, factor > 0
            ends, before = (upper, upper[number]) if upward else (lower, lower[number])
            ends[number] = (
                end if before is None else min(before, end) if upward else max(before, end)
            )
        elif "X" in kinds:
            raise Rejected("the property: a comparison of several inputs, or with outputs")
        else:
            rows.append((form, constant))
    if None in lower or None in upper:
        raise Rejected("the property: an input without a lower or upper end")
    crossed = any(low > up for low, up in zip(lower, upper))
    return None if crossed else (tuple(lower), tuple(upper)), rows


def _ends(box, arithmetic):
    """The ends as numbers, rounded outward."""
    lower, upper = (np.array(ends, dtype=object) for ends in box)
    if arithmetic.exact:
        return lower, upper
    low, up = arithmetic.numbers(lower), arithmetic.numbers(upper)
    inward = [np.array([Fraction(float(x)) for x in ends], dtype=object) for ends in (low, up)]
    low = np.where(inward[0] > lower, np.nextafter(low, -np.inf), low)
    return low, np.where(inward[1] < upper, np.nextafter(up, np.inf), up)


def _rows(rows, outputs, arithmetic):
    matrix = np.full((max(1, len(rows)), outputs), Fraction(0), dtype=object)
    offsets = np.full(max(1, len(rows)), Fraction(0), dtype=object)
    for place, (form, constant) in enumerate(rows):
        offsets[place] = constant
        for (_, number), factor in form.items():
            matrix[place, number] = factor
    return arithmetic.numbers(matrix), arithmetic.numbers(offsets)
