"""Imports run one way: from layer to layer, and within a layer without a circle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from walking import walk

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors", "plugins", "components", "labels", "noise", "config", "devices", "precision", "environment", "locking",
     "typed", "run_folder", "streams", "progress", "ledger", "kernels", "checker"},
    {"bounds"},
    {"step", "data", "models", "attacks", "losses"},
    {"training", "verifiers", "evaluation", "diagnostics", "export"},
    {"recipe", "comparison", "importing"},
    {"workflows"},
    {"command_line"},
    {"__main__"},
]  # fmt: skip
LAYER = {room: number for number, layer in enumerate(LAYERS) for room in layer}
FOLDERS = {"certtrain": ROOT / "certtrain", "certtrain.kernels": ROOT / "kernels",
           "certtrain.verifiers": ROOT / "verifiers"}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its name, with its file."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name != "certtrain" or parts[0] not in ("kernels", "verifiers"):  # links
                found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room_of(module: str) -> str | None:
    """None for the package itself and its aliases."""
    parts = module.split(".")[1:]
    return parts[0] if parts and parts[0] != "_alias" else None


def imports(module: str, *, everywhere: bool) -> set[str]:
    """Modules of certtrain that a module imports: when it is imported itself, or ``everywhere``, in functions and for
    type checkers too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, ast.FunctionDef)
            later |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if later and not everywhere:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*base, *([child.module] if child.module else [])])
                names = {f"{base}.{alias.name}" for alias in child.names}
                found.update(names & MODULES.keys() or {base})
            else:
                visit(child)

    visit(ast.parse(path.read_text()))
    return found & MODULES.keys() - {module}


def room_imports(module: str) -> set[str]:
    """Other rooms that a module imports, wherever it does."""
    return {room for other in imports(module, everywhere=True) if (room := room_of(other))} - {room_of(module)}


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """One circle, if there is any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [tuple(error.args[1])]
    return []


def test_every_room_has_its_layer():
    assert {room for module in MODULES if (room := room_of(module))} == LAYER.keys()
    assert sum(map(len, LAYERS)) == len(LAYER)


@walk("layer", range(len(LAYERS)))
def test_rooms_import_only_from_their_own_layer_and_those_to_its_left(layer):
    wrong = {
        (module, room)
        for module in MODULES
        if LAYER.get(room_of(module) or "") == layer
        for room in room_imports(module)
        if LAYER[room] > layer
    }
    assert not wrong


def test_no_rooms_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        if room := room_of(module):
            graph.setdefault(room, set()).update(room_imports(module))
    assert not circles(graph)


def test_no_modules_import_each_other_in_a_circle():
    assert not circles({module: imports(module, everywhere=False) for module in MODULES})


def test_the_walk_sees_imports():
    assert {"bounds", "config", "step"} <= room_imports("certtrain.attacks.base")
    assert {"attacks", "bounds"} <= room_imports("certtrain.verifiers.stages")
    assert "workflows" in room_imports("certtrain.command_line.verify")  # inside a function
    assert "certtrain.workflows.verify" not in imports("certtrain.command_line.verify", everywhere=False)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circles({"a": {"b", "c"}, "b": {"c"}})


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
