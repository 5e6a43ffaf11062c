"""NuAT, N-AAER, MART, GAIRAT, Friendly-TRADES and HAT against their formulas written out, and what they reduce to."""

import math
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model, make_step
from torch import nn

from certtrain.attacks import Ascent, EarlyStopped, KullbackLeibler, Nuclear, nuclear_norm
from certtrain.bounds import L2Ball, LinfBall
from certtrain.config import structure, unstructure
from certtrain.errors import InputError
from certtrain.losses import (
    AdversarialTraining,
    CcIbp,
    FriendlyTrades,
    Gairat,
    Hat,
    Loss,
    Mart,
    Mer,
    NAaer,
    NFgsm,
    NuAt,
    PgdAt,
    Qub,
    Trades,
)
from certtrain.losses.adversarial import Passes, quadratic_upper_bound
from certtrain.losses.teacher import load_teacher
from certtrain.step import State

WEAK = Ascent(attack_mode="eval", steps=3, step_size=0.4, start="normal", start_scale=1e-3)
OVERSHOOTS = replace(NAaer().attack, step_size=20.0)  # so far that the loss falls for some
BALLS = [LinfBall, L2Ball]
every_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda kind: kind.__name__)


def agrees(loss: Loss, step, formula, model=make_model) -> None:
    """Value and gradient of a loss against a formula of the network, the attack's result and the batch."""
    batch, network = make_batch(), model()
    expected = formula(network, loss.attacked(network, batch, step), batch)
    network.zero_grad()
    expected.backward()
    by_hand = torch.cat([p.grad.flatten() for p in network.parameters()])
    terms, slope = gradient(model(), loss, batch, step)
    assert torch.allclose(terms.total, expected, rtol=1e-12) and torch.allclose(slope, by_hand, atol=1e-11)


def methods(folder, batch_norm=False) -> dict[str, Loss]:
    torch.manual_seed(5)
    teacher = make_model(batch_norm)
    for parameter in teacher.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    safetensors.torch.save_file(teacher.state_dict(), folder / "model.safetensors")
    return {
        "NuAt": NuAt(weight=2.0), "NAaer": NAaer(), "Mart": Mart(), "Gairat": Gairat(begin_epoch=0),
        "FriendlyTrades": FriendlyTrades(), "Hat": Hat(teacher=folder),
    }  # fmt: skip


NAMES = ["NuAt", "NAaer", "Mart", "Gairat", "FriendlyTrades", "Hat"]


