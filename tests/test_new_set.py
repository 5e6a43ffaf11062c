"""A perturbation set written as CONTRIBUTING.md says, in one file of a package of one's own, works everywhere."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import certtrain
from certtrain.attacks import Ascent, Attack, FrankWolfe, Pgd, SparsePgd, default_attack
from certtrain.bounds import L1Ball, L2Ball, LinfBall, PerturbationSet, SparseBall, compute_bounds
from certtrain.bounds.perturbation import PURPOSES
from certtrain.config import structure, unstructure
from certtrain.data import Digits
from certtrain.diagnostics import DIAGNOSTICS, Subject, those_for
from certtrain.errors import InputError
from certtrain.evaluation import Evaluate
from certtrain.losses import CrownIbp, Ibp, Sabr, Staps, Trades
from certtrain.noise import Noise
from certtrain.recipe import Config, load_config
from certtrain.run_folder import RunFolder
from certtrain.step import Batch, Step
from certtrain.verifiers import AttackStage, Certify, certify, run_cascade
from certtrain.verifiers.cascade import robustness
from certtrain.verifiers.vnnlib_reader import read_property
from certtrain.workflows.run import recorded_config
from certtrain.workflows.train import train

BUDGET = '''
"""Each pixel changes by at most ``cap``, all together by at most ``epsilon``; valid images alone."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from certtrain.bounds import PerturbationSet
from certtrain.bounds.interval import cut_box


@dataclass(frozen=True)
class Budget(PerturbationSet):
    epsilon: Any = 1.0
    cap: float = 0.1
    default_attacks: ClassVar[Mapping[str, Mapping[str, Any]]] = {"falsify": {"type": "FrankWolfe", "steps": 30}}

    def with_epsilon(self, epsilon):
        return dataclasses.replace(self, epsilon=epsilon)

    def scaled(self, factor):
        return dataclasses.replace(self, epsilon=self.epsilon * factor)

    def hull(self, images):
        return cut_box(images, min(self.cap, float(self.epsilon)))

    def project(self, images, candidates):
        change = (candidates.clamp(0, 1) - images).clamp(-self.cap, self.cap)
        total = change.abs().flatten(1).sum(1).reshape(-1, *[1] * (images.ndim - 1))
        inside = self.contains(images, candidates).reshape(total.shape)
        share = (self.epsilon * (1 - 1e-5) / total.clamp(min=1e-30)).clamp(max=1 - 1e-5)
        return torch.where(inside, candidates, images + change * share)

    def contains(self, images, candidates, slack=0.0):
        change = (candidates.double() - images.double()).abs().flatten(1)
        valid = ((candidates >= -slack) & (candidates <= 1 + slack)).flatten(1).all(1)
        return valid & (change.amax(1) <= self.cap + slack) & (change.sum(1) <= float(self.epsilon) + slack)

    def concretise(self, coefficients, images):
        forms, center = coefficients.flatten(2), images.flatten(1).unsqueeze(1)
        order = forms.detach().abs().argsort(dim=2, descending=True)
        room = torch.where(forms > 0, center, 1 - center).clamp(max=self.cap).gather(2, order)
        left = float(self.epsilon) - (room.cumsum(2) - room)
        gains = forms.abs().gather(2, order) * torch.minimum(room, left.clamp(min=0))
        return (forms * center).sum(2) - gains.sum(2)

    def sample(self, images, noise, stream):
        change = (2 * noise.uniform(images.shape[1:], stream, images.dtype) - 1) * self.cap
        total = change.abs().flatten(1).sum(1).reshape(-1, *[1] * (images.ndim - 1))
        return change * (float(self.epsilon) / total).clamp(max=1)
