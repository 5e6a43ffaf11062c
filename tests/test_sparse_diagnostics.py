"""Diagnostics of adversarial losses, sparse ones above all: against torch itself, brute force and hand computations."""

import copy
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from walking import walk

from certtrain.attacks import Ascent, Attack, AttackResult, FrankWolfe, SparsePgd, SparseRs, default_attack
from certtrain.bounds import L2Ball, LinfBall, SparseBall
from certtrain.bounds.l1 import L1Ball
from certtrain.command_line import main
from certtrain.data import Split
from certtrain.diagnostics import (
    DIAGNOSTICS,
    Subject,
    adversarial_hessian,
    attacked,
    between,
    gradient_gap,
    interpolation,
    looking,
    overlap,
    those_for,
    weight_landscape,
)
from certtrain.diagnostics.hessian import eigenpairs
from certtrain.errors import InputError
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.training.diagnosing import Diagnose
from certtrain.workflows.diagnose import diagnose

SPARSE = SparseBall(3)
ONE_STEP = SparsePgd(steps=1, alpha=1.0, beta=1.0, patience=None, keep="last")
TWENTY_STEPS = SparsePgd(steps=20, patience=10, keep="last")
BALLS = [SPARSE, SparseBall(1, unit="row"), LinfBall(0.1), L2Ball(0.5), L1Ball(1.0)]
every_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)


def one_step(ball) -> Attack:
    return default_attack(ball, "one_step")


def many_steps(ball) -> Attack:
    return default_attack(ball, "many_steps")


def small(classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, classes)
    ).double().eval()  # fmt: skip


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    index = torch.arange(9)
    return Batch((torch.rand(9, 2, 2, 5, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1), index % 3, index)


@pytest.fixture
def noise(batch) -> Noise:
    return Noise(5, batch.index)


@dataclass(frozen=True)
class Corners(Attack):
    """The pixels ``places`` go to ``value``, of images (B, C, H, W): takes no notice of the network."""

    places: tuple[int, ...] = (0, 1)
    value: float = 0.75

    def propose(self, model, batch, ball, step):
        flat = batch.images.flatten(2).clone()
        flat[:, :, list(self.places)] = self.value
        return AttackResult(flat.reshape(batch.images.shape))


@dataclass(frozen=True)
class Random(Attack):
    """A random point of the set."""

    def propose(self, model, batch, ball, step):
        return AttackResult(batch.images + ball.sample(batch.images, step.noise, "random"))


class TestInterpolation:
    @every_ball
    def test_ends_are_clean_and_attacked_accuracy(self, batch, noise, ball):
        model, attack = small(), one_step(ball)
        found = interpolation(model, batch, ball, noise, attack=attack)
        images = attack(model, batch, ball, Step.evaluation(ball, noise)).images
        for i, x in ((0, batch.images), (-1, images)):
            logits = model(x).detach()
            assert found.accuracies[i] == float((logits.argmax(1) == batch.labels).double().mean())
            assert found.losses[i] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), abs=1e-12)
        assert found.shares == (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
        assert not torch.equal(images, batch.images)

    def test_the_ends_are_exact_in_float32(self, batch, noise):
        """x + 1 · (x' - x) is not x' there."""
        seen, model = [], small().float()
        model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
        floats = Batch(batch.images.float(), batch.labels, batch.index)
        interpolation(model, floats, SPARSE, noise, attack=Corners(value=0.1), shares=(0.0, 1.0))
        ends = Corners(value=0.1)(model, floats, SPARSE, Step.evaluation(SPARSE, noise)).images
        clean, attacked = seen[-2:]  # before them, one image shows whether there are logits
        assert torch.equal(clean, floats.images) and torch.equal(attacked, ends)

    def test_by_hand(self):
        """One pixel goes from 0 to 1; logits (0, 1 - 2 |x - 1/2|·2): right in the middle alone, wrong where tied."""

        class Peak(nn.Module):
            def forward(self, x):
                x = x.flatten(1)
                return torch.cat([0.5 + 0 * x, 1 - 4 * (x - 0.5).abs()], 1)

        one = Batch(torch.zeros(1, 1, 1, 1), torch.tensor([1]), torch.arange(1))
        attack, ball = Corners(places=(0,), value=1.0), SparseBall(1)
        shares = (0.0, 0.375, 0.5, 0.6, 1.0)
        found = interpolation(Peak(), one, ball, Noise(0, one.index), attack=attack, shares=shares)
        assert found.accuracies == (0.0, 0.0, 1.0, 1.0, 0.0)  # a tie at 3/8
        assert found.losses[2] == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)

    @pytest.mark.parametrize("shares", [(), (0.5, 1.1), (-0.1,), (math.nan,)])
    def test_bad_shares(self, batch, noise, shares):
        with pytest.raises(InputError, match=r"shares: found .*accepted"):
            interpolation(small(), batch, SPARSE, noise, attack=ONE_STEP, shares=shares)