class TestEach:
    @every_ball
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("count", [12, 1])
    def test_trains_in_every_ball_and_on_one_image(self, name, ball, count, tmp_path):
        loss, model, batch = methods(tmp_path)[name], make_model(batch_norm=False), make_batch(count)
        step = make_step(ball=ball).part(slice(0, count))
        terms, slope = gradient(model, loss, batch, step)
        assert terms.total.isfinite() and slope.isfinite().all() and slope.abs().max() > 0
        found = loss.attacked(model, batch, step)
        factor = 3.0 if name == "NAaer" else 1.0
        assert ball(0.05 * factor).contains(batch.images, found.images, slack=1e-12).all()
        assert (found.images - batch.images).abs().max() > 0 or name == "FriendlyTrades"
        again = loss.attacked(model, batch, step)
        assert torch.equal(found.images, again.images)

    @pytest.mark.parametrize("name", [name for name in NAMES if name != "Mart"])
    def test_qub_replaces_the_accuracy_term_alone(self, name, tmp_path):
        base, model, batch, step = methods(tmp_path, True)[name], make_model(), make_batch(), make_step()
        found = base.attacked(model, batch, step)
        passes = base.passes(model, batch, step, found, model(batch.images))
        bound = quadratic_upper_bound(passes.clean_logits, passes.adversarial, batch.labels)
        own = F.cross_entropy(passes.clean_logits if base.term == "clean" else passes.adversarial, batch.labels,
                              reduction="none")  # fmt: skip
        weights = 1 if passes.weights is None else passes.weights
        expected = base.criterion(passes, step) + (weights * (bound - own)).mean()
        assert torch.allclose(Qub(base=base).criterion(passes, step), expected, rtol=1e-12)
        terms, slope = gradient(model, Qub(base=base), batch, step)
        assert terms.total.isfinite() and slope.abs().max() > 0

    def test_qub_refuses_mart_by_name(self):
        with pytest.raises(InputError, match=r"^loss\.base: found 'Mart'; accepted: .*cross-entropy"):
            structure(Loss, {"type": "Qub", "base": {"type": "Mart"}}, "loss")
        terms, _ = gradient(make_model(), Mer(base=Mart()), make_batch(), make_step())
        assert terms.total.isfinite()

    @pytest.mark.parametrize("name", NAMES)
    def test_the_attack_leaves_running_statistics_alone_or_says_that_it_does_not(self, name, tmp_path):
        loss, model = methods(tmp_path, True)[name], make_model()
        loss.attacked(model, make_batch(), make_step())
        moved = any(norm.num_batches_tracked > 0 for norm in model if isinstance(norm, nn.BatchNorm2d))
        assert moved == (loss.attack.attack_mode == "train") == (name == "NAaer")

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"type": "NuAt", "weight": -1}, r"loss\.weight"),
            ({"type": "NuAt", "attack": {"weight": -1}}, r"loss\.attack\.weight"),
            ({"type": "NuAt", "attack": {"type": "Pgd"}}, r"loss\.attack\.type"),
            ({"type": "NAaer", "logit_weight": -0.1}, r"loss\.logit_weight"),
            ({"type": "Gairat", "begin_epoch": -1}, r"loss\.begin_epoch"),
            ({"type": "Gairat", "attack": {"steps": 1}}, r"loss\.attack\.steps"),
            ({"type": "FriendlyTrades", "attack": {"patience": -1}}, r"loss\.attack\.patience"),
            ({"type": "FriendlyTrades", "attack": {"milestones": [0]}}, r"loss\.attack\.milestones"),
            ({"type": "Hat", "helper_weight": {"start": 0, "end": -1}}, r"loss\.helper_weight"),
        ],
    )
    def test_refuses(self, given, named):
        with pytest.raises(InputError, match=rf"^{named}: found .*; accepted: "):
            structure(Loss, given, "loss")

    def test_one_line_of_yaml(self):
        found = structure(Loss, {"type": "NAaer", "attack": {"step_size": 1.25, "start_scale": 1, "projected": True}})
        assert found.attack == Ascent(attack_mode="train", steps=1, step_size=1.25, start="uniform")
        patient = structure(Loss, {"type": "FriendlyTrades", "attack": {"patience": 10, "milestones": []}})
        assert structure(Loss, unstructure(patient)) == patient and patient.attack.patience == 10


