"""The cascade's stages by themselves: above all, what must never be called verified."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from problems import alone, decided, linear_model, problem_of, unknown
from torch import nn

from certtrain.attacks import Attack, AttackResult, Pgd
from certtrain.bounds import Box, L2Ball, LinfBall
from certtrain.errors import InputError
from certtrain.verifiers import (
    AlphaStage,
    AttackStage,
    BabStage,
    Certify,
    CleanStage,
    IbpStage,
    Judge,
    Problem,
    Specification,
    certify,
    run_cascade,
)


@dataclass(frozen=True)
class Leaving(Attack):
    """Goes down by ``far``, wherever the ball ends."""

    far: float = 0.2

    def allowed(self, ball):
        return ball.with_epsilon(self.far)

    def propose(self, model, batch, ball, step):
        return AttackResult(batch.images - self.far)


class TestStages:
    def test_clean_stage(self):
        model = linear_model([[1.0, 0.0], [0.0, 1.0]])
        images = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.5, 0.5], [0.6, 0.4]]).reshape(4, 1, 1, 2)
        labels = torch.tensor([0, 0, 0, 1])  # right, wrong, tied, wrong
        finding = alone(CleanStage(), problem_of(model, images, labels, LinfBall(0.0), 2))
        assert finding.statuses == [None, "misclassified", "misclassified", "misclassified"]

    def test_clean_stage_counts_nan_as_wrong(self):
        model = linear_model([[1.0, 0.0], [0.0, 1.0]])
        problem = problem_of(model, torch.rand(2, 1, 1, 2), torch.tensor([0, 1]), LinfBall(0.0), 2)
        known = unknown(problem)
        with torch.no_grad():
            model[1].weight[0, 0] = math.nan
        assert all(decided(alone(CleanStage(), problem, known)))

    @pytest.mark.parametrize("kind", [LinfBall, L2Ball])
    def test_linear_networks_are_decided_up_to_their_exact_radius(self, kind):
        """z = <w, x> + b: the radius is |z| over the dual norm (images far from the pixels' edges)."""
        torch.manual_seed(0)
        weight = torch.randn(2, 16)
        images = 0.5 + 0.02 * torch.randn(30, 1, 4, 4)
        difference = weight[0] - weight[1]
        margins = images.flatten(1) @ difference
        model, labels = linear_model(weight), (margins < 0).long()
        dual = difference.abs().sum() if kind is LinfBall else difference.norm()
        attack = Pgd(steps=20, step_size=0.5, objective="margin")
        for number in range(30):
            radius = float(margins[number].abs() / dual)
            x, y = images[number : number + 1], labels[number : number + 1]
            if radius > 0.3 or radius < 1e-3:
                continue
            assert certify(model, x, y, kind(radius * 0.98), Certify(attack=attack))[0].status == "verified"
            beyond = certify(model, x, y, kind(radius * 1.02), Certify(attack=attack))[0]
            assert beyond.status != "verified"
            if kind is LinfBall:
                assert beyond.status == "falsified"

    def test_the_lower_bound_of_a_linear_network_is_its_worst_margin(self):
        model = linear_model([[2.0, 0.0], [0.0, 1.0]], [0.1, 0.0])
        x = torch.tensor([0.9, 0.5]).reshape(1, 1, 1, 2)
        verdict = certify(model, x, torch.tensor([0]), 0.2, Certify(stages=("ibp",)))[0]
        assert verdict.status == "verified" and verdict.stage == "ibp"
        assert verdict.lower_bound == pytest.approx(2 * 0.7 + 0.1 - 0.7, rel=1e-6)

    @pytest.mark.parametrize("width", [1e-3, 1e-4])
    def test_a_needle_that_attacks_miss_is_never_verified(self, width):
        """The network errs at one corner of the box alone, within ``width`` of it."""
        count, epsilon = 16, 0.1
        sign = torch.tensor([1.0, -1.0] * (count // 2))
        images = torch.full((1, 1, 4, 4), 0.5)
        corner = float((sign * (0.5 + epsilon * sign)).sum())
        hidden, out = nn.Linear(count, 1), nn.Linear(1, 2)
        with torch.no_grad():
            hidden.weight.copy_(sign[None]), hidden.bias.fill_(-(corner - width))
            out.weight.copy_(torch.tensor([[0.0], [2 / width]])), out.bias.copy_(torch.tensor([1.0, 0.0]))
        model = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out).eval()
        labels = torch.tensor([0])
        worst = images + epsilon * sign.reshape(1, 1, 4, 4)
        assert model(images).argmax() == 0 and model(worst).argmax() == 1
        settings = Certify(attack=Pgd(steps=3, step_size=0.1, objective="margin"))
        cheap = replace(settings, stages=("attack", "ibp"))
        assert certify(model, images, labels, epsilon, cheap)[0].status == "unknown"
        assert certify(model, images, labels, epsilon * 0.9, cheap)[0].status == "verified"
        for stages in (settings.stages, ("crown_ibp", "crown", "alpha", "bab"), ("bab",)):  # bounds show the way to it
            verdict = certify(model, images, labels, epsilon, replace(settings, stages=stages))[0]
            assert verdict.status == "falsified" and verdict.counterexample is not None
            assert model(verdict.counterexample[None]).argmax() == 1
            assert (
                certify(model, images, labels, epsilon * 0.9, replace(settings, stages=stages))[0].status == "verified"
            )

    def test_candidates_outside_the_region_never_count(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        images = torch.full((1, 1, 1, 1), 0.6)
        problem = problem_of(model, images, torch.tensor([0]), LinfBall(0.05), 2)
        finding = alone(AttackStage(Leaving(far=0.2)), problem)
        assert model(images - 0.2).argmax() == 1 and not any(decided(finding))

    def test_not_even_by_less_than_a_millionth(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        images = torch.full((1, 1, 1, 1), 0.5 + 3e-7)
        problem = problem_of(model, images, torch.tensor([0]), LinfBall(1e-7), 2)
        assert all(decided(alone(IbpStage(), problem)))  # the region is safe …
        finding = alone(AttackStage(Leaving(far=6e-7)), problem)  # … and this point of another one is not
        assert not any(decided(finding))

    def test_replay_has_the_last_word(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        images = torch.tensor([0.52, 0.53, 0.9]).reshape(3, 1, 1, 1)
        problem = problem_of(model, images, torch.tensor([0, 0, 0]), LinfBall(0.1), 2)
        assert decided(alone(AttackStage(Pgd()), problem)) == [True, True, False]
        seen = []

        def replay(image):
            seen.append(image.shape)
            return torch.tensor([[1.0, 0.0] if len(seen) == 1 else [0.0, 0.0]])

        finding = alone(AttackStage(Pgd(), judge=Judge(replay)), problem)
        assert decided(finding) == [False, True, False]  # refused; a tie is unsafe; never a suspect
        assert seen == [(1, 1, 1)] * 2
        refusing = Judge(lambda image: torch.tensor([[1.0, 0]]))
        verdict = run_cascade(problem, [CleanStage(), AttackStage(Pgd(), judge=refusing)])
        assert all(v.status == "unknown" and v.counterexample is None for v in verdict)
        for stage in (AlphaStage(judge=refusing), BabStage(judge=refusing)):
            assert alone(stage, problem).statuses == [None, None, "verified"]

    def test_every_stage_asks_for_a_replay(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        problem = problem_of(
            model, torch.tensor([0.52, 0.9]).reshape(2, 1, 1, 1), torch.tensor([0, 0]), LinfBall(0.1), 2
        )
        seen = []

        def replay(image):
            seen.append(float(image))
            return torch.zeros(1, 2)

        for stage in (
            AttackStage(Pgd(), judge=Judge(replay)),
            AlphaStage(judge=Judge(replay)),
            BabStage(judge=Judge(replay)),
        ):
            seen.clear()
            assert alone(stage, problem).statuses[0] == "falsified"
            assert seen and all(value == pytest.approx(0.42) for value in seen)

    def test_replay_may_be_more_precise_than_the_network(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        problem = problem_of(model, torch.full((1, 1, 1, 1), 0.52), torch.tensor([0]), LinfBall(0.1), 2)
        exact = linear_model([[1.0], [0.0]], [-0.5, 0.0], torch.float64)
        judge = Judge(lambda image: exact(image[None].double()))
        assert all(decided(alone(AttackStage(Pgd(), judge=judge), problem)))

    def test_specifications_of_several_rows_in_the_ibp_stage(self):
        """Unsafe where z0 <= 0 and z1 <= 0 together: one row alone may fail."""
        model = linear_model([[1.0, 0.0], [0.0, 1.0]], [-0.5, -0.5])
        images = torch.tensor([[0.9, 0.1], [0.6, 0.55], [0.2, 0.3]]).reshape(3, 1, 1, 2)
        rows = torch.eye(2).expand(3, 2, 2)
        specification = Specification(rows, torch.zeros(3, 2), torch.tensor([0, 0]))
        problem = Problem(model, LinfBall(0.2).region(images), specification, torch.arange(3))
        finding = alone(IbpStage(), problem)
        assert decided(finding) == [True, False, False]
        assert specification.worst(finding.known.rows).tolist() == pytest.approx([0.2, -0.1, -0.4], abs=1e-6)

    def test_nan_bounds_prove_nothing(self):
        model = linear_model([[1.0, 0.0], [0.0, 1.0]])
        problem = problem_of(model, torch.zeros(1, 1, 1, 2), torch.tensor([0]), LinfBall(0.0), 2)
        known = unknown(problem)
        with torch.no_grad():
            model[1].weight[0, 0] = math.inf
        assert not any(decided(alone(IbpStage(), problem, known)))


def test_the_attack_refuses_a_box_in_one_line():
    """It has no images to attack around."""
    model = linear_model([[1.0, 0.0], [0.0, 1.0]])
    region = Box(torch.zeros(1, 2), torch.ones(1, 2))
    problem = Problem(model, region, Specification.robust(torch.tensor([0]), 2), torch.arange(1))
    with pytest.raises(
        InputError, match="region: found a Box; accepted for the stage attack: a perturbation set around"
    ):
        run_cascade(problem, [AttackStage()])
