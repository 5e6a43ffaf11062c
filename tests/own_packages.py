"""Packages of a user's own: written into a folder, imported, and forgotten again."""

import gc
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from certtrain import plugins
from certtrain.attacks import default
from certtrain.bounds.operations.registry import FUNCTIONS, MODULES


class forgotten:
    """Modules, classes, operations and search path of plug-ins are gone afterwards."""

    def __enter__(self) -> None:
        self.modules, self.path = set(sys.modules), list(sys.path)
        self.rules = dict(MODULES), dict(FUNCTIONS)
        gc.freeze()  # so that the collection at the end looks at what came after alone

    def __exit__(self, *_: object) -> None:
        sys.path[:] = self.path
        for name in set(sys.modules) - self.modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(tempfile.gettempdir()):
                del sys.modules[name]
        for table, before in zip((MODULES, FUNCTIONS), self.rules, strict=True):
            table.clear()
            table.update(before)
        default._built.cache_clear()  # it holds classes
        plugins._added.clear()
        plugins._digests.clear()
        gc.collect()
        gc.unfreeze()


def written(folder: Path, name: str, text: str) -> Path:
    """The file ``name`` of the package ``mine`` in ``folder``."""
    package = folder / "mine"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    file = package / f"{name}.py"
    file.write_text(text)
    return file


def imported(folder: Path, name: str, text: str) -> ModuleType:
    """The module ``mine.<name>``, written and imported."""
    plugins.import_plugin(str(written(folder, name, text)))
    return importlib.import_module(f"mine.{name}")
