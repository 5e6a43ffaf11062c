"""Tables of verdicts and accuracies for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPARSE = ("changed", "queries")
"""Further fields of rows about sparse sets."""


def summary(folder) -> None:
    from rich.table import Table

    from ..bounds import sized
    from ..progress import console

    final = folder.final()
    if "images" not in final:
        console.print(f"{folder.path}: trained in {final['seconds']:.0f} s; not certified (certify.enabled is false)")
        return
    size = sized(folder.open(folder.path)[1]["config"]["perturbation"]["type"], final["epsilon"])
    table = Table(title=f"{folder.path}: {final['images']} test images, {size}")
    table.add_column("accuracy")
    table.add_column("%", justify="right")
    for name, key in (("clean", "clean"), ("no counterexample found", "attacked"), ("certified", "certified"),
                      ("certified by IBP alone", "ibp_certified")):  # fmt: skip
        table.add_row(name, f"{100 * final[f'{key}_accuracy']:.2f}")
    console.print(table)
    stages([v for v in folder.verdicts if v["index"] < final["images"]], "verdicts by stage")
    console.print(f"{final['seconds']:.0f} s")
    say_where(folder.verdicts.path)


def stages(records, title: str) -> None:
    """Print the verdicts and seconds of each stage."""
    from rich.table import Table

    from ..progress import console
    from ..verifiers.records import by_stage, certified, reasons

    table = Table(title=title)
    table.add_column("stage")
    for name in (columns := ("images", "misclassified", "falsified", "verified", "seconds")):
        table.add_column(name, justify="right")
    for stage, row in by_stage(records).items():
        row = {**row, "seconds": f"{row['seconds']:.2f}"}
        table.add_row(stage, *(str(row.get(name, "")) for name in columns))
    console.print(table)
    low, high = certified(records)
    console.print(f"certified accuracy: {100 * low:.2f} %" + (f" to {100 * high:.2f} %" if high > low else ""))
    if why := reasons(records):
        console.print(f"undecided: {sum(why.values())} ({', '.join(f'{word}: {n}' for word, n in why.items())})")


def proofs(found) -> None:
    """Print what became of checking a run's proofs."""
    from rich.table import Table

    from ..checker import VERSION
    from ..progress import console

    table = Table(title=f"{found.images} test images, proofs checked by certtrain.checker {VERSION}")
    for name in ("verified", "proofs checked", "proved", "rejected", "seconds"):
        table.add_column(name, justify="right")
    seconds = sum(line["seconds"] for line in found.records)
    table.add_row(
        *map(str, (found.verified, len(found.records), found.proved, found.rejected)), f"{seconds:.2f}"
    )  # fmt: skip
    console.print(table)
    console.print(f"accuracy independently proved: {100 * found.accuracy:.2f} %")
    for line in [line for line in found.records if line["status"] == "rejected"][:10]:
        console.print(f"image {line['index']}: rejected: {line['reason']}", markup=False)
    console.print(f"what became of every proof: {found.folder / 'checked.jsonl'}")


def say_where(path: Path) -> None:
    from ..progress import console

    console.print(f"verdicts of every image: {path}")


def agreement(found, first: str, second: str) -> None:
    """Print the number of images by the statuses of two verifiers."""
    from rich.table import Table

    from ..progress import console

    table = Table(title=f"{sum(found.counts.values())} images, {first} and {second}")
    for name in (first, second):
        table.add_column(name)
    table.add_column("images", justify="right")
    table.add_column("")
    for (one, two), count in sorted(found.counts.items(), key=lambda item: -item[1]):
        table.add_row(one, two, str(count), "" if one == two else "differ")
    console.print(table)
    console.print(f"contradictions: {len(found.contradictions)}")


def accuracies(folder) -> None:
    """Print the table of ``evaluation.json``, and the rows that could not be measured."""
    from rich.table import Table

    from ..bounds import size_name, sized
    from ..progress import console

    found = json.loads(folder.evaluation.read_text(encoding="utf-8"))
    kind, more = found["perturbation"], [name for name in SPARSE if any(name in row for row in found["rows"])]
    title = f"{folder.path}: test images that stay right, {kind}"
    table = Table(title=title, collapse_padding=True, pad_edge=False)  # to fit into 80 columns
    for name in ("checkpoint", "attack"):
        table.add_column(name, overflow="fold")
    for name in (size_name(kind), "images", "%", "seconds", *more):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["rows"]:
        first, count = row["first_image"], row["images"]
        size = sized(kind, row["epsilon"], 4).partition(" ")[2]
        table.add_row(
            row["checkpoint"], row["attack"], "" if row["attack"] == "clean" else size,
            f"{first}:{first + count}" if first else str(count),
            f"{100 * row['accuracy']:.2f}", f"{row['seconds']:.1f}", *(_mean(row.get(name)) for name in more),
        )  # fmt: skip
    console.print(table)
    for row in found["rows"]:
        if way := _way(row):
            console.print(f"{row['checkpoint']}, {row['attack']}, {sized(kind, row['epsilon'], 4)}: {way}")
    if "changed" in more:
        console.print("changed: units of the images that it broke, in the mean")
    for row in found["skipped"]:
        where = f"{row['checkpoint']}, {row['attack']}, {sized(kind, row['epsilon'])}"
        console.print(f"{where}: none ({row['reason']})")
    for row in found["rows"]:
        if row["unconfirmed"]:
            images = f"{row['unconfirmed']} images"
            where = f"{row['checkpoint']}, {row['attack']}, {sized(kind, row['epsilon'])}"
            console.print(f"{where}: what it claimed of {images} was not borne out")
    for name, values in found["versions"].items():
        if len(values) > 1:
            console.print(f"rows of different {name}: {', '.join(values)}; each row of the file says its own")
    console.print(f"the table: {folder.evaluation}; what became of every image: {folder.evaluation.with_suffix('')}/")


def _mean(found: Mapping[str, float] | float | None) -> str:
    if found is None:
        return ""
    return f"{found['mean'] if isinstance(found, Mapping) else found:.1f}"


def _way(row: Mapping[str, Any]) -> str:
    """The accuracy after each stage of a cascade of attacks, or the number of images lost to each attack."""
    if "stages" in row:
        return ", ".join(f"{100 * share:.2f} % after {name}" for name, share in row["stages"].items())
    names = {name: count for name, count in row["lost_to"].items() if name != "clean"}
    lost = ", ".join(f"{name} {count}" for name, count in names.items())
    return f"lost to {lost}" if lost and "auto" in row["attack"] else ""
