"""Tune the swept fields of studies on held-out training images, then run each study with the chosen values.

    python scripts/compare_tuned.py configs/studies/architectures_digits.yaml
    python scripts/compare_tuned.py configs/studies/architectures_mnist.yaml --share 0.8

For each study, in ``OUT/NAME-tuning``: all its rows with its first seed, a share of the training images of each class
held out in place of the test images (``HeldOut``): the larger it is, the cheaper the tuning. Of each sweep the value
with the highest certified accuracy is chosen; of equal ones that with the higher clean accuracy, then the first. Then,
in ``OUT/NAME``: the rows with these values, trained on all training images, with all seeds of the study. Both are
studies of their own, ``study.yaml`` in their folder: the same call resumes a stopped one. A value whose loss stops
being finite is not chosen.

Exit codes are those of ``compare``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from certtrain import compare
from certtrain.comparison import read_study
from certtrain.comparison.report import put, results_of
from certtrain.comparison.results import TrialResult
from certtrain.comparison.study import Study
from certtrain.config import read_yaml
from certtrain.errors import Failure, InputError, Interrupted, check


def tuning_of(file: Path, share: float) -> dict[str, Any]:
    """The study's YAML with its first seed and held-out images; rows without a sweep are left out.

    Args:
        share: share of the training images that is held out.
    Raises:
        InputError: the share is not in (0, 1); the study cannot be read, has no sweep, does not certify, or compares
            times with a swept row's.
    """
    check(0 < share < 1, "--share", share, "a number between 0 and 1")
    study = read_study(file)
    certified = all(row.config.certify.enabled for row in study.rows)
    check(certified, f"{file}: certify.enabled", False, "true, for values are chosen by certified accuracy")
    mapping = inlined(file)
    reference = mapping.get("reference")
    swept = any(row.fields and row.label == reference for row in study.rows)
    check(not swept, f"{file}: reference", reference, "a row without a sweep, for its value may not be chosen")
    rows = [row for row in mapping["rows"] if row.get("sweep")]
    check(rows, f"{file}: rows", "none with a sweep", "one or more, whose values are tuned")
    data = {"type": "HeldOut", "source": mapping["base"].get("data", {"type": "Digits"}), "share": share}
    base = {**mapping["base"], "data": data}
    tuning = {**mapping, "name": f"{study.name}-tuning", "seeds": [study.seeds[0]], "base": base, "rows": rows}
    tuning.pop("reference", None)
    return tuning


def tuned(file: Path, tuning: Study, results: Sequence[TrialResult]) -> dict[str, Any]:
    """The study's YAML with the chosen value alone in each sweep.

    Args:
        results: of ``tuning``, the study that ``tuning_of`` describes; values without a result are not chosen.
    Raises:
        InputError: no value of a sweep has a result.
    """
    mapping, rows = inlined(file), []
    found = {result.trial.row.label: score(result) for result in results}
    for entry in mapping["rows"]:
        values = [row for row in tuning.rows if row.group == entry["name"] and row.label in found]
        if entry.get("sweep"):
            check(values, f"{file}: row {entry['name']}", "no value that trains", "one or more")
            chosen = max(values, key=lambda row: found[row.label])  # the first of equal ones
            sweep = {path: [value] for path, value in zip(chosen.fields, chosen.swept, strict=True)}
            entry = {**entry, "sweep": sweep}
        rows.append(entry)
    return {**mapping, "rows": rows}


def score(result: TrialResult) -> tuple[float, float]:
    """(certified, clean) accuracy of a finished run."""
    epsilon = result.trial.config.perturbation.epsilon
    return result.accuracies["last", "certified", float(epsilon)], result.accuracies["last", "clean", None]


def inlined(file: Path) -> dict[str, Any]:
    """The study's YAML with its base in place of a path to it, so that it may lie in another folder."""
    mapping = dict(read_yaml(file))
    if isinstance(mapping.get("base"), str):
        mapping["base"] = read_yaml(file.parent / mapping["base"])
    return mapping


def run(mapping: Mapping[str, Any], folder: Path) -> Mapping[str, str]:
    """Write the study into its folder and finish it; returns what failed, and why, by run."""
    file = folder / "study.yaml"
    put(file, yaml.safe_dump(dict(mapping), sort_keys=False).encode())
    failures = compare(file, out=folder, command=f"python {shlex.join(sys.argv)}").failures
    for trial, why in failures.items():
        print(f"failed: {trial}: {why}", file=sys.stderr)
    return failures


def compare_tuned(file: Path, share: float, out: Path) -> bool:
    """Tune and run one study; returns whether every run of the chosen values is finished."""
    mapping = tuning_of(file, share)
    folder = out / mapping["name"]
    run(mapping, folder)
    tuning = read_study(folder / "study.yaml")
    chosen = tuned(file, tuning, results_of(tuning, folder))
    return not run(chosen, out / chosen["name"])


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Tune swept fields on held-out training images, then run the studies.")
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="folder of the studies' folders")
    parser.add_argument("--share", type=float, default=0.2, help="share of the training images held out for tuning")
    options = parser.parse_args(words)
    try:
        return 0 if all([compare_tuned(file, options.share, options.out) for file in options.studies]) else 1
    except (InputError, Failure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2
    except Interrupted as stopped:
        print(f"stopped by {stopped}; go on with: the same call", file=sys.stderr)
        return 128 + stopped.signal


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
