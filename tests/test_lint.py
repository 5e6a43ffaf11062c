"""``make lint`` reads the folders behind the symbolic links, the strictly checked ones strictly."""

import json
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PLANTED = {
    "verifiers/lp.py": '\n\nplanted: int = "no"\n',
    "kernels/linear.py": "\n\ndef planted(x):\n    return x\n",  # wrong where checking is strict
    "certtrain/bounds/interval.py": '\n\nplanted: int = "no"\n',
}
NAMES = {name if name.startswith("certtrain") else f"certtrain/{name}" for name in PLANTED}


def checked() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]


def lint(folder: Path, include: list[str]) -> None:
    """Run ``make lint`` on a copy of the tree with errors, of which pyright reads these files and folders."""
    parts = ["certtrain", "kernels", "verifiers", "scripts", "typings", "pyproject.toml", "Makefile"]
    subprocess.run(["cp", "-a", *parts, str(folder)], cwd=ROOT, check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for name, code in PLANTED.items():
        (folder / name).write_text((folder / name).read_text() + code)
    settings = (folder / "pyproject.toml").read_text()
    narrowed = settings.replace(
        f"include = {json.dumps(checked()['include'])}", f"include = {json.dumps(list(include))}"
    )
    assert narrowed != settings or list(include) == checked()["include"]
    (folder / "pyproject.toml").write_text(narrowed)
    # -o: the environment is not made anew
    result = subprocess.run(["make", "-o", ".venv/.ready", "lint"], cwd=folder, capture_output=True, text=True)
    assert result.returncode
    wrong = set(re.findall(r"^ *\S*?/(certtrain/[\w/]+\.py):\d+:\d+ - error", result.stdout, re.MULTILINE))
    assert wrong == NAMES, result.stdout  # and nothing else: without them it passes


def test_an_error_planted_in_a_copy_of_the_tree_is_found(tmp_path):
    """In files behind the links, by the names under which the whole tree is read."""
    lint(tmp_path, sorted(NAMES))
    include = checked()["include"]
    assert all(any(name.startswith(f"{folder}/") for folder in include) for name in NAMES)
    assert {"certtrain", "certtrain/kernels", "certtrain/verifiers", "scripts"} <= set(include)


@pytest.mark.slow
def test_an_error_planted_is_found_among_all_files(tmp_path):
    lint(tmp_path, checked()["include"])


def test_suppressions_are_few_and_each_has_its_reason():
    """In the strictly checked files; a file of Triton kernels, checked by the basic rules, counts as one."""
    strict = checked()["strict"]
    paths = [ROOT / name for name in strict]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert len(files) > 60
    suppression = re.compile(r"# (?:type: ignore|pyright: (?:ignore|basic))(?:\[[\w, -]*\])?(.*)")
    lines = [pair for file in files for pair in pairwise(["", *file.read_text().splitlines()])]
    reasons = [found[1] or before for before, line in lines if (found := suppression.search(line))]
    assert len(reasons) <= 15
    assert [reason for reason in reasons if "# " not in reason] == []
