"""The guard against catastrophic overfitting: what it measures, when it fires, what it does, what it remembers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.attacks import Ascent, Pgd
from certtrain.bounds import LinfBall
from certtrain.command_line import main
from certtrain.config import structure, unstructure
from certtrain.data import Augment, Dataset, Loader, Split
from certtrain.errors import InputError
from certtrain.losses import PgdAt
from certtrain.models import SmallCnn
from certtrain.noise import Noise, key_of
from certtrain.run_folder import RunFolder
from certtrain.step import Step
from certtrain.training import checkpoint
from certtrain.training.guard import CheckResult, Guard, LastCheck

BALL = LinfBall(0.1)


def dataset_of(pixels: list[float], labels: list[int], held_out: int = 0) -> Dataset:
    split = Split(torch.tensor(pixels).reshape(-1, 1, 1, 1), torch.tensor(labels), 1)
    index = torch.arange(len(labels))
    kept = split.subset(index[held_out:])
    return Dataset(kept, split.subset(index[:held_out]), Split(split.images * 0, split.labels, 1), 2, "")


class Threshold(nn.Module):
    """Class 1 above ``at``, class 0 below."""

    def __init__(self, at: float):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        z = x.flatten(1) - self.at
        return torch.cat([-z, z], 1)


class TestMeasure:
    def test_by_hand(self):
        """Right by more than epsilon: 0.2 and 0.7; right by less: 0.45; wrong: 0.3."""
        dataset = dataset_of([0.2, 0.45, 0.7, 0.3], [0, 0, 1, 1])
        model = Threshold(0.5).train()
        assert Guard().measure(model, dataset, BALL, seed=0) == 0.5
        assert Guard(images=2).measure(model, dataset, BALL, seed=0) == 1.0  # spread over the split: 0.2 and 0.7
        assert model.training and model.at.grad is None

    def test_validation_images(self):
        dataset = dataset_of([0.45, 0.3, 0.2, 0.7], [0, 1, 0, 1], held_out=2)
        assert Guard(split="validation").measure(Threshold(0.5), dataset, BALL, 0) == 0.0
        assert Guard(split="train").measure(Threshold(0.5), dataset, BALL, 0) == 1.0

    def test_no_validation_images(self):
        dataset = dataset_of([0.2], [0])
        Guard().check_data(dataset)
        guard = Guard(split="validation")
        for refuse in (guard.check_data, lambda it: guard.measure(Threshold(0.5), it, BALL, 0)):
            with pytest.raises(InputError, match=r"training\.guard\.split: found validation.*accepted"):
                refuse(dataset)

    def test_logits_that_are_not_finite_are_wrong(self):
        assert Guard().measure(Threshold(math.nan), dataset_of([0.2, 0.2], [0, 0]), BALL, 0) == 0.0

    def test_repeats_and_leaves_everything_alone(self, digits_dataset):
        torch.manual_seed(0)
        model = SmallCnn(width=2, hidden=8).build((1, 8, 8), 10).train()
        before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        found = [Guard(images=600).measure(model, digits_dataset, LinfBall(0.02), 0) for _ in range(2)]
        assert found[0] == found[1]
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(generator, torch.get_rng_state()) and all(module.training for module in model.modules())


class TestFell:
    @pytest.mark.parametrize(
        "before, now, fell",
        [
            (None, 0.0, False),
            (None, math.nan, False),
            (0.9, 0.95, False),
            (0.9, 0.71, False),
            (0.9, 0.7, False),  # exactly 0.2, which is 0.20000000000000007
            (0.3, 0.1, False),  # and 0.19999999999999998
            (0.9, 0.69, True),
            (0.9, 0.0, True),
            (0.1, 0.0, False),
            (0.1, math.nan, True),
        ],
    )
    def test_fell(self, before, now, fell):
        assert Guard(fall=0.2).fell(before, now) is fell


class Scripted(Guard):
    """A guard whose measurements are known."""

    def measure(self, model, dataset, ball, seed):
        return model.at.item()  # the weight says it


def run(guard: Guard, accuracies: list[float]) -> tuple[list[CheckResult], LastCheck, Threshold]:
    model, last, seen = Threshold(0.0), LastCheck(), []
    for epoch, accuracy in enumerate(accuracies, start=1):
        with torch.no_grad():
            model.at.fill_(accuracy)
            model.seen.fill_(epoch)
        seen.append(last.check(guard, model, dataset_of([0.2], [0]), BALL, 0, epoch))
        if seen[-1].halt:
            break
    return seen, last, model


COLLAPSE = [0.5, 0.75, 0.25, 0.5, 0.0]


class TestActions:
    def test_warn(self):
        seen, last, model = run(Scripted(), COLLAPSE)
        assert [check.alarm is not None for check in seen] == [False, False, True, False, True]
        assert not any(check.halt for check in seen) and not last.halted
        assert seen[0].figures == {"guard_accuracy": 0.5}
        assert seen[2].figures == {"guard_accuracy": 0.25, "guard_fell_from": 0.75}
        assert "after epoch 3" in seen[2].alarm and "25.0 %" in seen[2].alarm and "75.0 %" in seen[2].alarm
        assert "training goes on" in seen[2].alarm and "\n" not in seen[2].alarm
        assert last.accuracy == 0.0 and last.epoch == 5 and not last.weights and model.at.item() == 0.0

    def test_stop(self):
        seen, last, model = run(Scripted(action="stop"), COLLAPSE)
        assert len(seen) == 3 and seen[-1].halt and last.halted
        assert "training ends here" in seen[-1].alarm
        assert model.at.item() == 0.25 and not last.weights

    def test_rollback(self):
        seen, last, model = run(Scripted(action="rollback"), COLLAPSE)
        assert len(seen) == 3 and seen[-1].halt and last.halted
        assert seen[-1].figures == {"guard_accuracy": 0.25, "guard_fell_from": 0.75, "guard_rolled_back_to": 2}
        assert "weights of epoch 2" in seen[-1].alarm
        assert model.at.item() == 0.75 and float(model.seen) == 2  # buffers too
        assert last.accuracy == 0.75 and last.epoch == 2

    def test_a_slow_fall_shows_against_the_best(self):
        slow = [0.8, 0.65, 0.5, 0.35]
        assert not any(check.alarm for check in run(Scripted(), slow)[0])
        seen, _, model = run(Scripted(since="best", action="rollback"), slow)
        assert len(seen) == 3 and seen[-1].figures["guard_fell_from"] == pytest.approx(0.8)
        assert model.at.item() == pytest.approx(0.8)

    def test_a_fall_to_nothing_is_not_compared_with_later(self):
        seen, last, _ = run(Scripted(since="best"), [0.8, 0.1, 0.1])
        assert [check.alarm is not None for check in seen] == [False, True, True] and last.accuracy == pytest.approx(
            0.8
        )

    def test_memory_survives_a_checkpoint(self, tmp_path):
        """Through ``resume.pt``'s own reader; then a rollback to what was kept before."""
        _, last, _ = run(Scripted(action="rollback"), [0.5, 0.75])
        checkpoint.save(tmp_path / "resume.pt", {"guard": vars(last)})
        again, model = LastCheck(), Threshold(0.25)
        again.restore(checkpoint.load(tmp_path / "resume.pt", torch.device("cpu"))["guard"])
        assert again.weights.keys() == last.weights.keys() == {"at", "seen"}
        assert (again.accuracy, again.epoch, again.halted) == (0.75, 2, False)
        seen = again.check(Scripted(action="rollback"), model, dataset_of([0.2], [0]), BALL, 0, 3)
        assert seen.halt and model.at.item() == 0.75
        checkpoint.save(tmp_path / "resume.pt", {"guard": vars(again)})
        again.restore(checkpoint.load(tmp_path / "resume.pt", torch.device("cpu"))["guard"])
        assert again.halted
        checkpoint.save(tmp_path / "resume.pt", {"guard": vars(LastCheck())})
        again.restore(checkpoint.load(tmp_path / "resume.pt", torch.device("cpu"))["guard"])
        assert again == LastCheck()

    def test_kept_weights_do_not_follow_the_training(self):
        _, last, model = run(Scripted(action="rollback"), [0.5])
        with torch.no_grad():
            model.at.fill_(9.0)
        assert float(last.weights["at"]) == 0.5


