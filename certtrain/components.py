"""Families of configured objects, and the names of their members in recipes and ``run.json``."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from . import plugins
from .errors import InputError


class Component(abc.ABC):
    """Base of every family of configured objects; concrete members are frozen dataclasses."""

    @classmethod
    def members(cls) -> dict[str, type[Self]]:
        """The concrete classes of this family by their ``type``, sorted by name, users' classes last."""
        members: dict[str, type[Self]] = {}
        for kind in cls._lineage():
            if dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
                name = plugins.type_name(kind)
                if name not in members or not plugins.is_current(members[name]) or plugins.is_current(kind):
                    members[name] = kind
        return dict(sorted(members.items(), key=lambda item: (plugins.is_outside(item[1]), item[0])))

    @classmethod
    def member(cls, name: object, where: str = "") -> type[Self]:
        """The concrete class of this family that has ``name`` in recipes.

        A user's class is found where its module is imported already or belongs to an installed plug-in, which is then
        imported.

        Args:
            where: path of the section, for messages.
        Raises:
            InputError: there is no such class, or a user's class of that name cannot be used.
        """
        members, field = cls.members(), f"{where}.type" if where else "type"
        if isinstance(name, str):
            if name in members:
                return _checked(members[name], members, field)
            module, colon, inside = name.partition(":")
            if colon:
                plugins.import_installed(module)
                members = cls.members()
                found = members.get(name, plugins.named_object(module, inside))
                for kind in members.values():
                    if kind is found:  # under its own name, or where another module imports it
                        return _checked(kind, members, field)
                raise InputError(f"{field}: {_why_no_member(cls, name, found, members)}")
            same = [full for full, kind in members.items() if kind.__name__ == name]
            if len(same) == 1:
                return _checked(members[same[0]], members, field)
            members = {full: members[full] for full in same} or members
        raise InputError(f"{field}: found {name!r}; accepted: {', '.join(members)}")

    @classmethod
    def _lineage(cls) -> Iterator[type[Self]]:
        yield cls
        for kind in cls.__subclasses__():
            yield from kind._lineage()


class Presets(abc.ABC):
    """Base of a section with named presets.

    In a recipe the name of one stands for the section (``search: thorough``), or in it as ``preset``, where fields
    beside it win over the preset's (``search: {preset: thorough, candidates: 4}``).
    """

    @classmethod
    @abc.abstractmethod
    def presets(cls) -> Mapping[str, Self]:
        """The presets by name."""

    @classmethod
    def preset(cls, name: object, where: str = "preset") -> Self:
        """The preset of that name; ``where`` is the field named in the error.

        Raises:
            InputError: there is no such preset.
        """
        presets = cls.presets()
        if not isinstance(name, str) or name not in presets:
            raise InputError(f"{where}: found {name!r}; accepted: {', '.join(presets)}")
        return presets[name]


def load_plugins(words: Iterable[str | Path]) -> None:
    """Import the modules or files that the user named, so that recipes can name their classes.

    Raises:
        InputError: a module cannot be imported, or defines a class that has the name of one of certtrain's.
    """
    plugins.refuse_during_import()
    if isinstance(words, str):
        raise InputError(f"plugins: found {words!r}; accepted: a list of modules and files, such as [{words!r}]")
    for word in map(str, words):
        before = set(Component._lineage())
        plugins.import_plugin(word)
        for family in Component.__subclasses__():
            members = family.members()
            for kind in members.values():
                if kind not in before:
                    _refuse_clash(kind, members, f"plug-in {word}")