class TestNuclearNorm:
    @pytest.mark.parametrize("shape", [(12, 5), (3, 7), (1, 6), (6, 1), (4, 4)])
    def test_value_and_gradient(self, shape):
        torch.manual_seed(2)
        matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        found = nuclear_norm(matrix)
        exact = np.linalg.svd(matrix.detach().numpy(), compute_uv=False).sum()
        assert float(found.detach()) == pytest.approx(exact, rel=1e-12)
        assert torch.autograd.gradcheck(nuclear_norm, matrix)
        frobenius, rank = float(matrix.detach().norm()), min(shape)
        assert frobenius * (1 - 1e-12) <= float(found.detach()) <= math.sqrt(rank) * frobenius * (1 + 1e-12)

    def test_equal_singular_values_and_none(self):
        """Where the decomposition's derivative is infinite; of zero the least subgradient."""
        for matrix, slope in ((torch.eye(4, 6), torch.eye(4, 6)), (torch.zeros(3, 5), torch.zeros(3, 5))):
            matrix = matrix.double().requires_grad_()
            total = nuclear_norm(matrix)
            total.backward()
            assert float(total.detach()) == pytest.approx(float(slope.sum()))
            assert torch.allclose(matrix.grad, slope.double(), atol=1e-12)

    def test_of_rank_one_it_is_the_frobenius_norm_and_its_gradient(self):
        left, right = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.0, 4.0, 0.0])
        matrix = torch.outer(left, right).double().requires_grad_()
        total = nuclear_norm(matrix)
        total.backward()
        assert float(total.detach()) == pytest.approx(math.sqrt(5.25) * 5, rel=1e-12)
        assert torch.allclose(matrix.grad, matrix.detach() / matrix.detach().norm(), atol=1e-12)

    def test_bad_entries_do_not_raise(self):
        for value in (math.nan, math.inf):
            assert not nuclear_norm(torch.tensor([[1.0, value], [0.0, 1.0]])).isfinite()
        assert float(nuclear_norm(torch.zeros(0, 5))) == 0
        assert nuclear_norm(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.float32


class TestNuAt:
    def test_formula(self):
        def formula(model, found, batch):
            clean, adversarial = model(batch.images), model(found.images)
            norm = torch.linalg.matrix_norm(adversarial - clean, ord="nuc")
            return F.cross_entropy(clean, batch.labels) + 1.7 / 12 * norm

        agrees(NuAt(weight=1.7), make_step(), formula)

    def test_without_weight_it_is_the_clean_cross_entropy(self):
        model, batch = make_model(), make_batch()
        expected = F.cross_entropy(model(batch.images), batch.labels)
        assert torch.equal(NuAt(weight=0.0)(model, batch, make_step()).total, expected)
        ramp = replace(make_step(), progress=0.0)
        assert torch.equal(NuAt()(model, batch, ramp).total, expected)

    def test_the_weight_ends_after_nine_tenths_of_the_training(self):
        batch = make_batch()
        for progress, weight in ((0.45, 2.25), (0.9, 4.5), (0.99, 4.5)):
            step = replace(make_step(), progress=progress)
            ours, fixed = (loss(make_model(), batch, step).total for loss in (NuAt(), NuAt(weight=weight)))
            assert torch.allclose(ours, fixed, rtol=1e-12)

    @every_ball
    def test_the_attack_by_hand(self, ball):
        """With the norm at the second batch, without at the first and third; the start is a corner of half the ball."""
        model, batch, weight = make_model().eval(), make_batch(), 30.0  # heavy, so that many signs differ
        set_ = ball(0.05)
        attack = Nuclear(weight=weight)
        state = State({"nuclear_iterations": torch.zeros(1, dtype=torch.int64)}, attack.declare_state((1, 8, 8), 10))
        step = replace(make_step(ball=ball), state=state)
        noise = step.noise.normal((1, 8, 8), "start", torch.float64)
        start = set_.project(batch.images, (batch.images + 0.025 * set_.direction(noise)).clamp(0, 1))
        if ball is LinfBall:
            corner = (start - batch.images).abs()
            assert torch.allclose(corner[(batch.images > 0.03) & (batch.images < 0.97)], torch.tensor(0.025).double())
        clean, moved = model(batch.images).detach(), {}
        for with_norm in (False, True):
            point = start.clone().requires_grad_()
            logits = model(point)
            climbed = F.cross_entropy(logits, batch.labels)
            if with_norm:
                climbed = climbed + weight / 12 * torch.linalg.matrix_norm(logits - clean, ord="nuc")
            (slope,) = torch.autograd.grad(climbed, point)
            change = 0.05 * set_.direction(slope)
            moved[with_norm] = set_.project(batch.images, (start + change).clamp(0, 1))
        assert not torch.allclose(moved[True], moved[False])
        for with_norm in (False, True, False, True):
            found = attack(model, batch, step.ball, step)
            assert torch.allclose(found.images, moved[with_norm], atol=1e-12)
        assert int(state.tensors["nuclear_iterations"]) == 4
        unkept = replace(step, state=State())
        assert torch.allclose(attack(model, batch, step.ball, unkept).images, moved[True], atol=1e-12)

    def test_parts_of_a_batch_are_one_iteration(self):
        model, batch, attack = make_model().eval(), make_batch(), Nuclear(weight=30.0)
        state = State({"nuclear_iterations": torch.zeros(1, dtype=torch.int64)}, attack.declare_state((1, 8, 8), 10))
        step = replace(make_step(), state=state)
        plain = Nuclear()(model, batch, step.ball, make_step()).images
        for iteration in (1, 2, 3):
            differ = []
            for rows in (slice(0, 6), slice(6, 12)):
                found = attack(model, batch.part(rows), step.ball, step.part(rows)).images
                differ.append(not torch.equal(found, plain[rows]))
            assert differ == [iteration == 2] * 2 and int(state.tensors["nuclear_iterations"]) == iteration

    def test_whose_weight_counts(self):
        model, batch = make_model(), make_batch()
        unkept = make_step()
        handed = NuAt(weight=30.0).attacked(model, batch, unkept).images
        own = NuAt(weight=0.1, attack=Nuclear(weight=30.0)).attacked(model, batch, unkept).images
        none = NuAt(weight=30.0, attack=Nuclear(weight=0.0)).attacked(model, batch, unkept).images
        assert torch.equal(handed, own) and not torch.equal(handed, none)


class TestNAaer:
    def by_hand(self, start, reached, labels, weight, loss_weight, logit_weight):
        """The penalty's value, sample by sample."""
        drop, moved = {True: [], False: []}, {True: [], False: []}
        for s, r, y in zip(start.tolist(), reached.tolist(), labels.tolist(), strict=True):
            before = -s[y] + math.log(sum(map(math.exp, s)))
            after = -r[y] + math.log(sum(map(math.exp, r)))
            drop[before > after].append(before - after)
            moved[before > after].append(sum((a - b) ** 2 for a, b in zip(s, r, strict=True)))
        if not drop[True] or not drop[False]:
            return 0.0
        share = len(drop[True]) / len(labels)
        further = max(np.mean(moved[True]) - np.mean(moved[False]), 0)
        return weight * share * (loss_weight * np.mean(drop[True]) + logit_weight * further)

    def cases(self):
        """Passes with five abnormal samples, which moved further than the others or less far; with none; all; none."""
        loss, model, batch, step = NAaer(), make_model(), make_batch(), make_step(0.3)
        passes = loss.passes(model, batch, step, loss.attacked(model, batch, step), None)
        torch.manual_seed(3)
        start, own = torch.randn(12, 5, dtype=torch.float64), F.one_hot(batch.labels, 5)
        for lowered, raised in ((2.0, -0.5), (0.5, -2.0), (1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)):
            change = torch.where(torch.arange(12) < 5, lowered, raised)[:, None] * own
            yield replace(passes, adversarial=(start + change).requires_grad_(), others={"start": start})

    def test_the_penalty_sample_by_sample(self):
        found = []
        for passes in self.cases():
            for weights in ((1.0, 1.5, 0.15), (0.7, 0.0, 2.0), (1.0, 8.5, 1.5)):
                loss = NAaer(weight=weights[0], loss_weight=weights[1], logit_weight=weights[2])
                penalty = loss.regularisers(passes, make_step())["abnormal"]
                expected = self.by_hand(passes.others["start"], passes.adversarial, passes.labels, *weights)
                assert float(penalty.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-15)
                found.append(expected)
        assert len([value for value in found if value > 0]) == 5 and found.count(0.0) == 10

    def test_no_gradient_where_a_set_is_empty_and_no_nan(self):
        for detached in (True, False):
            for passes in list(self.cases())[2:]:
                total = NAaer(detached=detached).regularisers(passes, make_step())["abnormal"]
                total.backward()
                assert float(total.detach()) == 0 and torch.equal(passes.adversarial.grad, torch.zeros(12, 5).double())

    def test_the_gradient_by_hand(self):
        """Of the distance: of A alone, other mean and start being constants. The loss term has none by default."""
        moved = []
        for passes in list(self.cases())[:2]:
            start, reached, labels = passes.others["start"], passes.adversarial, passes.labels
            before, after = (F.cross_entropy(z, labels, reduction="none").detach() for z in (start, reached))
            abnormal = before > after
            expected = torch.zeros(12, 5).double()
            distance = (start - reached).square().sum(1)
            assert abnormal.sum() == 5
            if distance[abnormal].mean() > distance[~abnormal].mean():
                moved.append(distance)
                expected[abnormal] = 0.15 / 12 * 2 * (reached - start)[abnormal].detach()
            NAaer().regularisers(passes, make_step())["abnormal"].backward()
            assert torch.allclose(reached.grad, expected, atol=1e-14)
            reached.grad = None
            start.requires_grad_()
            undone = NAaer(detached=False).regularisers(passes, make_step())["abnormal"]
            undone.backward()
            residual = F.softmax(reached.detach(), 1) - F.one_hot(labels, 5)
            expected[abnormal] -= 1.5 / 12 * residual[abnormal]
            assert torch.allclose(reached.grad, expected, atol=1e-14)
            residual = F.softmax(start.detach(), 1) - F.one_hot(labels, 5)
            expected = 1.5 / 12 * residual * abnormal[:, None]  # not of the distance, in which it is a constant
            assert torch.allclose(start.grad, expected, atol=1e-14)
            start.grad = None
        assert len(moved) == 1

    def test_undetached_the_start_carries_a_gradient_too(self):
        def formula(model, found, batch):
            start, reached = model(found.trace["start"]), model(found.images)
            before, after = (F.cross_entropy(z, batch.labels, reduction="none") for z in (start, reached))
            chosen = before > after
            assert 0 < chosen.sum() < 12
            return after.mean() + chosen.sum() / 12 * 1.5 * (before - after)[chosen].mean()

        agrees(NAaer(detached=False, logit_weight=0.0, attack=OVERSHOOTS), make_step(), formula)

    def test_reductions(self):
        results = []
        for loss in (NFgsm(), NAaer(weight=0.0), NAaer(loss_weight=0.0, logit_weight=0.0)):
            model = make_model()
            terms, slope = gradient(model, loss, make_batch(), make_step(0.3))
            results.append([terms.total, slope, *model.state_dict().values()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_the_loss_term_changes_the_value_and_no_gradient(self):
        without, with_ = (
            gradient(make_model(), NAaer(loss_weight=weight, attack=OVERSHOOTS), make_batch(), make_step())
            for weight in (0.0, 1.5)
        )
        assert with_[0].total > without[0].total and torch.equal(without[1], with_[1])

    def test_the_start_is_passed_once(self):
        """Its logits are those of the attack's gradient: two passes a step, as N-FGSM has."""
        for loss, passes in ((NFgsm(), 2), (NAaer(), 2), (NAaer(detached=False), 3)):
            model = make_model()
            loss(model, make_batch(), make_step())
            assert int(model[1].num_batches_tracked) == passes


class TestMart:
    def by_hand(self, clean, adversarial, labels, weight):
        total = 0.0
        for z, a, y in zip(clean.tolist(), adversarial.tolist(), labels.tolist(), strict=True):
            p, q = (np.exp(np.array(v) - np.max(v)) / np.exp(np.array(v) - np.max(v)).sum() for v in (z, a))
            runner_up = max(q[k] for k in range(len(q)) if k != y)
            divergence = sum(p[k] * (math.log(p[k]) - math.log(q[k] + 1e-12)) for k in range(len(p)))
            total += -math.log(q[y]) - math.log(1.0001 - runner_up + 1e-12) + weight * divergence * (1.0000001 - p[y])
        return total / len(labels)

    def test_formula(self):
        loss, model, batch, step = Mart(weight=3.5), make_model(), make_batch(), make_step(0.2)
        images = loss.attacked(model, batch, step).images
        total = float(loss(model, batch, step).total.detach())
        expected = self.by_hand(model(batch.images), model(images), batch.labels, 3.5)
        assert total == pytest.approx(expected, rel=1e-10)

    def passes(self, clean, adversarial, labels):
        return Passes(torch.tensor(labels), adversarial, clean, torch.zeros(len(labels), 1, 8, 8))

    def test_the_weight_carries_a_gradient(self):
        """Against autograd of the formula as written, and unlike it with the weight held constant."""
        torch.manual_seed(4)
        clean, adversarial = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        passes = self.passes(clean, adversarial, [0, 3, 2])

        def slopes(total):
            return torch.cat(torch.autograd.grad(total, (clean, adversarial), retain_graph=True))

        p, q = clean.softmax(1), adversarial.softmax(1)
        rows = torch.arange(3)
        others = torch.tensor([[1, 2, 3], [0, 1, 2], [0, 1, 3]])
        boosted = -q[rows, passes.labels].log() - (1.0001 - q.gather(1, others).amax(1) + 1e-12).log()
        distance = (p * (p.log() - (q + 1e-12).log())).sum(1)
        weight = 1.0000001 - p[rows, passes.labels]
        expected = (boosted + 5 * distance * weight).mean()
        constant = (boosted + 5 * distance * weight.detach()).mean()
        found = Mart().criterion(passes, make_step())
        assert torch.allclose(slopes(found), slopes(expected), atol=1e-12)
        assert not torch.allclose(slopes(found), slopes(constant), atol=1e-3)

    def test_a_certain_clean_prediction_kills_the_divergence(self):
        clean = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
        far = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
        assert 0 <= float(Mart().regularisers(self.passes(clean, far, [0]), make_step())["divergence"]) < 1e-5
        assert float(Mart().regularisers(self.passes(clean, far, [1]), make_step())["divergence"]) > 5

    def test_the_runner_up_is_never_the_label(self):
        certain = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
        step = make_step()
        right, wrong = (float(Mart().accuracy(self.passes(certain, certain, [y]), step)) for y in (0, 1))
        assert right == pytest.approx(-math.log(1.0001), abs=1e-6) and Mart().may_be_negative
        assert wrong == pytest.approx(60 - math.log(0.0001), rel=1e-6)
        tied = torch.zeros(1, 4, dtype=torch.float64)
        assert float(Mart().accuracy(self.passes(tied, tied, [2]), step)) == pytest.approx(
            math.log(4) - math.log(0.7501), rel=1e-9
        )

    def test_finite_where_predictions_are_certain_and_wrong(self):
        clean = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
        adversarial = torch.tensor([[0.0, 1e4, 0.0]], requires_grad=True)
        total = Mart().criterion(self.passes(clean, adversarial, [0]), make_step())
        total.backward()
        assert total.isfinite() and clean.grad.isfinite().all() and adversarial.grad.isfinite().all()


class TestGairat:
    @pytest.mark.parametrize(("steps", "half"), [(10, 5), (7, 3), (2, 1)])
    @pytest.mark.parametrize("offset", [-1.0, 0.0, 2.5])
    def test_weights_by_hand(self, steps, half, offset):
        loss = Gairat(attack=Ascent(steps=steps), offset=offset)
        correct = torch.tensor([*range(steps + 1), 0, steps])
        raw = [(math.tanh(offset + 5 * (half - kappa) / half) + 1) / 2 for kappa in correct.tolist()]
        expected = [len(raw) * value / sum(raw) for value in raw]
        found = loss.weights(correct)
        assert found.tolist() == pytest.approx(expected, rel=1e-9)
        assert float(found.sum()) == pytest.approx(len(raw), rel=1e-12)
        assert (found[: steps + 1].diff() <= 0).all()

    def test_a_saturated_batch_has_no_nan(self):
        saturated = torch.full((6,), 10)
        raw = (torch.tanh(torch.tensor(-5.0) - 5) + 1) / 2
        assert float(raw) == 0  # the formula itself would divide by it
        for offset in (-5, -60, -1e4, math.inf):
            assert torch.equal(Gairat(offset=offset).weights(saturated), torch.ones(6).double())

    def test_kappa_counts_the_points_before_each_step(self):
        model, batch, step, loss = make_model(), make_batch(), make_step(0.1), Gairat()
        points = []
        with torch.no_grad():
            handle = model.register_forward_pre_hook(lambda _, given: points.append(given[0].detach().clone()))
            found = loss.attacked(model, batch, step)
            handle.remove()
            model.eval()
            expected = sum((model(point).argmax(1) == batch.labels).long() for point in points[:10])
        assert len(points) == 10 and torch.equal(found.trace["correct"], expected)
        assert torch.equal(points[0], found.trace["start"])

    def test_the_weights_carry_no_gradient(self):
        loss = Gairat(begin_epoch=0)

        def formula(model, found, batch):
            weights = loss.weights(found.trace["correct"])
            assert weights.max() > 1.01 > 0.99 > weights.min()
            return (weights * F.cross_entropy(model(found.images), batch.labels, reduction="none")).mean()

        agrees(loss, make_step(0.1), formula)

    @pytest.mark.parametrize(
        ("begin", "epoch", "plain"), [(None, 59, True), (None, 60, False), (3, 2, True), (3, 3, False)]
    )
    def test_it_begins_as_plain_adversarial_training(self, begin, epoch, plain):
        step = replace(make_step(0.1), epoch=epoch, epochs=120)
        total, slope = gradient(make_model(), Gairat(begin_epoch=begin), make_batch(), step)
        evaluated = PgdAt(attack=replace(PgdAt().attack, attack_mode="eval"))
        other, other_slope = gradient(make_model(), evaluated, make_batch(), step)
        assert torch.equal(total.total, other.total) == plain and torch.equal(slope, other_slope) == plain
        even = Gairat(begin_epoch=0, offset=math.inf)
        assert torch.equal(gradient(make_model(), even, make_batch(), step)[1], other_slope)

    def test_a_recipe_of_one_epoch_weighs(self):
        assert Gairat()(make_model(), make_batch(), make_step(0.1)).total.isfinite()
        passes = Gairat().passes(
            model := make_model(), batch := make_batch(), make_step(0.1),
            Gairat().attacked(model, batch, make_step(0.1)), None,
        )  # fmt: skip
        assert passes.weights is not None and passes.weights.dtype == torch.float64


class TestFriendlyTrades:
    @every_ball
    @pytest.mark.parametrize("patience", [0, 1, 2, 6])
    def test_each_sample_alone(self, ball, patience):
        """A loop over single samples, as the method is told."""
        model, batch, step = make_model().eval(), make_batch(), make_step(0.1 if ball is LinfBall else 0.6, ball=ball)
        attack = EarlyStopped(
            steps=6, step_size=0.4, start="normal", start_scale=1e-3, patience=patience, milestones=(),
            objective=KullbackLeibler(),
        )  # fmt: skip
        found = attack(model, batch, step.ball, step)
        noise, stopped = step.noise.normal((1, 8, 8), "start", torch.float64), 0
        for i in range(12):
            image, label = batch.images[i : i + 1], int(batch.labels[i])
            clean = model(image).detach().softmax(1)
            point, tau = step.ball.project(image, (image + 1e-3 * noise[i : i + 1]).clamp(0, 1)), patience
            for _ in range(6):
                point = point.detach().requires_grad_()
                logits = model(point)
                if int(logits.argmax(1)) != label:
                    if tau == 0:
                        stopped += 1
                        break
                    tau -= 1
                divergence = (clean * (clean.log() - logits.log_softmax(1))).sum()
                (slope,) = torch.autograd.grad(divergence, point)
                moved = point.detach() + 0.4 * step.ball.epsilon * step.ball.direction(slope)
                point = step.ball.project(image, moved.clamp(0, 1))
            assert torch.allclose(found.images[i : i + 1], point.detach(), atol=1e-12)
        assert stopped == 0 if patience == 6 else stopped > 0

    @every_ball
    def test_with_all_patience_it_is_trades(self, ball):
        patient = FriendlyTrades(attack=replace(FriendlyTrades().attack, patience=10, milestones=()))
        for epoch in (0, 99):
            step = replace(make_step(0.2, ball=ball), epoch=epoch)
            terms, slope = gradient(make_model(), patient, make_batch(), step)
            other, other_slope = gradient(make_model(), Trades(), make_batch(), step)
            assert torch.equal(terms.total, other.total) and torch.equal(slope, other_slope)
        impatient = FriendlyTrades()(make_model(), make_batch(), make_step(0.2, ball=ball))
        assert impatient.total < other.total

    def test_patience_grows_with_the_epochs(self):
        model, batch = make_model(), make_batch()
        fixed = [
            EarlyStopped(steps=10, patience=tau, milestones=())(model, batch, LinfBall(0.2), make_step(0.2)).images
            for tau in range(4)
        ]
        assert not any(torch.equal(a, b) for a, b in pairwise(fixed))
        for epoch, tau in ((0, 0), (29, 0), (30, 1), (49, 1), (50, 2), (69, 2), (70, 3), (400, 3)):
            step = replace(make_step(0.2), epoch=epoch)
            assert torch.equal(EarlyStopped(steps=10)(model, batch, LinfBall(0.2), step).images, fixed[tau])

    def test_what_is_misclassified_stays_at_the_start(self):
        model, batch, step = make_model().eval(), make_batch(), make_step(0.2)
        found = FriendlyTrades().attacked(model, batch, step)
        wrong = model(found.trace["start"]).argmax(1) != batch.labels
        assert 0 < wrong.sum() < 12
        assert torch.equal(found.images[wrong], found.trace["start"][wrong])
        assert (found.images - found.trace["start"]).flatten(1).abs().amax(1)[~wrong].min() > 0.01


class TestHat:
    def teacher(self, folder, batch_norm=True) -> nn.Module:
        torch.manual_seed(6)
        teacher = make_model(batch_norm)
        for parameter in teacher.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
        if batch_norm:
            teacher[1].running_mean.uniform_(-0.3, 0.3)
        with torch.no_grad():  # every class is somebody's
            teacher[-1].bias -= teacher.eval()(make_batch().images).mean(0)
        safetensors.torch.save_file(teacher.state_dict(), folder / "model.safetensors")
        return teacher.eval()

    def test_formula(self, tmp_path):
        teacher, step = self.teacher(tmp_path), make_step(0.3)

        def formula(model, found, batch):
            images = Trades(attack=WEAK).attacked(model, batch, step).images
            probe = batch.images + 2.5 * (images - batch.images)
            assert probe.max() > 1 and probe.min() < 0 and (probe - batch.images).abs().max() > 0.5
            labels = teacher(images).argmax(1)
            assert not torch.equal(labels, teacher(probe).argmax(1)) and not torch.equal(labels, batch.labels)
            clean, adversarial, helper = model(batch.images), model(images), model(probe)
            divergence = (clean.softmax(1) * (clean.log_softmax(1) - adversarial.log_softmax(1))).sum(1).mean()
            return F.cross_entropy(clean, batch.labels) + 1.5 * divergence + 0.7 * F.cross_entropy(helper, labels)

        agrees(Hat(attack=WEAK, weight=1.5, helper_weight=0.7, extrapolation=2.5, teacher=tmp_path), step, formula)

    @every_ball
    def test_without_helpers_it_is_trades(self, ball, tmp_path):
        self.teacher(tmp_path)
        loss, step = Hat(helper_weight=0.0, weight=6.0, teacher=tmp_path), make_step(ball=ball)
        terms, slope = gradient(make_model(), loss, make_batch(), step)
        other, other_slope = gradient(make_model(), Trades(), make_batch(), step)
        assert torch.equal(terms.total, other.total) and torch.allclose(slope, other_slope, atol=1e-14)

    def test_the_teacher_stays_as_it_is(self, tmp_path):
        before = self.teacher(tmp_path).state_dict()
        loss, model = Hat(teacher=tmp_path), make_model()
        for _ in range(2):
            gradient(model, loss, make_batch(), make_step())
        teacher = load_teacher(model, tmp_path)
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())

    def test_three_passes(self, tmp_path):
        self.teacher(tmp_path)
        model = make_model()
        Hat(teacher=tmp_path)(model, make_batch(), make_step())
        assert int(model[1].num_batches_tracked) == 3

    def test_inside_a_certified_loss(self, tmp_path):
        self.teacher(tmp_path)
        loss = CcIbp(adversarial=Hat(teacher=tmp_path), alpha=0.3)
        terms, slope = gradient(make_model(), loss, make_batch(), make_step())
        assert terms.total.isfinite() and slope.isfinite().all()

    def test_its_file_is_recorded(self, tmp_path):
        self.teacher(tmp_path)
        digest = sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
        for path in (tmp_path, tmp_path / "model.safetensors"):
            assert Hat(teacher=path).files() == {"teacher": digest} == Qub(base=Hat(teacher=path)).files()

    def test_teachers_that_cannot_teach(self, tmp_path):
        model = make_model()
        safetensors.torch.save_file({"0.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "part.safetensors")
        (tmp_path / "text.safetensors").write_text("no weights")
        (tmp_path / "empty").mkdir()
        for teacher, named in ((None, "found none"), (tmp_path / "no", "no.*cannot be read"),
                               (tmp_path / "empty", "empty.*cannot be read"),
                               (tmp_path / "text.safetensors", "cannot be read"),
                               (tmp_path / "part.safetensors", "[Mm]issing key")):  # fmt: skip
            with pytest.raises(InputError, match=f"^loss.teacher: .*{named}.*accepted: ") as caught:
                Hat(teacher=teacher).check_model(model)
            assert "\n" not in str(caught.value)

    def test_the_teacher_follows_its_student(self, tmp_path):
        """To another device; and another path is another teacher."""
        first = self.teacher(tmp_path)
        model = make_model()
        assert load_teacher(model, tmp_path) is load_teacher(model, tmp_path)
        (tmp_path / "other").mkdir()
        second = make_model()
        safetensors.torch.save_file(second.state_dict(), tmp_path / "other" / "model.safetensors")
        assert torch.equal(load_teacher(model, tmp_path / "other")[0].weight, second[0].weight)
        assert torch.equal(load_teacher(model, tmp_path)[0].weight, first[0].weight)
        model.to("meta")
        assert load_teacher(model, tmp_path)[0].weight.device.type == "meta"


def test_ascent_keeps_what_these_read():
    """The trace of a plain ascent: start, logits there in the attack's mode, points that were right."""
    model, batch, step = make_model(), make_batch(), make_step(0.1)
    found = AdversarialTraining(attack=Ascent(attack_mode="eval")).attacked(model, batch, step)
    assert torch.allclose(model.eval()(found.trace["start"]), found.trace["logits"], atol=1e-14)
    assert not any(value.requires_grad for value in found.trace.values())
