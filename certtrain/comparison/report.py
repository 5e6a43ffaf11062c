"""A study's table and figures from the available runs. Unchanged files are not rewritten."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from ..run_folder import JsonLines, write_atomically
from .curves import curve_csv, curve_figure, curve_of
from .figure import against_epsilon, trade_off
from .numbers import Statistic, accuracies, columns, heading, kind_of, made_by, of_row, ratio, seconds
from .results import TrialResult, result_of
from .study import Study


def results_of(study: Study, folder: Path) -> list[TrialResult]:
    """The results of the trained trials.

    Raises:
        InputError: they were trained on different data.
    """
    found = [result for trial in study.trials(folder) if (result := result_of(trial)) is not None]
    for result in found:
        if result.data != found[0].data:
            raise InputError(
                f"{result.trial.path}: found a run on images with sha256 {result.data[:12]}…; accepted: those of "
                f"{found[0].trial.path}, {found[0].data[:12]}…, or another --out"
            )
    return found


def write_table(study: Study, folder: Path, failures: Mapping[str, str]) -> None:
    """Write ``table.md`` and ``table.csv``."""
    results = results_of(study, folder)
    calls = [call["command"] for call in JsonLines(folder / "calls.jsonl")]
    put(folder / "table.md", markdown(study, results, calls, failures).encode())
    put(folder / "table.csv", table_csv(study, results).encode())


def write_figures(study: Study, folder: Path) -> None:
    """Write ``figure.png``, ``figure-epsilon.png`` if epsilon is swept, and each curve with points as PNG and CSV."""
    results = results_of(study, folder)
    if (image := trade_off(study, results)) is not None:
        put(folder / "figure.png", image)
    if (image := against_epsilon(study, results)) is not None:
        put(folder / "figure-epsilon.png", image)
    for curve in study.curves:
        lines = curve_of(curve, study, results)
        if lines:
            put(folder / f"{curve.stem}.csv", curve_csv(lines).encode())
            put(folder / f"{curve.stem}.png", curve_figure(curve, lines))


def markdown(study: Study, results: Sequence[TrialResult], calls: Sequence[str], failures: Mapping[str, str]) -> str:
    """The table in Markdown, followed by notes and the calls that made it."""
    keys = columns(study, results)
    two = len({key[0] for key in keys}) > 1
    headings = [heading(key, two, kind_of(study)) for key in keys]
    titles = [study.name, "n", *headings, "s/epoch", f"time / {study.reference}"]
    lines = [titles, ["---", *["--:"] * (len(titles) - 1)]]
    for row in study.rows:
        own = of_row(row, results)
        cells = [percent(accuracies(row, key, results), len(own)) for key in keys]
        share = ratio(row, study.reference, results)
        time = plain(seconds(row, results), len(own))
        lines.append([row.label, str(len(own)), *cells, time, "" if share is None else f"{share:.2f}"])
    text = "".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |\n" for line in lines)
    notes = [*_notes(study, results, keys), *(f"failed: {trial}: {why}" for trial, why in failures.items())]
    made = "".join(f"    {call}\n" for call in calls)
    return text + "\n" + "\n".join(notes) + "\n" + (f"\nMade by\n\n{made}" if made else "")


def _notes(study: Study, results: Sequence[TrialResult], keys: Sequence) -> list[str]:
    attacked = [key for key in keys if key[1] != "certified"]
    counts = {count for result in results for key, count in result.images.items() if key in attacked}
    images = " or ".join(map(str, sorted(counts))) or "no"
    certified = {count for result in results for key, count in result.images.items() if key[1] == "certified"}
    images += f" (certified: {' or '.join(map(str, sorted(certified)))})" if certified - counts else ""
    runs = len(study.rows) * len(study.seeds)
    notes = [
        f"Accuracy in % of {images} test images: mean ± sample standard deviation over n seeds "
        f"({', '.join(map(str, study.seeds))}); no ± for one seed. An empty cell: not there.",
        "s/epoch: the median epoch, without what is measured after it; compared on one device and thread count alone.",
        f"{len(results)} of {runs} runs are trained.",
    ]  # fmt: skip
    origins = made_by(results)
    if origins:
        notes.append("; ".join(f"{name} {', '.join(values)}" for name, values in origins.items()) + ".")
    return notes


def percent(statistic: Statistic | None, runs: int) -> str:
    return _cell(statistic, runs, 100.0)


def plain(statistic: Statistic | None, runs: int) -> str:
    return _cell(statistic, runs, 1.0)


def _cell(statistic: Statistic | None, runs: int, scale: float) -> str:
    """Mean ± deviation, with n if not all runs of the row have the number."""
    if statistic is None:
        return ""
    text = f"{scale * statistic.mean:.2f}"
    if statistic.deviation is not None:
        text += f" ± {scale * statistic.deviation:.2f}"
    return text if statistic.count == runs else f"{text} (n = {statistic.count})"


def table_csv(study: Study, results: Sequence[TrialResult]) -> str:
    """The table as CSV, unrounded; accuracies are shares."""
    keys = columns(study, results)
    titles = [f"{heading(key, True, kind_of(study))}{end}" for key in keys for end in ("", " sd", " n")]
    ends = ["seconds per epoch", "seconds per epoch sd", f"time / {study.reference}"]
    rows = [["row", "n", *titles, *ends]]
    for row in study.rows:
        cells = [str(len(of_row(row, results)))]
        for key in keys:
            found = accuracies(row, key, results)
            cells += [_exact(found and found.mean), _exact(found and found.deviation), str(found.count if found else 0)]
        time = seconds(row, results)
        cells += [_exact(time and time.mean), _exact(time and time.deviation)]
        rows.append([row.label, *cells, _exact(ratio(row, study.reference, results))])
    return written(rows)


def _exact(number: float | None) -> str:
    return "" if number is None else repr(number)


def written(rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def put(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it has this content already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