def own_classes(value: object) -> dict[str, type]:
    """The users' classes inside a configured object, by their ``type``."""
    classes: dict[str, type] = {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Component) and plugins.is_outside(type(value)):
            classes[plugins.type_name(type(value))] = type(value)
        for field in fields_of(type(value)):
            classes |= own_classes(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            classes |= own_classes(item)
    return classes


def sources_of(value: object) -> dict[str, dict[str, str | None]]:
    """The section ``plugins`` of ``run.json``: file and sha256 of the text of each user's class."""
    return {name: plugins.source_of(kind) for name, kind in own_classes(value).items()}


def check_sources(description: Mapping[str, Any], *parts: object) -> None:
    """Compare the users' classes in ``parts`` with those recorded in ``run.json``.

    Raises:
        InputError: the text of a class has changed since the run was started; weights and verdicts in the folder belong
            to the earlier text.
    """
    for part in parts:
        for name, found in sources_of(part).items():
            wanted = _recorded_source(description, name).get("sha256")
            if found["sha256"] and wanted not in (None, found["sha256"]):
                raise InputError(
                    f"{name}: found a class that has changed since the run was started, in {found['file']}; accepted: "
                    f"as it was, with sha256 {wanted[:12]}…, or the changed class under another name in a new run"
                )


def with_file(error: str, description: Mapping[str, Any]) -> str:
    """Complete the message about a class that is not loaded with the file recorded in ``run.json``."""
    recorded = description.get("plugins")
    for name in recorded if isinstance(recorded, dict) else ():
        if f"found {name!r}" in error and (file := _recorded_source(description, name).get("file")):
            return error.replace("--plugin FILE.py", f"--plugin {shlex.quote(file)}")
    return error


def _recorded_source(description: Mapping[str, Any], name: str) -> dict[str, str]:
    """The recorded file and sha256 of a class. Other entries are dropped: the folder may come from anybody."""
    recorded = description.get("plugins")
    source = recorded.get(name) if isinstance(recorded, dict) else None
    items = source.items() if isinstance(source, dict) else ()
    return {key: text for key, text in items if isinstance(text, str) and text.isprintable()}


def remarks(value: object) -> list[str]:
    """Warnings about users' classes that other processes cannot find again."""
    reasons = ((name, plugins.why_lost(kind)) for name, kind in own_classes(value).items())
    lost = "resume, verify and load_model find it only where it is defined anew"
    return [f"{name} {why}: {lost}" for name, why in reasons if why]


def fields_of(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _checked(kind: type, members: Mapping[str, type], field: str) -> type:
    _refuse_clash(kind, members, field)
    if plugins.is_outside(kind) and "__dataclass_fields__" not in vars(kind):
        raise InputError(f"{field}: found {plugins.type_name(kind)}, a plain class; accepted: @dataclass(frozen=True)")
    return kind


def _refuse_clash(kind: type, members: Mapping[str, type], where: str) -> None:
    """Refuse a user's class with the name of one of certtrain's: tables and messages show bare names."""
    if plugins.is_outside(kind) and kind.__name__ in members:
        ours = members[kind.__name__]
        raise InputError(
            f"{where}: found {plugins.type_name(kind)}, which has the name of certtrain's own "
            f"{ours.__module__}:{ours.__name__}; accepted: a class of another name"
        )


def _why_no_member(family: type, name: str, found: object, members: Mapping[str, type]) -> str:
    """The reason why a name in the form ``module:Class`` is refused, and what is accepted."""
    module = name.partition(":")[0]
    if isinstance(found, type) and issubclass(found, family):
        lacks = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        return f"found {name!r}, which is abstract{lacks and f': it lacks {lacks}'}; accepted: a class that has all"
    if found is not None:
        return f"found {name!r}, which is no {family.__name__}; accepted: a class that extends {family.__name__}"
    if "<locals>" in name:
        return f"found {name!r}, defined inside a function; accepted: a class at the top of a module"
    if not module.isprintable():
        return f"found {name!r}; accepted: {', '.join(members)}"
    if module == "__main__":
        return f"found {name!r}, defined in an interactive session; accepted: a session that defines it as well"
    if plugins.is_loaded(module):
        return f"found {name!r}, but {module} defines no such class; accepted: {', '.join(members)}"
    named = f"--plugin {shlex.quote(module)} or --plugin FILE.py (in Python plugins=[{module!r}], or its import first)"
    return f"found {name!r}, a class of a module that was not named; accepted: {named}"
