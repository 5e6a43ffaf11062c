"""Studies: their file, rows and runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import flatten, read_yaml, structure, unstructure
from ..errors import InputError, check
from ..recipe import Config

FIELDS = ("name", "base", "seeds", "evaluate", "reference", "robustness", "curves", "rows")
ROW_FIELDS = ("name", "changes", "sweep")


@dataclass(frozen=True)
class Curve:
    """A figure of a metric in ``metrics.jsonl`` over the epochs, with one line for each row of the study.

    Args:
        metric: name of a number in the lines; dots lead into mappings and lists, as in ``split.2``.
        kind: kind of the lines: ``epoch``, ``diagnosis`` or ``measurement``.
        beside: further metrics in the same figure, dashed.
    """

    metric: str
    kind: str = "epoch"
    beside: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The stem of the curve's file names."""
        return f"curves-{slug_of(self.metric)}"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        label: name in the table; for a sweep it ends with the values, as in ``FAIT weight=12``.
        group: name in the study's file, shared by all values of a sweep.
        config: the recipe, except for seed and name.
        fields, swept: fields of the sweep, and their values in this row.
    """

    label: str
    group: str
    config: Config
    fields: tuple[str, ...] = ()
    swept: tuple[float | str, ...] = ()

    @property
    def slug(self) -> str:
        return slug_of(self.label)


@dataclass(frozen=True)
class Trial:
    """One run of a study: a row, a seed and a folder."""

    row: Row
    seed: int
    config: Config
    path: Path

    def __str__(self) -> str:
        return f"{self.row.label}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """Recipes that share their data.

    Args:
        file: path of the file.
        name: name of its folder.
        rows, seeds: each row is run with each seed.
        reference: label of the row by whose training time the others are divided.
        robustness: attack whose accuracy the figures show, or ``certified``.
        curves: figures over the epochs.
    """

    file: Path
    name: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    reference: str
    robustness: str
    curves: tuple[Curve, ...] = field(default=())

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    def trials(self, out: Path) -> Iterator[Trial]:
        """All runs in ``out``, ordered by seed: every row has its first seed before any has its second."""
        for seed, row in itertools.product(self.seeds, self.rows):
            name = f"{row.slug}-seed{seed}"
            config = dataclasses.replace(row.config, seed=seed, name=f"{self.name}-{name}")
            yield Trial(row, seed, config, out / name)


def read_study(path: str | Path) -> Study:
    """Read a study from its YAML file; the recipe of each row is built and checked.

    Raises:
        InputError: names the file, row, field, the value found and the accepted ones.
    """
    path = Path(path)
    mapping = read_yaml(path)
    try:
        return _study(path, mapping)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _study(path: Path, mapping: Mapping[str, Any]) -> Study:
    _refuse_others(mapping, FIELDS, "")
    name, seeds = mapping.get("name"), mapping.get("seeds", [0])
    fine = isinstance(name, str) and slug_of(name) and "/" not in name
    check(fine, "name", name, "a name with a letter or digit, without slashes")
    fine = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    check(fine and len(set(seeds)) == len(seeds), "seeds", seeds, "a list of different whole numbers >= 0")
    base = _base(path, mapping.get("base"))
    evaluate = _mapping(mapping.get("evaluate", {}), "evaluate")
    if evaluate:
        base = changed(base, {"evaluate": evaluate})
    entries = _list(mapping.get("rows"), "rows")
    rows = [row for number, entry in enumerate(entries) for row in _rows(entry, base, f"rows[{number}]")]
    check(rows, "rows", rows, "a list of mappings of name, changes, sweep")
    names = [entry["name"] for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    check(twice is None, "rows", f"{twice} twice", "different names")
    _refuse_twins(rows)
    _refuse_other_data(rows)
    curves = _list(mapping.get("curves", []), "curves")
    curves = tuple(structure(Curve, entry, f"curves[{number}]") for number, entry in enumerate(curves))
    stems = [curve.stem for curve in curves]
    twin = next((curve.metric for curve in curves if stems.count(curve.stem) > 1), None)
    check(twin is None, "curves", f"{twin} twice", "different metrics, for each has files of its own")
    labels = [row.label for row in rows]
    reference = mapping.get("reference", labels[0])
    check(reference in labels, "reference", reference, f"a row: {'; '.join(labels)}")
    attacks = rows[0].config.evaluate.attacks or ("",)
    robustness = mapping.get("robustness", attacks[0])
    shown = [*attacks, *(["certified"] if rows[0].config.certify.enabled else [])]
    check(robustness in shown, "robustness", robustness, f"one of evaluate.attacks: {', '.join(shown)}")
    return Study(path, str(name), tuple(rows), tuple(seeds), reference, robustness, curves)


def _base(path: Path, base: Any) -> Mapping[str, Any]:
    if isinstance(base, str):
        return read_yaml(path.parent / base)
    return _mapping(base, "base", "a recipe, or a path to one from the study's folder")


def _rows(entry: Any, base: Mapping[str, Any], place: str) -> Iterator[Row]:
    """One row, or one for each combination of a sweep's values."""
    entry = _mapping(entry, place, f"a mapping of {', '.join(ROW_FIELDS)}")
    _refuse_others(entry, ROW_FIELDS, f"{place}.")
    name = entry.get("name")
    fine = isinstance(name, str) and slug_of(name) and "," not in name
    check(fine, f"{place}.name", name, "text with a letter or digit, without a comma")
    where = f"row {name}: "
    recipe = changed(base, _mapping(entry.get("changes", {}), f"{where}changes"))
    sweep = _mapping(entry.get("sweep", {}), f"{where}sweep")
    for path, values in sweep.items():
        fine = isinstance(values, list) and values and all(isinstance(v, (int, float, str)) for v in values)
        check(
            fine and isinstance(path, str), f"{where}sweep: {path}", values, "section.field: a list of numbers or words"
        )
    for values in itertools.product(*sweep.values()):
        swept, words = recipe, [str(name)]
        for path, value in zip(sweep, values):
            swept = changed(swept, _nested(path, value))
            words.append(f"{_short(path, sweep)}={value}")
        try:
            config = structure(Config, swept)
            config.loss.check_ball(config.perturbation)
            config.training.update.check_loss(config.loss)
            best = "best" in config.evaluate.checkpoints and not config.training.select
            check(not best, "evaluate.checkpoints", "best", "last, or a training.select that keeps one")
        except InputError as error:
            raise InputError(f"row {' '.join(words)}: {error}") from error
        yield Row(" ".join(words), str(name), config, tuple(sweep), values)


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` changed by ``changes``, as defaults are by a recipe: a mapping without a ``type`` changes the fields
    that it names, one with a ``type`` stands on its own."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and "type" not in value and isinstance(merged.get(key), Mapping)
        merged[key] = changed(merged[key], value) if nested else value
    return merged


def slug_of(text: str) -> str:
    """A folder name from a label: ``FGSM-RS + QUB`` → ``fgsm-rs-qub``."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _short(path: str, paths: Mapping[str, Any]) -> str:
    last = path.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in paths) == 1 else path


def _mapping(value: Any, where: str, accepted: str = "a mapping") -> Mapping[str, Any]:
    check(isinstance(value, Mapping), where, value, accepted)
    return value


def _list(value: Any, where: str) -> list[Any]:
    check(isinstance(value, list), where, value, "a list")
    return value


def _refuse_others(mapping: Mapping[str, Any], fields: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key not in fields:
            raise InputError(f"{where}{key}: no such field; accepted: {', '.join(fields)}")


def _refuse_other_data(rows: list[Row]) -> None:
    """Refuse rows with different data: accuracies on different images would share a column."""
    first = flatten(unstructure(rows[0].config.data))
    for row in rows:
        found = flatten(unstructure(row.config.data))
        for name in [*found, *first]:
            if found.get(name) != first.get(name):
                raise InputError(
                    f"row {row.label}: data.{name}: found {found.get(name)!r}; accepted: {first.get(name)!r}, as in "
                    "the first row, for all rows share their data"
                )


def _refuse_twins(rows: list[Row]) -> None:
    """Refuse two rows with the same folder."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row.slug in seen:
            raise InputError(
                f"rows: found {seen[row.slug].label!r} and {row.label!r}, whose folders are both {row.slug}; accepted: "
                "names that differ in letters or digits"
            )
        seen[row.slug] = row
