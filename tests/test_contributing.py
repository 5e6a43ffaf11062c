"""A loss, an attack and a data set written as CONTRIBUTING says, in one file of a package of one's own each: a run with
them trains, resumes bit for bit, verifies and is opened again, with nothing edited elsewhere.

The other recipes are followed in ``test_new_operation.py``, ``test_new_set.py`` and ``test_new_stage.py``.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from own_packages import forgotten, imported, written
from torch import nn

import certtrain
from certtrain.attacks import Attack
from certtrain.bounds import L2Ball, LinfBall, SparseBall
from certtrain.components import Component, load_plugins
from certtrain.config import structure, unstructure
from certtrain.data import Source
from certtrain.errors import InputError
from certtrain.losses import Loss
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.training import loop as loop_module
from certtrain.workflows.train import resume

REMEMBERING = '''
"""Noisy images, and predictions that stay near those of the sample's last visit."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from certtrain.errors import InputError, check
from certtrain.losses import Loss, LossTerms
from certtrain.step import StateSpec


@dataclass(frozen=True)
class Remembering(Loss):
    """CE(f(x'), y) + weight · |softmax f(x') - the sample's last one|², x' a random point of the set.

    Args:
        weight: of the distance.
    """

    weight: float = 0.5

    def __post_init__(self):
        check(self.weight >= 0, "weight", self.weight, "a number >= 0")

    def declare_state(self, shape, classes):
        return {"last": StateSpec("sample", (classes,)), "seen": StateSpec("sample")}

    def check_model(self, model):
        if any(isinstance(layer, nn.Dropout) for layer in model.modules()):
            raise InputError("model: found dropout; accepted for Remembering: layers that are not random")

    def __call__(self, model, batch, step):
        change = step.ball.sample(batch.images, step.noise, "remembering")
        logits = model(step.ball.project(batch.images, (batch.images + change).clamp(0, 1)))
        last, seen = (step.state.read(name, batch) for name in ("last", "seen"))
        now = logits.softmax(1)
        distance = (seen * (now - last).square().sum(1)).mean()
        step.state.write("last", batch, now)
        step.state.write("seen", batch, seen + 1 - seen)
        entropy = F.cross_entropy(logits, batch.labels)
        parts = {"noisy_loss": entropy.detach(), "distance": distance.detach()}
        return LossTerms(entropy + self.weight * distance, parts)
'''

WORST_CLASS = '''
"""The bounds of the worst class alone."""

from dataclasses import dataclass

import torch.nn.functional as F

from certtrain.losses.certified import CertifiedLoss, verified_parts


@dataclass(frozen=True)
class WorstClass(CertifiedLoss):
    """log(1 + exp(-the least margin's lower bound)), by intervals."""

    def clean_gradient(self, step):
        return True  # the bounds use the clean pass' statistics, with their gradients

    def robust(self, model, batch, step, clean):
        verified, activity = self.bound(model, batch, step, clean.statistics)
        return F.softplus(-verified.amin(1)).mean(), verified_parts(verified), activity
'''

LEAPING = '''
"""One step along the gradient from the sample's last change."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from certtrain.attacks import Attack, AttackResult, CrossEntropy, gradient_of
from certtrain.bounds import NormBall, PerturbationSet
from certtrain.errors import check
from certtrain.step import StateSpec


@dataclass(frozen=True)
class Leaping(Attack[NormBall]):
    """x' = x + the sample's last change + step_size · epsilon · the gradient's direction there."""

    needs: ClassVar[type[PerturbationSet]] = NormBall
    step_size: float = 0.75

    def __post_init__(self):
        check(self.step_size > 0, "step_size", self.step_size, "a number > 0, in epsilons")

    def declare_state(self, shape, classes):
        return {"change": StateSpec("sample", shape)}

    def propose(self, model, batch, ball, step):
        kept = "change" in step.state.tensors  # only in training
        start = batch.images
        if kept:
            start = ball.project(start, (start + step.state.read("change", batch)).clamp(0, 1))
        loss = CrossEntropy()
        reference = loss.reference(model, batch)
        _, gradient = gradient_of(model, start, lambda logits: loss(logits, reference))
        points = start + self.step_size * ball.radius(start) * ball.direction(gradient)
        if kept:
            step.state.write("change", batch, points - batch.images)
        return AttackResult(points)
