"""What torch is told about each op: schema, fakes, gradients, autocast; so that a compiler may take it anywhere."""

import os
import shutil

import pytest
import torch
from op_table import DIFFERENTIABLE, NAMES, Call, outcome, table, tensors
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import config as inductor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from walking import walk

from certtrain import kernels
from certtrain.kernels import convolution, cutting, linear, margins, pointwise, registration, relaxation, sparse

MODULES = (convolution, cutting, linear, margins, pointwise, relaxation, sparse)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


CHECKS = {
    "cpu": ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    "reference": ("test_schema", "test_faketensor"),  # the others trace the op alone
}
"""opcheck's tests by backend."""


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["formula", "op"])
def under_a_compiler(request, monkeypatch):
    """A compiler gets the plain formula on the CPU; here also the op, as it does on other devices."""
    torch._dynamo.reset()
    if request.param == "op":
        for module in MODULES:
            monkeypatch.setattr(module, "formula_is_faster", lambda tensor, entries: False, raising=False)
    yield request.param
    torch._dynamo.reset()


class Recorder(TorchDispatchMode):
    """Our ops as torch runs them, forward and backward, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "certtrain":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(name, **options):
    with kernels.use_backend("reference"), Recorder() as recorder:
        outcome(table(**options)[name])
    return recorder.calls


def test_every_op_is_in_the_table():
    ops = {value._qualname for module in MODULES for value in vars(module).values() if isinstance(value, CustomOpDef)}
    assert ops == {func._schema.name for name in NAMES for func, _ in recorded(name)}


IMAGES = [name for name, call in table().items() if any(leaf.ndim == 4 for leaf in call.leaves)]


@walk(
    "name, last", [*((name, False) for name in NAMES), *((name, True) for name in IMAGES)],
    ids=lambda value: {True: "channels_last", False: "contiguous"}.get(value, value),
)  # fmt: skip
def test_opcheck(name, last, backend):
    for func, args in recorded(name, last=last):
        backward = func._schema.name.endswith("_backward")  # its gradient only raises: see test_second_derivative
        with_gradient = table()[name].gradients and not backward
        given = tuple(_leaf(a, with_gradient) for a in args)
        torch.library.opcheck(func, given, test_utils=CHECKS["reference" if last else backend])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_have_the_dtypes_of_their_fakes(dtype):
    for name in NAMES:
        for func, args in recorded(name, dtype=dtype):
            torch.library.opcheck(func, tuple(_leaf(a, False) for a in args), test_utils=["test_faketensor"])
    statistics = table(dtype)["norm"]
    assert [part.dtype for part in outcome(statistics)[0]] == [dtype, torch.float32, torch.float32]


def _leaf(value, with_gradient):
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return value.detach().requires_grad_(with_gradient) if floating else value


@pytest.mark.parametrize(
    "under_a_compiler, name",
    [*(("op", name) for name in NAMES), *(("formula", name) for name in NAMES if table()[name].formula)],
    indirect=["under_a_compiler"],
)  # fmt: skip
def test_compiled(name, under_a_compiler, monkeypatch):
    monkeypatch.setattr(registration, "SMALL", 0)  # the formula is taken for the compiler's sake
    call = table()[name]
    with kernels.use_backend("cpu"):
        expected = outcome(call)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    compiled = torch.compile(call.run, fullgraph=True, backend=backend)
    torch.testing.assert_close(outcome(call, compiled), expected, **EXACT)
    assert ("ops.certtrain" in graphs[0]) == (under_a_compiler == "op")


CPP = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(not CPP, reason="needs a C++ compiler for Inductor")
def test_compiled_by_inductor():
    torch._dynamo.reset()
    calls = [table()[name] for name in ("affine relu", "margins")]
    count = len(calls[0].leaves)

    def run(*leaves):
        return *tensors(calls[0].run(*leaves[:count])), *tensors(calls[1].run(*leaves[count:]))

    both = Call(run, [*calls[0].leaves, *calls[1].leaves])
    with inductor.patch(compile_threads=1):  # more would each import torch
        compiled = outcome(both, torch.compile(run, fullgraph=True))
    torch.testing.assert_close(compiled, outcome(both), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_float32(dtype, under_a_compiler):
    """In bfloat16 a radius of 1/255 beside 1 would be lost; and eager and compiled results must not differ in dtype."""

    def results(given):
        return {name: call.run(*call.leaves) for name, call in given.items()}

    given = table(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ways = [results(given), torch.compile(results, fullgraph=True, backend="aot_eager")(given)]
    with kernels.use_backend("reference"):
        expected = results({name: call for name, call in table(torch.float32).items()})
    for found in ways:
        for name, values in found.items():
            for part, like in zip(tensors(values), tensors(expected[name])):
                assert part.dtype == like.dtype, name
                if dtype == torch.float32:
                    torch.testing.assert_close(part, like, msg=lambda text, name=name: f"{name}: {text}")


@walk("name", [name for name in DIFFERENTIABLE if table()[name].exact])
def test_gradient(name, backend):
    call = table()[name]
    assert torch.autograd.gradcheck(call.run, [leaf.clone().requires_grad_() for leaf in call.leaves])


@walk("name", DIFFERENTIABLE)
def test_second_derivative_raises_where_an_op_ran(name, backend):
    call = table()[name]
    leaves = [leaf.clone().requires_grad_() for leaf in call.leaves]
    outputs = [part.square().sum() for part in tensors(call.run(*leaves)) if part.dtype.is_floating_point]
    # crown's bias and the image of apply enter by a sum: the gradient is the output's own, and torch's second is right
    outside = {"crown lower": 1, "crown upper": 1, "apply": 0, "apply unprojected": 0}.get(name)
    for position, gradient in enumerate(torch.autograd.grad(sum(outputs), leaves, create_graph=True)):
        if position == outside:
            continue
        with pytest.raises(RuntimeError, match=r"has no second derivative; accepted: .*reference"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if table()[name].formula])
def test_second_derivative_is_right_where_the_formula_ran(name):
    leaves = [leaf.clone().requires_grad_() for leaf in table()[name].leaves]
    assert torch.autograd.gradgradcheck(table()[name].run, leaves, fast_mode=True)
