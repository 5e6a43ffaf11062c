"""Answer one VNN-COMP instance and print how many subproblems its searches bounded and closed, as a line of JSON.

    python scripts/counted_search.py NET.onnx PROPERTY.vnnlib SECONDS

For checkouts whose answers do not record these counts (``verify --json``); PYTHONPATH names the checkout. Counts
children made by splits, and of roots and children those that a proof closed (a positive bound, infeasible assumptions,
a leaf's program).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from torch import Tensor

from certtrain.streams import tolerant_streams
from certtrain.verifiers.engine import BranchAndBound
from certtrain.verifiers.vnncomp import answer


class Counted:
    """Counts of all searches of this process, taken at the two places that every subproblem passes."""

    def __init__(self) -> None:
        self.numbers = Counter[str]()
        self._recorded, self._close = BranchAndBound._recorded, BranchAndBound._close
        BranchAndBound._recorded, BranchAndBound._close = self._count_made(), self._count_closed()

    def _count_made(self) -> Any:
        def recorded(search: BranchAndBound, subproblems: Any, root: bool) -> Any:
            self.numbers["roots" if root else "children"] += len(subproblems)
            return self._recorded(search, subproblems, root)

        return recorded

    def _count_closed(self) -> Any:
        def close(search: BranchAndBound, subproblems: Any, which: Tensor | None = None, *more: Any) -> Any:
            proved = subproblems.bound > 0
            self.numbers["closed"] += int((proved if which is None else proved & which).sum())
            return self._close(search, subproblems, which, *more)

        return close


def main() -> None:
    network, property, seconds = sys.argv[1:]
    counted = Counted()
    word = answer(network, property, float(seconds)).word
    print(json.dumps({"answer": word, **{key: counted.numbers[key] for key in ("roots", "children", "closed")}}))


if __name__ == "__main__":
    with tolerant_streams():
        main()