'''

GUESSING = '''
"""Random points of any set, by logits alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from certtrain.attacks import Attack, AttackResult
from certtrain.bounds import PerturbationSet
from certtrain.errors import check


@dataclass(frozen=True)
class Guessing(Attack[PerturbationSet]):
    """The random point with the largest cross-entropy."""

    takes_gradients: ClassVar[bool] = False
    tries: int = 4

    def __post_init__(self):
        check(self.tries >= 1, "tries", self.tries, "a whole number >= 1")

    def propose(self, model, batch, ball, step):
        best, most = batch.images, F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        for number in range(self.tries):
            change = ball.sample(batch.images, step.noise, f"guess/{number}")
            points = ball.project(batch.images, (batch.images + change).clamp(0, 1))
            found = F.cross_entropy(model(points), batch.labels, reduction="none")
            best = torch.where((found > most).reshape(-1, *[1] * (best.ndim - 1)), points, best)
            most = torch.maximum(found, most)
        return AttackResult(best, {"queries": torch.full_like(batch.labels, self.tries + 1)})
'''

STRIPES = '''
"""Stripes, in a text file of numbers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from certtrain.data import Source, Split
from certtrain.errors import InputError


@dataclass(frozen=True)
class Stripes(Source):
    """Images of 6 × 6 bytes, one a line after its label; the last quarter is for testing.

    Args:
        path: the text file.
    """

    path: Path = Path("stripes.txt")

    @property
    def place(self):
        return str(self.path)

    def read(self):
        try:
            rows = [[int(word) for word in line.split()] for line in self.path.read_text().splitlines()]
            table = torch.tensor(rows).reshape(len(rows), 37)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.path}: cannot be read ({reason}); accepted: lines of 37 whole numbers") from error
        whole = Split(table[:, 1:].reshape(-1, 1, 6, 6).to(torch.uint8), table[:, 0])
        count = len(rows) * 3 // 4
        return whole.subset(torch.arange(count)), whole.subset(torch.arange(count, len(rows))), 2
'''

PREPARED_STRIPES = '''
"""Stripes, as a folder of files too large for memory."""

from dataclasses import dataclass

import numpy as np
import torch

from certtrain.data.prepared import Contents, PreparedSource
from certtrain.errors import InputError


@dataclass(frozen=True)
class PreparedStripes(PreparedSource):
    """``train.npy`` and ``test.npy``, bytes (N, 37): a label and 6 × 6 pixels."""

    def state_of_folder(self):
        files = [self.root / "train.npy", self.root / "test.npy"]
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: no such file; accepted: bytes (N, 37)")
        return " ".join(f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)

    def contents(self):
        found = {}
        for name in ("train", "test"):
            table = np.load(self.root / f"{name}.npy", mmap_mode="r")
            found[name] = Contents(torch.from_numpy(table[:, 0].astype(np.int64)), blocks(table))
        return found, 2


def blocks(table):
    for start in range(0, len(table), 50):
        yield np.asarray(table[start : start + 50, 1:]).reshape(-1, 1, 6, 6)
