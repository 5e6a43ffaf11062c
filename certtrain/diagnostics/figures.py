"""Figures of diagnostics as PNG files, drawn without a display and without global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run_folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (5.0, 3.6)
DOTS = 150
"""Dots per inch."""


def _figure(rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a third of a second that nothing else need pay
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], rows * INCHES[1]), dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, squeeze=False).ravel().tolist()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file, atomically; create its folder."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _whole(axes: Axes) -> None:
    """Place the ticks of the horizontal axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_landscape(found: Mapping[str, Any], title: str) -> Figure:
    """Draw the mean loss around images, from ``landscape_steps`` and ``landscape_losses``."""
    figure, (axes,) = _figure()
    steps, losses = found["landscape_steps"], found["landscape_losses"]
    columns = [list(column) for column in zip(*losses)]  # contours take rows for y; the gradient's axis is x
    filled = axes.contourf(steps, steps, columns, levels=20, cmap="viridis")
    axes.plot([0], [0], marker="+", color="white")
    figure.colorbar(filled, ax=axes, label="cross-entropy")
    axes.set(title=title, xlabel="along the gradient's direction, epsilons", ylabel="random direction, epsilons")
    return figure


def draw_hessian(found: Mapping[str, Any], title: str) -> Figure:
    """Draw the largest eigenvalues, from ``hessian_values``."""
    figure, (axes,) = _figure()
    values = found["hessian_values"]
    axes.plot(range(1, len(values) + 1), values, marker="o", linestyle="none")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title=title, xlabel="rank", ylabel="eigenvalue of the weights' Hessian")
    _whole(axes)
    return figure


def draw_split(found: Mapping[str, Any], title: str) -> Figure:
    """Draw R and R' at each index, from ``divergence`` and ``divergence_split``."""
    figure, (axes,) = _figure()
    split = found["divergence_split"]
    axes.plot(range(1, len(split) + 1), split, marker="o", label="split, R'")
    axes.axhline(found["divergence"], color="black", linestyle="--", label="whole, R")
    axes.set(title=title, xlabel="index I of the attack's iterate", ylabel="mean divergence", ylim=(0, None))
    _whole(axes)
    axes.legend()
    return figure


def draw_adversarial_hessian(found: Mapping[str, Any], title: str) -> Figure:
    """``draw_hessian`` for ``adversarial_hessian_values``."""
    figure = draw_hessian({"hessian_values": found["adversarial_hessian_values"]}, title)
    figure.axes[0].set(ylabel="eigenvalue of the adversarial loss' Hessian")
    return figure


def draw_interpolation(found: Mapping[str, Any], title: str) -> Figure:
    """Draw ``interpolation_accuracies`` above and ``interpolation_losses`` below, from clean to attacked images."""
    figure, (above, below) = _figure(2)
    for axes, name, words in ((above, "accuracies", "accuracy"), (below, "losses", "cross-entropy")):
        axes.plot(found["interpolation_shares"], found[f"interpolation_{name}"], marker="o")
        axes.set(ylabel=words)
    above.set(title=title, ylim=(0, 1))
    below.set(xlabel="share of the attack's change")
    return figure


def draw_weight_landscape(found: Mapping[str, Any], title: str) -> Figure:
    """Draw the mean adversarial loss around the weights, from ``weight_landscape_steps`` and ``…_losses``."""
    figure, (axes,) = _figure()
    steps, losses = found["weight_landscape_steps"], found["weight_landscape_losses"]
    columns = [list(column) for column in zip(*losses)]
    filled = axes.contourf(steps, steps, columns, levels=20, cmap="viridis")
    axes.plot([0], [0], marker="+", color="white")
    figure.colorbar(filled, ax=axes, label="adversarial cross-entropy")
    first, second = found["weight_landscape_values"]
    axes.set(
        title=title, xlabel=f"eigenvector of {first:.3g}, the largest eigenvalue", ylabel=f"eigenvector of {second:.3g}"
    )
    return figure


def draw_epochs(lines: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw diagnostics along training: cosines and shares above, R and R' at I = 2 below; ``epoch`` is in each line."""
    figure, (above, below) = _figure(2)
    for axes, names in (
        (above, ("gradient_alignment", "fgsm_pgd_cosine", "boundary_distortion")),
        (below, ("divergence", "qub_gap")),
    ):
        for name in names:
            _along(axes, name.replace("_", " "), [(line["epoch"], line.get(name)) for line in lines])
    second = [(line["epoch"], (line.get("divergence_split") or [None])[:2][-1]) for line in lines]
    _along(below, "divergence, split at I = 2", second)
    above.set(title=title, ylabel="cosine, share")
    below.set(xlabel="epoch", ylabel="mean divergence, gap")
    for axes in (above, below):
        if axes.lines:
            axes.legend()
    return figure


def _along(axes: Axes, label: str, points: Sequence[tuple[int, float | None]]) -> None:
    known = [(epoch, value) for epoch, value in points if value is not None]
    if known:
        axes.plot(*zip(*known), marker=".", label=label)


FIGURES = {
    "landscape": draw_landscape, "hessian": draw_hessian, "split": draw_split, "interpolation": draw_interpolation,
    "adversarial_hessian": draw_adversarial_hessian, "weight_landscape": draw_weight_landscape,
}  # fmt: skip
"""The function that draws the figure of each diagnostic."""
