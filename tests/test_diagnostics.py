"""Diagnostics against torch itself, brute force and hand computations; they change nothing; figures are figures."""

import ast
import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from certtrain.attacks import Ascent, SquaredEuclidean
from certtrain.bounds import L2Ball, LinfBall
from certtrain.command_line import main
from certtrain.config import structure, unstructure
from certtrain.data import Split
from certtrain.diagnostics import (
    DIAGNOSTICS,
    Subject,
    boundary_distortion,
    divergence_split,
    fgsm_pgd_cosine,
    gradient_alignment,
    hessian,
    hessian_spectrum,
    landscape,
    looking,
    qub_gap,
    spread,
    those_for,
)
from certtrain.diagnostics.figures import draw_epochs, draw_landscape, save
from certtrain.diagnostics.logits import largest_curvature
from certtrain.errors import InputError
from certtrain.losses import Fait
from certtrain.noise import Noise
from certtrain.run_folder import RunFolder
from certtrain.step import Batch, Step
from certtrain.training.diagnosing import Diagnose
from certtrain.workflows.diagnose import diagnose

BALL = LinfBall(0.1)
KNOWN = those_for(BALL)


def batch_of(images: torch.Tensor, classes: int = 3) -> Batch:
    index = torch.arange(len(images))
    return Batch(images, index % classes, index)


def small(classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, classes)
    ).double().eval()  # fmt: skip


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    return batch_of(torch.rand(7, 1, 2, 5, dtype=torch.float64))


@pytest.fixture
def noise(batch) -> Noise:
    return Noise(5, batch.index)


class Function(nn.Module):
    """Logits (0, g(x)) of images of one pixel."""

    def __init__(self, g):
        super().__init__()
        self.g = g

    def forward(self, x):
        x = x.flatten(1)
        return torch.cat([0 * x, self.g(x)], 1)


class TestAlignment:
    @pytest.mark.parametrize("ball", [BALL, L2Ball(0.5)])
    def test_two_logits_of_a_linear_network_are_aligned(self, batch, noise, ball):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(10, 2)).double()
        found = gradient_alignment(model, batch_of(batch.images, 2), ball, noise)
        assert found == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("ball", [BALL, L2Ball(0.5)])
    def test_against_one_image_at_a_time(self, batch, noise, ball):
        model, expected = small(), []
        with torch.no_grad():
            model[1].weight *= 10  # far from linear
        eta = ball.sample(batch.images, noise, "eta")
        for i in range(len(batch)):
            found = []
            for x in (batch.images[i : i + 1], batch.images[i : i + 1] + eta[i]):
                x = x.clone().requires_grad_()
                F.cross_entropy(model(x), batch.labels[i : i + 1]).backward()
                found.append(x.grad.flatten())
            expected.append(F.cosine_similarity(*found, dim=0).item())
        found = gradient_alignment(model, batch, ball, noise)
        assert found == pytest.approx(sum(expected) / 7, abs=1e-12)
        assert found < 0.999

    def test_images_without_a_gradient_are_left_out(self):
        """g is flat below 0.3, and rises by x² above: the first image has no gradient, that of the others aligns."""
        model = Function(lambda x: torch.where(x < 0.3, 0 * x, x**2))
        images = torch.tensor([0.1, 0.7, 0.8], dtype=torch.float64).reshape(3, 1, 1, 1)
        assert gradient_alignment(model, batch_of(images, 2), BALL, Noise(0, torch.arange(3))) == pytest.approx(1)
        flat = batch_of(images[:1], 2)
        assert gradient_alignment(model, flat, BALL, Noise(0, torch.arange(1))) is None
        assert fgsm_pgd_cosine(model, flat, BALL, Noise(0, torch.arange(1)), attack=Ascent(start="zero")) is None

    def test_small_gradients_count(self):
        """Squares of 1e-30 vanish in float32."""
        model = Function(lambda x: 1e-30 * x)
        images = torch.full((2, 1, 1, 1), 0.5)
        assert gradient_alignment(model, batch_of(images, 2), BALL, Noise(0, torch.arange(2))) == pytest.approx(1)

    def test_a_broken_network_is_not_aligned(self):
        images = torch.full((2, 1, 1, 1), 0.5)
        found = gradient_alignment(
            Function(lambda x: x / 0 - x / 0), batch_of(images, 2), BALL, Noise(0, torch.arange(2))
        )
        assert found is not None and math.isnan(found)

    def test_fgsm_and_pgd_agree_where_the_loss_is_linear(self, batch, noise):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(10, 2)).double()
        assert fgsm_pgd_cosine(model, batch_of(batch.images, 2), BALL, noise) == pytest.approx(1, abs=1e-9)

    def test_fgsm_against_pgd_by_hand(self):
        """Label 0, g has its peak at 0.53: from 0.5 FGSM goes 0.1 up; PGD's last step of 0.04 from 0.48 overshoots."""
        model = Function(lambda x: -((x - 0.53) ** 2))
        images = torch.tensor([0.5, 0.6]).reshape(2, 1, 1, 1)
        attack = Ascent(steps=2, step_size=0.4, start="zero")  # 0.5 -> 0.54 -> 0.5: no change, not counted
        found = fgsm_pgd_cosine(
            model, Batch(images, torch.zeros(2).long(), torch.arange(2)), BALL, Noise(0, torch.arange(2)), attack=attack
        )
        assert found == pytest.approx(1)  # 0.6 -> 0.56 -> 0.52, as FGSM: down

    def test_distortion_by_hand(self):
        """A bump of g around 0.55: right at 0.5 and at 0.6, wrong between; right all along; wrong at the start."""
        model = Function(lambda x: 1 - 40 * (x - 0.55).abs())
        images = torch.tensor([0.5, 0.2, 0.55], dtype=torch.float64).reshape(3, 1, 1, 1)
        batch, noise = Batch(images, torch.zeros(3).long(), torch.arange(3)), Noise(0, torch.arange(3))
        assert boundary_distortion(model, batch, BALL, noise) == 0.5
        assert boundary_distortion(model, batch, BALL, noise, points=2) == 0.5  # the middle, 0.55, is wrong
        assert boundary_distortion(model, batch, BALL, noise, points=1) == 0.0  # nothing lies between
        assert boundary_distortion(model, batch.part(slice(2, 3)), BALL, Noise(0, torch.arange(1))) is None


