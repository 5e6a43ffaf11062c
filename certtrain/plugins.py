"""Users' modules: the names of their classes, and the rules for importing them.

certtrain's classes are called by their bare name, all others by ``module:Class``. A module is imported only if the user
named it with ``--plugin``, in ``plugins=[...]``, or by installing a distribution with an entry point in ``GROUP``.
Names in a run folder are looked up among these classes and never cause another import.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from importlib import metadata
from pathlib import Path

from .errors import InputError

GROUP = "certtrain.plugins"
"""Group of the entry points that name modules with plug-ins."""

ACCEPTED = "a module such as my_package.my_loss, or a file such as path/to/my_loss.py"

_added: list[str] = []
"""Folders that this module added to ``sys.path``."""
_digests: dict[str, str] = {}
"""sha256 of the files that this module imported, by module name."""
_importing: list[str] = []
"""Plug-ins whose import is in progress, outermost first."""


def is_outside(kind: type) -> bool:
    """Whether a class is a user's rather than certtrain's."""
    return not kind.__module__.startswith("certtrain.")


def type_name(kind: type) -> str:
    """The name of a class in recipes and ``run.json``: ``CcIbp``, or ``my_package.my_loss:MyLoss``."""
    return f"{_home(kind)}:{kind.__qualname__}" if is_outside(kind) else kind.__name__


def is_current(kind: type) -> bool:
    """Whether the name of a class still refers to it: a notebook cell that runs again leaves older classes behind."""
    return named_object(kind.__module__, kind.__qualname__) is kind


def named_object(module: str, name: str) -> object:
    """The object called ``name`` in a module that is imported already, or None. Runs no code."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        if not (inspect.ismodule(found) or inspect.isclass(found)):
            return None
        found = vars(found).get(part)
    return found


def is_loaded(module: str) -> bool:
    """Whether an imported module, or the running script, has this name."""
    return module in sys.modules or module == _script("__main__")


