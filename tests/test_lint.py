"""``make lint`` reads the folders behind the symbolic links, the strictly checked ones strictly."""

import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_error_planted_in_a_copy_of_the_tree_is_found(tmp_path):
    parts = ["certtrain", "kernels", "verifiers", "scripts", "typings", "pyproject.toml", "Makefile"]
    subprocess.run(["cp", "-a", *parts, str(tmp_path)], cwd=ROOT, check=True)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    planted = {
        "verifiers/lp.py": '\n\nplanted: int = "no"\n',
        "kernels/linear.py": "\n\ndef planted(x):\n    return x\n",  # wrong where checking is strict
        "certtrain/bounds/interval.py": '\n\nplanted: int = "no"\n',
    }
    for name, code in planted.items():
        (tmp_path / name).write_text((tmp_path / name).read_text() + code)
    # -o: the environment is not made anew
    result = subprocess.run(["make", "-o", ".venv/.ready", "lint"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode
    wrong = set(re.findall(r"^ *\S*?/(certtrain/[\w/]+\.py):\d+:\d+ - error", result.stdout, re.MULTILINE))
    found = {name if name.startswith("certtrain") else f"certtrain/{name}" for name in planted}
    assert wrong == found, result.stdout  # and nothing else: without them it passes


def test_suppressions_are_few_and_each_has_its_reason():
    """In the strictly checked files; a file of Triton kernels, checked by the basic rules, counts as one."""
    strict = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["strict"]
    paths = [ROOT / name for name in strict]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert len(files) > 60
    suppression = re.compile(r"# (?:type: ignore|pyright: (?:ignore|basic))(?:\[[\w, -]*\])?(.*)")
    lines = [pair for file in files for pair in pairwise(["", *file.read_text().splitlines()])]
    reasons = [found[1] or before for before, line in lines if (found := suppression.search(line))]
    assert len(reasons) <= 15
    assert [reason for reason in reasons if "# " not in reason] == []