class TestOverlap:
    def test_by_hand(self):
        """Pixels {0, 1, 2} and {2, 3} of 10, k = 4: one is shared, with the same value; the images differ in three."""
        images = torch.zeros(2, 3, 2, 5)
        first, second = images.clone(), images.clone()
        first[0, :, 0, :3] = 0.5
        second[0, 1, 0, 2:4] = 0.5
        second[0, 0, 0, 2] = second[0, 2, 0, 2] = 0.5
        second[1] = first[1] + 1  # the second image is left alone by the first attack: it does not count
        found = between(SparseBall(4), images, first, second)
        assert (found.overlap, found.jaccard, found.images, found.sizes) == (1 / 4, 1 / 4, 1, (3, 2))
        assert found.chance == 3 * 2 / (10 * 4) and found.distance == 3 / 5

    @pytest.mark.parametrize("unit, expected", [("pixel", 1 / 3), ("feature", 0.0), ("row", 1.0), ("column", 1 / 3)])
    def test_units(self, unit, expected):
        """Two channels of one pixel, then neighbours: what is shared depends on what a unit is."""
        images = torch.zeros(1, 2, 2, 4)
        first, second = images.clone(), images.clone()
        first[0, 0, 0, 0] = first[0, 0, 0, 1] = 1
        second[0, 1, 0, 0] = second[0, 0, 0, 3] = 1
        assert between(SparseBall(5, unit=unit), images, first, second).jaccard == pytest.approx(expected)

    def test_an_attack_with_itself(self, batch, noise):
        """Its own images agree with themselves; attacks that draw nothing also in two runs."""
        model = small()
        images = SparsePgd(steps=3, keep="last")(model, batch, SPARSE, Step.evaluation(SPARSE, noise)).images
        found = between(SPARSE, batch.images, images, images)
        assert found.jaccard == 1 and found.distance == 0 and found.images == len(batch)
        assert found.overlap == pytest.approx((found.sizes[0] or 0) / 3)
        attack = Corners(places=(0, 1, 2))
        found = overlap(model, batch, SPARSE, noise, first=attack, second=attack)
        assert (found.overlap, found.jaccard, found.distance) == (1, 1, 0) and found.chance == pytest.approx(3 / 10)

    def test_disjoint_attacks(self, batch, noise):
        found = overlap(
            small(), batch, SPARSE, noise, first=Corners(places=(0, 1, 2)), second=Corners(places=(7, 8, 9))
        )
        assert (found.overlap, found.jaccard, found.distance) == (0, 0, 1)

    def test_random_masks_overlap_as_chance_says(self):
        """The mean of a hypergeometric distribution; each attack draws for itself, also from the same class."""
        index = torch.arange(1500)
        images = torch.full((1500, 1, 6, 6), 0.5)
        ball, model = SparseBall(9), nn.Flatten()
        batch, noise = Batch(images, index % 36, index), Noise(0, index)
        found = overlap(model, batch, ball, noise, first=Random(), second=Random())
        assert found.chance == pytest.approx(9 / 36) and found.sizes == (9, 9)
        assert found.overlap == pytest.approx(9 / 36, abs=0.012)  # 4 standard deviations of the mean
        halves = [between(ball, images[:2], images[:2] + shift, images[:2]) for shift in (0.1, 0.0)]
        assert [half.images for half in halves] == [0, 0] and halves[0].overlap is None

    def test_more_than_all_pixels(self, batch, noise):
        """k above N means N."""
        attack = Corners(places=tuple(range(10)), value=0.3)
        found = overlap(small(), batch, SparseBall(99), noise, first=attack, second=attack)
        assert found.overlap == 1 and found.chance == 1
        nothing = overlap(small(), batch, SparseBall(0), noise, first=attack, second=attack)
        assert nothing.overlap is None and nothing.jaccard is None and nothing.images == 0

    def test_the_ball_of_a_norm_is_refused(self, batch, noise):
        with pytest.raises(InputError, match="perturbation: found 'LinfBall'; accepted: SparseBall"):
            overlap(small(), batch, LinfBall(0.1), noise, first=Corners(), second=Corners())


