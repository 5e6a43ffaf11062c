"""Answers queries in the words of the VNN-LIB standard's command line (VNN-LIB/VNNLIB-Standard, chapter 5)."""

from __future__ import annotations

from pathlib import Path

from .assignments import check_folder, write_assignment
from .queries import Networks
from .settings import Arithmetic, Certify
from .vnncomp import PROPERTY, RESULTS, Answer, Word, answer

STANDARD: dict[Word, str] = {**RESULTS, "timeout": "timed-out"}
"""The standard's words: whether an assignment exists that satisfies the query."""


def solve(
    query: str | Path,
    networks: Networks,
    timeout: float | None = None,
    *,
    arithmetic: Arithmetic | None = None,
    results: str | Path | None = None,
    record: str | Path | None = None,
    assignments: str | Path | None = None,
    certify: Certify = PROPERTY,
) -> Answer:
    """Decide whether a query has an assignment of inputs that satisfies it.

    Args:
        query: a VNN-LIB file, plain or gzipped, of version 1.0 or 2.0.
        networks: ONNX files by the names that the query declares, except of networks that equal another; or the one
            file of a query about one network, whatever its name.
        timeout: seconds, reading included; None for those of ``certify``.
        assignments: folder for the assignment, a file ``NAME.pb`` (an ONNX TensorProto) for each declared tensor; it is
            made where there is none.
        arithmetic, results, record, certify: as for ``certtrain.verifiers.vnncomp.answer``.
    Returns:
        an ``Answer``: its ``word`` is ``violated`` where an assignment exists, and ``holds`` where it is proved that
        none does. Where memory ran out it is ``unknown``.
    Raises:
        InputError: a file that cannot be read, or does not fit the others; networks missing or too many; a place where
            nothing can be written.
    """
    if assignments is not None:
        check_folder(assignments)
    found = answer(networks, query, timeout, arithmetic=arithmetic, results=results, record=record, certify=certify)
    if assignments is not None:
        write_assignment(assignments, found)
    return found


def said(answer: Answer, *, serialised: bool = False) -> str:
    """The answer as the standard's command line prints it: its word in the first line, and behind ``sat`` the
    assignment, in the form of the query's version of VNN-LIB, unless it is ``serialised``."""
    return "\n".join([STANDARD[answer.word], *([] if serialised else answer.assigned()), ""])
