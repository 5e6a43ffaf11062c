"""The loop, its checkpoints and its ends: killed, interrupted, not finite."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from processes import start
from torch import nn

from certtrain.bounds import forward
from certtrain.command_line import main
from certtrain.config import unstructure
from certtrain.data import Augment, Digits
from certtrain.export import Export
from certtrain.losses import CcIbp, Loss, LossTerms
from certtrain.models import SmallCnn
from certtrain.recipe import Config
from certtrain.run_folder import RunFolder
from certtrain.step import StateSpec
from certtrain.training import Adam, Interrupted, Sgd, Smoothed, Training, TrainingStopped, checkpoint
from certtrain.verifiers import Certify
from certtrain.workflows.train import build_model, resume, train

TINY = Config(
    data=Digits(validation=0.1),
    model=SmallCnn(width=2, hidden=8),
    training=Training(
        epochs=3, batch_size=300, milestones=(2,), schedule=Smoothed(start=1, length=2),
        augment=Augment(pad=1, flip=True), checkpoint_seconds=0,
    ),
    certify=Certify(images=40, batch_size=16, stages=("ibp", "crown", "attack")),
    export=Export(enabled=False),  # which tests/test_export.py tries; it costs seconds
)  # fmt: skip
STEPS = 3 * 5
COMPLETE = dataclasses.replace(TINY, certify=Certify(images=40, batch_size=16))
"""With every stage."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[[Config], RunFolder]:
    """The finished run of a recipe, trained once for all tests; nobody may change it."""
    return cache(lambda config: train(config, tmp_path_factory.mktemp("finished") / "run", quiet=True))


def with_training(config: Config, **changes) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


MEASURED = ("seconds", "spent", "search_seconds", "peak_memory")


def results(folder):
    def timeless(lines):
        return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]

    return folder.model.read_bytes(), timeless(folder.metrics), timeless(folder.verdicts)


@dataclass(frozen=True)
class Stateful(Loss):
    """Keeps one state of each kind, and lets all three reach the weights."""

    def declare_state(self, shape, classes) -> Mapping[str, StateSpec]:
        return {
            "soft": StateSpec("sample", (10,), fill=0.1),
            "shift": StateSpec("position", shape),
            "count": StateSpec("run", (), torch.float64),
        }

    def __call__(self, model, batch, step):
        images = batch.images + 0.01 * step.state.read("shift", batch)
        logits = forward(model, images).logits
        target = step.state.read("soft", batch)
        count = step.state.read("count", batch)
        step.state.write("soft", batch, 0.9 * target + 0.1 * logits.softmax(1))
        step.state.write("shift", batch, step.noise.uniform(batch.images.shape[1:]))
        step.state.write("count", batch, count + 1)
        loss = (
            F.cross_entropy(logits, batch.labels) + (1 + 0.01 * count.float().sum()) * (logits - target).square().mean()
        )
        return LossTerms(loss)