class TestLogits:
    @pytest.mark.parametrize("ball", [BALL, L2Ball(0.5), LinfBall(0.0)])
    def test_qub_gap_by_its_formula(self, batch, noise, ball):
        model = small()
        found = qub_gap(model, batch, ball, noise)
        images = Ascent()(model, batch, ball, Step.evaluation(ball, noise)).images
        with torch.no_grad():
            z, a = model(batch.images), model(images)
        p, y = z.softmax(1), F.one_hot(batch.labels, 3)
        bound = (
            F.cross_entropy(z, batch.labels) + ((a - z) * (p - y)).sum(1).mean() + (a - z).square().sum(1).mean() / 4
        )
        assert found.gap == pytest.approx(float(bound - F.cross_entropy(a, batch.labels)), abs=1e-12)
        assert found.distance == pytest.approx(float((a - z).norm(dim=1).mean()), abs=1e-12)
        assert -1e-12 <= found.centred_gap <= found.gap + 1e-12
        assert found.gap <= float((a - z).square().sum(1).mean()) / 4 + 1e-12
        assert (found.gap > 0) == (ball.epsilon > 0)
        exact = torch.linalg.eigvalsh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])[:, -1]
        assert found.curvature == pytest.approx(float(exact.mean()), abs=1e-12)

    @pytest.mark.parametrize("classes", [2, 3, 10])
    @pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 2000.0])
    def test_largest_curvature(self, classes, scale):
        """Uniform, ordinary, peaked and saturated predictions."""
        torch.manual_seed(0)
        p = F.softmax(scale * torch.randn(20, classes, dtype=torch.float64), 1)
        exact = torch.linalg.eigvalsh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])[:, -1]
        torch.testing.assert_close(largest_curvature(p), exact, atol=1e-13, rtol=0)

    def test_largest_curvature_of_ties(self):
        p = torch.tensor([[0.4, 0.4, 0.2], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(
            largest_curvature(p), torch.tensor([0.4, 0.5, 0.0], dtype=torch.float64), atol=1e-15, rtol=0
        )

    @pytest.mark.parametrize("divergence", [None, SquaredEuclidean()])
    def test_split_is_what_fait_trains(self, batch, noise, divergence):
        """At every index, by one attack: FAIT's own regulariser for an attack that stops to record there."""
        model, given = small(), {} if divergence is None else {"divergence": divergence}
        found = divergence_split(model, batch, BALL, noise, **given)
        assert len(found.split) == 9
        step = Step.evaluation(BALL, noise)
        for index, split in enumerate(found.split, start=1):
            loss = Fait(index=index, weight=1.0, **given)
            passes = loss.passes(model, batch, step, loss.attacked(model, batch, step), model(batch.images))
            assert split == pytest.approx(float(loss.regularisers(passes, step)["divergence"]), abs=1e-12)
            whole = loss.divergence.between(passes.clean_logits, passes.adversarial).mean()
            assert found.whole == pytest.approx(float(whole), abs=1e-12)
        assert found.whole > 0

    def test_one_step_has_no_split(self, batch, noise):
        found = divergence_split(small(), batch, BALL, noise, attack=Ascent(steps=1, step_size=1.0, start="uniform"))
        assert found.split == () and found.whole > 0


class TestLandscape:
    def test_against_brute_force(self, batch, noise):
        model = small()
        found = landscape(model, batch, BALL, noise, half=2, reach=1.5)
        assert found.steps.tolist() == [-1.5, -0.75, 0.0, 0.75, 1.5]
        x = batch.images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch.labels), x)
        signs = 2 * noise.integers(2, batch.images.shape[1:], "rademacher") - 1
        for i, a in enumerate(found.steps):
            for j, b in enumerate(found.steps):
                points = batch.images + a * 0.1 * gradient.sign() + b * 0.1 * signs
                expected = F.cross_entropy(model(points), batch.labels)
                torch.testing.assert_close(found.losses[i, j], expected.detach(), atol=1e-12, rtol=0)
        assert found.losses[2, 2] == pytest.approx(F.cross_entropy(model(batch.images), batch.labels).item(), abs=1e-15)

    def test_the_loss_rises_along_the_first_axis(self, batch, noise):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(10, 2)).double()
        found = landscape(model, batch_of(batch.images, 2), BALL, noise, half=3)
        assert (found.losses.diff(dim=0) > 0).all()

    def test_one_image_of_odd_shape_in_an_l2_ball(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
        batch = batch_of(torch.rand(1, 3, 1, 1))
        found = landscape(model, batch, L2Ball(0.2), Noise(0, batch.index), half=1)
        assert found.losses.shape == (3, 3)
        assert found.losses[1, 1] == pytest.approx(F.cross_entropy(model(batch.images), batch.labels).item(), abs=1e-6)

    @pytest.mark.parametrize("wrong", [{"half": 0}, {"reach": 0.0}, {"reach": math.nan}, {"reach": math.inf}])
    def test_bad_grids(self, batch, noise, wrong):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: found .*accepted"):
            landscape(small(), batch, BALL, noise, **wrong)


def dense_hessian(model: nn.Module, batch: Batch) -> torch.Tensor:
    """By torch.func, forward over reverse."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        pieces = (piece.view_as(w) for piece, w in zip(flat.split(sizes), weights.values()))
        logits = torch.func.functional_call(model, dict(zip(weights, pieces)), (batch.images.double(),))
        return F.cross_entropy(logits, batch.labels)

    return torch.func.hessian(loss)(torch.cat([weight.flatten() for weight in weights.values()]))


class TestHessian:
    @pytest.mark.parametrize("part", [128, 3])
    @pytest.mark.parametrize("top", [1, 5, 40])
    def test_against_the_dense_hessian(self, batch, top, part, monkeypatch):
        monkeypatch.setattr(hessian, "BATCH", part)
        model = small()
        exact = torch.linalg.eigvalsh(dense_hessian(model, batch)).flip(0)
        found = hessian_spectrum(model, batch, top)
        assert found.weights == len(exact) == 6 * 11 + 12 + 3 * 7
        torch.testing.assert_close(torch.tensor(found.values).double(), exact[:top], rtol=1e-6, atol=1e-9)
        assert len(found.residuals) == top and max(found.residuals) < 1e-6

    def test_largest_in_size(self, batch):
        model = small()
        with torch.no_grad():
            model[4].bias += torch.tensor([9.0, -9.0, 0.0])  # mostly wrong: curvature of both signs
        exact = torch.linalg.eigvalsh(dense_hessian(model, batch))
        expected = exact[exact.abs().argsort(descending=True)][:6]
        assert (expected < 0).any() and (expected > 0).any()
        found = hessian_spectrum(model, batch, 6, which="LM")
        torch.testing.assert_close(torch.tensor(found.values).double(), expected, rtol=1e-6, atol=1e-9)

    def test_a_quadratic_with_a_known_spectrum(self):
        class Weights(nn.Module):
            def __init__(self):
                super().__init__()
                self.w, self.idle = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(2))

            def forward(self, x):
                return self.w.flatten().expand(len(x), -1)

        torch.manual_seed(0)
        spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.0, -0.5, -1.0, -3.0, -9.0]).double()
        turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
        matrix = turn @ torch.diag(spectrum) @ turn.T
        batch = batch_of(torch.rand(5, 1, 1, 1))
        found = hessian_spectrum(Weights(), batch, 4, losses=lambda w, _: ((w @ matrix) * w).sum(1) / 2)
        assert found.values == pytest.approx([8, 4, 2, 1], rel=1e-8)
        found = hessian_spectrum(Weights(), batch, 3, which="LM", losses=lambda w, _: ((w @ matrix) * w).sum(1) / 2)
        assert found.values == pytest.approx([-9, 8, 4], rel=1e-8) and found.weights == 14

    def test_float32_training_mode_pools_and_frozen_layers(self):
        """The copy is in float64 and in evaluation mode; frozen weights have no rows."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(8, 3),
        )  # fmt: skip
        model[0].requires_grad_(False)
        batch = batch_of(torch.rand(6, 1, 4, 4))
        exact = torch.linalg.eigvalsh(dense_hessian(copy.deepcopy(model).double().eval(), batch)).flip(0)
        before = copy.deepcopy(model.state_dict())
        found = hessian_spectrum(model.train(), batch, 4)
        torch.testing.assert_close(torch.tensor(found.values).double(), exact[:4], rtol=1e-6, atol=1e-9)
        assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_a_network_of_zeros(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
        for weight in model.parameters():
            nn.init.zeros_(weight)
        batch = Batch(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), torch.arange(2))
        found = hessian_spectrum(model, batch, 2)  # of the last bias alone: diag(p) - ppT = [[1, -1], [-1, 1]] / 4
        assert found.values == pytest.approx([0.5, 0.0], abs=1e-12)

    @pytest.mark.parametrize("wrong", [{"top": 0}, {"top": 99}, {"which": "SM"}])
    def test_bad_questions(self, batch, wrong):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: found .*accepted"):
            hessian_spectrum(small(), batch, **wrong)

    def test_nothing_to_train(self, batch):
        with pytest.raises(InputError, match="model: found 'no weights"):
            hessian_spectrum(small().requires_grad_(False), batch, 1)

    def test_the_same_at_every_call(self, batch):
        assert hessian_spectrum(small(), batch, 3) == hessian_spectrum(small(), batch, 3)


