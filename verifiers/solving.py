"""Answers queries in the words of the VNN-LIB standard's command line (VNN-LIB/VNNLIB-Standard, chapter 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .assignments import check_folder, write_assignment
from .queries import Networks, present
from .settings import Arithmetic, Certify
from .vnncomp import PROPERTY, RESULTS, Answer, Word, answer
from .vnnlib_reader import read_query
from .vnnlib_text import Token

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
    proof: str | Path | None = None,
) -> Answer:
    """Decide whether a query has an assignment of inputs that satisfies it.

    Args:
        query: a VNN-LIB file, plain or gzipped, of version 1.0 or 2.0.
        networks: ONNX files by the names that the query declares, except of networks that equal another; or the one
            file of a query about one network, whatever its name.
        timeout: seconds, reading included; None for those of ``certify``.
        assignments: folder for the assignment, a file ``NAME.pb`` (an ONNX TensorProto) for each declared tensor; it is
            made where there is none.
        arithmetic, results, record, certify, proof: as for ``certtrain.verifiers.vnncomp.answer``.
    Returns:
        an ``Answer``: its ``word`` is ``violated`` where an assignment exists, and ``holds`` where it is proved that
        none does. Where memory ran out it is ``unknown``.
    Raises:
        InputError: a file that cannot be read, or does not fit the others; networks missing or too many; a place where
            nothing can be written.
    """
    if assignments is not None:
        check_folder(assignments)
    found = answer(
        networks, query, timeout, arithmetic=arithmetic, results=results, record=record, certify=certify, proof=proof
    )
    if assignments is not None:
        write_assignment(assignments, found)
    return found


def refuse_unnecessary(query: str | Path, networks: Mapping[str, str | Path]) -> None:
    """Refuse a file for a network that is ``equal-to`` another, as the standard's command line must.

    Raises:
        InputError: such a file, also where both have the same, as tables of instances list it; a query that cannot be
            read.
    """
    if len(networks) < 2:
        return
    asked = read_query(present(query))
    for network in asked.declared.networks if asked.declared else ():
        if network.equal_to and network.name in networks:
            found = Token(f"{network.name} equal-to {network.equal_to} with a file of its own", network.line)
            asked.source.refuse(found, f"a file for {network.equal_to}, and none for {network.name}")


def said(answer: Answer, *, serialised: bool = False) -> str:
    """The answer as the standard's command line prints it: its word in the first line, and behind ``sat`` the
    assignment, in the form of the query's version of VNN-LIB, unless it is ``serialised``."""
    return "\n".join([STANDARD[answer.word], *([] if serialised else answer.assigned()), ""])
