"""The wheel installs beside packages called ``kernels`` and ``verifiers``; in a checkout those names are aliases."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ["certtrain", "kernels", "verifiers", "pyproject.toml", "README.md", "LICENSE"]


def run(code: str, *paths: Path, cwd: Path) -> str:
    found = ":".join(map(str, paths))
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cwd, env={"PYTHONPATH": found, "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode().strip()


def test_the_wheel_takes_no_bare_name(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # the build writes beside the sources: not into the checkout
    source.mkdir()
    subprocess.run(["cp", "-a", *PARTS, str(source)], cwd=ROOT, check=True)
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"certtrain/kernels/cpu/selection.py", "certtrain/verifiers/cascade.py", "certtrain/py.typed"} <= set(names)
    assert not any(name.startswith(("kernels", "verifiers", "tests", "scripts")) for name in names)

    site = tmp_path / "site"
    for package in ("kernels", "verifiers"):
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").write_text(f"whose = 'somebody else’s {package}'\n")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-compile", "--target", str(site), str(wheel)], check=True)
    code = (
        "import kernels, verifiers, certtrain.kernels, certtrain.verifiers\n"
        "assert 'somebody' in kernels.whose and 'somebody' in verifiers.whose\n"
        "from certtrain.verifiers import certify\n"
        "print(certtrain.kernels.__file__, certtrain.kernels.ibp_relu.__module__, certify.__module__)"
    )
    said = run(code, site, cwd=tmp_path)
    assert said.startswith(str(site)) and said.endswith("certtrain.kernels.pointwise certtrain.verifiers.cascade")


def test_the_source_distribution_holds_real_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["cp", "-a", *PARTS, str(source)], cwd=ROOT, check=True)
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / result.stdout.split()[-1]) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {"certtrain/kernels/cpu/selection.py", "certtrain/verifiers/cascade.py", "certtrain/py.typed"} <= files


ONE_WAY = """
import sys, kernels, verifiers, kernels.linear, verifiers.problem
from kernels.reference import ibp_relu
import certtrain.kernels, certtrain.verifiers, certtrain.kernels.reference
assert kernels is certtrain.kernels and verifiers is certtrain.verifiers
assert kernels.linear is certtrain.kernels.linear and ibp_relu is certtrain.kernels.reference.ibp_relu
assert verifiers.Verdict is certtrain.verifiers.Verdict and verifiers.problem.Verdict is verifiers.Verdict
assert kernels.linear.__spec__.name == 'certtrain.kernels.linear'
"""
REVERSE = """
import certtrain.kernels.linear as a, kernels.linear as b, certtrain.kernels as c, kernels as d
assert a is b and c is d
"""


def test_in_a_checkout_the_folders_are_one_module_with_the_package():
    """Each way in a process that has imported neither, forked where the others' imports are done."""
    code = f"""
import os, sys, torch
assert not {{"certtrain", "kernels", "verifiers"}} & set(sys.modules)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    exec({REVERSE!r})
    print("one")
else:
    exec({ONE_WAY!r})
"""
    assert run(code, ROOT, cwd=ROOT) == "one"
