"""Answer made queries, and compare with what is known of them.

    python scripts/make_queries.py OUT_DIR --seed 0
    python scripts/benchmark_queries.py OUT_DIR --seconds 20 --clock processor --json queries.jsonl

Each query is answered in this process, reading included. A ``sat`` must bear the competition's rules
(``query_scoring``): a counterexample that does not counts as wrong, as does an answer that contradicts
``answers.csv``. It is *forgiven* where the competition's own arithmetic, in float32, finds a comparison of inputs off
by 1e-4 at most, though it holds exactly. ``--clock processor`` counts CPU seconds, also for the limit. The exit code is
1 where something was wrong.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from query_scoring import Refused, score

from certtrain.bounds.clock import until
from certtrain.errors import InputError
from certtrain.verifiers.vnncomp import RESULTS, answer


@dataclass(frozen=True)
class Known:
    """A query of ``answers.csv`` with its files; networks as in the table of instances."""

    query: str
    family: str
    size: str
    expected: str
    why: str
    networks: str | dict[str, str]
    property: str


@dataclass(frozen=True)
class Outcome:
    """The answer on a query.

    Args:
        fault: why it is wrong; empty where it is not. forgiven: whether a counterexample needs the tolerance of inputs.
    """

    query: str
    family: str
    size: str
    expected: str
    found: str
    reason: str
    stage: str
    seconds: float
    fault: str
    forgiven: bool = False

    @property
    def decided(self) -> bool:
        return self.found == self.expected and not self.fault


def known_queries(folder: Path) -> Iterator[Known]:
    with open(folder / "instances.csv", newline="") as table, open(folder / "answers.csv", newline="") as known:
        for (column, property, _), row in zip(csv.reader(table), csv.DictReader(known), strict=True):
            networks = dict(ast.literal_eval(column)) if column.startswith("[") else column
            yield Known(**row, networks=networks, property=property)


def ask(folder: Path, known: Known, seconds: float, clock: Callable[[], float] = time.process_time) -> Outcome:
    """Answer a query within seconds of a clock, and judge the answer."""
    networks: str | Path | dict[str, str | Path] = (
        {name: folder / file for name, file in known.networks.items()}
        if isinstance(known.networks, dict) else folder / known.networks
    )  # fmt: skip
    started, stage, fault, forgiven = clock(), "", "", False
    try:
        with until(now=clock):
            given = answer(networks, folder / known.property, seconds)
        found, reason, stage = RESULTS[given.word], given.reason or "", given.stage
        if found == "sat":
            fault, forgiven = judged((folder / known.property).read_text(), given.result(), networks)
        if found in ("sat", "unsat") and found != known.expected:
            fault = f"contradicts: {known.why} {fault}"
    except InputError as error:
        found, reason, fault = "error", str(error), "an error"
    spent = round(clock() - started, 3)
    return Outcome(known.query, known.family, known.size, known.expected, found, reason, stage, spent, fault, forgiven)


def judged(query: str, result: str, networks: str | Path | dict[str, str | Path]) -> tuple[str, bool]:
    """Why the rules do not take a counterexample, empty where they do; whether only with the tolerance of inputs."""
    try:
        found = score(query, result, networks)
    except Refused as error:
        return f"refused: {error}", False
    return "" if found.forgiven and found.exact else f"no counterexample: {found}", not found.accepted


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| family | size | queries | unsat | sat | undecided | wrong | forgiven | mean seconds | longest |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    groups = dict.fromkeys((one.family, one.size) for one in outcomes)
    for family, size in [*groups, ("all", "")]:
        own = [one for one in outcomes if family == "all" or (one.family, one.size) == (family, size)]
        unsat, sat = (sum(one.decided and one.found == word for one in own) for word in ("unsat", "sat"))
        wrong, forgiven = (sum(map(bool, faults)) for faults in zip(*((one.fault, one.forgiven) for one in own)))
        times = [one.seconds for one in own]
        words = (family, size, len(own), unsat, sat, len(own) - unsat - sat - wrong, wrong, forgiven)
        lines.append(f"| {' | '.join(map(str, words))} | {sum(times) / len(times):.2f} | {max(times):.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of queries")
    parser.add_argument(
        "--json", type=Path, help="appends a line for each query; those that are there are not asked again"
    )
    options = parser.parse_args()
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    torch.set_num_threads(1)
    done = dict[str, Outcome]()
    if options.json is not None and options.json.exists():
        done = {line["query"]: Outcome(**line) for line in map(json.loads, options.json.read_text().splitlines())}
    outcomes = list[Outcome]()
    for known in known_queries(options.folder):
        if not known.query.startswith(tuple(options.only)):
            continue
        outcome = done.get(known.query) or ask(options.folder, known, options.seconds, clock)
        outcomes.append(outcome)
        if known.query not in done and options.json is not None:
            with open(options.json, "a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        if not outcome.decided:
            print(f"{outcome.query} ({outcome.size}, {outcome.expected}): {outcome.found} {outcome.reason} "
                  f"{outcome.fault} [{outcome.stage}, {outcome.seconds} s]", file=sys.stderr, flush=True)  # fmt: skip
    print(table(outcomes))
    return int(any(outcome.fault for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