@dataclass(frozen=True)
class Exploding(CcIbp):
    """NaN from the fourth step on."""

    def __call__(self, model, batch, step):
        terms = super().__call__(model, batch, step)
        return LossTerms(terms.total * float("nan"), terms.parts) if step.progress >= 3 / STEPS else terms


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("place", "loss"),
    [("checkpoint", Stateful()), ("metrics", Stateful()), ("rename", Stateful()), ("verdicts", CcIbp())],
    ids=["checkpoint", "metrics", "rename", "verdicts"],
)
def test_killed_anywhere_and_resumed_is_as_if_never_interrupted(loss, place, finished, tmp_path, monkeypatch):
    """Die at every k-th durable write, before or half way through it, until the run gets to its end."""
    config = dataclasses.replace(COMPLETE if place == "verdicts" else TINY, loss=loss)
    expected = results(finished(config))
    budget = {"left": 0, "deaths": 0}

    def dying(function, when=lambda *_: True, half=None):
        def wrapped(*args):
            if when(*args):
                budget["left"] -= 1
                if budget["left"] < 0:
                    budget["deaths"] += 1
                    if half:
                        half(*args)
                    raise Killed
            return function(*args)

        return wrapped

    from certtrain import run_folder

    if place == "checkpoint":
        monkeypatch.setattr(checkpoint, "save", dying(checkpoint.save))
    elif place == "rename":
        monkeypatch.setattr(
            run_folder.os, "replace", dying(os.replace, lambda source, target: target.name != "run.json")
        )
    else:

        def half_a_line(lines, *records):
            with lines.path.open("ab") as file:
                file.write(json.dumps(records[0])[:25].encode())

        append = dying(run_folder.JsonLines.append, lambda lines, *_: lines.path.stem == place, half_a_line)
        monkeypatch.setattr(run_folder.JsonLines, "append", append)

    folder, start = None, lambda: train(config, tmp_path / "cut", quiet=True)
    for allowed in (0, 1, 2, 4, 6, 1000):
        budget["left"] = allowed
        try:
            folder = start()
            break
        except Killed:
            start = lambda: resume(tmp_path / "cut", quiet=True)  # noqa: E731
    assert budget["deaths"] >= 2
    assert folder is not None and results(folder) == expected


def test_really_killed_and_resumed(tmp_path):
    """SIGKILL at moments that nobody chose."""
    config = with_training(TINY, epochs=20, milestones=(10,))
    expected = results(train(config, tmp_path / "whole", quiet=True))
    out = tmp_path / "cut"
    code = """
import json, os, sys
from certtrain.config import structure
from certtrain.recipe import Config
from certtrain.workflows.train import resume, train
recipe, out = sys.argv[1:]
if os.path.exists(out + "/run.json"):
    resume(out, quiet=True)
else:
    train(structure(Config, json.loads(recipe)), out, quiet=True)
"""
    chance, kills = random.Random(0), 0
    for _ in range(3):
        process = start("-c", code, json.dumps(unstructure(config)), out)
        before = (out / "resume.pt").stat().st_mtime_ns if (out / "resume.pt").exists() else 0
        while process.poll() is None:
            if (out / "resume.pt").exists() and (out / "resume.pt").stat().st_mtime_ns != before:
                time.sleep(chance.uniform(0, 0.2))
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
    assert kills >= 1
    assert results(resume(out, quiet=True)) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, finished, tmp_path, monkeypatch, capsys):
    config = with_training(TINY, checkpoint_seconds=1000.0)
    expected = results(finished(config))
    from certtrain.training import update

    steps, descend = [], update.Descend.__call__

    def signalled(*args):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), number)
        return descend(*args)

    monkeypatch.setattr(update.Descend, "__call__", signalled)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", quiet=True)
    assert len(steps) == 7
    assert results(resume(tmp_path / "cut", quiet=True)) == expected
    assert len(steps) == STEPS  # no step was repeated

    steps.clear()
    out = tmp_path / "line"
    words = ["train", "--out", str(out), "--model.type", "Mlp", "--model.hidden", "[8]", "--certify.images", "8"]
    assert main(words) == 128 + number
    assert f"--resume {out}" in capsys.readouterr().err
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_good_checkpoint(tmp_path):
    with pytest.raises(TrainingStopped) as caught:
        train(dataclasses.replace(TINY, loss=Exploding()), tmp_path / "run", quiet=True)
    message = str(caught.value)
    assert "step 4 (epoch 1)" in message and "loss = nan" in message and "resume.pt" in message
    assert not (tmp_path / "run" / "model.safetensors").exists()
    content = checkpoint.load(tmp_path / "run" / "resume.pt", torch.device("cpu"))
    assert content["position"]["step"] == 3
    assert all(torch.isfinite(value).all() for value in content["model"].values() if value.is_floating_point())


