"""Sound bounds of a network's outputs over a set of inputs."""

from .forward import BatchStatistics, Forward, Statistics, forward
from .ibp import Activity, compute_bounds, compute_margins, compute_rows
from .interval import Bounds, Interval
from .perturbation import L2Ball, LinfBall, PerturbationSet
from .program import Program, UnsupportedNode
from .region import Box, Region
from .tracing import trace

__all__ = [
    "Activity", "BatchStatistics", "Bounds", "Box", "Forward", "Interval", "L2Ball", "LinfBall", "PerturbationSet",
    "Program", "Region", "Statistics", "UnsupportedNode", "compute_bounds", "compute_margins", "compute_rows",
    "forward", "trace",
]  # fmt: skip
