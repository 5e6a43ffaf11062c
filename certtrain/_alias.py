"""In a checkout ``import kernels`` means ``certtrain.kernels``: one copy in a process.

The folders ``kernels`` and ``verifiers`` stand at the top of the repository but are installed inside
certtrain, because living PyPI packages own the bare names.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, name: str):
        self.prefix = f"{name}."

    def find_spec(self, fullname, path=None, target=None):
        return importlib.machinery.ModuleSpec(fullname, self) if fullname.startswith(self.prefix) else None

    def create_module(self, spec):
        module = importlib.import_module(f"certtrain.{spec.name}")
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self.own_spec  # the import system has just put the alias' spec there


def hand_over(name: str) -> None:
    """Make ``name`` and its submodules the same module objects as ``certtrain.<name>``."""
    sys.meta_path.insert(0, _Alias(name))
    sys.modules[name] = importlib.import_module(f"certtrain.{name}")
