"""The best weights beside the last ones, cyclic learning rates, runs without certificates."""

import dataclasses

import pytest
import safetensors.torch
import torch
from torch import nn

from certtrain.attacks import Ascent
from certtrain.bounds import LinfBall
from certtrain.command_line import main
from certtrain.config import structure
from certtrain.data import Digits, Split
from certtrain.errors import InputError
from certtrain.export import Export
from certtrain.losses import Fgsm
from certtrain.models import SmallCnn
from certtrain.models.base import Architecture
from certtrain.recipe import Config
from certtrain.run_folder import RunFolder
from certtrain.training import Cycle, Diagnose, Guard, Linear, Select, Sgd, Training
from certtrain.training import loop as loop_module
from certtrain.training.evaluation import attacked_accuracy, evaluate
from certtrain.training.selection import SCORE, Best
from certtrain.verifiers import Certify
from certtrain.workflows import train as pipeline
from certtrain.workflows.train import resume, train

TINY = Config(
    data=Digits(validation=0.1),
    model=SmallCnn(width=2, hidden=8),
    perturbation=LinfBall(0.05),
    loss=Fgsm(),
    training=Training(
        epochs=4, batch_size=300, optimiser=Sgd(lr=0.2), cycle=Cycle(epochs=(0, 1, 4), shares=(0, 1, 0)), clip=None,
        schedule=Linear(start=1, length=0), epsilon_multiplier=1.0, initialisation="default",
        select=Select(attack=Ascent(steps=3, step_size=0.5)), checkpoint_seconds=0,
    ),
    certify=Certify(enabled=False),
    export=Export(enabled=False),
)  # fmt: skip


class Threshold(nn.Module):
    """Class 1 where the only pixel exceeds ``level``: its accuracy under attack is known by hand."""

    def __init__(self, level: float):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, x):
        margin = x.flatten(1).sum(1) - self.level
        return torch.stack([-margin, margin], 1)


def test_attacked_accuracy_by_hand():
    pixels = torch.tensor([0.1, 0.35, 0.45, 0.55, 0.65, 0.9])
    split = Split(pixels.reshape(-1, 1, 1, 1), (pixels > 0.5).long(), 1)
    model = Threshold(0.5)
    for epsilon, expected in ((0.0, 6), (0.04, 6), (0.1, 4), (0.2, 2), (0.45, 0)):
        found = attacked_accuracy(model, split, LinfBall(epsilon), Ascent(steps=10, step_size=0.25), 0)
        assert found == expected / 6, epsilon
    assert attacked_accuracy(model, split, LinfBall(0.1), Ascent(), 0, images=3) == pytest.approx(2 / 3)


def test_the_first_of_the_best_is_kept():
    pixels = torch.tensor([0.1, 0.35, 0.45, 0.55, 0.65, 0.9])
    split = Split(pixels.reshape(-1, 1, 1, 1), (pixels > 0.5).long(), 1)
    best = Best()
    for epoch, level in enumerate((0.9, 0.5, 0.5001, 0.2), start=1):
        model = Threshold(level)
        score = best.consider(Select(), model, split, LinfBall(0.1), 0, epoch)
        model.level.data.fill_(-1.0)  # what training does next
        assert best.score >= score
    assert (best.epoch, best.score) == (2, 4 / 6) and best.weights["level"] == 0.5


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    """A run that nothing interrupted, to be read alone."""
    return train(TINY, tmp_path_factory.mktemp("whole") / "run", quiet=True)


def test_a_run_keeps_the_best_of_its_candidates(whole):
    folder = whole
    scores = [line[SCORE] for line in folder.metrics if line["kind"] == "epoch"]
    assert len(scores) == 4 and len(set(scores)) > 1
    kept = safetensors.torch.load_file(folder.best)
    shorter = dataclasses.replace(TINY.training, epochs=4)
    model = TINY.model.build((1, 8, 8), 10)
    model.load_state_dict(kept)
    dataset = TINY.data.load()
    found = attacked_accuracy(
        model, dataset.validation, TINY.perturbation, shorter.select.attack_over(TINY.perturbation), TINY.seed
    )
    assert found == max(scores)


def test_every_so_many_epochs_and_the_last(tmp_path):
    select = dataclasses.replace(TINY.training.select, every=3)
    config = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, select=select))
    folder = train(config, tmp_path / "run", quiet=True)
    lines = [line for line in folder.metrics if line["kind"] == "epoch"]
    assert [SCORE in line for line in lines] == [False, False, True, True]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", [5, 10, 15, 19])