'''


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield


def stripes(folder: Path) -> np.ndarray:
    """(200, 37) bytes: upright stripes are of class 0, level ones of class 1."""
    random = np.random.default_rng(0)
    labels = np.arange(200) % 2
    pattern = np.zeros((6, 6))
    pattern[::2] = 200
    images = np.stack([pattern if label else pattern.T for label in labels]) + random.integers(0, 56, (200, 6, 6))
    return np.concatenate([labels[:, None], images.reshape(200, 36)], 1).astype(np.uint8)


def recipe(**sections: Any) -> dict[str, Any]:
    """Two epochs of four steps, whose ramp ends in the second."""
    return {
        "model": {"type": "SmallCnn", "width": 2, "hidden": 8},
        "perturbation": {"type": "LinfBall", "epsilon": 0.05},
        "training": {
            "epochs": 2, "batch_size": 400, "milestones": [1], "checkpoint_seconds": 0,
            "schedule": {"type": "Smoothed", "start": 1, "length": 1},
        },
        "certify": {"images": 12, "timeout": 2, "stages": ["ibp", "attack", "crown"]},
        "export": {"enabled": False},
        **sections,
    }  # fmt: skip


def followed(folder: Path, file: Path, sections: dict[str, Any], monkeypatch, killed_at=(6,)) -> Path:
    """Train the recipe, resume copies of it that were killed, verify and open it; the run's folder."""
    named, run, save = [str(file)], folder / "run", loop_module._save
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(**sections)))

    def keep_and_save(kept, config, position, *rest):
        """Copy what a run killed just before this checkpoint leaves on disk."""
        if position.step - 1 in killed_at:
            shutil.copytree(run, folder / f"killed at {position.step - 1}")
        save(kept, config, position, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "_save", keep_and_save)
        certtrain.train(folder / "recipe.yaml", run, plugins=named, quiet=True)
    for number in killed_at:
        killed = folder / f"killed at {number}"
        assert resume(killed, plugins=named, quiet=True).model.read_bytes() == (run / "model.safetensors").read_bytes()
        assert statuses(killed) == statuses(run)
    before = statuses(run)
    certtrain.verify(run, images="0:20", plugins=named, quiet=True)
    assert len(statuses(run)) == 20 and statuses(run)[: len(before)] == before
    (name, *_) = json.loads((run / "run.json").read_text())["plugins"]
    assert name.startswith(f"mine.{file.stem}:")
    certtrain.load_model(run, plugins=named)
    return run


def statuses(run: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (run / "verdicts.jsonl").read_text().splitlines()]
    return [(line["status"], line["stage"]) for line in lines]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_refuses(kind: type[Component], family: type[Component]) -> None:
    """Numbers below the range are refused by name, and sections come back as they were."""
    name = f"{kind.__module__}:{kind.__name__}"
    assert structure(family, json.loads(json.dumps(unstructure(kind())))) == kind()
    for field in fields(kind):
        if isinstance(field.default, (int, float)):
            with pytest.raises(InputError, match=rf"^here\.{field.name}: found -1.*; accepted: "):
                structure(family, {"type": name, field.name: -1}, "here")


class TestLosses:
    def test_one_with_state(self, tmp_path, monkeypatch):
        file = written(tmp_path, "remembering", REMEMBERING)
        sections = {"loss": {"type": "mine.remembering:Remembering", "weight": 2}}
        run = followed(tmp_path, file, sections, monkeypatch, killed_at=(1, 6))
        losses = [line["noisy_loss"] for line in metrics(run) if "noisy_loss" in line]
        assert losses and losses[-1] < losses[0]
        assert all("distance" in line for line in metrics(run) if "noisy_loss" in line)

    def test_one_over_bounds(self, tmp_path, monkeypatch):
        file = written(tmp_path, "worst_class", WORST_CLASS)
        run = followed(tmp_path, file, {"loss": {"type": "mine.worst_class:WorstClass", "l1": 1e-5}}, monkeypatch)
        assert any("robust_loss" in line for line in metrics(run))

    def test_its_checks(self, tmp_path):
        mine = imported(tmp_path, "remembering", REMEMBERING)
        assert_refuses(mine.Remembering, Loss)
        mine.Remembering().check_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        with pytest.raises(InputError, match="found dropout"):
            mine.Remembering().check_model(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)))


class TestAttacks:
    @pytest.mark.parametrize("loss", ["CcIbp", "AdversarialTraining"])
    def test_one_with_state(self, loss, tmp_path, monkeypatch):
        """It serves the loss, the verifier and a guard along training."""
        file, attack = written(tmp_path, "leaping", LEAPING), {"type": "Leaping", "step_size": 1.0}
        certify = recipe()["certify"] | {"attack": attack}
        guarded = recipe()["training"] | {"guard": {"images": 16, "attack": attack}}
        sections = {"loss": {"type": loss, "attack": attack}, "certify": certify, "training": guarded}
        followed(tmp_path, file, sections, monkeypatch, killed_at=(3,))

    def test_one_without_gradients_over_any_set(self, tmp_path, monkeypatch):
        file, attack = written(tmp_path, "guessing", GUESSING), {"type": "mine.guessing:Guessing", "tries": 3}
        sections = {
            "perturbation": {"type": "SparseBall", "k": 2}, "loss": {"type": "Trades", "attack": attack},
            "certify": recipe()["certify"] | {"attack": attack, "stages": ["ibp", "attack"]},
        }  # fmt: skip
        followed(tmp_path, file, sections, monkeypatch, killed_at=(3,))

    def test_what_the_frame_adds(self, tmp_path):
        leaping, guessing = imported(tmp_path, "leaping", LEAPING), imported(tmp_path, "guessing", GUESSING)
        for kind in (leaping.Leaping, guessing.Guessing):
            assert_refuses(kind, Attack)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).train()
        batch = Batch(torch.rand(5, 1, 8, 8), torch.arange(5) % 3, torch.arange(5))
        for attack in (leaping.Leaping(9.0), guessing.Guessing()):
            for ball in (LinfBall(0.1), L2Ball(0.5), SparseBall(3)):
                if not attack.needs.matches(ball):
                    with pytest.raises(InputError, match=r"found Leaping for a SparseBall; accepted: .*SparsePgd"):
                        attack.check_ball(ball)
                    continue
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                found = attack(model, batch, ball, Step.evaluation(ball, Noise(0, batch.index)))
                assert ball.contains(batch.images, found.images).all() and not found.images.requires_grad
                assert model.training and all(parameter.grad is None for parameter in model.parameters())
                assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class TestDataSets:
    def test_one_in_memory(self, tmp_path, monkeypatch):
        table = stripes(tmp_path)
        np.savetxt(tmp_path / "stripes.txt", table, "%d")
        file = written(tmp_path, "stripes", STRIPES)
        data = {"type": "mine.stripes:Stripes", "path": str(tmp_path / "stripes.txt"), "validation": 0.1}
        run = followed(tmp_path, file, self.sections(data), monkeypatch)
        with (tmp_path / "stripes.txt").open("a") as text:
            text.write(" ".join(map(str, table[0])) + "\n")
        with pytest.raises(InputError, match="data"):  # another content than the run's
            certtrain.verify(run, plugins=[file], quiet=True)

    def test_one_that_is_prepared(self, tmp_path, monkeypatch):
        table = stripes(tmp_path)
        (tmp_path / "files").mkdir()
        np.save(tmp_path / "files" / "train.npy", table[:150])
        np.save(tmp_path / "files" / "test.npy", table[150:])
        file = written(tmp_path, "prepared", PREPARED_STRIPES)
        data = {"type": "mine.prepared:PreparedStripes", "root": str(tmp_path / "files")}
        followed(tmp_path, file, self.sections(data), monkeypatch)
        assert (tmp_path / "files.safetensors").is_file()

    def sections(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"data": data, "loss": {"type": "CcIbp"}, "training": recipe()["training"] | {"batch_size": 30}}

    def test_its_content_is_checked_for_it(self, tmp_path):
        load_plugins([written(tmp_path, "stripes", STRIPES)])
        for text, message in (
            (None, "stripes.txt: cannot be read"), ("0 1 2\n", "stripes.txt: cannot be read"),
            ("\n".join(" ".join(["7"] * 37) for _ in range(8)), r"stripes.txt train.*found.* 7"),
        ):  # fmt: skip
            if text is not None:
                (tmp_path / "stripes.txt").write_text(text)
            source = structure(Source, {"type": "mine.stripes:Stripes", "path": str(tmp_path / "stripes.txt")})
            with pytest.raises(InputError, match=message):
                source.load()
