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
from .means import Reduction, Resampling
from .moves import ConstantPad
from .opaque import Opaque
from .pooling import AveragePool, MaxPool
from .rearrangement import Copies, Rearrangement, Selection
from .registry import from_function, from_module
from .relu import LeakyRelu, Relu
from .scale import Constants, Scale
from .sigmoid import Sigmoid, Tanh
from .sum import Sum
from .transposed_convolution import TransposedConvolution

__all__ = [
    "Affine",
    "AveragePool",
    "BatchNorm",
    "BatchStatistics",
    "Concat",
    "ConstantPad",
    "Constants",
    "Convolution",
    "Copies",
    "Dense",
    "Dropout",
    "Entrywise",
    "Function",
    "Gelu",
    "GeluTanh",
    "Input",
    "LeakyRelu",
    "LinearOperation",
    "MaxPool",
    "Nonlinear",
    "Opaque",
    "Operation",
    "Rearrangement",
    "Reduction",
    "Relu",
    "Resampling",
    "Scale",
    "Selection",
    "Sigmoid",
    "Silu",
    "Sum",
    "Tanh",
    "TransposedConvolution",
    "Unbounded",
    "UnsupportedOperation",
    "Weights",
    "from_function",
    "from_module",
]  # fmt: skip
