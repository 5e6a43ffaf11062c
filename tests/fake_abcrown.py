"""A stand-in for α-β-CROWN that answers as it is told, image by image, and remembers what it was asked."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

PROGRAM = r"""
import csv, hashlib, json, os, sys
from pathlib import Path

import yaml

config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
general, attack, model = config["general"], config["attack"], config["model"]
here, root = Path(__file__).parent, Path(general["root_path"])
plan = json.loads((here / "plan.json").read_text())


class arguments:
    Globals = {}


def default_adv_saver(x, y, path):
    Path(path).write_text("(" + "".join(f"(X_{i}  {v})\n" for i, v in enumerate(x)) + "(Y_0  1.0))")


for place, (name,) in enumerate(list(csv.reader((root / general["csv_name"]).open()))):
    arguments.Globals["example_idx"] = place
    number = Path(os.readlink(root / name)).stem
    with (here / "asked").open("a") as asked:
        content = {"image": int(number), "timeout": config["bab"]["timeout"], "device": general["device"]}
        content["property"] = hashlib.sha256((root / name).read_bytes()).hexdigest()
        content["network"] = hashlib.sha256(Path(model["onnx_path"]).read_bytes()).hexdigest()
        content["shape"] = model["input_shape"]
        asked.write(json.dumps(content) + "\n")
    print(f'\n {"%" * 35} idx: {place}, vnnlib ID: {place} {"%" * 35}')
    said = plan.get(number, {"word": "safe-incomplete"})
    if said["word"] == "crash":
        raise ValueError(f"image {number}")
    if "point" in said:
        eval(attack["adv_saver"])(said["point"], None, attack["cex_path"])
    print(f"Result: {said['word']} in {said['seconds']:.4f} seconds")
"""


@dataclass(frozen=True)
class FakeAbcrown:
    """Files in a folder that look like a checkout and its interpreter."""

    folder: Path

    @classmethod
    def install(cls, folder: Path, missing: Mapping[str, str] | None = None) -> "FakeAbcrown":
        """``missing``: what its interpreter says that it cannot import."""
        fake = cls(folder)
        fake.home.mkdir(parents=True)
        (fake.home / "abcrown.py").write_text(PROGRAM)
        found = json.dumps([{"python": "3.11.0", "torch": "2.8.0"}, dict(missing or {})])
        fake.python.write_text(
            f'#!/bin/sh\nif [ "$1" = -c ]; then echo \'FOUND {found}\'; else exec {sys.executable} "$@"; fi\n'
        )
        fake.python.chmod(0o755)
        fake.says({})
        return fake

    @property
    def home(self) -> Path:
        return self.folder / "complete_verifier"

    @property
    def python(self) -> Path:
        return self.folder / "python"

    @property
    def options(self) -> list[str]:
        return ["--abcrown-python", str(self.python), "--abcrown-home", str(self.folder)]

    def says(self, words: Mapping[int, str | tuple[str, Tensor]], seconds: float = 0.125) -> None:
        """Of an image: a word of its own, such as ``unsafe-pgd``, and a counterexample. Others are safe."""
        plan: dict[int, dict[str, Any]] = {number: {"word": "safe-incomplete"} for number in range(1000)}
        for number, said in words.items():
            word, point = (said, None) if isinstance(said, str) else said
            plan[number] = {"word": word, **({} if point is None else {"point": point.flatten().tolist()})}
        timed = {number: {**said, "seconds": seconds} for number, said in plan.items()}
        (self.home / "plan.json").write_text(json.dumps(timed))

    def asked(self) -> list[dict[str, Any]]:
        """What it was asked since the last call."""
        path = self.home / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def images(self) -> list[int]:
        return [asked["image"] for asked in self.asked()]
