"""Contests between processes: the cases hard, closed, networks and easy of ``benchmark_verification``."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, TypeVar

from contenders import PUBLISHED, AlphaBetaCrown, Checkout, Contender, Ran, Track, Usage

from certtrain.errors import InputError
from certtrain.verifiers.abcrown import HOME, PYTHON, Abcrown
from certtrain.verifiers.instances import Instance, read_instances

OURS, OTHER, RIVAL = "ours", "other tree", "α-β-CROWN"
DECIDED = ("holds", "violated")
OPPOSITE = [{"holds", "violated"}, {"verified", "falsified"}]
ALLOWED = "1.1 · limit + 1 s"
STAGES = "ibp,crown_ibp,attack,crown,alpha,bab"
C = TypeVar("C", bound=Contender)


def add_options(parser: argparse.ArgumentParser) -> None:
    contest = parser.add_argument_group("hard, closed, networks, easy: contests between processes on one core")
    contest.add_argument("--instances", type=Path, metavar="CSV", help="hard, closed: a table onnx,vnnlib,seconds")
    contest.add_argument(
        "--only", nargs="+", metavar="TEXT", help="of it, the properties whose path contains one of these"
    )
    contest.add_argument("--limits", type=float, nargs="+", default=[30.0], metavar="S", help="seconds for an instance")
    contest.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="whose seconds limits are; processor, on a busy machine: contenders' clocks count CPU time",
    )
    contest.add_argument("--tree", type=Path, metavar="DIR", help="another checkout to be run beside this one")
    contest.add_argument(
        "--ours", default="", metavar="ARGUMENTS", help="further arguments of our verify.py, as one word"
    )
    contest.add_argument(
        "--without-abcrown", action="store_true", help=f"even where {PYTHON} and {HOME} say where it is"
    )
    contest.add_argument(
        "--published",
        nargs="+",
        default=[],
        metavar="EXPRESSION=YAML",
        help="α-β-CROWN's settings, in its exp_configs, for networks whose file name fits",
    )
    contest.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="where all contenders run")
    contest.add_argument("--runs", type=Path, nargs="+", metavar="DIR", help="networks: finished runs")
    contest.add_argument("--abcrown-runs", type=Path, nargs="+", default=[], metavar="DIR",
                         help="of them, those that α-β-CROWN gets as well")  # fmt: skip
    contest.add_argument("--seconds", type=float, default=5.0, help="networks, easy: limit for an image, an instance")
    contest.add_argument("--folders", type=Path, nargs="+", metavar="DIR", help="easy: folders with an instances.csv")
    contest.add_argument("--sample", type=int, default=20, help="easy: how many of each, evenly spread over the table")


def hard(options: argparse.Namespace) -> dict[str, Any]:
    """Every contender on every instance at every limit."""
    contenders, instances, track = _contenders(options), _instances(options), _track(options)
    starts = _starts(contenders, track)
    rows = list[dict[str, Any]]()
    for limit in options.limits:
        for number, instance in enumerate(instances):
            for contender in _turns(contenders, number):
                ran = contender.answer(instance, limit, track)
                rows += [_row(contender, instance, limit, ran, starts[contender.name], track)]
                _say(rows[-1])
    found: dict[str, Any] = {"rows": rows, "start-up": {name: _usage(usage) for name, usage in starts.items()}}
    for limit in options.limits:
        at = [row for row in rows if row["limit"] == limit]
        decided = Counter(row["contender"] for row in at if row["decided"])
        found[f"decided at {limit:g} s"] = {one.name: decided[one.name] for one in contenders}
        found[f"late at {limit:g} s ({ALLOWED})"] = [f"{r['contender']}: {r['instance']}" for r in at if r["late"]]
        for rival in contenders[1:]:
            ratios = _ratios(at, rival.name)
            found[f"CPU time / {rival.name}'s at {limit:g} s, both decide"] = ratios
    return {**found, "contradictions": _contradictions(rows)}


def closed(options: argparse.Namespace) -> dict[str, Any]:
    """Subproblems closed per CPU second."""
    contenders, instances, track = _contenders(options), _instances(options), _track(options)
    starts, limit = _starts(contenders, track), options.limits[0]
    rows = list[dict[str, Any]]()
    for number, instance in enumerate(instances):
        for contender in _turns(contenders, number):
            ran = contender.search(instance, limit, track)
            row = _row(contender, instance, limit, ran, starts[contender.name], track)
            seconds = max(row["processor"] - starts[contender.name].processor, 0.01)
            row |= {**ran.counts, "closed a second": round(ran.counts.get("closed", 0) / seconds, 1),
                    "children a second": round(ran.counts.get("children", 0) / seconds, 1)}  # fmt: skip
            rows += [row]
            _say(row)
    found: dict[str, Any] = {"rows": rows, "start-up": {name: _usage(usage) for name, usage in starts.items()}}
    for name in dict.fromkeys(row["instance"] for row in rows):
        rates = {row["contender"]: row["closed a second"] for row in rows if row["instance"] == name}
        found[f"closed a CPU second, {name}"] = rates
        for rival in contenders[1:]:
            ratio = rates[OURS] / rates[rival.name] if rates[rival.name] else None
            found[f"ours / {rival.name}'s, {name}"] = ratio and round(ratio, 2)
    return {**found, "contradictions": _contradictions(rows)}


def networks(options: argparse.Namespace) -> dict[str, Any]:
    """The first test images of finished runs, each contender by one process for a run."""
    trees = [one for one in _contenders(options) if isinstance(one, Checkout)]
    for run in (run for run in options.abcrown_runs if run not in options.runs):
        raise InputError(f"--abcrown-runs: found {run}; accepted: some of --runs")
    found, rows = dict[str, Any](), list[dict[str, Any]]()
    for number, run in enumerate(options.runs):
        asked = list[tuple[str, Checkout, list[str]]]()
        for tree in _turns(trees, number):
            asked += [(tree.name, tree, ["--stages", STAGES])]
        if run in options.abcrown_runs:
            asked += [(RIVAL, trees[0], ["--verifier", "abcrown"])]
        for name, tree, words in asked:
            usage, statuses = _verified(run, tree, words, options)
            counts = Counter(statuses.values())
            refuted = counts["falsified"] + counts["misclassified"]
            row = {
                "run": run.name, "contender": name, "certified": counts["verified"], "refuted": refuted,
                "undecided": options.images - counts["verified"] - refuted, **_usage(usage),
            }  # fmt: skip
            rows += [row]
            _say(row)
            row["statuses"] = statuses
        found[run.name] = {r["contender"]: {k: r[k] for k in ("certified", "undecided", "processor", "wall")}
                           for r in rows if r["run"] == run.name}  # fmt: skip
    wrong = [
        f"{one['run']}, image {image}: {one['contender']} {word}, {two['contender']} {two['statuses'][image]}"
        for one, two in combinations(rows, 2)
        if one["run"] == two["run"]
        for image, word in one["statuses"].items()
        if {word, two["statuses"].get(image)} in OPPOSITE
    ]
    return {**found, "rows": rows, "contradictions": wrong}


def easy(options: argparse.Namespace) -> dict[str, Any]:
    """Samples of tables of easy instances: what the other tree decides, and its CPU time."""
    trees = [one for one in _contenders(options) if isinstance(one, Checkout)]
    track = _track(options)
    starts = _starts(trees, track)
    found, wrong = dict[str, Any](), list[str]()
    for folder in options.folders:
        with tempfile.TemporaryDirectory(prefix="certtrain-benchmark-") as name:
            table = Path(name) / "instances.csv"
            instances = _sample(folder / "instances.csv", options.sample)
            with table.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows((*one[:2], f"{one.timeout:g}") for one in instances)
            seconds, words = {one.name: list[float]() for one in trees}, dict[str, dict[str, str]]()
            for number in range(options.rounds):
                for tree in _turns(trees, number):
                    usage, words[tree.name] = tree.table(table, options.seconds, track)
                    seconds[tree.name].append(max(usage.processor - starts[tree.name].processor, 0.001))
                    _say({"folder": folder.name, "contender": tree.name, **_usage(usage)})
        result: dict[str, Any] = {
            one.name: {"decided": sum(word in DECIDED for word in words[one.name].values()), "of": len(instances),
                       "processor": round(median(seconds[one.name]), 2)}
            for one in trees
        }  # fmt: skip
        if len(trees) > 1:
            ratios = [ours / other for ours, other in zip(seconds[OURS], seconds[OTHER], strict=True)]
            result["CPU time / other tree's"] = round(median(ratios), 3)
            other = words[OTHER]
            result["lost"] = [p for p, word in other.items() if word in DECIDED and words[OURS].get(p) not in DECIDED]
            wrong += [f"{p}: ours {words[OURS][p]}, other tree {word}" for p, word in other.items()
                      if {word, words[OURS].get(p)} in OPPOSITE]  # fmt: skip
        found[folder.name] = result
    return {**found, "contradictions": wrong}


def _contenders(options: argparse.Namespace) -> list[Contender]:
    found: list[Contender] = [Checkout(OURS, Path(__file__).resolve().parents[1], tuple(options.ours.split()))]
    if options.tree:
        tree = options.tree.absolute()
        if not (tree / "scripts" / "verify.py").is_file():
            raise InputError(f"--tree: found no scripts/verify.py in {tree}; accepted: a checkout of certtrain")
        found += [Checkout(OTHER, tree)]
    if not options.without_abcrown and (os.environ.get(PYTHON) or os.environ.get(HOME)):
        pairs = [text.partition("=") for text in options.published]
        if wrong := next(
            (text for text, (_, equals, path) in zip(options.published, pairs) if not (equals and path)), None
        ):
            raise InputError(f"--published: found {wrong!r}; accepted: EXPRESSION=YAML")
        settings = {**{expression: path for expression, _, path in pairs}, **PUBLISHED}
        found += [AlphaBetaCrown(RIVAL, Abcrown.find(), settings)]
    return found


def _track(options: argparse.Namespace) -> Track:
    return Track(options.core, options.clock == "processor")


def _instances(options: argparse.Namespace) -> list[Instance]:
    folder = options.instances.absolute().parent
    found = [Instance(str(folder / one.network), str(folder / one.property), one.timeout)
             for one in read_instances(options.instances)
             if not options.only or any(text in one.property for text in options.only)]  # fmt: skip
    if not found:
        raise InputError(f"{options.instances}: found no property with {options.only}; accepted: parts of their paths")
    for path in (path for one in found for path in one[:2] if not Path(path).is_file()):
        raise InputError(f"{options.instances}: found no file {path}; accepted: paths relative to the table")
    return found


def _sample(table: Path, count: int) -> list[Instance]:
    every = read_instances(table)
    chosen = [every[number * len(every) // min(count, len(every))] for number in range(min(count, len(every)))]
    folder = table.absolute().parent
    return [Instance(str(folder / one.network), str(folder / one.property), one.timeout) for one in chosen]


def _turns(contenders: Sequence[C], number: int) -> Iterator[C]:
    """The contenders, each beginning in its turn."""
    first = number % len(contenders)
    yield from (*contenders[first:], *contenders[:first])


def _starts(contenders: Sequence[Contender], track: Track) -> dict[str, Usage]:
    found = {one.name: one.start_up(track) for one in contenders}
    for name, usage in found.items():
        _say({"start-up": name, **_usage(usage)})
    return found


def _usage(usage: Usage) -> dict[str, float]:
    return {"wall": round(usage.wall, 2), "processor": round(usage.processor, 2), "peak_mib": round(usage.peak_mib)}


def _row(
    contender: Contender, instance: Instance, limit: float, ran: Ran, start: Usage, track: Track
) -> dict[str, Any]:
    """One line of results. ``late``: by the contenders' clock, start-up aside; ``decided``: and in time."""
    usage = ran.usage
    taken = usage.processor - start.processor if track.processor_clock else usage.wall - start.wall
    late = taken > 1.1 * limit + 1
    name = f"{Path(instance.network).stem} {Path(instance.property).stem}"
    return {
        "instance": name,
        "contender": contender.name,
        "limit": limit,
        "answer": ran.answer,
        **_usage(usage),
        "late": late,
        "decided": ran.answer in DECIDED and not late,
        "reason": usage.output[-500:] if ran.answer == "error" else None,
    }


