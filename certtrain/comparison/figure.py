"""Figures of accuracy and robustness with error bars over seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..bounds import size_name
from .numbers import PROOFS, accuracies, columns, kind_of, radius
from .results import TrialResult
from .study import Study

MARKERS = "osD^vPX*<>hp"
SIZES = {"perturbation.epsilon", "perturbation.k"}


def trade_off(study: Study, results: Sequence[TrialResult]) -> bytes | None:
    """A PNG of robust against clean accuracy of the last checkpoint, with a panel for each epsilon.

    Robust accuracy is that under the study's ``robustness`` attack. Points of a numeric sweep are joined by a line.
    None if no row has both numbers.
    """
    epsilons = [key[2] for key in columns(study, results) if key[:2] == ("last", study.robustness)]
    panels = [panel for panel in (_points(study, results, epsilon) for epsilon in epsilons) if panel[1]]
    if not panels:
        return None
    groups = list(dict.fromkeys(row.group for row in study.rows))
    figure = canvas(5.5 * len(panels) + 2.5, height(len(groups)))
    words = {row.group for row in study.rows if not row.swept or any(isinstance(v, str) for v in row.swept)}
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for place, (epsilon, points) in zip(axes, panels):
        for group, found in points.items():
            number = groups.index(group)
            x, dx, y, dy = zip(*found)
            place.errorbar(
                x, y, xerr=dx, yerr=dy, label=group, color=colour(number), capsize=2, linewidth=1,
                marker=MARKERS[number % len(MARKERS)], linestyle="none" if group in words else "-",
            )  # fmt: skip
        place.set_xlabel("clean accuracy, %")
        place.set_ylabel(f"{_named(study)}, {size_name(kind_of(study))} {radius(epsilon or 0.0)}, %")
        place.grid(alpha=0.3)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    return png(figure)


def against_epsilon(study: Study, results: Sequence[TrialResult]) -> bytes | None:
    """A PNG of the accuracy under the study's ``robustness`` attack over epsilon, with each network attacked at its own
    training epsilon. None if no row sweeps epsilon."""
    points = trained_at(study, results)
    if not points:
        return None
    figure = canvas(8.0, height(len(points)))
    place = figure.subplots()
    for number, (group, found) in enumerate(points.items()):
        x, y, dy = zip(*sorted(found))
        marker = MARKERS[number % len(MARKERS)]
        place.errorbar(x, y, yerr=dy, label=group, color=colour(number), capsize=2, linewidth=1, marker=marker)
    place.set_xlabel(f"{size_name(kind_of(study))} of training and of the attack")
    place.set_ylabel(f"{_named(study)}, %")
    place.grid(alpha=0.3)
    place.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    return png(figure)


def trained_at(study: Study, results: Sequence[TrialResult]) -> dict[str, list[tuple[float, ...]]]:
    """Epsilon, accuracy and its deviation in % of the rows that sweep epsilon, by group."""
    points: dict[str, list[tuple[float, ...]]] = {}
    for row in study.rows:
        epsilon = float(row.config.perturbation.epsilon)
        found = accuracies(row, ("last", study.robustness, epsilon), results)
        if found and SIZES & set(row.fields):
            points.setdefault(row.group, []).append((epsilon, 100 * found.mean, 100 * (found.deviation or 0.0)))
    return points


def _named(study: Study) -> str:
    if study.robustness in PROOFS:
        return "certified accuracy" if study.robustness == "certified" else f"accuracy {PROOFS[study.robustness]}"
    return f"accuracy under {study.robustness}"


def _points(study: Study, results: Sequence[TrialResult], epsilon: float | None):
    """Clean accuracy, its deviation, robust accuracy and its deviation, in %, by group; rows that have both."""
    points: dict[str, list[tuple[float, ...]]] = {}
    for row in study.rows:
        clean = accuracies(row, ("last", "clean", None), results)
        robust = accuracies(row, ("last", study.robustness, epsilon), results)
        if clean and robust:
            numbers = clean.mean, clean.deviation or 0.0, robust.mean, robust.deviation or 0.0
            points.setdefault(row.group, []).append(tuple(100 * number for number in numbers))
    return epsilon, points


def canvas(width: float, height: float) -> Any:
    """A figure of this size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def height(entries: int) -> float:
    """Height in inches of a figure with this number of legend entries."""
    return max(4.8, 0.8 + 0.2 * entries)


def colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](2 * number % 20 + number // 10 % 2)


def png(figure: Any) -> bytes:
    """A figure as PNG without date and library version, so that equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()
