"""Triton's kernels build for three generations of GPUs, none of which has to be here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes for one program, CUDA programming guide, table 30


def kernels_launched() -> set[str]:
    return {
        f"{path.stem}.{name}"
        for path in (TESTS.parent / "kernels" / "gpu").glob("*.py")
        for name in re.findall(r"\blaunch\(\s*(_\w+)", path.read_text())
    }


DIAGONAL = "80-float32", "90-float64", "100-bfloat16"
ALL = "80-float32", "90-float32", "100-float32", "90-float64", "90-bfloat16", "90-float16"


@pytest.mark.parametrize("targets", [DIAGONAL, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_kernels_build(targets):
    """Triton's own cache is used: its key is the source, the signature, the target and the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, TESTS / "compile_gpu_kernels.py", *targets], cwd=TESTS.parent,
        env=environment | {"PYTHONPATH": "."}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert tuple(found) == targets
    for target, builds in found.items():
        assert {build["kernel"] for build in builds} == kernels_launched(), target
        assert all(build["shared"] <= SHARED[int(target.split("-")[0])] for build in builds), target
        large = [build for build in builds if build["stack"] > 128]
        assert not large, (target, large)