def _ratios(rows: Sequence[dict[str, Any]], rival: str) -> dict[str, float]:
    """Our CPU time over the rival's, whole processes, on the instances that both decide, and the geometric mean."""
    spent = {(row["contender"], row["instance"]): row["processor"] for row in rows if row["decided"]}
    found = {name: round(seconds / spent[rival, name], 2) for (who, name), seconds in spent.items()
             if who == OURS and (rival, name) in spent}  # fmt: skip
    return found | ({"geometric mean": round(geometric_mean(found.values()), 2)} if found else {})


def _contradictions(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{one['instance']}: {one['contender']} {one['answer']}, {two['contender']} {two['answer']}"
            for one, two in combinations(rows, 2)
            if one["instance"] == two["instance"] and {one["answer"], two["answer"]} in OPPOSITE]  # fmt: skip


def _verified(
    run: Path, tree: Checkout, words: Sequence[str], options: argparse.Namespace
) -> tuple[Usage, dict[int, str]]:
    """Verify the first images of a copy of a run without its verdicts: (usage, statuses by image)."""
    with tempfile.TemporaryDirectory(prefix="certtrain-benchmark-") as name:
        copy = Path(name) / "run"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("verdicts*", "evaluation*", "*.lock"))
        command = [sys.executable, tree.tree / "scripts" / "verify.py", copy, "--images", f"0:{options.images}",
                   "--timeout", f"{options.seconds:g}", "--device", "cpu", *words]  # fmt: skip
        command += tree.more if "--verifier" not in words else ()
        usage = _track(options).measured(command, options.seconds * options.images, os.environ, str(tree.tree))
        lines = [json.loads(line) for file in (copy / "verdicts.jsonl", *(copy / "verdicts").glob("*.jsonl"))
                 if file.exists() for line in file.read_text().splitlines()]  # fmt: skip
    if not lines:
        raise InputError(f"{run}: found no verdicts after verification:\n{usage.output[-2000:]}")
    return usage, {line["index"]: line["status"] for line in lines if "index" in line}


def _say(row: dict[str, Any]) -> None:
    print("   ", ", ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)