def test_a_network_that_loses_its_robustness(digits_dataset):
    """Six epochs of PGD-AT, then clean images alone: clean accuracy stays, robustness goes, and the guard sees it."""
    torch.manual_seed(0)
    model, ball = SmallCnn(width=8, hidden=32).build((1, 8, 8), 10), LinfBall(0.12)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loader, last = Loader(digits_dataset.train, 128, Augment(), 0), LastCheck()
    guard = Guard(every=2, action="rollback")
    seen, number = [], 0
    for epoch in range(24):
        model.train()
        optimizer.param_groups[0]["lr"] = 5e-3 if epoch < 6 else 2e-2
        for batch in loader.epoch(epoch):
            number += 1
            step = Step.evaluation(ball, Noise(key_of(0, number), torch.arange(len(batch))))
            robust = epoch < 6
            total = PgdAt()(model, batch, step).total if robust else F.cross_entropy(model(batch.images), batch.labels)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        if (epoch + 1) % guard.every:
            continue
        seen.append(last.check(guard, model, digits_dataset, ball, 0, epoch + 1))
        if seen[-1].halt:
            break
    accuracies = [check.figures["guard_accuracy"] for check in seen]
    assert seen[-1].halt and not any(check.halt for check in seen[:-1]) and len(seen) > 3
    assert accuracies[-1] < accuracies[-2] - 0.2
    assert guard.measure(model, digits_dataset, ball, 0) == accuracies[-2]  # rolled back, with its statistics