'''

BRIGHTER = '''
"""Pixels grow brighter, by at most ``amount``: a box."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from certtrain.bounds import Interval, PerturbationSet


@dataclass(frozen=True)
class Brighter(PerturbationSet):
    amount: Any = 0.1
    size: ClassVar[str] = "amount"
    is_box = True
    is_local = True

    @property
    def epsilon(self):
        return self.amount

    def with_epsilon(self, epsilon):
        return dataclasses.replace(self, amount=epsilon)

    def scaled(self, factor):
        return self.with_epsilon(self.amount * factor)

    def hull(self, images):
        return Interval.from_bounds(images, (images + self.amount).clamp(max=1))

    def project(self, images, candidates):
        return candidates.clamp(images, (images + self.amount).clamp(max=1))

    def contains(self, images, candidates, slack=0.0):
        return self.hull(images).contains(candidates, slack).flatten(1).all(1)

    def concretise(self, coefficients, images):
        return (coefficients * images.unsqueeze(1)).flatten(2).sum(2) + (
            coefficients.clamp(max=0) * (self.hull(images).upper - images).unsqueeze(1)
        ).flatten(2).sum(2)

    def sample(self, images, noise, stream):
        return noise.uniform(images.shape[1:], stream, images.dtype) * self.amount
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory):
    """A package of two files, a set in each."""
    root = tmp_path_factory.mktemp("site")
    folder = root / "sets_of_my_own"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .brighter import Brighter\nfrom .budget import Budget\n")
    (folder / "budget.py").write_text(BUDGET)
    (folder / "brighter.py").write_text(BRIGHTER)
    sys.path.insert(0, str(root))
    try:
        yield importlib.import_module("sets_of_my_own")
    finally:
        sys.path.remove(str(root))


@pytest.fixture(params=["Budget", "Brighter"])
def ball(package: ModuleType, request) -> PerturbationSet:
    return {"Budget": package.Budget(0.4, 0.5), "Brighter": package.Brighter(0.15)}[request.param]


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(75, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return (torch.rand(6, 1, 5, 5) * 1.4 - 0.2).clamp(0, 1)


def batch_of(model: nn.Module, images: torch.Tensor) -> tuple[Batch, Step]:
    index = torch.arange(len(images))
    return Batch(images, model(images).argmax(1), index), index


def points_of(ball: PerturbationSet, images: torch.Tensor, key: int) -> torch.Tensor:
    """Points of the set: projected samples and projected corners."""
    noise = Noise(key, torch.arange(len(images)))
    far = images + (1 if key % 2 else 4) * ball.sample(images, noise, "x")
    return ball.project(images, far.clamp(0, 1))


class TestBounds:
    def test_the_least_of_linear_forms_is_a_linear_programs(self, package, images):
        ball, flat = package.Budget(0.4, 0.15), images.double().flatten(1)
        forms = torch.randn(6, 2, 1, 5, 5, dtype=torch.float64)
        found = ball.concretise(forms, images.double())
        for row in range(2):
            for column in range(2):
                form, image = forms[row, column].flatten(), flat[row]
                ends = [(0.0, min(0.15, float(end))) for end in (*(1 - image), *image)]  # up, then down
                best = linprog([*form.tolist(), *(-form).tolist()], [[1.0] * 50], [0.4], bounds=ends)
                assert found[row, column].item() == pytest.approx(float(form @ image) + best.fun, abs=1e-9)

    def test_they_hold_at_points_of_the_set(self, ball, images):
        model, region = small(), ball.region(images)
        bounds = compute_bounds(model, region)
        hull, windows = ball.hull(images), region.windows(torch.arange(6), lambda x: x[..., 1:4, 1:4])
        for key in range(20):
            points = points_of(ball, images, key)
            assert ball.contains(images, points).all() and hull.contains(points).all()
            assert windows.contains(points[..., 1:4, 1:4]).all()
            logits = model(points)
            assert (bounds.lower - 1e-5 <= logits).all() and (logits <= bounds.upper + 1e-5).all()

    def test_a_set_that_is_not_said_to_be_local_is_bounded_by_its_hull_in_windows(self, package, images):
        region = package.Budget(0.4, 0.15).region(images)
        assert not region.is_local and region.has_windows
        assert region.windows(torch.arange(6), lambda x: x[..., :2, :2]).is_box


class TestAttacks:
    def test_every_attack_that_takes_it_stays_inside(self, ball, images):
        model = small()
        batch, index = batch_of(model, images)
        taking = [kind for kind in Attack.members().values() if kind.needs.matches(ball)]
        assert FrankWolfe in taking and Pgd not in taking and SparsePgd not in taking
        for kind in (kind for kind in taking if kind.__module__.startswith("certtrain.")):
            found = kind()(model, batch, ball, Step.evaluation(ball, Noise(0, index))).images
            assert ball.contains(images, found).all()

    def test_there_is_a_default_for_every_purpose(self, package, ball, images):
        model = small()
        batch, index = batch_of(model, images)
        for purpose in PURPOSES:
            attack = default_attack(ball, purpose)
            attack.check_ball(ball)
            found = attack(model, batch, ball, Step.evaluation(ball, Noise(0, index))).images
            assert ball.contains(images, found).all()
        assert default_attack(package.Budget(), "falsify") == FrankWolfe(steps=30)  # its own
        assert default_attack(package.Budget(), "search") == FrankWolfe(steps=100)  # inherited

    def test_one_step_is_the_linear_maximum(self, package, images):
        ball, model = package.Budget(0.4, 0.15), nn.Sequential(nn.Flatten(), nn.Linear(25, 2)).eval()
        labels, index = model(images).argmax(1), torch.arange(6)
        attack = FrankWolfe(steps=1)
        found = attack(model, Batch(images, labels, index), ball, Step.evaluation(ball, Noise(0, index))).images
        weight = model[1].weight.detach()
        margin = (weight[labels] - weight[1 - labels]).reshape(6, 1, 1, 5, 5)
        change = (margin.squeeze(1) * (found - images)).flatten(1).sum(1)
        least = ball.concretise(margin, images).squeeze(1) - (margin.squeeze(1) * images).flatten(1).sum(1)
        torch.testing.assert_close(change, least, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("attack", [Ascent(), Pgd(), SparsePgd()])
    def test_an_attack_that_does_not_take_it_names_those_that_do(self, package, attack):
        with pytest.raises(InputError, match=r"loss.attack.type: found \w+ for a Budget; accepted: .*FrankWolfe"):
            attack.check_ball(package.Budget(), "loss.attack")


class TestVerdicts:
    @pytest.mark.parametrize("stages", [("ibp", "crown_ibp", "attack", "crown", "alpha", "bab"), ("attack", "bab")])
    def test_they_hold(self, ball, images, stages):
        found = set()
        for seed in range(3):
            model = small(seed)
            with torch.no_grad():  # close calls
                model[-1].bias -= model(images).mean(0)
            labels = model(images).argmax(1)
            for factor in (0.02, 1.0, 25.0):
                wide = ball.scaled(factor)
                for verdict in certify(model, images, labels, wide, Certify(stages=stages, timeout=5.0)):
                    image, found = images[verdict.index], found | {verdict.status}
                    if verdict.counterexample is not None:
                        assert wide.contains(image[None], verdict.counterexample[None]).all()
                        assert model(verdict.counterexample[None]).argmax(1) != labels[verdict.index]
                    if verdict.status == "verified":
                        for key in range(10):
                            points = points_of(wide, image[None], key)
                            assert (model(points).argmax(1) == labels[verdict.index]).all()
        assert "falsified" in found and ("verified" in found or not ball.is_box)

    def test_boxes_are_decided_to_the_end_also_in_exact_arithmetic(self, package, images):
        model = small()
        labels = model(images).argmax(1)
        verdicts = certify(model, images, labels, package.Brighter(0.1), Certify(stages=("bab",), arithmetic="real"))
        assert all(verdict.status in ("verified", "falsified") for verdict in verdicts)

    def test_other_arithmetic_is_refused_of_what_is_no_box(self, package):
        with pytest.raises(InputError, match=r"certify.arithmetic: found real for a Budget; accepted: nearest"):
            Certify(arithmetic="real").check_ball(package.Budget())


class TestRuns:
    @pytest.mark.parametrize("loss", ["CcIbp", "AdversarialTraining"])
    def test_a_recipe_with_it_runs_from_start_to_end(self, package, tmp_path, loss):
        found = self.of(tmp_path, {"type": "Budget", "epsilon": 0.2, "cap": 0.05}, loss)
        record = json.loads((found / "run.json").read_text())
        ball = {"type": "sets_of_my_own.budget:Budget", "epsilon": 0.2, "cap": 0.05}
        assert record["config"]["perturbation"] == ball and [*record["plugins"]] == [ball["type"]]
        lines = [json.loads(line) for line in (found / "verdicts.jsonl").read_text().splitlines()]
        assert len(lines) == 8 and all(line["status"] != "error" for line in lines)
        assert not list((found / "specs").glob("*.vnnlib"))  # which state boxes

    def test_a_box_is_exported_as_one(self, package, tmp_path):
        found = self.of(tmp_path, {"type": "Brighter", "amount": 0.05}, "CcIbp")
        ball = recorded_config(*RunFolder.open(found)).perturbation
        image = Digits().load().test.pixels(torch.tensor([7]))
        case = read_property(found / "specs" / "0007.vnnlib", 64, 10).cases[0]
        assert ball == package.Brighter(0.05) and len(list((found / "specs").glob("*.vnnlib"))) == 8
        for end, wanted in zip((case.lower, case.upper), ball.ends(image), strict=True):
            torch.testing.assert_close(torch.as_tensor(end).float(), wanted.flatten())

    def of(self, folder: Path, perturbation: dict, loss: str) -> Path:
        recipe = unstructure(load_config(Path(__file__).parents[1] / "configs" / "smoke.yaml"))
        recipe |= {"perturbation": perturbation, "loss": {"type": loss}}
        recipe["certify"] |= {"images": 8, "timeout": 5.0}
        recipe["export"] |= {"images": 8}
        recipe["training"] |= {"guard": {"images": 16}, "diagnose": {"images": 16}}
        return train(structure(Config, recipe), folder / "run", quiet=True).path

    def test_it_is_evaluated_by_its_own_attack_and_by_relaxations(self, ball, images):
        model = small()
        batch, index = batch_of(model, images)
        step = Step.evaluation(ball.scaled(25.0), Noise(0, index))
        with pytest.raises(InputError, match=r"^pgd-20: found a \w+; accepted: the ball of a norm, or here default"):
            Evaluate(attacks=("pgd-20",)).check_ball(ball, images, model)
        settings = Evaluate(attacks=("default", "crown"))
        settings.check_ball(ball, images, model)
        by_attack, by_bounds = (one(model, batch, step.ball, step) for one in settings.adversaries())
        for lost, unproved in zip(by_attack, by_bounds, strict=True):
            assert lost.lost_to is None or unproved.lost_to is not None
        assert not any(one.unconfirmed for one in by_attack)

    @pytest.mark.parametrize("loss", [Ibp(), Sabr(attack=None), Staps(attack=None), CrownIbp(), Trades(attack=None)])
    def test_other_losses_take_it(self, ball, images, loss):
        model = small().train()
        batch, index = batch_of(model, images)
        epsilon = torch.tensor(float(ball.epsilon))
        loss.check_ball(ball)
        terms = loss(model, batch, Step(ball.with_epsilon(epsilon), epsilon, epsilon, 0.5, Noise(0, index)))
        terms.total.backward()
        assert terms.total.isfinite() and all(weight.grad.isfinite().all() for weight in model.parameters())

    def test_diagnostics_that_know_every_set_know_it(self, ball, images):
        model = small()
        batch, index = batch_of(model, images)
        subject = Subject(model, batch, ball, Noise(0, index))
        for name in {"qub", "interpolation", "gradient_gap"}:
            assert name in those_for(ball) and DIAGNOSTICS[name](subject)


class TestKnownSets:
    BALLS = (LinfBall(0.1), L2Ball(0.5), L1Ball(1.0), SparseBall(2))

    def test_each_has_a_default_attack_for_every_purpose(self):
        for ball in self.BALLS:
            for purpose in PURPOSES:
                attack = default_attack(ball, purpose)
                attack.check_ball(ball)
                assert not attack.declare_state((1, 5, 5), 3)  # for which a loss that names no attack has no room

    def test_the_attack_that_is_named_is_taken_whatever_it_is(self):
        """PGD-40 with just the default's fields used to stand for sPGD-300 over a sparse set."""
        for steps in (40, 41):
            attack = Pgd(steps=steps, step_size=0.1, restarts=5, diversified=2, objective="margin")
            with pytest.raises(InputError, match=r"certify.attack.type: found Pgd for a SparseBall; .*SparsePgd"):
                Certify(attack=attack).check_ball(SparseBall(1))
            Certify(attack=attack).check_ball(LinfBall(0.1))
        Certify().check_ball(SparseBall(1))
        assert AttackStage().attack_over(SparseBall(1)) == SparsePgd(steps=300)
        assert AttackStage().attack_over(L1Ball(1.0)) == FrankWolfe(steps=300)

    def test_an_attack_is_looked_at_only_where_a_stage_attacks(self):
        Certify(attack=Pgd(), stages=("ibp", "crown")).check_ball(SparseBall(1))

    def test_the_attack_stage_says_that_it_takes_no_box(self, images):
        model = small()
        labels = model(images).argmax(1)
        problem = robustness(model, images, labels, torch.arange(6), 3, LinfBall(0.1))
        box = certtrain.Box((images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1))
        over = type(problem)(problem.network, box, problem.specification, problem.index)
        with pytest.raises(InputError, match=r"region: found a Box; accepted for the stage attack: .*falsify"):
            run_cascade(over, [AttackStage()])
        statuses = [verdict.status for verdict in run_cascade(over, Certify(stages=("falsify", "bab")).build(0))]
        assert set(statuses) <= {"verified", "falsified"}


def test_defaults_recorded_by_earlier_runs_mean_the_same(package, run):
    """Before ``format`` 2 the norm balls' attack was recorded where none was named."""
    file = run / "run.json"
    record = json.loads(file.read_text())
    assert record["format"] == 2 and record["config"]["certify"]["attack"] is None
    earlier = Pgd(steps=40, step_size=0.1, restarts=5, diversified=2, objective="margin")
    record["config"]["certify"]["attack"] = unstructure(earlier)
    record["config"]["perturbation"] = unstructure(SparseBall(2))
    read = RunFolder.open
    file.write_text(json.dumps(record))
    assert recorded_config(*read(run)).certify.attack == earlier  # named, and refused by whoever attacks
    del record["format"]
    file.write_text(json.dumps(record))
    assert recorded_config(*read(run)).certify.attack is None
    record["config"]["certify"]["attack"]["steps"] = 41
    file.write_text(json.dumps(record))
    assert recorded_config(*read(run)).certify.attack == Pgd(**{**vars(earlier), "steps": 41})
