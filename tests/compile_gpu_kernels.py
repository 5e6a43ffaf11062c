"""Compile every Triton kernel for GPUs that are not here, and print what the compiler made of it as JSON.

Run by test_gpu_compile.py in a process of its own: kernels are either interpreted or compiled, decided at their import.
Launches are recorded instead of made, so that a kernel is compiled exactly as its launcher asks.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from certtrain.kernels import gpu

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def launches(dtype: torch.dtype) -> Iterator[tuple[JITFunction, tuple, dict]]:
    """Every kernel with the arguments of a call of each kind."""
    recorded: list[tuple[JITFunction, tuple, dict]] = []

    def record(kernel: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        recorded.append((kernel, arguments, options))

    JITFunction.run = record  # type: ignore[method-assign]
    images, vector = torch.zeros(8, 64, 32, 32, dtype=dtype), torch.zeros(64, dtype=dtype)
    statistics = torch.zeros(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for x in (images, images.contiguous(memory_format=torch.channels_last)):
        state = torch.zeros_like(x, dtype=torch.uint8)
        gpu.pointwise(x, x, vector, vector, True)
        gpu.pointwise(x, x, None, vector, True)
        gpu.pointwise_backward(x, x, state, x, x, vector, True)
        gpu.pointwise_backward(x, x, state, None, None, None, True)
        gpu.batch_norm(x, vector, vector, 1e-5)
        gpu.batch_norm_backward(x, statistics, statistics, x, statistics, statistics, vector, 1e-5)
    gpu.pointwise(images, images, None, None, True)
    gpu.pointwise_backward(images, images, state, None, None, None, False)
    rows, weight, labels = (
        torch.zeros(256, 512, dtype=dtype),
        torch.zeros(1000, 512, dtype=dtype),
        torch.zeros(256).long(),
    )
    gpu.margins(rows, rows, weight, weight[:, 0], labels)
    gpu.margins_backward(torch.zeros(256, 999, dtype=dtype), rows, weight, labels)
    forms, shared = torch.zeros(4, 10, 4096, dtype=dtype), torch.zeros(4, 1, 4096, dtype=dtype)
    for lines in ([shared] * 3, [forms, shared, shared]):
        gpu.crown(forms, *lines, False)
        gpu.crown_backward(forms, forms[..., 0], forms, *lines, False)
    cuts, chosen = torch.zeros(16, 3072, dtype=dtype), torch.zeros(16, 8).long()
    gpu.cut_box_minima(cuts, cuts[:, 0], cuts, cuts[:, 0], chosen)
    gpu.cut_box_minima(cuts[:, :5], cuts[:, 0], cuts[:, :5], cuts[:, 0], chosen[:, :1])
    budgets = torch.zeros(8).long()
    for pixels in (49, 1024, 4096, 50176):
        p, m = torch.zeros(8, 3, pixels, dtype=dtype), torch.zeros(8, pixels, dtype=dtype)
        mask = torch.zeros(8, pixels, dtype=torch.uint8)
        gpu.sparse_apply(p, p, m, budgets, 0)
        gpu.topk_mask(m, None, 20)
        gpu.spgd_step(p, p, m, p, mask, None, 20, 0.25, 0.25, True)
    yield from recorded


def source(kernel: JITFunction, arguments: tuple, options: dict) -> tuple[ASTSource, dict]:
    """What the launch compiles: None and 1 are constants, multiples of 16 are known to be that."""
    options = dict(options)
    flags = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    given = dict(zip(kernel.arg_names, arguments)) | options
    signature, constants, known = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        constant = parameter.is_constexpr or value is None or (type(value) is int and value == 1)
        signature[parameter.name] = "constexpr" if constant else parameter.annotation_type or mangle_type(value)
        if constant:
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            known[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, known), flags


def builds(capability: int, dtype: str) -> list[dict]:
    """What became of every kernel for one generation of GPUs and one kind of numbers."""
    seen = {}
    for kernel, arguments, options in launches(getattr(torch, dtype)):
        what, flags = source(kernel, arguments, options)
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        key = f"{name} {what.signature} {what.constants} {flags}"
        if key in seen:
            continue
        compiled = triton.compile(what, target=GPUTarget("cuda", capability, 32), options=flags)
        seen[key] = {"kernel": name, "shared": compiled.metadata.shared, "stack": stack(compiled.asm["cubin"])}
    return list(seen.values())


def stack(binary: bytes) -> int:
    """Bytes of each thread's stack frame, where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return max(int(part.removeprefix("STACK:")) for part in usage.stdout.split() if part.startswith("STACK:"))


if __name__ == "__main__":  # called with targets, as 90-float32
    print(json.dumps({target: builds(int(target.split("-")[0]), target.split("-")[1]) for target in sys.argv[1:]}))
