"""The rooms know only the rooms to their left."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "errors", "typed", "devices", "labels", "precision", "config", "noise", "locking", "run_folder", "streams",
    "progress", "kernels", "bounds", "step", "data", "models", "attacks", "losses", "diagnostics", "training",
    "verifiers", "export", "evaluation", "recipe", "surroundings", "runs", "robustness", "pipeline", "comparison",
    "importing", "verification", "diagnosis", "second_opinion", "command_line",
]  # fmt: skip
FILES = [path for folder in ("certtrain", "kernels", "verifiers") for path in sorted((ROOT / folder).rglob("*.py"))]


def room_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "certtrain" else parts
    return parts[0] if parts[0] in ORDER else None


def imported_rooms(path: Path) -> set[str]:
    """Rooms of certtrain that a file imports, by its ``from`` imports."""
    depth = len(path.relative_to(ROOT).parts) - (1 if path.relative_to(ROOT).parts[0] == "certtrain" else 0)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth and depth:
            rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return rooms & set(ORDER)


@pytest.mark.parametrize(
    "path", [path for path in FILES if room_of(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room is not None
    later = {other for other in imported_rooms(path) if ORDER.index(other) > ORDER.index(room)}
    assert not later


def test_the_walk_sees_imports():
    assert {"bounds", "config", "step"} <= imported_rooms(ROOT / "certtrain" / "attacks" / "base.py")
    assert {"attacks", "bounds"} <= imported_rooms(ROOT / "verifiers" / "stages.py")


def test_kernels_import_torch_and_one_compiler_alone():
    compilers = {"cpu": {"numba", "numpy"}, "gpu": {"triton"}}
    for path in (ROOT / "kernels").rglob("*.py"):
        allowed = {"torch", *compilers.get(path.parent.name, ()), *sys.stdlib_module_names}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and "hand_over" not in {a.name for a in node.names}:
                assert str(node.module).split(".")[0] in allowed, path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level <= len(path.relative_to(ROOT).parts) - 1, f"{path} imports of certtrain"


def test_importing_the_kernels_imports_no_compiler():
    code = "import sys, certtrain.kernels; sys.exit(bool({'numba', 'triton.language', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_certtrain_imports_nothing_else():
    code = "import sys, certtrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