class TestAll:
    def subject(self, batch, noise, model=None) -> Subject:
        return Subject(model or small(), batch, BALL, noise, top=3)

    def test_parts_make_no_difference(self, batch, noise, monkeypatch):
        whole = {name: DIAGNOSTICS[name](self.subject(batch, noise)) for name in KNOWN}
        monkeypatch.setattr(looking, "BATCH", 3)
        for name in KNOWN:
            for key, value in DIAGNOSTICS[name](self.subject(batch, noise)).items():
                found, expected = torch.tensor(value), torch.tensor(whole[name][key])
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("name", KNOWN)
    def test_nothing_changes(self, name, batch, noise):
        model = nn.Sequential(nn.Flatten(), nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU())
        model.append(nn.Linear(6, 3)).train()
        model[2].eval()
        model[1].bias.requires_grad_(False)
        model[5].weight.grad = torch.ones(3, 6)
        before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
        generator = torch.get_rng_state()
        floats = Batch(batch.images.float(), batch.labels, batch.index)
        images = floats.images.clone()
        DIAGNOSTICS[name](self.subject(floats, noise, model))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert modes == [module.training for module in model.modules()]
        assert [weight.requires_grad for weight in model.parameters()] == [True, False, True, True, True, True]
        assert [weight.grad is None for weight in model.parameters()] == [True, True, True, True, False, True]
        assert torch.equal(model[5].weight.grad, torch.ones(3, 6))
        assert torch.equal(generator, torch.get_rng_state()) and torch.equal(images, floats.images)

    @pytest.mark.parametrize("name", KNOWN)
    def test_an_empty_batch_is_refused(self, name, batch, noise):
        empty = batch.part(slice(0))
        with pytest.raises(InputError, match="batch: found 0; accepted: one image or more"):
            DIAGNOSTICS[name](self.subject(empty, Noise(0, empty.index)))

    def test_modes_come_back_after_an_error(self, batch, noise):
        class Breaks(nn.Module):
            def forward(self, x):
                raise KeyboardInterrupt

        model = nn.Sequential(nn.Linear(5, 2), Breaks()).double().train()
        with pytest.raises(KeyboardInterrupt):
            gradient_alignment(model, batch, BALL, noise)
        assert model.training and all(weight.requires_grad for weight in model.parameters())


