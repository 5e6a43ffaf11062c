"""Conversion between frozen dataclasses, plain mappings, YAML and command-line words, with one set of checks.

A *component* is a family of configured objects (losses, attacks, data sources, …). In YAML it is a
mapping with a ``type``; the remaining keys are the fields of that frozen dataclass::

    loss: {type: CcIbp, alpha: 0.01, attack: {type: Pgd, steps: 8}}

A user's own component has its module in front, ``type: my_package.my_loss:MyLoss``: see ``certtrain.plugins``.

Overrides from the command line are written into the mapping *before* it is structured, so that a typo
or a value out of range meets the same check, and reads the same, wherever it was written. A section that
is left out keeps its default; one without a ``type`` changes the default in the fields it names.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import cattrs
import yaml

from . import plugins
from .components import Component, Presets, fields_of
from .errors import FieldError, InputError


def parse_number(value: object) -> float:
    """A finite float from a number or from text such as ``0.1``, ``5e-4`` or the exact fraction ``2/255``.

    Raises:
        ValueError: anything else, including a zero denominator, NaN and infinities.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("not a number")
    try:
        number = float(Fraction(re.sub(r"\s*/\s*", "/", value))) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError("not a number") from error
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def structure(cls: type, mapping: object, where: str = "") -> Any:
    """Build the dataclass ``cls`` (or the member of family ``cls`` named by ``type``) from a mapping.

    Raises:
        InputError: an unknown key or type, a value of the wrong kind or out of range; the message
            starts with the field's path, for example ``loss.alpha``.
    """
    prefix = f"{where}." if where else ""
    mapping = _over_preset(cls, mapping, where)
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where or 'recipe'}: found {mapping!r}; accepted: {_describe(cls)}")
    values = dict(mapping)
    if issubclass(cls, Component):
        cls = cls.member(values.pop("type", None), where)
    hints = _hints(cls, prefix)
    fields = {field.name: field for field in fields_of(cls)}
    for key in values:
        if key not in fields:
            accepted = ["preset", *fields] if issubclass(cls, Presets) else fields
            raise InputError(f"{prefix}{key}: no such field; accepted: {', '.join(accepted)}")
    for name, field in fields.items():
        if name not in values and _default(field) is dataclasses.MISSING:
            raise InputError(f"{prefix}{name}: must be given; accepted: {_describe(hints[name])}")
    built = {
        key: _value(hints[key], _over_default(value, _changed(fields[key]), f"{prefix}{key}"), f"{prefix}{key}")
        for key, value in values.items()
    }
    try:
        return cls(**built)
    except FieldError as error:
        raise InputError(f"{prefix}{error}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError) or not plugins.is_outside(cls):
            raise
        raise InputError(f"{where or 'recipe'}: refused by {plugins.type_name(cls)}: {_line(error)}") from error


def unstructure(value: Any) -> Any:
    """The plain mapping that ``structure`` turns back into an equal object."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: unstructure(getattr(value, f.name)) for f in fields_of(type(value))}
        return {"type": plugins.type_name(type(value)), **fields} if isinstance(value, Component) else fields
    if isinstance(value, (tuple, list)):
        return [unstructure(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def stable_mapping(value: Any) -> Any:
    """The mapping of ``unstructure`` without the fields made by ``added`` that hold their default: it is the same
    before and after a dataclass gets such a field."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in fields_of(type(value)) if not (ADDED in f.metadata and getattr(value, f.name) == f.default)]
        fields = {f.name: stable_mapping(getattr(value, f.name)) for f in kept}
        return {"type": plugins.type_name(type(value)), **fields} if isinstance(value, Component) else fields
    if isinstance(value, (tuple, list)):
        return [stable_mapping(item) for item in value]
    return unstructure(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file (safe loader: nothing is executed).

    Raises:
        InputError: the file is missing, not YAML, or not a mapping; names the file and the line.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; accepted: a recipe in YAML, see configs/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); accepted: a recipe in YAML") from error
    except (yaml.YAMLError, ValueError) as error:  # impossible dates raise a bare ValueError
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise InputError(f"{path}{line}: not valid YAML ({reason}); accepted: a recipe in YAML") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}; accepted: a mapping of sections")
    return content


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a mapping with the same key twice, of which YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def override(mapping: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """A copy of ``mapping`` changed by ``{"loss.alpha": "0.02", …}``; each value is read as YAML.

    A new ``type`` for a component drops the fields of the old type, because they may not exist in the new one; a
    ``preset`` drops the fields that stood there before.
    """
    merged = _copy(mapping)
    words = [(path.split("."), text) for path, text in overrides.items()]
    # types first, outer ones before inner: "--loss.alpha 0.3 --loss.type MtlIbp" means the same in whichever order
    for (*sections, key), text in sorted(words, key=lambda word: (word[0][-1] not in ("type", "preset"), len(word[0]))):
        path = ".".join([*sections, key])
        target = merged
        for section in sections:
            old = target.get(section)
            if not isinstance(old, dict):
                target[section] = {"preset": old} if isinstance(old, str) else {}
            target = target[section]
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # impossible dates raise a bare ValueError
            raise InputError(f"--{path}: found {text!r}; accepted: a value in YAML") from error
        if (key == "type" and target.get("type") != value) or _names_preset({key: value}, target):
            target.clear()
        target[key] = value
    return merged


def flatten(mapping: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The fields by the paths that the command line accepts: ``{"loss": {"alpha": 1}}`` → ``{"loss.alpha": 1}``."""
    rows: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{where}.{key}" if where else key
        rows |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return rows


def section_of(config: Any, path: str) -> str:
    """The sections that an empty field accepts, such as ``a mapping of start, every``; empty if it takes none."""
    *sections, name = path.split(".")
    for section in sections:
        config = getattr(config, section)
    kinds = typing.get_args(typing.get_type_hints(type(config))[name])
    return " or ".join(_describe(kind) for kind in kinds if isinstance(kind, type) and _is_section(kind))


def _hints(kind: type, prefix: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError as error:
        if not plugins.is_outside(kind):
            raise
        accepted = "types that its module imports, and not for type checkers alone"
        raise InputError(f"{prefix}type: {plugins.type_name(kind)}: {error}; accepted: {accepted}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def none_or(section: Any) -> Any:
    """A dataclass field with default None; a section without a ``type`` changes the fields of ``section``."""
    return dataclasses.field(default=None, metadata={"section": section})


ADDED = "added"


def added(default: Any) -> Any:
    """A dataclass field that came after the first release, with a default that means what was done before it.

    Checkpoints are recognised by ``stable_mapping``, so that runs begun without the field go on.
    """
    return dataclasses.field(default=default, metadata={ADDED: True})


def with_null_defaults(value: Any) -> Any:
    """A copy of the dataclass ``value`` with None in each field made by ``none_or`` that still holds its section,
    at every level."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        null = "section" in field.metadata and old == field.metadata["section"]
        if (new := None if null else with_null_defaults(old)) is not old:
            changes[field.name] = new
    return dataclasses.replace(value, **changes) if changes else value


def with_sections(value: Any) -> Any:
    """The dataclass ``value`` with the section of every field made by ``none_or`` that is None: what
    ``with_null_defaults`` takes away."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        new = field.metadata["section"] if old is None and "section" in field.metadata else with_sections(old)
        if new is not old:
            changes[field.name] = new
    return dataclasses.replace(value, **changes) if changes else value


def _changed(field: dataclasses.Field) -> Any:
    """The default that a section without a ``type`` changes."""
    return field.metadata.get("section", _default(field))


def _over_preset(kind: type, value: object, where: str) -> object:
    """A section with all fields of the preset that it names, under its own; any other value as it is."""
    if not issubclass(kind, Presets):
        return value
    if isinstance(value, Mapping) and "preset" in value:
        named, own = kind.preset(value["preset"], f"{where}.preset"), {k: v for k, v in value.items() if k != "preset"}
        return _update(unstructure(named), own)
    return unstructure(kind.preset(value, where)) if isinstance(value, str) else value


def _over_default(value: object, default: Any, where: str) -> object:
    """Apply a section without a ``type`` to the field's default; one with a ``type`` stands on its own."""
    value = _over_preset(type(default), value, where)
    if isinstance(value, Mapping) and "type" not in value and dataclasses.is_dataclass(default):
        return _update(unstructure(default), value)
    return value


def _update(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and "type" not in value:
            merged[key] = value if _names_preset(value, old) else _update(old, value)
        else:
            merged[key] = value
    return merged


def _names_preset(value: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether ``value`` names a preset for the section ``old``; in a component ``preset`` is a field like others."""
    return "preset" in value and "type" not in old


def _value(kind: Any, value: object, where: str) -> Any:
    """Convert ``value`` to ``kind``: dataclasses here, so that errors carry the path, other types with cattrs."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if value is None and type(None) in options:
        return None
    sections = [option for option in options if isinstance(option, type) and _is_section(option)]
    for option in sections:
        if isinstance(value, Mapping) or len(options) == 1:
            return structure(option, value, where)
    if not _is_plain(value):
        found = f"a {type(value).__name__}, which no recipe can hold"
        raise InputError(f"{where}: found {found}; accepted: {_described(options) or 'numbers, text, lists of them'}")
    for option in options:
        if (item := _item_of(option)) and isinstance(value, (list, tuple)):
            return tuple(_value(item, one, f"{where}[{place}]") for place, one in enumerate(value))
        if option not in sections:
            try:
                return _SCALARS.structure(value, option)
            except Exception:  # cattrs raises ValueError, TypeError and families of its own
                continue
    raise InputError(f"{where}: found {value!r}; accepted: {_described(options)}")


def _item_of(kind: Any) -> Any:
    """The item type of a list type if items may be sections, else None."""
    if typing.get_origin(kind) is not tuple:
        return None
    item = typing.get_args(kind)[0]
    kinds = typing.get_args(item) if _is_union(item) else (item,)
    return item if any(isinstance(kind, type) and _is_section(kind) for kind in kinds) else None


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Path))


def _is_section(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or issubclass(kind, Component)


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _described(kinds: Iterable[Any]) -> str:
    """The accepted kinds that YAML can express; in Python a field may also accept others, such as tensors."""
    return " or ".join(words for kind in kinds if (words := _describe(kind)))


def _describe(kind: Any) -> str:
    if _is_union(kind):
        return _described(typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a list ({_describe(typing.get_args(kind)[0])})"
    if isinstance(kind, type) and issubclass(kind, Component):
        return f"a mapping with type {', '.join(kind.members())}"
    if isinstance(kind, type) and issubclass(kind, Presets):
        fields = ["preset", *(field.name for field in fields_of(kind))]
        return f"{', '.join(kind.presets())} or a mapping of {', '.join(fields)}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {', '.join(field.name for field in dataclasses.fields(kind))}"
    names = {float: "a finite number or a fraction such as 2/255", int: "a whole number", bool: "true or false",
             str: "text", type(None): "null", Path: "a path"}  # fmt: skip
    return names.get(kind, "")


def _as_tuple(value: object, kind: Any) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise ValueError("not a list")
    return tuple(_SCALARS.structure(item, typing.get_args(kind)[0]) for item in value)


def _exactly(kind: type):
    def hook(value: object, _: type) -> Any:
        if type(value) is not kind:
            raise ValueError(f"not {kind.__name__}")
        return value

    return hook


_SCALARS = cattrs.Converter()
_SCALARS.register_structure_hook(float, lambda value, _: parse_number(value))
_SCALARS.register_structure_hook_func(lambda kind: typing.get_origin(kind) is tuple, _as_tuple)
for _kind in (int, bool, str):
    _SCALARS.register_structure_hook(_kind, _exactly(_kind))
