"""One test that walks over a table, in place of a test id for each of its rows."""

import functools
import inspect
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def walk(names: str | Iterable[str], values: Iterable[Any], ids: Any = None) -> Callable:
    """Call the test once for each row, in one test id: the arguments of ``pytest.mark.parametrize``.

    Every row is tried. The failing ones are raised together, each with its row as a note. Rows that are skipped are
    passed over; where all are, the test is. The fixtures of a test are made once for all of its rows, so that a row
    must leave them as it found them. Several walks over one test make their product.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    named = None if ids is None or callable(ids) else list(ids)
    rows = []
    for number, row in enumerate(values):
        if isinstance(row, ParameterSet):
            assert not row.marks, "a walk knows no marks"
            value, name = row.values, row.id
        else:
            value, name = (row if len(names) > 1 else (row,)), named and named[number]
        if callable(ids):
            name = "-".join(str(ids(part)) for part in value)
        rows.append((dict(zip(names, value, strict=True)), name))
    assert rows, f"no row of {', '.join(names)}"

    def decorate(test: Callable) -> Callable:
        inner, walked = getattr(test, "walked", (test, []))
        tables = [rows, *walked]

        def once(**fixtures):
            failed, skipped, count = [], [], 0
            for parts in product(*tables):
                arguments = {name: value for part, _ in parts for name, value in part.items()}
                count += 1
                try:
                    inner(**fixtures, **arguments)
                except pytest.skip.Exception as reason:
                    skipped.append(reason)
                except (Exception, pytest.fail.Exception) as error:
                    error.add_note(f"row: {', '.join(_named(*part) for part in parts)}")
                    failed.append(error)
            if failed:
                told = "\n".join(error.__notes__[-1] for error in failed)
                raise BaseExceptionGroup(f"{len(failed)} of {count} rows failed\n{told}", failed)
            if len(skipped) == count:
                raise skipped[0]

        signature = inspect.signature(inner)
        walks = {name for table in tables for part, _ in table for name in part}
        kept = [parameter for name, parameter in signature.parameters.items() if name not in walks]
        assert walks <= set(signature.parameters), f"{inner.__name__} takes no {walks - set(signature.parameters)}"
        wrapped = functools.wraps(test)(_with_self(once) if "self" in signature.parameters else once)
        wrapped.__signature__ = signature.replace(parameters=kept)  # pytest reads the fixtures from it
        del wrapped.__wrapped__
        wrapped.walked = inner, tables
        return wrapped

    return decorate


def pairs(*axes: Iterable[Any]) -> list[tuple]:
    """Rows of the axes' product such that any two values of two axes meet in a row: few, and always the same ones."""
    columns = [list(axis) for axis in axes]
    rows = list(product(*(range(len(column)) for column in columns)))
    places = [list(combinations(enumerate(row), 2)) for row in rows]
    missing, chosen = {pair for row in places for pair in row}, []
    while missing:
        best = max(range(len(rows)), key=lambda number: sum(pair in missing for pair in places[number]))
        missing.difference_update(places[best])
        chosen.append(best)
    return [tuple(column[i] for column, i in zip(columns, rows[number])) for number in sorted(chosen)]


def _with_self(once: Callable) -> Callable:
    return lambda self, **fixtures: once(self=self, **fixtures)


def _named(part: dict[str, Any], name: Any) -> str:
    return str(name) if name else ", ".join(f"{key}={value!r}" for key, value in part.items())