def split_of(count: int) -> Split:
    torch.manual_seed(2)
    return Split(torch.rand(count, 1, 2, 5), torch.arange(count) % 3, 1)


class TestDiagnose:
    def test_a_line_is_json_and_repeats(self):
        settings, model = Diagnose(images=8, what=tuple(KNOWN), top=2), small().float()
        line = settings(model, split_of(20), BALL, seed=3)
        assert json.loads(json.dumps(line, allow_nan=False)) == line
        assert settings(model, split_of(20), BALL, seed=3) == line
        assert settings(model, split_of(20), BALL, seed=4) != line
        assert line["images"] == 8 and len(line["divergence_split"]) == 9 and len(line["hessian_values"]) == 2
        assert line["landscape_steps"][10] == 0.0 and len(line["landscape_losses"]) == 21

    def test_only_what_was_asked_for(self):
        assert set(Diagnose(what=("qub", "cosine"))(small().float(), split_of(5), BALL, 0)) == {
            "images", "qub_gap", "qub_centred_gap", "qub_distance", "qub_curvature", "fgsm_pgd_cosine",
        }  # fmt: skip

    def test_images_are_spread_over_the_split(self):
        assert spread(split_of(10), 4).index.tolist() == [0, 2, 5, 7]
        assert spread(split_of(3), 4).index.tolist() == [0, 1, 2]
        torch.testing.assert_close(spread(split_of(10), 4).images, split_of(10).images[[0, 2, 5, 7]])
        with pytest.raises(InputError, match="images: found 0"):
            spread(split_of(0), 4)

    def test_round_trip(self):
        settings = Diagnose(every=2, what=("hessian",), attack=Ascent(steps=3))
        assert structure(Diagnose, unstructure(settings)) == settings

    @pytest.mark.parametrize(
        "field, value",
        [("what", ["alignment", "sharpness"]), ("what", []), ("every", 0), ("images", 0), ("top", 0),
         ("attack", {"attack_mode": "train"}), ("images", "many")],
    )  # fmt: skip
    def test_bad_fields(self, field, value):
        with pytest.raises(InputError, match=rf"^training\.diagnose\.{field}: found .*accepted: [^\n]*$") as caught:
            structure(Diagnose, {field: value}, "training.diagnose")
        if field == "what":
            assert ", ".join(DIAGNOSTICS) in str(caught.value)


