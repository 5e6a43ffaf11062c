"""Docstrings say at a glance what a thing gives: they begin with the imperative or a noun phrase. A class name stands
for one thing in the whole package."""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
RIDDLES = ("Of", "What")
"""First words after which one has to read to the end to know what is meant."""

FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("certtrain", "verifiers", "kernels", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if not {ROOT / "certtrain" / link for link in ("verifiers", "kernels")} & set(path.parents)
)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those behind assignments included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def riddles(source: str) -> list[str]:
    """Line and first line of each docstring that begins with one of ``RIDDLES``."""
    texts = docstrings(ast.parse(source))
    return [
        f"{line}: {text.splitlines()[0]}" for line, text in texts if text.split()[:1] and text.split()[0] in RIDDLES
    ]


def test_docstrings_begin_with_what_a_thing_gives():
    found = [f"{path}:{line}" for path in FILES for line in riddles((ROOT / path).read_text())]
    assert len(FILES) > 200 and found == []


def test_the_rule_sees_modules_classes_functions_and_constants():
    source = '''"""What it is."""
A = 1
"""Of B."""
class C:
    """Offered."""
    def d(self):
        """What
        it does."""
'''
    assert riddles(source) == ["1: What it is.", "3: Of B.", "7: What"]


def repeated_classes(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Class names defined more than once, nested classes included, each with the files of its definitions."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    return {name: files for name, files in places.items() if len(files) > 1}


def test_no_class_name_is_used_twice():
    package = [path for path in FILES if path.parts[0] != "scripts"]
    repeated = repeated_classes({str(path): (ROOT / path).read_text() for path in package})
    assert len(package) > 200 and repeated == {}


def test_a_class_name_that_is_used_twice_is_seen():
    sources = {"a.py": "class A: ...\nclass B:\n    class C: ...", "b.py": "class C: ...", "c.py": "A = 1"}
    assert repeated_classes(sources) == {"C": ["a.py", "b.py"]}
