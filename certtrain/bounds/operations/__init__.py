"""The operations of networks, one class per file; importing this package registers their tracing rules."""

from .affine import Affine, Weights
from .attention import ByRoot
from .base import Function, Input, LinearOperation, Nonlinear, Operation, Unbounded, UnsupportedOperation
from .batch_norm import BatchNorm, BatchStatistics
from .concat import Concat
from .convolution import Convolution
from .dropout import Dropout
from .entrywise import Entrywise
from .gated import Gelu, GeluTanh, Silu
from .linear import Dense
from .matrix_product import MatrixProduct
from .normalisation import Centering, RowNorm
from .opaque import Opaque
from .pooling import AveragePool, MaxPool
from .product import Product, Quotient, Square
from .rearrangement import Rearrangement, Selection
from .reduction import Maximum, Reduction
from .registry import from_function, from_module
from .relu import LeakyRelu, Relu
from .scale import Constants, Scale
from .sigmoid import Sigmoid, Tanh
from .softmax import LogSoftmax, LogSumExp, Softmax
from .sum import Sum

__all__ = [
    "Affine",
    "AveragePool",
    "BatchNorm",
    "BatchStatistics",
    "ByRoot",
    "Centering",
    "Concat",
    "Constants",
    "Convolution",
    "Dense",
    "Dropout",
    "Entrywise",
    "Function",
    "Gelu",
    "GeluTanh",
    "Input",
    "LeakyRelu",
    "LinearOperation",
    "LogSoftmax",
    "LogSumExp",
    "MatrixProduct",
    "MaxPool",
    "Maximum",
    "Nonlinear",
    "Opaque",
    "Operation",
    "Product",
    "Quotient",
    "Rearrangement",
    "Reduction",
    "Relu",
    "RowNorm",
    "Scale",
    "Selection",
    "Sigmoid",
    "Silu",
    "Softmax",
    "Square",
    "Sum",
    "Tanh",
    "Unbounded",
    "UnsupportedOperation",
    "Weights",
    "from_function",
    "from_module",
]  # fmt: skip
