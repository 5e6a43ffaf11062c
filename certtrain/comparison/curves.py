"""Curves of metrics over epochs for all rows of a study."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..run_folder import RunFolder
from .figure import canvas, colour, height, png
from .numbers import Statistic, of_row
from .results import TrialResult
from .study import Curve, Study

Lines = dict[tuple[str, str], dict[int, Statistic]]
"""The statistic over seeds of each epoch, from 1, by label and metric."""
DASHES = ("-", "--", ":", "-.")


def curve_of(curve: Curve, study: Study, results: Sequence[TrialResult]) -> Lines:
    """The available points; rows without any are omitted."""
    lines: Lines = {}
    for row in study.rows:
        runs = [list(RunFolder(result.trial.path).metrics) for result in of_row(row, results)]
        for metric in (curve.metric, *curve.beside):
            points: dict[int, list[float]] = {}
            for line in (line for run in runs for line in run if line.get("kind") == curve.kind):
                value = value_at(line, metric)
                if value is not None:
                    points.setdefault(line["epoch"], []).append(value)
            if points:
                found = {epoch: Statistic.of(values) for epoch, values in sorted(points.items())}
                lines[row.label, metric] = {epoch: value for epoch, value in found.items() if value}
    return lines


def value_at(line: Mapping[str, Any], metric: str) -> float | None:
    """The number at ``metric``, whose dots lead into mappings and lists, or None."""
    value: Any = line
    for key in metric.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def curve_csv(lines: Lines) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "metric", "epoch", "mean", "sd", "n"])
    for (label, metric), points in lines.items():
        for epoch, point in points.items():
            deviation = "" if point.deviation is None else repr(point.deviation)
            writer.writerow([label, metric, epoch, repr(point.mean), deviation, point.count])
    return file.getvalue()


def curve_figure(curve: Curve, lines: Lines) -> bytes:
    """A PNG of the means over seeds with a band of one standard deviation."""
    figure = canvas(8.5, height(len(lines)))
    place = figure.subplots()
    labels, metrics = list(dict.fromkeys(label for label, _ in lines)), (curve.metric, *curve.beside)
    for (label, metric), points in lines.items():
        shade, dash = colour(labels.index(label)), DASHES[metrics.index(metric) % len(DASHES)]
        name = label if len(metrics) == 1 else f"{label}: {metric}"
        epochs, means = list(points), [point.mean for point in points.values()]
        place.plot(epochs, means, label=name, color=shade, linestyle=dash, marker="." if len(epochs) == 1 else "")
        spread = [point.deviation or 0.0 for point in points.values()]
        if any(spread):
            low, high = ([mean + sign * sd for mean, sd in zip(means, spread)] for sign in (-1, 1))
            place.fill_between(epochs, low, high, color=shade, alpha=0.15, linewidth=0)
    place.set_xlabel("epoch")
    place.set_ylabel(", ".join(metrics))
    place.grid(alpha=0.3)
    place.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    return png(figure)
