from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class _Marginals:
    marginals: npt.NDArray[np.float64]

class OptimizeResult:
    status: int
    """0: optimal; 1: a limit was reached; 2: infeasible; 3: unbounded; 4: numerical difficulties."""
    x: Any
    """Array, or None without a solution."""
    fun: float | None
    ineqlin: _Marginals
    mip_dual_bound: float | None

class Bounds:
    def __init__(self, lb: npt.ArrayLike, ub: npt.ArrayLike) -> None: ...

class LinearConstraint:
    def __init__(self, A: Any, lb: npt.ArrayLike, ub: npt.ArrayLike) -> None: ...

def linprog(
    c: npt.ArrayLike,
    A_ub: npt.ArrayLike | None = None,
    b_ub: npt.ArrayLike | None = None,
    A_eq: npt.ArrayLike | None = None,
    b_eq: npt.ArrayLike | None = None,
    bounds: Sequence[tuple[float | None, float | None]] = ...,
    method: str = ...,
    *,
    options: dict[str, Any] | None = None,
) -> OptimizeResult: ...
def milp(
    c: npt.ArrayLike,
    *,
    integrality: npt.ArrayLike | None = None,
    bounds: Bounds | None = None,
    constraints: LinearConstraint | None = None,
    options: dict[str, Any] | None = None,
) -> OptimizeResult: ...