TINY = ["--model.type", "Mlp", "--model.hidden", "[8]", "--training.epochs", "2", "--training.milestones", "[]",
        "--training.schedule.length", "1", "--training.batch_size", "500", "--certify.images", "2",
        "--export.enabled", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *TINY, "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def assert_png(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 300
        image.load()
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 10


class TestFinishedRun:
    def test_everything(self, run, capsys):
        assert main(["diagnose", str(run), "--images", "50", "--top", "3"]) == 0
        shown = capsys.readouterr().out
        assert "gradient alignment" in shown and "diagnostics.json" in shown
        found = json.loads((run / "diagnostics.json").read_text())
        assert found["images"] == 50 and found["epsilon"] == 0.1 and found["checkpoint"] == "last"
        assert found["split"] == "train" and found["weights"] == RunFolder(run).weights_sha256()
        assert 0 < found["gradient_alignment"] <= 1 and found["qub_gap"] >= 0
        assert found["hessian_values"] == sorted(found["hessian_values"], reverse=True)
        drawn = ["adversarial_hessian", "hessian", "interpolation", "landscape", "split", "weight_landscape"]
        assert sorted(path.name for path in (run / "figures").iterdir()) == [f"{name}.png" for name in drawn]
        for name in drawn:
            assert_png(run / "figures" / f"{name}.png")

    def test_the_numbers_are_those_along_training(self, run):
        found = diagnose(run, images=30, what=("alignment", "split"), quiet=True)
        from certtrain.workflows.run import load_model

        model, config = load_model(run)
        line = Diagnose(images=30, what=("alignment", "split"))(
            model, config.data.load().train, config.perturbation, config.seed
        )
        assert line.items() <= found.content.items()

    def test_a_later_call_replaces_an_earlier_one(self, run):
        assert main(["diagnose", str(run), "--images", "9", "--what", "split,alignment"]) == 0
        with RunFolder(run).metrics.path.open("a") as file:
            for epoch in (1, 2):
                file.write(json.dumps({"kind": "diagnosis", "epoch": epoch, "gradient_alignment": 1 / epoch}) + "\n")
        assert main(["diagnose", str(run), "--images", "9", "--what", "hessian"]) == 0
        assert sorted(path.name for path in (run / "figures").iterdir()) == ["epochs.png", "hessian.png"]
        assert "divergence" not in json.loads((run / "diagnostics.json").read_text())

    @pytest.mark.parametrize(
        "words, mentions",
        [
            (["--what", "alignment,sharpness"], ["what", "sharpness", "landscape"]),
            (["--what", ""], ["what", "alignment"]),
            (["--checkpoint", "first"], ["checkpoint", "first", "last, best"]),
            (["--checkpoint", "best"], ["best.safetensors"]),
            (["--images", "0"], ["--images", "0"]),
            (["--images", "1.5"], ["--images", "1.5"]),
            (["--top", "many"], ["--top", "many"]),
            (["--what", "hessian", "--top", "100000"], ["top", "100000"]),
            (["--device", "tpu"], ["device", "tpu"]),
            (["--epochs", "3"], ["--epochs"]),
        ],
    )
    def test_bad_input(self, run, capsys, words, mentions):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert main(["diagnose", str(run), *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "accepted" in said
        assert all(mention in said for mention in mentions)
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def test_no_run(self, tmp_path, capsys):
        assert main(["diagnose", str(tmp_path)]) == 2
        assert main(["diagnose"]) == 2
        assert capsys.readouterr().err.count("accepted") == 2


class TestFigures:
    def test_a_flat_landscape(self, tmp_path):
        flat = {"landscape_steps": [-1.0, 0.0, 1.0], "landscape_losses": [[0.5] * 3] * 3}
        save(draw_landscape(flat, "flat"), tmp_path / "new" / "flat.png")
        assert_png(tmp_path / "new" / "flat.png")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["flat.png"]

    def test_epochs_with_holes(self, tmp_path):
        lines = [{"epoch": 1, "gradient_alignment": None, "divergence_split": [0.2]},
                 {"epoch": 2, "divergence": 0.3, "divergence_split": [0.1, None, 0.4]}, {"epoch": 3}]  # fmt: skip
        figure = draw_epochs(lines, "holes")
        assert [line.get_xdata().tolist() for axes in figure.axes for line in axes.lines] == [[2], [1]]
        save(figure, tmp_path / "epochs.png")
        assert_png(tmp_path / "epochs.png")

    def test_no_module_imports_what_keeps_state(self):
        """Nowhere pyplot, and nothing else of matplotlib where a module is read."""
        for path in (Path(__file__).parents[1] / "certtrain").rglob("*.py"):
            tree = ast.parse(path.read_text())
            names = {
                node: [node.module or ""] if isinstance(node, ast.ImportFrom) else [part.name for part in node.names]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
            }
            assert "pyplot" not in str([alias.name for node in names for alias in node.names] + [*names.values()]), path
            assert not any(name.startswith("matplotlib") for node in tree.body for name in names.get(node, [])), path

    @pytest.mark.slow
    def test_no_shared_state_of_the_library(self):
        code = (
            "import sys, certtrain.workflows.diagnose, certtrain.diagnostics.figures as f\n"
            "assert 'matplotlib' not in sys.modules\n"
            "f.draw_split({'divergence': 1.0, 'divergence_split': [0.5, 0.6]}, 't')\n"
            "sys.exit('matplotlib.pyplot' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
