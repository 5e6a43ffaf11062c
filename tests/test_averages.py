"""Precise batch norm, weight averaging, measurements along training, optimisers: exact, and exact after a kill."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from certtrain.attacks import Pgd
from certtrain.bounds import LinfBall, compute_margins, forward
from certtrain.config import structure
from certtrain.data import Arrays, Split
from certtrain.errors import InputError
from certtrain.export import Export
from certtrain.losses import CcIbp, Ibp
from certtrain.losses.certified import margin_loss
from certtrain.models import SmallCnn
from certtrain.recipe import Config
from certtrain.step import Batch
from certtrain.training import AdamW, Averaging, Descend, Measure, RAdam, Smoothed, Training
from certtrain.training import loop as loop_module
from certtrain.training.averages import WeightAverage, recompute_statistics
from certtrain.verifiers import Certify
from certtrain.workflows.run import load_model
from certtrain.workflows.train import resume, train


def config(**training) -> Config:
    """Three epochs of four steps on the digits."""
    return Config(
        model=SmallCnn(width=2, hidden=8), loss=CcIbp(),
        training=Training(**{"epochs": 3, "batch_size": 400, "milestones": (), "schedule": Smoothed(1, 1), **training}),
        certify=Certify(images=10, stages=("ibp",)), export=Export(enabled=False),
    )  # fmt: skip


class TestPreciseBatchNorm:
    def test_is_the_mean_over_all_batches(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double().train()
        images = [torch.rand(size, 3, dtype=torch.float64) for size in (5, 5, 2)]
        batches = [Batch(x, torch.zeros(len(x)).long(), torch.arange(len(x))) for x in images]
        norm = model[1]
        norm.running_mean.fill_(100.0)
        for _ in range(2):  # the second time from what the first left: it is forgotten
            recompute_statistics(model, batches)
        before = [model[0](x) for x in images]
        mean = sum(len(z) * z.mean(0) for z in before) / 12
        variance = sum(len(z) * z.var(0, unbiased=True) for z in before) / 12
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)
        assert norm.momentum == 0.1 and model.training

    def test_momentum_comes_back_after_an_interruption(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()

        def batches():
            yield Batch(torch.rand(5, 3), torch.zeros(5).long(), torch.arange(5))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            recompute_statistics(model, batches())
        assert model[1].momentum == 0.1

    def test_a_run_ends_with_them(self, tmp_path):
        recipe, plain = config(precise_bn=True), config()
        recipe, plain = (dataclasses.replace(r, loss=CcIbp(attack=Pgd(attack_mode="batch"))) for r in (recipe, plain))
        model, _ = load_model(train(recipe, tmp_path / "precise", quiet=True).path)
        other, _ = load_model(train(plain, tmp_path / "plain", quiet=True).path)
        # such an attack does not look at running statistics, so the weights are the same
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
        assert not torch.equal(model[1].running_mean, other[1].running_mean)
        split = recipe.data.load().train
        images = split.pixels(torch.arange(len(split)))
        inputs = forward(nn.Sequential(model[0]), images).logits
        torch.testing.assert_close(model[1].running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[1].running_var, inputs.var((0, 2, 3)), rtol=2e-2, atol=1e-3)


@dataclasses.dataclass(frozen=True)
class Recording(Descend):
    """Descends, and remembers the weights after each step."""

    def __call__(self, model, *rest):
        figures = super().__call__(model, *rest)
        WEIGHTS.append([parameter.detach().clone() for parameter in model.parameters()])
        return figures


WEIGHTS: list[list[torch.Tensor]] = []


class TestWeightAverage:
    @pytest.mark.parametrize(("start", "every", "taken"), [(0, 1, range(12)), (1, 3, (5, 8, 11)), (2, 2, (9, 11))])
    def test_a_run_ends_with_the_mean(self, start, every, taken, tmp_path):
        """``taken``, by hand: 0-based steps behind ``start`` epochs of 4 whose 1-based number ``every`` divides."""
        WEIGHTS.clear()
        recipe = config(averaging=Averaging(start, every), update=Recording())
        model, _ = load_model(train(recipe, tmp_path / "run", quiet=True).path)
        assert len(WEIGHTS) == 12
        for place, parameter in enumerate(model.parameters()):
            mean = torch.stack([WEIGHTS[step][place].double() for step in taken]).mean(0)
            torch.testing.assert_close(parameter.detach().double(), mean, rtol=1e-5, atol=1e-6)
        split = recipe.data.load().train
        inputs = model[0](split.pixels(torch.arange(len(split))))
        torch.testing.assert_close(model[1].running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)

    def test_none_leaves_the_weights(self):
        model = nn.Linear(2, 2)
        before = model.weight.clone()
        for settings in (None, Averaging(start=1, every=5)):
            average = WeightAverage(model, settings, steps_per_epoch=4)
            average.update(model, 3)
            assert not average.put_into(model) and torch.equal(model.weight, before)

    @pytest.mark.parametrize("field", ["start", "every"])
    def test_bad_values(self, field):
        with pytest.raises(InputError, match=f"averaging.{field}: found -1"):
            structure(Training, {"averaging": {"start": 1, field: -1}})
        with pytest.raises(InputError, match="averaging: found 'a start after epoch 3'"):
            structure(Training, {"epochs": 3, "averaging": {"start": 3}, "schedule": {"length": 1}})

    def test_one_that_averages_nothing_is_refused(self, tmp_path):
        for start, every in ((0, 13), (2, 8)):
            with pytest.raises(
                InputError, match=f"every {every} steps after {4 * start} of 12, which averages nothing"
            ):
                train(config(averaging=Averaging(start, every)), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


class TestMeasure:
    def test_what_a_line_says(self):
        torch.manual_seed(0)
        model = SmallCnn(width=2, hidden=8).build((1, 8, 8), 10)
        split = config().data.load().train
        ball = LinfBall(0.03)
        line = Measure(images=100, alphas=(0.0, 0.5, 1.0))(model, split, ball, seed=0)
        assert model.training
        assert line["cc_losses"][0] == pytest.approx(line["adversarial_loss"])
        assert line["cc_losses"][2] == pytest.approx(line["verified_loss"])
        assert line["cc_losses"] == sorted(line["cc_losses"]) and line["ordered"] == 1.0
        assert line["shift_error"] < 1e-3
        model.eval()
        index = torch.arange(100)
        margins, _ = compute_margins(model, ball.region(split.pixels(index)), split.labels[index])
        assert line["verified_loss"] == pytest.approx(margin_loss(margins).mean().item())
        assert [layer["units"] for layer in line["layers"]] == [2 * 16, 4 * 4, 8]
        assert [layer["path"] for layer in line["layers"]] == ["0", "3", "7"]

    def test_unstable_units_by_hand(self):
        """Inputs of the ReLUs: x, x - 0.5 and x - 2 for x = 0.5 ± 0.1, in one image of two."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
        with torch.no_grad():
            model[1].weight.fill_(1.0)
            model[1].bias.copy_(torch.tensor([0.0, -0.5, -2.0]))
        images = torch.tensor([0.5, 0.9]).reshape(2, 1, 1, 1)
        line = Measure()(model, Split(images, torch.tensor([0, 1]), 1), LinfBall(0.1), seed=0)
        assert line["layers"] == [
            {"path": "1", "units": 3, "radius": pytest.approx(0.1), "unstable": pytest.approx(1 / 6)}
        ]

    def test_a_layer_that_is_used_twice_is_told_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.flatten, self.layer, self.relu, self.last = (
                    nn.Flatten(),
                    nn.Linear(4, 4),
                    nn.ReLU(),
                    nn.Linear(4, 2),
                )

            def forward(self, x):
                x = self.relu(self.flatten(x))
                return self.last(self.relu(x + self.relu(self.layer(x))))

        line = Measure()(Twice(), Split(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), 1), LinfBall(0.1), seed=0)
        assert len(line["layers"]) == 3

    def test_an_attack_that_would_change_the_network_is_refused(self):
        with pytest.raises(InputError, match=r"measure\.attack: found .*accepted"):
            structure(Training, {"measure": {"attack": {"attack_mode": "train"}}})

    def test_lines_come_every_n_epochs_and_change_nothing(self, tmp_path):
        measured = train(config(measure=Measure(every=2, images=50)), tmp_path / "measured", quiet=True)
        plain = train(config(), tmp_path / "plain", quiet=True)
        assert measured.model.read_bytes() == plain.model.read_bytes()
        lines = [line for line in measured.metrics if line["kind"] == "measurement"]
        assert [line["epoch"] for line in lines] == [2]
        assert not [line for line in plain.metrics if line["kind"] == "measurement"]

    @pytest.mark.parametrize("alphas", [[0.5], [0.5, 0.1], [0.0, 2.0], [-1.0, 0.5]])
    def test_bad_alphas(self, alphas):
        with pytest.raises(InputError, match=r"measure\.alphas: found"):
            structure(Training, {"measure": {"alphas": alphas}})


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("killed_at", [5, 8, 11])
def test_resume_is_exact_with_all_of_them(killed_at, tmp_path, monkeypatch):
    recipe = config(averaging=Averaging(1, 2), precise_bn=True, measure=Measure(every=1, images=20))

    def results(folder):
        lines = [{k: v for k, v in line.items() if k not in ("seconds", "spent")} for line in folder.metrics]
        return folder.model.read_bytes(), lines

    expected = results(train(recipe, tmp_path / "whole", quiet=True))
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, checkpoint_seconds=0.0))
    save = loop_module._save

    def save_or_die(folder, fingerprint, position, *rest):
        if position.step == killed_at + 1:
            raise Killed
        save(folder, fingerprint, position, *rest)

    monkeypatch.setattr(loop_module, "_save", save_or_die)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    assert results(resume(tmp_path / "cut", quiet=True)) == expected


