"""Sound bounds of a network's outputs over a set of inputs."""

from .faithful import check_faithful, check_one_image, checked_logits
from .forward import Forward, forward
from .ibp import Activity, compute_activity, compute_bounds, compute_margins, compute_rows
from .interval import Bounds, Interval
from .l1 import L1Ball
from .l2 import L2Ball
from .linf import LinfBall
from .network import Network, NetworkModule, Statistics, UnsupportedOperation
from .operations import BatchStatistics, Operation, from_call, from_function, from_module
from .parts import Halves, split
from .perturbation import NormBall, PerturbationSet
from .region import Box, Region
from .sizes import size_name, sized
from .sparse import SparseBall
from .tracing import trace

__all__ = [
    "Activity", "BatchStatistics", "Bounds", "Box", "Forward", "Halves", "Interval", "L1Ball", "L2Ball", "LinfBall",
    "Network", "NetworkModule", "NormBall", "Operation", "PerturbationSet", "Region", "SparseBall", "Statistics",
    "UnsupportedOperation", "check_faithful", "check_one_image", "checked_logits", "compute_activity", "compute_bounds",
    "compute_margins", "compute_rows", "forward", "from_call", "from_function", "from_module", "size_name", "sized",
    "split", "trace",
]  # fmt: skip
