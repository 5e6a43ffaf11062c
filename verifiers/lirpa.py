"""Bounds by auto_LiRPA, as an oracle and as a stage, also for networks that our tracer does not take.

auto_LiRPA is optional and not a dependency: PyPI's newest, 0.3, does not import with a current torch. Its bounds hold
in nearest arithmetic. Some of its rules are wrong. Therefore only networks made of the operations in ``RIGHT`` are
bounded, auto_LiRPA's own evaluation must agree with the network at points of the box, and a bound that a point of the
box refutes is refused.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging.handlers
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..bounds import Bounds, Interval, Region
from ..bounds.clock import OutOfTime, look
from ..bounds.network import NetworkModule
from ..errors import InputError, check
from ..precision import full_float32
from ..typed import named_modules
from .bounds_so_far import BoundsSoFar
from .limits import out_of_memory
from .optimise import finite
from .problem import Problem
from .sampled_outputs import SampledOutputs, rounding
from .stage import Finding, Stage, proof, undecided

if TYPE_CHECKING:
    from .settings import Certify

Method = Literal["ibp", "crown_ibp", "crown", "alpha"]
METHODS: dict[str, str] = {"ibp": "IBP", "crown_ibp": "CROWN-IBP", "crown": "CROWN", "alpha": "CROWN-Optimized"}
SOURCE = "git+https://github.com/Verified-Intelligence/auto_LiRPA@a050a3d"  # 0.7.1
SHARE = 0.01  # least output of a softmax: auto_LiRPA adds 1e-8 under logarithms of them, 1e-6 of this
DESCENTS = 4  # steps of descent from the sampled points
INSTALL = f"pip install --no-deps appdirs graphviz packaging setuptools tqdm {SOURCE}"


def _reads_attributes(node: Any) -> bool:
    """Whether a pool uses no attribute that 0.7.1 ignores: ``dilations``, ``ceil_mode`` and ``count_include_pad``."""
    dense = all(step == 1 for step in node.attr.get("dilations", ())) and not node.attr.get("ceil_mode", 0)
    return dense and (not any(node.attr.get("pads", ())) or node.attr.get("count_include_pad", 0) == 1)


def _exponent_not_even(node: Any) -> bool:
    """Whether a power has a constant exponent that is not even. 0.7.1's CROWN lower bounds of even powers, ``x ** 2``
    among them, are too high where x keeps its sign: by 4.2 for x⁴ on [1, 2]."""
    exponent = getattr(node.inputs[1], "value", None)
    return isinstance(exponent, Tensor) and exponent.numel() == 1 and float(exponent) % 2 != 0


_RIGHT_ALWAYS = (
    "Abs", "Add", "ATenUnflatten", "Atan", "BatchNormalization", "Buffers", "Cast", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "Equal", "Exp", "Expand", "Flatten", "Gather", "Gelu",
    "GlobalAveragePool", "Input", "Linear", "Log", "MatMul", "Max", "Min", "Mul", "Neg", "Params", "Reciprocal",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax",
    "Softplus", "Split", "Sqr", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
RIGHT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_RIGHT_ALWAYS, ("", lambda node: True)),
    "AveragePool": ("without ceil_mode, padding counted", _reads_attributes),
    "LeakyRelu": ("with slopes in [0, 1]", lambda node: 0 <= node.attr["alpha"] <= 1),
    "MaxPool": ("without padding, dilation or ceil_mode", _reads_attributes),
    "Pow": ("with a constant exponent that is not even", _exponent_not_even),
}
"""The operations of auto_LiRPA 0.7.1 whose bounds ``tests/test_lirpa_layers.py`` shows right with every method; for
each the condition, in words and as a test of the node. Cosine, sine, tangent and tile are wrong and not listed."""
PATCHES = ("Add", "BatchNormalization", "Buffers", "Conv", "Flatten", "Input", "Linear", "Params", "Relu")
"""Operations whose bounds are right in auto_LiRPA's patches mode as well, for convolutions neither dilated nor grouped
and sums without constants. Shown wrong in it, by up to 0.1: dilated and (alpha) grouped convolutions, added
constants."""


def require() -> ModuleType:
    """Import auto_LiRPA.

    Raises:
        InputError: it is not installed, older than 0.7, or does not import; gives the install command.
    """
    spec, found = importlib.util.find_spec("auto_LiRPA"), "nothing"
    if spec and spec.origin:  # the version is read, not run: an old one does not import
        source = Path(spec.origin).read_text(encoding="utf-8")
        number = re.search(r"""__version__\s*=\s*["']((\d+)\.(\d+).*?)["']""", source)
        found = f"version {number[1]}" if number else "one of no version"
        if number and (int(number[2]), int(number[3])) >= (0, 7):
            try:
                with _quiet(torch.get_default_dtype()):
                    return importlib.import_module("auto_LiRPA")
            except Exception as error:
                found += f", which does not import ({error!r:.200})"
    raise InputError(f"auto_LiRPA: found {found}; accepted: 0.7 or later, not on PyPI: {INSTALL}")


def lirpa_rows(model: nn.Module, region: Region, rows: Tensor, method: Method, *, steps: int = 20) -> Tensor:
    """(B, R) lower bounds of the linear forms ``rows`` (B, R, K) of the logits, -inf where nothing is proved.

    The model is copied and bounded in evaluation mode. A region that is no box is bounded by its hull: auto_LiRPA's l2
    bounds are wrong behind a normalisation (0.7.1's IBP: 0.27 above an attack). Where auto_LiRPA meets a value that is
    not finite, the whole batch gets -inf. No bound exceeds the model's least value at sampled points of the box
    (``SampledOutputs``): centre, ends, random corners and points, and corners reached by ``DESCENTS`` steps.

    Args:
        steps: steps of the ascent on slopes, for the method ``alpha``.
    Raises:
        InputError: no auto_LiRPA (see ``require``); a model that it cannot bound, that has an operation outside
            ``RIGHT``, or that it evaluates differently; a bound that a point of the box refutes.
        OutOfTime: the clock ran out; it is checked at each operation of a backward pass.
    """
    check(method in METHODS, "method", method, ", ".join(METHODS))
    check(steps >= 0, "steps", steps, "a whole number >= 0")
    library, dtype, reason = require(), region.images.dtype, ""
    if not len(rows):
        return rows.new_empty(rows.shape[:2])
    said: list[logging.LogRecord] = []
    # six convolutions: 6 s and 1 GB as patches, 91 s and 6 GB as matrices; but few constants are possible in patches
    for mode in ("patches", "matrix"):
        try:
            with _quiet(dtype) as said, full_float32(), torch.no_grad():
                plain = copy.deepcopy(_unwrapped(model)).eval().requires_grad_(False)
                options = {"conv_mode": mode, "optimize_bound_args": {"iteration": steps + 1}}  # the last takes no step
                lower = _lower_bounds(library, plain, region.hull, rows.to(dtype), METHODS[method], options)
            if lower is not None:
                return lower
        except InputError:
            raise
        except Exception as error:
            if out_of_memory(error) or isinstance(error, OutOfTime):
                raise
            lacking = {name for record in said for name in re.findall(r"^Name: ([^,]+)", record.getMessage())}
            reason = (
                f"it has no rule for {', '.join(sorted(lacking))}"
                if lacking
                else f"{error.__context__ or error!r:.200}"
            )
    found = f"one that auto_LiRPA {library.__version__} cannot bound by {method} ({reason})"
    raise InputError(f"model: found {found}; accepted: operations that it has rules for")


def lirpa_bounds(model: nn.Module, region: Region, method: Method, *, steps: int = 20) -> Bounds:
    """Bounds of the logits, (B, K) each, infinite where nothing is proved; arguments and errors as ``lirpa_rows``."""
    with torch.no_grad():
        logits = _evaluating(model)(region.images)
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    both = torch.cat([identity, -identity]).expand(len(logits), -1, -1)
    lower, negative = lirpa_rows(model, region, both, method, steps=steps).chunk(2, dim=1)
    return Bounds(lower, -negative)


@dataclass(frozen=True)
class LirpaStage(Stage):
    """Verifies by auto_LiRPA's bounds, in nearest arithmetic only."""

    name: ClassVar[str] = "lirpa"
    traces: ClassVar[bool] = False
    method: Method = "crown"
    steps: int = 20

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(settings.lirpa, settings.alpha_steps)

    def versions(self) -> Mapping[str, str]:
        return {"auto_LiRPA": require().__version__}

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        if known.network.rounding is not None:
            return undecided(problem, known, "auto_LiRPA's bounds hold in nearest arithmetic only")
        look()
        forms, offsets = known.rows_of(problem.specification)
        rows = lirpa_rows(problem.network, problem.region, forms, self.method, steps=self.steps)
        return proof(problem, known.with_rows(rows + offsets))


def _unwrapped(model: nn.Module) -> nn.Module:
    return (model.runs or model) if isinstance(model, NetworkModule) else model


def _evaluating(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without ``Dropout``, which makes auto_LiRPA turn training mode on, and with
    ``Normalise`` as a 1 x 1 convolution, because its constants prevent patches mode."""
    from ..models.base import Normalise  # here, so that other stages need not load the models

    twin = copy.deepcopy(_unwrapped(model)).eval().requires_grad_(False)
    for name, module in list(named_modules(twin)):
        if isinstance(module, nn.Dropout):
            twin.set_submodule(name, nn.Identity())
        elif isinstance(module, Normalise):
            scale, same = 1 / module.std.flatten(), nn.Conv2d(len(module.std), len(module.std), 1)
            same.weight = nn.Parameter(scale.diag()[..., None, None], requires_grad=False)
            same.bias = nn.Parameter(-module.mean.flatten() * scale, requires_grad=False)
            twin.set_submodule(name, same)
    return twin


def _lower_bounds(
    library: ModuleType, model: nn.Module, hull: Interval, rows: Tensor, method: str, options: Mapping[str, Any]
) -> Tensor | None:
    """(B, R) lower bounds; None where auto_LiRPA's are not known to be right in this mode."""
    finite_parts = list[Tensor]()
    with _TorchSubstitutes():
        bounded = library.BoundedModule(_evaluating(model), hull.center, bound_opts=options)
    if not _right_in_patches(library, bounded) and options["conv_mode"] == "patches":
        return None
    sampled = SampledOutputs.of(model, hull)
    for point, logits in zip(sampled.points, sampled.logits, strict=True):
        off = (bounded(point) - logits).abs() - rounding(logits).amax(1, keepdim=True)
        if (off > 0).any():
            why = f"one that auto_LiRPA {library.__version__} evaluates otherwise than it runs, at a point of the box"
            raise InputError(f"model: found {why}; accepted: one whose outputs it repeats")
    for node in bounded.nodes():
        node.get_bias = partial(_recording_finite, node.get_bias, finite_parts)
        node.bound_backward = partial(_in_time, node.bound_backward)
    given = library.BoundedTensor(hull.center, library.PerturbationLpNorm(x_L=hull.lower, x_U=hull.upper))
    with torch.set_grad_enabled(method == METHODS["alpha"]), _TorchSubstitutes():
        bounds = bounded.compute_bounds((given,), C=rows, method=method, bound_upper=False)[0].detach()
    for node in bounded.nodes():
        finite_parts += [end.isfinite().all() for end in (node.lower, node.upper) if isinstance(end, Tensor)]
        if type(node).__name__ == "BoundLog":  # its tangent may be one where there is no logarithm
            finite_parts.append((node.inputs[0].lower > 0).all())
        if type(node).__name__ == "BoundSoftmax":
            bounds = bounds.where(_least_share(node)[:, None] > SHARE, -torch.inf)
    if not all(map(bool, finite_parts)):
        return torch.full_like(bounds, -torch.inf)
    for _ in range(DESCENTS):
        sampled = sampled.with_corner(model, hull, rows, bounds)
    least, slack = sampled.least(rows)
    if (bounds > least + slack).any():
        why = f"a bound by auto_LiRPA {library.__version__} above the model's own value, at a point of the box"
        raise InputError(f"model: found {why}; accepted: one that it bounds right")
    return finite(torch.minimum(bounds, least))


def _right_in_patches(library: ModuleType, bounded: Any) -> bool:
    """Whether the bounds of all operations are right in patches mode too.

    Raises:
        InputError: an operation that is not among ``RIGHT``.
    """
    plain = True
    for node in bounded.nodes():
        name = type(node).__name__.removeprefix("Bound")
        words, fits = RIGHT.get(name, ("", lambda node: False))
        if not fits(node):
            found = f"{name}, whose bounds by auto_LiRPA {library.__version__} are wrong or were never tested"
            others = "AveragePool, LeakyRelu, MaxPool, Pow with theirs, others of RIGHT in certtrain/verifiers/lirpa.py"
            accepted = f"{name} {words}" if words else others
            raise InputError(f"model: found {found}; accepted: {accepted}")
        plain &= name in PATCHES
        if name == "Conv":
            plain &= node.attr.get("group", 1) == 1 and all(step == 1 for step in node.attr.get("dilations", ()))
        elif name == "Add":
            plain &= all(part.from_input for part in node.inputs)
    return plain


def _least_share(node: Any) -> Tensor:
    """(B,) lower bounds of the smallest output of a softmax."""
    lower, upper = node.inputs[0].lower, node.inputs[0].upper
    return (lower - upper.logsumexp(node.axis, keepdim=True)).exp().flatten(1).amin(1)


def _recording_finite(get_bias: Any, finite_parts: list[Tensor], coefficients: Any, bias: Any) -> Any:
    """Record whether a relaxation's offsets are finite: auto_LiRPA replaces NaN by 0."""
    finite_parts.append(torch.as_tensor(bias).isfinite().all())
    return get_bias(coefficients, bias)


def _in_time(bound_backward: Any, *arguments: Any, **options: Any) -> Any:
    """Check the clock before each operation of a backward pass."""
    look()
    return bound_backward(*arguments, **options)


class _TorchSubstitutes(TorchFunctionMode):
    """Replaces two torch functions, in this thread: exact GELU, and clamp under gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named: dict[str, Any] = kwargs or {}
        if func is F.gelu and named.get("approximate", "none") == "none":  # auto_LiRPA has a rule for its own op only
            return importlib.import_module("auto_LiRPA.operators.gelu").GELUOp.apply(args[0])
        result = func(*args, **named)
        # slopes start at an end of the clamp, where torch 2.15 gives no gradient: they would stay there
        if func is torch.clamp and torch.is_grad_enabled():
            return torch.where(args[0] == result, args[0], result.detach())
        return result


@contextmanager
def _quiet(dtype: torch.dtype) -> Generator[list[logging.LogRecord]]:
    """Silence auto_LiRPA's prints and warnings, yield its log records, and undo global settings of its import.

    ``dtype`` becomes the default precision within: auto_LiRPA makes its tables and slopes in that, and fails on
    networks of another."""
    root, log = logging.getLogger(), logging.getLogger("auto_LiRPA.utils")
    mute, ear = logging.NullHandler(), logging.handlers.BufferingHandler(1000)
    root.addHandler(mute)  # a root logger with a handler is not configured by auto_LiRPA's imports
    log.addHandler(ear)
    log.propagate, before = False, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield ear.buffer
    finally:
        torch.set_default_dtype(before)
        log.propagate = True
        log.removeHandler(ear)
        root.removeHandler(mute)