def dense_hessian(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """By torch.autograd.functional, at given images."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        pieces = (piece.view_as(w) for piece, w in zip(flat.split(sizes), weights.values()))
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(weights, pieces)), (images,)), labels)

    flat = torch.cat([weight.flatten() for weight in weights.values()])
    found = torch.autograd.functional.hessian(loss, flat)
    assert isinstance(found, torch.Tensor)
    return found


class TestAdversarialHessian:
    @every_ball
    def test_against_the_dense_hessian_at_frozen_images(self, batch, noise, ball):
        model, attack = small(), many_steps(ball)
        images = attack(model, batch, ball, Step.evaluation(ball, noise)).images
        exact = torch.linalg.eigvalsh(dense_hessian(model, images, batch.labels)).flip(0)
        found = adversarial_hessian(model, batch, ball, noise, attack=attack, top=4)
        torch.testing.assert_close(torch.tensor(found.values).double(), exact[:4], rtol=1e-6, atol=1e-9)
        clean = torch.linalg.eigvalsh(dense_hessian(model, batch.images, batch.labels)).flip(0)
        assert (clean[:4] - exact[:4]).abs().max() > 1e-4  # it is not the clean loss'

    def test_eigenvectors(self, batch):
        model = small()
        matrix = dense_hessian(model, batch.images, batch.labels)
        spectrum, vectors = eigenpairs(model, batch, 3)
        values = torch.tensor(spectrum.values).double()
        torch.testing.assert_close(matrix @ vectors.T, vectors.T * values, atol=1e-6, rtol=0)
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(3).double(), atol=1e-8, rtol=0)
        assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()

    def test_attacked_images_keep_their_type(self, batch, noise, monkeypatch):
        floats = Batch(batch.images.float(), batch.labels, batch.index)
        whole = attacked(small().float(), floats, SPARSE, noise, ONE_STEP)
        monkeypatch.setattr(looking, "BATCH", 4)
        parts = attacked(small().float(), floats, SPARSE, noise, ONE_STEP)
        assert parts.images.dtype == torch.float32 and SPARSE.contains(floats.images, parts.images).all()
        torch.testing.assert_close(parts.images, whole.images)


class TestWeightLandscape:
    @pytest.mark.parametrize("ball", [SPARSE, LinfBall(0.1)], ids=lambda ball: type(ball).__name__)
    def test_against_brute_force(self, batch, noise, ball):
        """The attack runs anew at each point, with the same noise."""
        model, attack = small(), one_step(ball)
        found = weight_landscape(model, batch, ball, noise, attack=attack, half=1, reach=0.7)
        assert found.steps.tolist() == [-0.7, 0.0, 0.7] and found.losses.shape == (3, 3)
        step = Step.evaluation(ball, noise)
        spectrum, (first, second) = eigenpairs(model, attacked(model, batch, ball, noise, attack), 2)
        assert found.values == spectrum.values
        start = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        for i, a in enumerate((-0.7, 0.0, 0.7)):
            for j, b in enumerate((-0.7, 0.0, 0.7)):
                there = copy.deepcopy(model)
                nn.utils.vector_to_parameters(start + a * first + b * second, there.parameters())
                images = attack(there, batch, ball, step).images
                expected = F.cross_entropy(there(images), batch.labels).item()
                assert float(found.losses[i, j]) == pytest.approx(expected, abs=1e-10)

    def test_frozen_weights_stay(self, batch, noise):
        model = small().float()
        model[1].requires_grad_(False)
        floats = Batch(batch.images.float(), batch.labels, batch.index)
        found = weight_landscape(model, floats, SPARSE, noise, attack=ONE_STEP, half=1)
        images = ONE_STEP(model, floats, SPARSE, Step.evaluation(SPARSE, noise)).images
        middle = F.cross_entropy(model(images), floats.labels).item()
        assert float(found.losses[1, 1]) == pytest.approx(middle, abs=1e-6)

    @pytest.mark.parametrize("wrong", [{"half": 0}, {"reach": 0.0}, {"reach": math.nan}, {"reach": math.inf}])
    def test_bad_grids(self, batch, noise, wrong):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: found .*accepted"):
            weight_landscape(small(), batch, SPARSE, noise, attack=ONE_STEP, **wrong)


class TestGradientGap:
    @every_ball
    def test_by_autograd(self, batch, noise, ball, monkeypatch):
        """Two groups, of 6 and 3 images, count alike."""
        monkeypatch.setattr("certtrain.diagnostics.weights.GROUP", 6)
        model, one, many = small(), one_step(ball), many_steps(ball)
        found = gradient_gap(model, batch, ball, noise, one=one, many=many)
        near, far = (attack(model, batch, ball, Step.evaluation(ball, noise)).images for attack in (one, many))
        gaps, lengths = [], []
        for rows in (slice(0, 6), slice(6, 9)):
            flat = []
            for images in (near, far):
                loss = F.cross_entropy(model(images[rows]), batch.labels[rows])
                pieces = torch.autograd.grad(loss, list(model.parameters()))
                flat.append(torch.cat([piece.flatten() for piece in pieces]))
            gaps.append((flat[0] - flat[1]).norm())
            lengths.append(flat[1].norm())
        assert found.gap == pytest.approx(float(sum(gaps)) / 2, abs=1e-12)
        assert found.length == pytest.approx(float(sum(lengths)) / 2, abs=1e-12)
        assert found.gap > 0 or isinstance(ball, L1Ball)  # whose first linear maximum is a corner that may stay

    def test_an_attack_and_itself(self, batch, noise):
        assert gradient_gap(small(), batch, SPARSE, noise, one=ONE_STEP, many=ONE_STEP).gap == 0


class TestChoice:
    def test_attacks_of_each_set(self):
        assert one_step(SPARSE) == ONE_STEP and one_step(LinfBall()) == Ascent(
            attack_mode="eval", steps=1, step_size=1.0, start="zero"
        )
        assert one_step(L1Ball()) == FrankWolfe(steps=1) and many_steps(L1Ball()) == FrankWolfe(steps=20)
        assert many_steps(SPARSE) == TWENTY_STEPS and many_steps(LinfBall()) == Ascent(attack_mode="eval")
        assert default_attack(SPARSE, "search") == SparsePgd(steps=100)

    def test_an_attack_that_is_named_is_taken(self, batch, noise):
        own = SparsePgd(steps=7)
        subject = Subject(small(), batch, SPARSE, noise, own)
        assert subject.many == subject.search == own and subject.one == ONE_STEP

    def test_which_diagnostics_know_which_sets(self):
        norms = {"alignment", "cosine", "distortion", "split", "landscape"}
        assert set(those_for(LinfBall())) == set(those_for(L1Ball())) == set(DIAGNOSTICS) - {"overlap"}
        assert set(those_for(SPARSE)) == set(DIAGNOSTICS) - norms

    @walk("ball", [SPARSE, LinfBall(0.1)], ids=lambda ball: type(ball).__name__)
    @walk("name", DIAGNOSTICS)
    def test_the_others_refuse(self, batch, noise, name, ball):
        if name not in those_for(ball):
            with pytest.raises(InputError, match=f"perturbation: found '{type(ball).__name__}'; accepted: a "):
                DIAGNOSTICS[name](Subject(small(), batch, ball, noise))


def split_of(count: int) -> Split:
    torch.manual_seed(2)
    return Split(torch.rand(count, 2, 2, 5), torch.arange(count) % 3, 1)


class TestAll:
    @pytest.fixture(autouse=True)
    def cheaply(self, monkeypatch):
        monkeypatch.setattr("certtrain.diagnostics.table.RANDOM_SEARCH", SparseRs(queries=20))

    @pytest.mark.parametrize("name", those_for(SPARSE))
    def test_nothing_changes(self, name, batch, noise):
        model = nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU())
        model.append(nn.Linear(6, 3)).train()
        model[2].eval()
        model[1].bias.requires_grad_(False)
        model[5].weight.grad = torch.ones(3, 6)
        before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
        generator, floats = torch.get_rng_state(), Batch(batch.images.float(), batch.labels, batch.index)
        images = floats.images.clone()
        found = DIAGNOSTICS[name](Subject(model, floats, SPARSE, noise, top=2))
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert modes == [module.training for module in model.modules()]
        assert [weight.requires_grad for weight in model.parameters()] == [True, False, True, True, True, True]
        assert [weight.grad is None for weight in model.parameters()] == [True, True, True, True, False, True]
        assert torch.equal(model[5].weight.grad, torch.ones(3, 6))
        assert torch.equal(generator, torch.get_rng_state()) and torch.equal(images, floats.images)
        empty = batch.part(slice(0))
        with pytest.raises(InputError, match="batch: found 0; accepted: one image or more"):
            DIAGNOSTICS[name](Subject(model, empty, SPARSE, Noise(0, empty.index)))

    def test_parts_make_no_difference(self, batch, noise, monkeypatch):
        subject = Subject(small(), batch, SPARSE, noise, SparsePgd(steps=3, keep="last"), top=2)
        whole = {name: DIAGNOSTICS[name](subject) for name in those_for(SPARSE)}
        monkeypatch.setattr(looking, "BATCH", 4)
        for name, expected in whole.items():
            for key, value in DIAGNOSTICS[name](subject).items():
                if not isinstance(value, dict):
                    torch.testing.assert_close(torch.tensor(value), torch.tensor(expected[key]), atol=1e-6, rtol=1e-6)

    def test_along_training(self):
        settings, model = Diagnose(images=8), small().float()
        line = settings(model, split_of(20), SPARSE, seed=3)
        assert settings(model, split_of(20), SPARSE, seed=3) == line
        assert set(line) == {
            "images", "qub_gap", "qub_centred_gap", "qub_distance", "qub_curvature", "interpolation_shares",
            "interpolation_accuracies", "interpolation_losses",
        }  # fmt: skip
        assert "gradient_alignment" in settings(model, split_of(20), LinfBall(0.1), seed=3)

    def test_a_diagnostic_of_another_set_is_refused(self):
        with pytest.raises(
            InputError, match=r"^training\.diagnose\.what: found cosine for a SparseBall; accepted: qub, "
        ):
            Diagnose(what=("qub", "cosine")).names_for(SPARSE)
        with pytest.raises(InputError, match=r"^training\.diagnose\.what: found overlap for a LinfBall; accepted: "):
            Diagnose(what=("overlap",))(small().float(), split_of(4), LinfBall(0.1), 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    words = ["--model.type", "Mlp", "--model.hidden", "[8]", "--training.epochs", "2", "--training.milestones", "[]",
             "--training.schedule.length", "1", "--training.batch_size", "500",
             "--certify.enabled", "false", "--export.enabled", "false", "--loss.type", "PgdAt",
             "--training.initialisation", "default"]  # fmt: skip
    assert main(["train", *words, "--out", str(path)]) == 0
    return path


class TestFinishedRun:
    SPARSE: ClassVar = ["--perturbation.type", "SparseBall", "--perturbation.k", "2"]

    def test_everything_that_knows_another_set(self, run, capsys, monkeypatch):
        monkeypatch.setattr("certtrain.diagnostics.table.RANDOM_SEARCH", SparseRs(queries=20))
        assert main(["diagnose", str(run), "--images", "30", "--top", "2", *self.SPARSE]) == 0
        shown = capsys.readouterr().out
        assert "shared pixels" in shown and "gradients' gap" in shown
        found = json.loads((run / "diagnostics.json").read_text())
        assert found["perturbation"] == {"type": "SparseBall", "k": 2, "unit": "pixel", "side": 1}
        assert found["epsilon"] == 2 and found["seed"] == 0 and found["attack"]["type"] == "SparsePgd"
        assert len(found["weight_landscape_index"]) == found["images"] == 30
        assert 0 <= found["overlap"] <= 1 and found["overlap_rs_second"]["queries"] == 20
        drawn = sorted(path.name for path in (run / "figures").iterdir())
        assert drawn == ["adversarial_hessian.png", "hessian.png", "interpolation.png", "weight_landscape.png"]
        assert all((run / "figures" / name).read_bytes()[1:4] == b"PNG" for name in drawn)

    def test_one_network_under_several_sets(self, run):
        tops = {}
        for ball in (None, SparseBall(1), L1Ball(2.0), L2Ball(0.5)):
            found = diagnose(run, images=20, what=["adversarial_hessian"], top=1, perturbation=ball, quiet=True).content
            tops[found["perturbation"]["type"]] = found["adversarial_hessian_values"][0]
        assert set(tops) == {"LinfBall", "SparseBall", "L1Ball", "L2Ball"} and len(set(tops.values())) == 4

    @pytest.mark.parametrize(
        "words, mentions",
        [
            ([*SPARSE, "--what", "qub,cosine"], ["what", "cosine", "SparseBall", "overlap"]),
            ([*SPARSE, "--what", "landscape"], ["landscape", "weight_landscape"]),
            (["--what", "overlap"], ["what", "overlap", "LinfBall"]),
            (["--perturbation.k", "2"], ["perturbation.k"]),
            (["--perturbation.type", "SparseBall", "--perturbation.k", "-1"], ["perturbation.k", "-1"]),
            ([*SPARSE, "--perturbation.unit", "patch", "--perturbation.side", "3"], ["side", "8×8"]),
            (["--perturbation.type", "L0"], ["perturbation.type", "SparseBall"]),
            (["--seed", "3"], ["--seed", "--perturbation"]),
        ],
    )  # fmt: skip
    def test_bad_input(self, run, capsys, words, mentions):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert main(["diagnose", str(run), *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "accepted" in said
        assert all(mention in said for mention in mentions), said
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
