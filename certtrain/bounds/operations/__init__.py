"""The operations of networks, one class per file; importing this package registers their tracing rules."""

from .affine import Affine, Weights
from .base import Function, Input, LinearOperation, Nonlinear, Operation, Unbounded, UnsupportedOperation
from .batch_norm import BatchNorm, BatchStatistics
from .concat import Concat
from .convolution import Convolution
from .dropout import Dropout
from .entrywise import Entrywise
from .gated import Gelu, GeluTanh, Silu
from .linear import Dense
from .opaque import Opaque
from .pooling import AveragePool, MaxPool
from .rearrangement import Rearrangement, Selection
from .registry import from_function, from_module
from .relu import LeakyRelu, Relu
from .scale import Constants, Scale
from .sigmoid import Sigmoid, Tanh
from .sum import Sum

__all__ = [
    "Affine", "AveragePool", "BatchNorm", "BatchStatistics", "Concat", "Constants", "Convolution", "Dense",
    "Dropout", "Entrywise", "Function", "Gelu", "GeluTanh", "Input", "LeakyRelu", "LinearOperation", "MaxPool",
    "Nonlinear", "Opaque", "Operation", "Rearrangement", "Relu", "Scale", "Selection", "Sigmoid", "Silu", "Sum",
    "Tanh", "Unbounded", "UnsupportedOperation", "Weights", "from_function", "from_module",
]  # fmt: skip
