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


TARGETS = ("80-float32", "90-float32", "100-float32", "90-float64", "90-bfloat16", "90-float16")


def test_kernels_build(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, TESTS / "compile_gpu_kernels.py", *TARGETS], cwd=TESTS.parent,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert tuple(found) == TARGETS
    for target, builds in found.items():
        assert {build["kernel"] for build in builds} == kernels_launched(), target
        assert all(build["shared"] <= SHARED[int(target.split("-")[0])] for build in builds), target
        large = [build for build in builds if build["stack"] > 128]
        assert not large, (target, large)