@pytest.mark.parametrize(("kind", "torch_kind"), [(AdamW, torch.optim.AdamW), (RAdam, torch.optim.RAdam)])
def test_optimisers_are_torchs(kind, torch_kind):
    optimiser = kind(lr=1e-3, weight_decay=0.02).build(nn.Linear(2, 2))
    assert type(optimiser) is torch_kind
    assert optimiser.param_groups[0]["lr"] == 1e-3 and optimiser.param_groups[0]["weight_decay"] == 0.02
    assert (
        kind().build(nn.Linear(2, 2)).defaults["weight_decay"]
        == torch_kind([nn.Parameter(torch.ones(1))]).defaults["weight_decay"]
    )


def test_milestones_from_the_end_of_the_ramp():
    """CTRAIN's 5 + 83 epochs of warm-up and ramp, +12 and +29 more."""
    training = Training(
        epochs=160, schedule=Smoothed(start=6, length=83), milestones=(12, 41), milestones_from="ramp_end", decay=0.1
    )
    rates = [round(training.learning_rate(epoch) / training.optimiser.lr, 10) for epoch in range(160)]
    assert rates == [1.0] * 100 + [0.1] * 29 + [0.01] * 31
    both = dataclasses.replace(training, milestones=(0, 0))
    assert both.learning_rate(87) == training.optimiser.lr and both.learning_rate(88) == pytest.approx(
        0.01 * training.optimiser.lr
    )
    with pytest.raises(InputError, match="milestones: found"):
        structure(Training, {"milestones": [0]})


def test_arrays_and_ibp_take_them_too(tmp_path):
    """No batch norm, another loss, another source: nothing to recompute, all the rest goes on."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = {f"{name}_images": rng.random((20, 1, 4, 4), dtype=np.float32) for name in ("train", "test")}
    labels = {f"{name}_labels": np.arange(20) % 2 for name in ("train", "test")}
    np.savez(tmp_path / "a.npz", **images, **labels)
    recipe = dataclasses.replace(
        config(precise_bn=True, averaging=Averaging(0, 1), batch_size=10, schedule=Smoothed(1, 0)), loss=Ibp(),
        data=Arrays(path=tmp_path / "a.npz"), model=SmallCnn(width=2, hidden=4, batch_norm=False),
    )  # fmt: skip
    final = train(copy.deepcopy(recipe), tmp_path / "run", quiet=True).final()
    assert final is not None and final["images"] == 10
