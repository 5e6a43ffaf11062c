"""The operations of networks, one class per file; importing this package registers their tracing rules."""

from . import extremes as extremes  # these six for their tracing rules
from . import layer_functions as layer_functions
from . import masks as masks
from . import norm_functions as norm_functions
from . import normalisation as normalisation
from . import row_statistics as row_statistics
from .affine import Affine, Weights
from .attention import ByRoot
from .base import Function, Input, LinearOperation, Nonlinear, Operation, Unbounded, UnsupportedOperation
from .batch_norm import BatchNorm, BatchStatistics
from .centering import Centering, CenteringOnce
from .concat import Bordered, Concat
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
from .opaque import Opaque
from .piecewise import Abs, Clamp, Maximum, PiecewiseLinear, PRelu
from .pooling import AveragePool, MaxPool
from .product import Product, Quotient
from .rearrangement import Copies, Rearrangement, Selection
from .registry import from_call, from_function, from_module
from .relu import LeakyRelu, Relu
from .row_norm import ByRootOf, RowNorm, SquareSum
from .scale import Constants, Scale
from .sigmoid import Sigmoid, Tanh
from .smooth import Celu, Elu, Hardswish, Mish, Selu, Softplus, Softsign, ThresholdedRelu
from .softmax import LogSoftmax, LogSumExp, Softmax
from .steps import Ceil, Floor, Round, Signum
from .sum import Sum
from .transformer import Projection
from .transposed_convolution import TransposedConvolution

__all__ = [
    "Abs", "Affine", "AveragePool", "BatchNorm", "BatchStatistics", "Bordered", "ByRoot", "ByRootOf", "Ceil",
    "Celu", "Centering", "CenteringOnce", "Clamp", "Concat", "ConstantPad", "Constants", "Convolution", "Copies",
    "Cos", "Dense", "Dropout", "Elu", "Entrywise", "Erf", "Exp", "Floor", "Function", "Gelu", "GeluTanh",
    "Hardswish", "Input", "LeakyRelu", "LinearOperation", "Log", "LogSoftmax", "LogSumExp", "MatrixProduct",
    "MaxPool", "Maximum", "Mish", "Nonlinear", "Opaque", "Operation", "PRelu", "Piece", "PiecewiseLinear", "Power",
    "Product", "Projection", "Quotient", "Rearrangement", "Reciprocal", "Reduction", "Relu", "Resampling", "Round",
    "RowNorm", "ScalarCurve", "Scale", "Selection", "Selu", "Sigmoid", "Signum", "Silu", "Sin", "Softmax",
    "Softplus", "Softsign", "Sqrt", "SquareSum", "Sum", "Tanh", "ThresholdedRelu", "TransposedConvolution",
    "Unbounded", "UnsupportedOperation", "Weights", "from_call", "from_function", "from_module",
]  # fmt: skip
