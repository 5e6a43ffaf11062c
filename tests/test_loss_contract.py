"""One contract that every loss of the library keeps. A new loss joins by being registered."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
import yaml

from certtrain.bounds import LinfBall
from certtrain.config import structure, unstructure
from certtrain.data import Digits, Split
from certtrain.errors import InputError
from certtrain.export import Export
from certtrain.losses import CcIbp, CrownIbp, Ibp, Loss
from certtrain.models import SmallCnn, initialise_for_ibp
from certtrain.noise import Noise
from certtrain.recipe import Config
from certtrain.step import Batch, State, Step
from certtrain.training import Adam, Descend, Smoothed, Training
from certtrain.training import loop as loop_module
from certtrain.verifiers import Certify
from certtrain.workflows.train import resume, train

LOSSES = [cls for cls in Loss.members().values() if cls.__module__.startswith("certtrain.")]
EXCEPTIONS: dict[str, str] = {}
"""Losses that need not overfit 64 digits, by name, with the reason."""


TINY = SmallCnn(width=2, hidden=8)
KILLED_AT = (1, 3, 4, 6)
"""Steps of eight: within each epoch, before its end and at it."""
MEASURED = ("seconds", "spent", "search_seconds", "peak_memory")

every_loss = pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def digits() -> Batch:
    split = Digits().load().train
    index = torch.arange(64)
    return Batch(split.pixels(index), split.labels[index], index)


@pytest.fixture(scope="module")
def teacher(digits) -> torch.nn.Module:
    return overfitted(CcIbp(), digits)


def overfitted(loss: Loss, digits: Batch, steps: int = 100, rate: float = 2e-3) -> torch.nn.Module:
    torch.manual_seed(0)
    model = SmallCnn().build((1, 8, 8), 10)
    initialise_for_ibp(model)
    ball = LinfBall(0.02)
    specs = loss.declare_state((1, 8, 8), 10)
    tensors = {name: spec.allocate(64, 64, torch.device("cpu")) for name, spec in specs.items()}
    optimizer = Adam(lr=rate).build(model)
    epsilon = torch.tensor(0.02)
    model.train()
    for number in range(steps):
        step = Step(ball.with_epsilon(epsilon), epsilon, epsilon, number / steps, Noise(number, digits.index),
                    State(tensors, specs))  # fmt: skip
        Descend()(model, optimizer, loss, [(digits, step)], clip=10.0)
    return model.eval()


def make(kind, teacher: torch.nn.Module, folder) -> Loss:
    """A loss with its defaults, and a teacher where it has one."""
    if "teacher" not in {field.name for field in dataclasses.fields(kind)}:
        return kind()
    safetensors.torch.save_file(teacher.state_dict(), folder / "teacher.safetensors")
    return kind(teacher=folder / "teacher.safetensors")


@every_loss
def test_overfits_64_digits_within_100_steps(kind, digits, teacher, tmp_path):
    if kind.__name__ in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[kind.__name__])
    shorter = {} if kind in (CrownIbp, Ibp) else {"steps": 30, "rate": 5e-3}  # which most losses need no more than
    model = overfitted(make(kind, teacher, tmp_path), digits, **shorter)
    accuracy = (model(digits.images).argmax(1) == digits.labels).float().mean()
    assert accuracy >= 0.95


@every_loss
def test_yaml_round_trip(kind):
    loss = kind()
    text = yaml.safe_dump(unstructure(loss))
    assert structure(Loss, yaml.safe_load(text)) == loss


@every_loss
def test_refuses_values_out_of_range(kind):
    for field in dataclasses.fields(kind):
        if isinstance(field.default, float):
            for bad in (-1.0, float("nan"), "many"):
                with pytest.raises(InputError, match=rf"^loss\.{field.name}: found .*accepted"):
                    structure(Loss, {"type": kind.__name__, field.name: bad}, "loss")


def tiny(loss) -> Config:
    """Two epochs of four steps; the ramp ends in the second. Verdicts of one loss are enough: they know no loss."""
    return Config(
        model=TINY,
        loss=loss,
        training=Training(epochs=2, batch_size=30, milestones=(1,), schedule=Smoothed(start=1, length=1)),
        certify=Certify(images=20) if type(loss) is CcIbp else Certify(enabled=False),
        export=Export(enabled=False),
    )


def results(folder) -> tuple[bytes, list[dict], list[dict]]:
    def timeless(lines):
        return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]

    return folder.model.read_bytes(), timeless(folder.metrics), timeless(folder.verdicts)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def some_digits() -> tuple[Split, Split, int]:
    """110 images to train on, in three batches of 30 and one of 20, and 60 to test."""
    train, test, classes = Digits().read()
    return train.subset(torch.arange(110)), test.subset(torch.arange(60)), classes


@every_loss
def test_resume_is_exact(kind, some_digits, tmp_path, monkeypatch):
    """Killed after one step and another, with the checkpoint one step behind, and resumed: as if never interrupted."""
    monkeypatch.setattr(Digits, "read", lambda self: some_digits)
    config = tiny(make(kind, TINY.build((1, 8, 8), 10), tmp_path))
    expected = results(train(config, tmp_path / "whole", quiet=True))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, checkpoint_seconds=0.0))
    save, left = loop_module._save, list(KILLED_AT)

    def die_or_save(folder, recipe, position, *rest):
        if left and position.step == left[0] + 1:
            del left[0]
            raise Killed
        save(folder, recipe, position, *rest)

    monkeypatch.setattr(loop_module, "_save", die_or_save)
    with pytest.raises(Killed):
        train(config, tmp_path / "run", quiet=True)
    while left:
        with pytest.raises(Killed):
            resume(tmp_path / "run", quiet=True)
    found = results(resume(tmp_path / "run", quiet=True))
    assert found == expected and bool(found[2]) == (kind is CcIbp)


def test_every_member_is_walked():
    assert {"CcIbp", "ExpIbp", "Ibp", "MtlIbp"} <= {kind.__name__ for kind in LOSSES}
    assert json.dumps(EXCEPTIONS) and set(EXCEPTIONS) <= {kind.__name__ for kind in LOSSES}
