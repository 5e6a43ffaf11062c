#!/usr/bin/env bash
# vnnlib 1.0.2, the VNN-LIB group's own reader: compat.transform returns sets that are larger than the query's.
# A good guess: assertions are conjoined, as VNN-LIB 2.0 says, and what boxes and polytopes cannot express is refused
# (as `!=` is): if a query comes back it is the same set, and if nesting is hard for it, then deep nesting.
# Seen instead, without an error or a warning:
#   two assertions that are each an `and` or an `or` are united: (assert (and A B)) (assert (and C D)) comes back as
#   (A and B) or (C and D), even where the first bounds the inputs and the second the outputs. One assertion that
#   nests the same, (assert (and (and A B) (and C D))) or (and (or A B) (or C D)), is right, and so are bare comparisons
#   (== a b) comes back as (<= a b), on inputs and outputs
# so points that the query excludes look like counterexamples.
# Runs without certtrain. PYTHON: an interpreter. Exits non-zero where the behaviour is another one.
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m venv "$site"
"$site/bin/python" -m pip install -q vnnlib==1.0.2
cd "$site"
bin/python - <<'PYTHON'
import itertools
import sys
from importlib.metadata import version

import vnnlib
import vnnlib.compat

print("vnnlib", version("vnnlib"), "python", sys.version.split()[0])
NETWORK = "(vnnlib-version <2.0>) (declare-network f (declare-input X float32 [2]) (declare-output Y float32 [2]))"
COMPARISONS = {"<=": float.__le__, ">=": float.__ge__, "==": float.__eq__, "!=": float.__ne__}
VALUES = (-0.5, 0.5, 1.0, 2.0)
POINTS = [dict(zip(("X[0]", "X[1]", "Y[0]", "Y[1]"), values)) for values in itertools.product(VALUES, repeat=4)]


def holds(expression, point):
    """Whether the point satisfies ("and", …), ("or", …) or (comparison, variable, number or variable)."""
    sign, *operands = expression
    if sign in COMPARISONS:
        return COMPARISONS[sign](*(point.get(operand, operand) for operand in operands))
    return {"and": all, "or": any}[sign](holds(operand, point) for operand in operands)


def text(expression):
    return f"({' '.join(map(text, expression))})" if isinstance(expression, tuple) else str(expression)


def contains(cases, point):
    """Whether one of vnnlib's cases contains the point: in the box and in one of the polytopes A y <= b."""
    x, y = (point["X[0]"], point["X[1]"]), (point["Y[0]"], point["Y[1]"])
    return any(
        all(low <= value <= high for value, (low, high) in zip(x, case.input_box))
        and any(
            all(sum(a * value for a, value in zip(row, y)) <= b for row, b in zip(polytope.coeff_matrix, polytope.rhs))
            for polytope in case.output_constraints
        )
        for case in cases
    )


def compared(assertions):
    """How many points the query contains, how many of those are lost, and how many others are added."""
    given = [all(holds(assertion, point) for assertion in assertions) for point in POINTS]
    query = vnnlib.parse_query_string(" ".join([NETWORK, *(f"(assert {text(assertion)})" for assertion in assertions)]))
    cases = vnnlib.compat.transform(query)
    found = [contains(cases, point) for point in POINTS]
    return sum(given), sum(g and not f for g, f in zip(given, found)), sum(f and not g for g, f in zip(given, found))


def bounds(name, low, high):
    return (">=", name, low), ("<=", name, high)


inputs = (*bounds("X[0]", 0.0, 1.0), *bounds("X[1]", 0.0, 1.0))
outputs = (("<=", "Y[0]", "Y[1]"), (">=", "Y[1]", 1.0))
either, other = ("or", *outputs), ("or", ("<=", "Y[0]", 0.0), ("<=", "Y[1]", 0.0))
wrong = {
    "(and inputs) (and outputs)": [("and", *inputs), ("and", *outputs)],
    "(and of X[0]) (and of X[1])": [("and", *inputs[:2]), ("and", *inputs[2:])],
    "inputs, (or …) (or …)": [*inputs, either, other],
    "(and inputs) (or outputs)": [("and", *inputs), either],
    "inputs, Y[0] == 1": [*inputs, ("==", "Y[0]", 1.0)],
    "inputs, Y[0] == Y[1]": [*inputs, ("==", "Y[0]", "Y[1]")],
    "X[0] == 1, outputs": [("==", "X[0]", 1.0), *outputs],
}
right = {
    "(and (and inputs) (and outputs))": [("and", ("and", *inputs), ("and", *outputs))],
    "inputs, outputs, bare": [*inputs, *outputs],
    "inputs, (or …)": [*inputs, either],
    "inputs, (and (or …) (or …))": [*inputs, ("and", either, other)],
    "1 <= X[0] <= 1, outputs": [*bounds("X[0]", 1.0, 1.0), *outputs],
}
print(f"{f'of {len(POINTS)} points:':36} query  lost added")
counts = {name: compared(assertions) for name, assertions in {**wrong, **right}.items()}
for name, (given, lost, added) in counts.items():
    print(f"{name:36} {given:5} {lost:5} {added:5}")
refused = False
try:
    compared([*inputs, ("!=", "Y[0]", 1.0)])
except vnnlib.VNNLibException as error:
    refused = True
    print("inputs, Y[0] != 1:", error)
assert refused, "!= is accepted now"
assert all(counts[name][1] == 0 and counts[name][2] > 0 for name in wrong), "one of the wrong ones is another now"
assert all(counts[name][1:] == (0, 0) for name in right), "one of the right ones is wrong now"
print("behaviour as described")
PYTHON