def source_of(kind: type) -> dict[str, str | None]:
    """The ``file`` of a user's class, and the ``sha256`` of its source text and that of its bases outside certtrain.
    Both are None without a file, as in an interactive session. Code called by its methods is not included."""
    try:
        file = inspect.getsourcefile(kind)
        texts = [inspect.getsource(base) for base in kind.__mro__ if base is kind or _is_users(base)]
    except (OSError, TypeError):
        return {"file": None, "sha256": None}
    place = None if file is None else os.path.abspath(file)
    return {"file": place, "sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest()}


def why_lost(kind: type) -> str:
    """The reason why ``--plugin`` cannot load a user's class in another process, or ``""``."""
    if "<locals>" in kind.__qualname__:
        return "is defined inside a function"
    home = _home(kind)
    if home == "__main__":
        return "is defined in an interactive session"
    if home != kind.__module__ and home.partition(".")[0] in sys.stdlib_module_names:
        return f"is defined in a script that has the name of Python's own {home}"
    return ""


def import_plugin(word: str) -> None:
    """Import the module, or the file, that the user named.

    A dotted name is looked up as Python does, then in the current folder. A file is imported under its own name, or
    under its dotted name inside a package. The folder that contains it stays at the end of ``sys.path``.

    Raises:
        InputError: no such module or file, a name that another module has, or an import that fails.
    """
    importlib.invalidate_caches()
    if word.endswith(".py") or os.sep in word:
        _import_file(word)
    else:
        _import_module(word)


def import_installed(module: str) -> None:
    """Import the installed plug-in that contains ``module``: the module of an entry point, or a package around it.

    Raises:
        InputError: the import fails.
    """
    for name in _installed():
        if name not in sys.modules and (module == name or module.startswith(f"{name}.")):
            _import(name, f"{name} (an entry point of {GROUP})")


def refuse_during_import() -> None:
    """Refuse calls of certtrain while a plug-in is imported: a script that trains on import would train at each use.

    Raises:
        InputError: the import of a plug-in is in progress.
    """
    if _importing:
        raise InputError('its import uses certtrain; accepted: what it runs stands below if __name__ == "__main__":')


def _installed() -> list[str]:
    """The modules named by entry points, except in the current folder, which may be a run's."""
    here = {os.path.realpath(path) for path in ("", *_added)}
    path = [entry for entry in sys.path if os.path.realpath(entry) not in here]
    points = (point for found in metadata.distributions(path=path) for point in found.entry_points)
    return sorted({point.module for point in points if point.group == GROUP})


def _is_users(kind: type) -> bool:
    return is_outside(kind) and kind.__module__.partition(".")[0] not in sys.stdlib_module_names


def _home(kind: type) -> str:
    """The module from which a class can be imported: for a script its file name instead of ``__main__``."""
    return _script(kind.__module__) if kind.__module__ in ("__main__", "__mp_main__") else kind.__module__


def _script(module: str) -> str:
    """The import name of the script that runs as ``module``; ``__main__`` if it has none."""
    main = sys.modules.get(module)
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:  # python -m package.module
        return spec.name
    if file is None or not file.endswith(".py"):  # an interactive session, a notebook
        return "__main__"
    name = _place(file)[1]
    return "__main__" if "." in Path(file).stem else name


def _place(file: str) -> tuple[str, str]:
    """The folder from which a file is imported, above all packages that contain it, and its dotted name there."""
    folder, stem = os.path.split(os.path.abspath(file))
    parts = [] if stem == "__init__.py" else [stem.removesuffix(".py")]
    while os.path.exists(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        parts.insert(0, package)
    return folder, ".".join(parts)


def _import_module(word: str) -> None:
    if not all(part.isidentifier() for part in word.split(".")):
        raise InputError(f"plug-in {word!r}: is no module; accepted: {ACCEPTED}")
    if not _exists(word):
        added = _add(os.getcwd())
        if not _exists(word):
            _remove(added)
            raise InputError(f"plug-in {word!r}: found no such module, nor in {os.getcwd()}; accepted: {ACCEPTED}")
    _import(word, word)


def _exists(word: str) -> bool:
    """Whether the outermost package can be found. Looking for the inner modules would import it."""
    top = word.partition(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


def _import_file(word: str) -> None:
    file = os.path.join(word, "__init__.py") if os.path.isdir(word) else word
    if not os.path.isfile(file) or not file.endswith(".py"):
        raise InputError(f"plug-in {word}: found no such Python file; accepted: {ACCEPTED}")
    if _same(getattr(sys.modules["__main__"], "__file__", None), file):  # the script that runs: its classes are there
        return
    folder, name = _place(file)
    stem = os.path.basename(file).removesuffix(".py")
    if "." in stem:
        raise InputError(f"plug-in {word}: found a dot in its name; accepted: such as {stem.replace('.', '_')}.py")
    top = name.partition(".")[0]
    added = _add(folder)
    try:
        found = sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)
    except ValueError:  # a module without a spec
        found = None
    wanted = (os.path.join(folder, f"{top}.py"), os.path.join(folder, top, "__init__.py"))
    if found is None or not any(_same(found.origin, path) for path in wanted):
        _remove(added)
        where = "one without a file" if found is None or found.origin is None else found.origin
        raise InputError(f"plug-in {word}: {top} is already a module, {where}; accepted: a file of another name")
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    if name in sys.modules and _digests.get(name, digest) != digest:
        raise InputError(f"plug-in {word}: has changed since this process imported it; accepted: a new process")
    try:
        _import(name, word)
    except InputError:
        _remove(added)
        raise
    _digests[name] = digest


def _same(one: str | None, other: str) -> bool:
    return one is not None and os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _add(folder: str) -> str | None:
    if folder in sys.path:
        return None
    sys.path.append(folder)
    _added.append(folder)
    return folder


def _remove(folder: str | None) -> None:
    if folder is not None:
        sys.path.remove(folder)
        _added.remove(folder)


def _import(module: str, word: str) -> None:
    _importing.append(word)
    try:
        importlib.import_module(module)
    except InputError as error:
        raise InputError(f"plug-in {word}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"plug-in {word}: its import fails{_where(error)}; accepted: a module that imports") from error
    finally:
        _importing.pop()


def _where(error: BaseException) -> str:
    """The place and text of an error, such as `` (my_loss.py, line 3: NameError: name 'x' is not defined)``."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    return f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno}: {text})" if own else f" ({text})"
