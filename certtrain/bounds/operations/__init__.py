"""The operations of networks, one class per file; importing this package registers their tracing rules."""

from .affine import Affine, Weights
from .attention import ByRoot
from .base import Function, Input, LinearOperation, Nonlinear, Operation, Unbounded, UnsupportedOperation
from .batch_norm import BatchNorm, BatchStatistics
from .concat import Concat
from .convolution import Convolution
from .curves import Piece, ScalarCurve
from .dropout import Dropout
from .elementary import Cos, Erf, Exp, Log, Power, Reciprocal, Sin, Sqrt
from .entrywise import Entrywise
from .gated import Gelu, GeluTanh, Silu
from .linear import Dense
from .matrix_product import MatrixProduct
from .means import Reduction, Resampling
from .moves import ConstantPad
from .normalisation import Centering, RowNorm
from .opaque import Opaque
from .piecewise import Abs, Clamp, Maximum, PiecewiseLinear, PRelu
from .pooling import AveragePool, MaxPool
from .product import Product, Quotient
from .rearrangement import Copies, Rearrangement, Selection
from .registry import from_function, from_module
from .relu import LeakyRelu, Relu
from .scale import Constants, Scale
from .sigmoid import Sigmoid, Tanh
from .smooth import Celu, Elu, Hardswish, Mish, Selu, Softplus, Softsign, ThresholdedRelu
from .softmax import LogSoftmax, LogSumExp, Softmax
from .steps import Ceil, Floor, Round, Signum
from .sum import Sum
from .transposed_convolution import TransposedConvolution

__all__ = [
    "Abs", "Affine", "AveragePool", "BatchNorm", "BatchStatistics", "ByRoot", "Ceil", "Celu", "Centering", "Clamp",
    "Concat", "ConstantPad", "Constants", "Convolution", "Copies", "Cos", "Dense", "Dropout", "Elu", "Entrywise",
    "Erf", "Exp", "Floor", "Function", "Gelu", "GeluTanh", "Hardswish", "Input", "LeakyRelu", "LinearOperation",
    "Log", "LogSoftmax", "LogSumExp", "MatrixProduct", "MaxPool", "Maximum", "Mish", "Nonlinear", "Opaque",
    "Operation", "PRelu", "Piece", "PiecewiseLinear", "Power", "Product", "Quotient", "Rearrangement", "Reciprocal",
    "Reduction", "Relu", "Resampling", "Round", "RowNorm", "ScalarCurve", "Scale", "Selection", "Selu", "Sigmoid",
    "Signum", "Silu", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Sum", "Tanh", "ThresholdedRelu",
    "TransposedConvolution", "Unbounded", "UnsupportedOperation", "Weights", "from_function", "from_module",
]  # fmt: skip
