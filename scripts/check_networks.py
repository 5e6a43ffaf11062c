"""Read ONNX networks and compare their numbers with onnxruntime's.

    python scripts/check_networks.py FOLDER [FOLDER …] --json networks.json

Every ``.onnx`` and ``.onnx.gz`` file below the folders is read as ``verify.py`` reads it, and evaluated at an input of
zeros, one of ones, one of minus ones, and at ``--points`` random ones each in [0, 1] and of the normal distribution.
onnxruntime evaluates the file operator by operator, and with its default optimisations. A line for each network says
the largest difference from either, divided by the largest output of this network; or why it is refused. A table of
all folders follows; an agreement is a difference of 1e-5 at most, with NaN and infinity in the same places.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from certtrain.errors import InputError
from certtrain.run_folder import write_atomically
from certtrain.verifiers.onnx_network import OnnxNetwork, read_onnx, replay_session

TOLERANCE = 1e-5
"""Largest difference that counts as agreement, relative to the network's largest output."""


@dataclass(frozen=True)
class Check:
    """The outcome for one network.

    Args:
        folder: the one that it was found below. file: its path there.
        difference: from onnxruntime, relative to the largest output; None if it is refused.
        reason: why it is refused, or why nothing could be compared.
    """

    folder: str
    file: str
    difference: float | None
    seconds: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return self.difference is not None and self.difference <= TOLERANCE


def points(shape: torch.Size, number: int) -> Iterator[Tensor]:
    noise = torch.Generator().manual_seed(0)
    for value in (0.0, 1.0, -1.0):
        yield torch.full(shape, value)
    for _ in range(number):
        yield torch.rand(shape, generator=noise)
        yield torch.randn(shape, generator=noise)


def difference(network: OnnxNetwork, number: int) -> float:
    """The largest distance of an output from onnxruntime's, relative to the largest of them; infinite where only one
    of the two is finite."""
    replay, distance, size = replay_session(network.model), 0.0, 0.0
    for image in points(network.shape, number):
        with torch.no_grad():
            ours = network.module(image[None].to(network.dtype)).double()
        theirs = replay(image).double()
        if not torch.equal(theirs.isfinite(), ours.isfinite().expand_as(theirs)):
            return float("inf")
        distance = max(distance, float((theirs - ours).nan_to_num(0.0, 0.0, 0.0).abs().max()))
        size = max(size, float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return distance / size if distance else 0.0


def check(folder: Path, file: Path, number: int) -> Check:
    start = time.perf_counter()
    try:
        found, reason = difference(read_onnx(file), number), ""
    except InputError as error:
        found, reason = None, str(error).removeprefix(f"{file}: ")
    return Check(str(folder), str(file.relative_to(folder)), found, time.perf_counter() - start, reason)


def table(checks: list[Check]) -> Iterator[str]:
    yield "| folder | networks | read | agree | largest difference | seconds |"
    yield "|---|---|---|---|---|---|"
    for folder in dict.fromkeys(found.folder for found in checks):
        own = [found for found in checks if found.folder == folder]
        read = [found.difference for found in own if found.difference is not None]
        counts = f"{len(own)} | {len(read)} | {sum(found.agrees for found in own)}"
        yield f"| {folder} | {counts} | {max(read, default=0.0):.1e} | {sum(found.seconds for found in own):.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--points", type=int, default=4, help="random inputs of each kind (default 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each network")
    options = parser.parse_args()
    for folder in options.folders:
        if not folder.is_dir():
            parser.error(f"{folder}: found no folder; accepted: one with ONNX files in it or below it")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        parser.error(f"{options.json}: cannot be written; accepted: a file, in a folder that is there")
    checks, known = list[Check](), set[Path]()
    for folder in options.folders:
        for file in sorted(path for path in folder.rglob("*.onnx*") if path.name.endswith((".onnx", ".onnx.gz"))):
            if file.resolve() in known:
                continue
            known.add(file.resolve())
            found = check(folder, file, options.points)
            checks.append(found)
            print(f"{file}: {found.reason or f'{found.difference:.1e}'}", flush=True)
            if options.json:
                lines = "".join(json.dumps(asdict(one)) + "\n" for one in checks)
                write_atomically(options.json, lambda temporary, lines=lines: temporary.write_text(lines))
    print(*table(checks), sep="\n")
    outcome = Counter("agree" if one.agrees else "refused" if one.difference is None else "differ" for one in checks)
    print(", ".join(f"{number} {what}" for what, number in outcome.items()) or "no networks")


if __name__ == "__main__":
    main()
