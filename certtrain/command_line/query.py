"""``verify`` of a VNN-LIB query, as the standard's command line has it: nothing but the answer goes to stdout."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..verifiers import Certify

NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_]*)=(.*)", re.DOTALL)
"""A network's name, and its file."""


def named_files(query: Path, words: Sequence[str]) -> str | dict[str, str]:
    """The files of ``--network`` by the names of their networks, or the only word without a name: a file, or a list.

    A file whose own name begins like ``name=`` is told apart by a folder in front, ``./name=net.onnx``.

    Raises:
        InputError: no file, a name twice, or a file without a name beside others.
    """
    from ..errors import InputError

    accepted = "--network NAME=FILE for each network of the query, once, or --network FILE for its only one"
    named: dict[str, str] = {}
    for word in words:
        match = NAMED.fullmatch(word)
        if match is None and len(words) == 1 and word:
            return word
        if match is None or match[1] in named or not match[2]:
            raise InputError(f"--network: found {word!r}; accepted: {accepted}")
        named[match[1]] = match[2]
    if not named:
        raise InputError(f"{query}: found a query without networks; accepted: {accepted}; of a run its folder")
    return named


def answer_query(
    path: Path,
    networks: str | dict[str, str],
    settings: Certify,
    started: float,
    *,
    results: str | None,
    record: str | None,
    assignments: str | None,
) -> int:
    """Print the answer on a query; its assignment goes to the folder ``assignments`` where one is given. The timeout
    counts from ``started``, by ``perf_counter``: imports take seconds."""
    with contextlib.redirect_stdout(sys.stderr):
        from ..verifiers.network_list import named_networks
        from ..verifiers.solving import refuse_unnecessary, said, solve

        if isinstance(networks, str):  # as instances have it
            networks = named_networks(networks, "--network")
        else:
            refuse_unnecessary(path, networks)
        left = max(settings.timeout - (perf_counter() - started), 1e-9)
        settings = replace(settings, timeout=left)
        found = solve(path, networks, results=results, record=record, assignments=assignments, certify=settings)
    for name, note in (("remark", found.remark), ("reason", found.reason), ("arithmetic", found.arithmetic)):
        if note is not None:
            print(f"{name}: {note}", file=sys.stderr)
    print(said(found, serialised=assignments is not None), end="")
    return 0