def test_resume_keeps_the_best(killed_at, whole, tmp_path, monkeypatch):
    save = loop_module._save

    def save_or_die(folder, recipe, position, *rest):
        if position.step == killed_at + 1:
            raise Killed
        save(folder, recipe, position, *rest)

    monkeypatch.setattr(loop_module, "_save", save_or_die)
    with pytest.raises(Killed):
        train(TINY, tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    cut = resume(tmp_path / "cut", quiet=True)
    assert cut.model.read_bytes() == whole.model.read_bytes() and cut.best.read_bytes() == whole.best.read_bytes()


def test_selection_needs_validation_images(tmp_path, capsys):
    words = ["train", "--data.validation", "0", "--training.select", "{every: 1}", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "training.select: found no validation images" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_cycle_is_piecewise_linear_step_by_step():
    cycle = Cycle(epochs=(0, 10, 20, 30), shares=(0, 1, 0.2, 0), momentum=(0.9, 0.8, 0.9, 0.9))
    training = Training(epochs=30, optimiser=Sgd(lr=0.3), cycle=cycle, schedule=Linear(length=0))
    for epoch, share, momentum in ((0, 0, 0.9), (5, 0.5, 0.85), (10, 1, 0.8), (15, 0.6, 0.85), (29, 0.02, 0.9)):
        assert training.learning_rate(epoch) == pytest.approx(0.3 * share, abs=1e-15)
        optimizer = training.optimiser.build(nn.Linear(2, 2))
        training.set_rate(optimizer, epoch)
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(momentum)
    assert training.learning_rate(30) == training.learning_rate(31) == 0
    constant = Training(
        epochs=30, optimiser=Sgd(lr=0.3), cycle=Cycle((0, 15, 30), (0, 1, 0)), schedule=Linear(length=0)
    )
    optimizer = constant.optimiser.build(nn.Linear(2, 2))
    constant.set_rate(optimizer, 15.0)
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": [1, 2], "shares": [0, 1]}, "epochs: found .* begins with 0"),
        ({"epochs": [0, 2, 2], "shares": [0, 1, 0]}, "epochs: found .*rising"),
        ({"epochs": [0, 2], "shares": [0]}, "shares: found .*2"),
        ({"epochs": [0, 2], "shares": [0, -1]}, "shares: found .*>= 0"),
        ({"epochs": [0, 2], "shares": [0, 1], "momentum": [0.9]}, "momentum: found"),
        ({"epochs": [0, 2], "shares": [0, 1], "momentum": [0.9, 1]}, "momentum: found"),
    ],
)
def test_a_cycle_that_is_none(fields, message):
    with pytest.raises(InputError, match=message):
        structure(Cycle, fields)


def test_only_sgd_has_a_momentum_to_move():
    with pytest.raises(InputError, match="cycle: found 'momentum'; accepted: none with Adam"):
        Training(cycle=Cycle((0, 1), (0, 1), (0.9, 0.8)))


class RunningSum(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


@dataclasses.dataclass(frozen=True)
class RunningSums(Architecture):
    """No bound knows its middle layer."""

    def layers(self, shape, classes):
        return [nn.Flatten(), nn.Linear(64, 16), RunningSum(), nn.Linear(16, classes)]


def test_what_cannot_be_traced_is_trained_where_nothing_is_to_be_certified(tmp_path):
    config = dataclasses.replace(
        TINY, model=RunningSums(), training=dataclasses.replace(TINY.training, precise_bn=True)
    )
    folder = train(config, tmp_path / "run", quiet=True)
    line = next(iter(folder.metrics))
    assert "validation_accuracy" in line and "validation_certified_accuracy" not in line
    assert not folder.verdicts.path.exists() and "certified_accuracy" not in folder.final()
    with pytest.raises(InputError, match=r"^model: cumsum at .*RunningSum.*bounds: training\.initialisation default"):
        train(dataclasses.replace(config, certify=Certify(images=5)), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_evaluate_measures_what_it_says():
    pixels = torch.tensor([0.1, 0.35, 0.45, 0.55, 0.65, 0.9])
    split = Split(pixels.reshape(-1, 1, 1, 1), (pixels > 0.5).long(), 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data = torch.tensor([[-1.0], [1.0]])
    model[1].bias.data = torch.tensor([0.5, -0.5])
    assert evaluate(model, split, LinfBall(0.1)) == {
        "validation_accuracy": 1.0, "validation_certified_accuracy": 4 / 6,
    }  # fmt: skip
    assert model.training


@pytest.fixture
def seen(monkeypatch) -> list[float]:
    """What the guard sees, epoch by epoch: a script in place of an attack."""
    script = [0.5, 0.6, 0.1, 0.1]
    found: list[float] = []

    def measure(self, model, dataset, ball, seed):
        found.append(script[len(found)])
        return found[-1]

    monkeypatch.setattr(Guard, "measure", measure)
    return found


def guarded(action) -> Config:
    return dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, guard=Guard(action=action)))


def weights(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder.model)


@pytest.mark.parametrize(("action", "epochs"), [("warn", 4), ("stop", 3), ("rollback", 3)])
def test_the_guard_acts_on_a_fall(action, epochs, seen, tmp_path, capsys):
    folder = train(guarded(action), tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "after epoch 3 accuracy under attack is 10.0 %, after epoch 2 it was 60.0 %" in said
    lines = [line for line in folder.metrics if line["kind"] == "epoch"]
    assert [line["guard_accuracy"] for line in lines] == seen and len(seen) == epochs
    assert SCORE in lines[-1] and folder.final()
    two = train(
        dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, epochs=2)), tmp_path / "two", quiet=True
    )
    same = all(torch.equal(value, weights(two)[name]) for name, value in weights(folder).items())
    assert same == (action == "rollback")


def test_a_halted_run_stays_halted(seen, tmp_path, monkeypatch):
    whole = train(guarded("stop"), tmp_path / "whole", quiet=True)
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_weights", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(guarded("stop"), tmp_path / "cut", quiet=True)
    cut = resume(tmp_path / "cut", quiet=True)
    assert cut.model.read_bytes() == whole.model.read_bytes() and len(list(cut.metrics)) == 4


def test_diagnoses_are_lines_of_their_own(tmp_path):
    diagnose = Diagnose(every=2, images=20, what=("alignment", "qub"))
    config = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, diagnose=diagnose))
    folder = train(config, tmp_path / "run", quiet=True)
    found = [line for line in folder.metrics if line["kind"] == "diagnosis"]
    assert [line["epoch"] for line in found] == [2, 4] and all(line["images"] == 20 for line in found)
    plain = train(TINY, tmp_path / "plain", quiet=True)
    assert plain.model.read_bytes() == folder.model.read_bytes()
