"""VNN-COMP's three scripts: their arguments, exit codes and files of results."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_vnncomp import TENT, save_network
from test_vnncomp_second import assert_accepted, interval, query

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts" / "vnncomp"
TOOL = "import sys; from certtrain.command_line import main; sys.exit(main())"


def executable(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.fixture
def environment(tmp_path) -> Path:
    """What the scripts need of a virtual environment: this interpreter, and the tool of this checkout."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    executable(folder / "python", f'exec {sys.executable} "$@"')
    executable(folder / "certtrain", f'exec {sys.executable} -c "{TOOL}" "$@"')
    return folder.parent


@pytest.fixture
def benchmark(tmp_path) -> Path:
    folder = tmp_path / "benchmarks" / "tents" / "2.0"
    for name in ("onnx", "vnnlib"):
        (folder / name).mkdir(parents=True)
    for name in ("f", "g"):
        save_network(folder / "onnx" / f"{name}.onnx", TENT)
    for name, height in (("unsat", "1.001"), ("sat", "0.999")):
        asked = query(interval("0.0", "1.0") + f"(assert (> Y[0,0] {height}))")
        (folder / "vnnlib" / f"{name}.vnnlib").write_text(asked)
    return folder


@pytest.fixture
def script(environment, tmp_path):
    def run(name: str, *words: str | Path) -> subprocess.CompletedProcess:
        variables = os.environ | {"CERTTRAIN_ENVIRONMENT": str(environment), "PYTHONPATH": str(ROOT)}
        command = ["bash", str(SCRIPTS / name), *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)

    return run


def test_an_instance(script, benchmark, tmp_path):
    onnx, results = benchmark / "onnx" / "f.onnx", tmp_path / "results.txt"
    prepared = script("prepare_instance.sh", "v1", "tents", onnx, benchmark / "vnnlib" / "sat.vnnlib")
    assert prepared.returncode == 0 and not results.exists()
    done = script("run_instance.sh", "v1", "tents", onnx, benchmark / "vnnlib" / "sat.vnnlib", results, "60")
    assert (done.returncode, done.stdout) == (0, "sat\n")
    assert_accepted(results.read_text(), (benchmark / "vnnlib" / "sat.vnnlib").read_text(), onnx)
    (tmp_path / "f=g.onnx").write_bytes(onnx.read_bytes())
    done = script("run_instance.sh", "v1", "tents", "f=g.onnx", benchmark / "vnnlib" / "unsat.vnnlib", results, "60")
    assert (done.returncode, done.stdout, results.read_text()) == (0, "unsat\n", "unsat\n")


@pytest.mark.parametrize("folder", ["", "benchmarks/tents/2.0/"])
def test_a_list_of_networks(script, benchmark, tmp_path, folder):
    """Relative to the benchmark's folder, or with that folder in front of the whole list."""
    text = (benchmark / "vnnlib" / "sat.vnnlib").read_text()
    second = "(declare-network g (equal-to f) (declare-input U float32 [1,1]) (declare-output V float32 [1,1]))\n"
    head, tail = text.split("(assert", 1)
    pair = f"{head}{second}(assert (and (>= U[0,0] 0.0) (<= U[0,0] 1.0)))\n(assert{tail}"
    (benchmark / "vnnlib" / "pair.vnnlib").write_text(pair)
    words = [f"{folder}[('f', 'onnx/f.onnx'), ('g', 'onnx/f.onnx')]", "benchmarks/tents/2.0/vnnlib/pair.vnnlib"]
    assert script("prepare_instance.sh", "v1", "tents", *words).returncode == 0
    done = script("run_instance.sh", "v1", "tents", *words, "results.txt", "60")
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert (done.returncode, done.stdout, lines[0]) == (0, "sat\n", "sat")
    assert [line for line in lines if "float32" in line] == [f"{name} float32 [1,1]" for name in "XYUV"]


def test_bad_input_is_an_error_in_the_results(script, benchmark, tmp_path):
    (tmp_path / "results.txt").write_text("an old answer\n")
    words = [benchmark / "onnx" / "f.onnx", benchmark / "onnx" / "g.onnx", "results.txt", "60"]
    done = script("run_instance.sh", "v1", "tents", *words)
    assert (done.returncode, done.stdout, (tmp_path / "results.txt").read_text()) == (0, "error\n", "error\n")
    assert "g.onnx" in done.stderr and "accepted" in done.stderr


def test_a_tool_that_takes_too_long_is_told_to_stop(script, environment, benchmark, tmp_path):
    """Before the script's own time is up; and where the harness ends the script, so does the tool."""
    seen = tmp_path / "seen.txt"
    executable(environment / "bin" / "certtrain", f'echo "$@" > {seen}')
    words = [benchmark / "onnx" / "f.onnx", benchmark / "vnnlib" / "sat.vnnlib", "results.txt"]
    for given, passed in (("100", "99"), ("5", "4.5"), ("0.5", "0.45")):
        script("run_instance.sh", "v1", "tents", *words, given)
        assert seen.read_text().split()[-2:] == ["--timeout", passed]
    executable(environment / "bin" / "certtrain", f"echo $$ > {seen}; exec sleep 60")
    seen.unlink()
    variables = os.environ | {"CERTTRAIN_ENVIRONMENT": str(environment)}
    command = ["bash", str(SCRIPTS / "run_instance.sh"), "v1", "tents", *map(str, words), "60"]
    with subprocess.Popen(command, cwd=tmp_path, env=variables) as running:
        until = time.monotonic() + 60
        while not (seen.exists() and seen.read_text().strip()) and time.monotonic() < until:
            time.sleep(0.01)
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(seen.read_text()), 0)
    assert (tmp_path / "results.txt").read_text() == "timeout\n"


def test_other_exit_codes_skip_an_instance(script, environment, benchmark, tmp_path):
    onnx, vnnlib = benchmark / "onnx" / "f.onnx", benchmark / "vnnlib" / "sat.vnnlib"
    for words, mention in (
        (["v2", "tents", onnx, vnnlib], "v2"),
        (["v1", "tents", onnx], "v1 CATEGORY ONNX VNNLIB"),
        (["v1", "tents", "none.onnx", vnnlib], "none.onnx: not found"),
        (["v1", "tents", onnx, "none.vnnlib"], "none.vnnlib: not found"),
    ):
        for name, more in (("prepare_instance.sh", []), ("run_instance.sh", ["results.txt", "60"])):
            done = script(name, *words, *more)
            assert done.returncode == 1 and mention in done.stderr and "accepted" in done.stderr
    for limit in ("soon", "0", "-1"):
        done = script("run_instance.sh", "v1", "tents", onnx, vnnlib, "results.txt", limit)
        assert done.returncode == 1 and f"TIMEOUT: found '{limit}'" in done.stderr
    assert not (tmp_path / "results.txt").exists()
    (environment / "bin" / "certtrain").unlink()
    done = script("prepare_instance.sh", "v1", "tents", onnx, vnnlib)
    assert done.returncode == 1 and "what install_tool.sh v1 installs" in done.stderr
    assert script("install_tool.sh", "v2").returncode == 1