def test_resume_without_a_checkpoint_starts_over(finished, tmp_path):
    wanted = results(finished(TINY))
    shutil.copytree(finished(TINY).path, tmp_path / "run")
    for name in ("resume.pt", "metrics.jsonl", "verdicts.jsonl", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    assert results(resume(tmp_path / "run", quiet=True)) == wanted


def test_resume_of_a_finished_run_changes_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished(TINY).path, tmp_path / "run")

    def everything():
        files = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = everything()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert everything() == before
    assert "certified" in capsys.readouterr().out


def test_the_last_line_sums_up_the_verdicts(finished):
    folder = finished(COMPLETE)
    final, verdicts = folder.final(), list(folder.verdicts)
    assert [verdict["index"] for verdict in verdicts] == list(range(40)) and final["images"] == 40
    status = [verdict["status"] for verdict in verdicts]
    wrong, fooled, proved = (status.count(name) for name in ("misclassified", "falsified", "verified"))
    assert final["clean_accuracy"] == (40 - wrong) / 40
    assert final["attacked_accuracy"] == (40 - wrong - fooled) / 40
    assert final["certified_accuracy"] == proved / 40
    assert final["ibp_certified_accuracy"] <= final["certified_accuracy"] and final["epsilon"] == 0.1
    lines = list(folder.metrics)
    assert [line["kind"] for line in lines] == ["epoch"] * 3 + ["final"]
    assert "validation_certified_accuracy" in lines[0] and lines[-1]["seconds"] > 0
    described = json.loads(folder.run.read_text())
    assert described["threads"] == torch.get_num_threads() and len(described["dataset"]["sha256"]) == 64


def test_the_seed_decides_everything(finished, tmp_path):
    first, other = (results(finished(dataclasses.replace(TINY, seed=seed))) for seed in (0, 1))
    again = results(train(dataclasses.replace(TINY, seed=0), tmp_path / "again", quiet=True))
    assert first == again and first[0] != other[0]


def test_two_threads_give_the_same_bits_every_time(tmp_path):
    """Batches large enough for torch to split the work: what a racing sum does shows within a few steps."""
    config = dataclasses.replace(TINY, threads=2, data=Digits(), model=SmallCnn(), certify=Certify(enabled=False))
    config = with_training(config, batch_size=640, checkpoint_seconds=100.0)
    weights = {train(config, tmp_path / str(n), quiet=True).model.read_bytes() for n in range(4)}
    assert len(weights) == 1


def test_the_callers_surroundings_come_back(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    train(dataclasses.replace(TINY, threads=1), tmp_path / "run", quiet=True)
    assert torch.rand(1) == expected and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_accumulated_gradients_are_those_of_the_batch(tmp_path):
    """Without batch norm the parts see what the whole saw, their noise included; ragged last batches too."""
    weights = []
    for parts in (1, 3):
        config = dataclasses.replace(TINY, model=SmallCnn(width=2, hidden=8, batch_norm=False),
                                     loss=CcIbp(regularisation=0.0))  # fmt: skip
        config = with_training(config, accumulate=parts, optimiser=Sgd(lr=0.05), epochs=2)
        train(config, tmp_path / str(parts), quiet=True)
        weights.append(checkpoint.load(tmp_path / str(parts) / "resume.pt", torch.device("cpu"))["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-5)


def test_a_batch_of_one_and_batch_norm_are_refused_before_training(tmp_path, capsys):
    words = ["--training.batch_size", "479", "--out", str(tmp_path / "run")]  # 1438 = 3 · 479 + 1
    assert main(["train", *words]) == 2
    assert "training.batch_size" in capsys.readouterr().err


def test_the_learning_rate_falls_after_its_milestones():
    training = Training(optimiser=Adam(lr=1.0), epochs=10, milestones=(4, 8), decay=0.1, schedule=Smoothed(1, 2))
    rates = [training.learning_rate(epoch) for epoch in range(10)]
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)


def test_initial_weights_depend_on_the_seed_alone():
    dataset = TINY.data.load()
    torch.manual_seed(1)
    first = build_model(TINY, dataset)
    torch.manual_seed(2)
    second = build_model(TINY, dataset)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    assert isinstance(first, nn.Sequential)