TINY = ["--loss.type", "Fgsm", "--model.type", "Mlp", "--model.hidden", "[8]", "--training.epochs", "3",
        "--training.milestones", "[]", "--training.schedule.length", "1", "--training.batch_size", "500",
        "--training.checkpoint_seconds", "0", "--certify.images", "2", "--certify.stages", "[ibp]",
        "--export.enabled", "false"]  # fmt: skip


class TestRun:
    """Through the command line and the training loop."""

    def test_watching_and_diagnosing_change_nothing(self, tmp_path):
        watching = [
            "--training.guard",
            "{action: rollback, fall: 0.99, every: 2}",
            "--training.diagnose",
            "{images: 40}",
        ]
        assert main(["train", *TINY, "--out", str(tmp_path / "plain")]) == 0
        assert main(["train", *TINY, *watching, "--out", str(tmp_path / "watched")]) == 0
        plain, watched = (RunFolder(tmp_path / name) for name in ("plain", "watched"))
        assert plain.model.read_bytes() == watched.model.read_bytes()
        lines = list(watched.metrics)
        assert [line["epoch"] for line in lines if "guard_accuracy" in line] == [2]
        found = [line for line in lines if line["kind"] == "diagnosis"]
        assert [line["epoch"] for line in found] == [1, 2, 3] and all("divergence_split" in line for line in found)

    @pytest.mark.parametrize("action", ["stop", "rollback"])
    def test_a_fall_ends_the_run(self, tmp_path, monkeypatch, action):
        """Measured accuracies are made up; a resume finds nothing left to train."""
        made_up = iter([0.9, 0.1])
        monkeypatch.setattr(Guard, "measure", lambda *_: next(made_up))
        assert main(["train", *TINY, "--training.guard", f"{{action: {action}}}", "--out", str(tmp_path / "run")]) == 0
        assert main(["train", *TINY, "--training.epochs", "2", "--out", str(tmp_path / "plain")]) == 0
        run, plain = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "plain")
        epochs = [line for line in run.metrics if line["kind"] == "epoch"]
        assert [line["guard_accuracy"] for line in epochs] == [0.9, 0.1] and epochs[1]["guard_fell_from"] == 0.9
        assert epochs[1].get("guard_rolled_back_to") == (1 if action == "rollback" else None)
        assert (run.model.read_bytes() == plain.model.read_bytes()) == (action == "stop")
        kept, lines = run.model.read_bytes(), run.metrics.path.read_text().splitlines(keepends=True)
        run.metrics.path.write_text("".join(lines[:-1]))  # cut short before its last line
        assert main(["train", "--resume", str(run.path)]) == 0
        assert run.model.read_bytes() == kept and run.final() is not None
        assert [line for line in run.metrics if line["kind"] == "epoch"] == epochs

    def test_no_validation_images_for_a_run(self, tmp_path, capsys):
        out = tmp_path / "run"
        assert main(["train", *TINY, "--training.guard", "{split: validation}", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: training.guard.split: found validation") and said.count("\n") == 1
        assert not out.exists()


class TestFields:
    def test_round_trip(self):
        guard = Guard(every=2, images=64, split="validation", attack=Pgd(steps=5), fall=0.1, action="stop")
        assert structure(Guard, unstructure(guard)) == guard
        pgd = Ascent(attack_mode="eval", steps=10, step_size=0.25, start="uniform")
        assert Guard().attack_over(LinfBall(0.1)) == pgd

    @pytest.mark.parametrize(
        "field, value",
        [("every", 0), ("images", 0), ("split", "test"), ("fall", 0.0), ("fall", 1.0), ("fall", "nan"),
         ("action", "hope"), ("since", "ever"), ("attack", {"attack_mode": "train"})],
    )  # fmt: skip
    def test_bad_fields(self, field, value):
        with pytest.raises(InputError, match=rf"^training\.guard\.{field}: found .*accepted: [^\n]+$"):
            structure(Guard, {field: value}, "training.guard")
