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


@pytest.mark.parametrize(
    "capability, dtype",
    [(80, "float32"), (90, "float32"), (100, "float32"), (90, "float64"), (90, "bfloat16"), (90, "float16")],
    ids=lambda value: f"sm_{value}" if isinstance(value, int) else value,
)
def test_kernels_build(capability, dtype, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, TESTS / "compile_gpu_kernels.py", str(capability), dtype]
    run = subprocess.run(
        command, cwd=TESTS.parent, env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    builds = json.loads(run.stdout)
    assert {build["kernel"] for build in builds} == kernels_launched()
    assert all(build["shared"] <= SHARED[capability] for build in builds)
    assert all(build["stack"] <= 128 for build in builds), [build for build in builds if build["stack"] > 128]
