"""The losses' formulas and lemmas, in float64 where the mathematics is exact."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model, make_step

from certtrain.bounds import L2Ball, LinfBall, compute_margins, forward
from certtrain.bounds.crown import bound_forms, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.losses import CcIbp, CrownIbp, ExpIbp, Ibp, MtlIbp, Ramp
from certtrain.losses.certified import margin_loss, margin_rows, margins_of, mix
from certtrain.losses.regularisers import l1_norm, warmup_regularisers

EXPRESSIVE = (CcIbp, MtlIbp, ExpIbp)


def random_margins(seed):
    torch.manual_seed(seed)
    adversarial = 3 * torch.randn(6, 4, dtype=torch.float64)
    return adversarial, adversarial - 2 * torch.rand_like(adversarial)


def test_margin_loss_is_the_cross_entropy():
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 6
    found = margin_loss(margins_of(logits, labels))
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-12, atol=0)
    shifted = margin_loss(margins_of(logits + 100, labels))
    torch.testing.assert_close(shifted, found, rtol=1e-10, atol=1e-12)


def test_margins_come_in_increasing_order_of_the_other_class():
    logits = torch.tensor([[1.0, 10.0, 100.0]])
    assert margins_of(logits, torch.tensor([1])).tolist() == [[9.0, -90.0]]


@pytest.mark.parametrize("loss", [CcIbp(), MtlIbp(), ExpIbp()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("seed", range(5))
class TestOrder:
    """Lemmas 7 to 11 of the reference sheet."""

    def test_sandwich_and_growth_in_alpha(self, loss, seed):
        adversarial, verified = random_margins(seed)
        values = [float(loss.combine(adversarial, verified, alpha / 10)) for alpha in range(11)]
        assert all(low <= high + 1e-12 for low, high in pairwise(values))

    def test_never_above_mtl(self, loss, seed):
        torch.manual_seed(seed)  # no condition on the attack: unrelated margins
        first, second = 4 * torch.randn(2, 6, 4, dtype=torch.float64)
        for alpha in (0.1, 0.5, 0.9):
            assert loss.combine(first, second, alpha) <= MtlIbp().combine(first, second, alpha) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_one_sample_exp_below_cc(seed):
    torch.manual_seed(seed)
    first, second = 4 * torch.randn(2, 1, 1, dtype=torch.float64)
    for alpha in (0.2, 0.7):
        assert ExpIbp().combine(first, second, alpha) <= CcIbp().combine(first, second, alpha) + 1e-12


def test_gradients_of_mtl_and_exp_follow_their_formulas():
    adversarial, verified = (margins.requires_grad_() for margins in random_margins(3))
    losses = margin_loss(adversarial).mean(), margin_loss(verified).mean()
    parts = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, (adversarial, verified), strict=True)]
    alpha = 0.3
    mtl = torch.autograd.grad(MtlIbp().combine(adversarial, verified, alpha), (adversarial, verified))
    torch.testing.assert_close(mtl, ((1 - alpha) * parts[0], alpha * parts[1]))
    value = ExpIbp().combine(adversarial, verified, alpha)
    torch.testing.assert_close(value, losses[1] ** alpha * losses[0] ** (1 - alpha))
    exp = torch.autograd.grad(value, (adversarial, verified))
    expected = (value * (1 - alpha) / losses[0] * parts[0], value * alpha / losses[1] * parts[1])
    torch.testing.assert_close(exp, expected)


def test_exp_has_a_gradient_where_the_attacked_loss_is_zero():
    adversarial = torch.full((4, 3), 200.0, requires_grad=True)
    verified = torch.full((4, 3), -1.0, requires_grad=True)
    value = ExpIbp().combine(adversarial, verified, 0.5)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(adversarial.grad).all() and torch.isfinite(verified.grad).all()


def test_mix_ignores_an_infinite_end_that_has_no_share():
    good, bad = torch.tensor([1.0]), torch.tensor([-torch.inf])
    assert mix(good, bad, 0) == good and mix(bad, good, 1) == good


@pytest.mark.parametrize("kind", EXPRESSIVE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("bn_mode", ["adv", "clean"])
class TestEndPoints:
    """alpha = 0 is adversarial training, alpha = 1 is IBP at the same statistics: values and gradients."""

    def test_alpha_zero_is_the_adversarial_loss(self, kind, bn_mode):
        model, batch, step = make_model(), make_batch(), make_step()
        loss = kind(alpha=0.0, bn_mode=bn_mode, regularisation=0.0)
        terms, found = gradient(model, loss, batch, step)
        model = make_model()
        clean = forward(model, batch.images)
        attacked = loss.attack_over(step.ball)(model, batch, step.ball, step).images
        given = clean.statistics if bn_mode == "clean" else None
        expected = margin_loss(margins_of(forward(model, attacked, given).logits, batch.labels)).mean()
        assert terms.total == expected
        expected.backward()
        assert torch.equal(found, torch.cat([p.grad.flatten() for p in model.parameters()]))

    def test_alpha_one_is_the_ibp_loss_at_the_same_statistics(self, kind, bn_mode):
        model, batch, step = make_model(), make_batch(), make_step()
        loss = kind(alpha=1.0, bn_mode=bn_mode, regularisation=0.0)
        terms, found = gradient(model, loss, batch, step)
        model = make_model()
        used = forward(model, batch.images)
        if bn_mode == "adv":
            used = forward(model, loss.attack_over(step.ball)(model, batch, step.ball, step).images)
        margins, _ = compute_margins(model, step.ball.region(batch.images), batch.labels, used.statistics)
        expected = margin_loss(margins).mean()
        assert terms.total == expected
        expected.backward()
        assert torch.equal(found, torch.cat([p.grad.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("kind", EXPRESSIVE, ids=lambda kind: kind.__name__)
def test_alpha_one_equals_the_ibp_loss(kind):
    batch, step = make_batch(), make_step()
    expected, from_ibp = gradient(make_model(), Ibp(regularisation=0.0), batch, step)
    found, from_kind = gradient(make_model(), kind(alpha=1.0, bn_mode="clean", regularisation=0.0), batch, step)
    assert found.total == expected.total and torch.equal(from_kind, from_ibp)


def test_running_statistics_move_twice_in_adv_mode_and_once_in_clean_mode():
    for bn_mode, updates in (("adv", 2), ("clean", 1)):
        model = make_model()
        CcIbp(bn_mode=bn_mode)(model, make_batch(), make_step())
        assert model[1].num_batches_tracked == updates


def test_gradients_flow_into_the_batch_statistics():
    """Detached statistics train too, and give other numbers: compare against finite differences."""
    batch, step = make_batch(), make_step()
    model = make_model()
    loss = Ibp(regularisation=0.0)
    _, found = gradient(model, loss, batch, step)
    weight, size = model[0].weight, 1e-6
    with torch.no_grad():
        weight[0, 0, 1, 1] += size
        above = loss(model, batch, step).total
        weight[0, 0, 1, 1] -= 2 * size
        below = loss(model, batch, step).total
    assert float(found[4]) == pytest.approx(float(above - below) / (2 * size), rel=1e-5)


def test_while_epsilon_is_zero_the_clean_loss_stands_in():
    model, batch = make_model(), make_batch()
    step = make_step(epsilon=0.0, ramp=0.0, clean=True)
    for loss in (Ibp(regularisation=0.0), CcIbp(regularisation=0.0)):
        found = loss(model, batch, step).total
        assert found == F.cross_entropy(forward(model, batch.images).logits, batch.labels)


def test_total_is_what_its_parts_say():
    model, batch, step = make_model(), make_batch(), make_step(epsilon=0.02, ramp=0.5)
    terms = MtlIbp(kappa=0.25, l1=1e-3, regularisation=0.5)(model, batch, step)
    part = terms.parts
    expected = 0.25 * part["clean_loss"] + 0.75 * part["robust_loss"] + 1e-3 * l1_norm(model)
    expected = expected + 0.5 * (1 - 0.02 / 0.05) * (part["tightness"] + part["balance"])
    torch.testing.assert_close(terms.total.detach(), expected.detach())


def test_a_ramped_alpha_moves_along_the_ramp():
    model, batch = make_model(), make_batch()
    for ramp, alpha in ((0.0, 0.2), (0.5, 0.4), (1.0, 0.6)):
        found = CcIbp(alpha=Ramp(0.2, 0.6), regularisation=0.0)(model, batch, make_step(ramp=ramp)).total
        expected = CcIbp(alpha=alpha, regularisation=0.0)(make_model(), batch, make_step(ramp=ramp)).total
        model = make_model()
        torch.testing.assert_close(found, expected)


def test_a_ramp_may_follow_epsilon():
    batch, step = make_batch(), dataclasses.replace(make_step(ramp=0.5), reached=0.25)
    found = CcIbp(alpha=Ramp(0.2, 0.6, along="epsilon"), regularisation=0.0)(make_model(), batch, step).total
    torch.testing.assert_close(found, CcIbp(alpha=0.3, regularisation=0.0)(make_model(), batch, step).total)
    assert CrownIbp().beta == Ramp(1.0, 0.0, along="epsilon")


def test_an_attack_larger_than_the_box_is_what_the_factor_says():
    """The adversarial term may then exceed the verified one: no order is promised (trap 4)."""
    batch, step = make_batch(), make_step()
    loss = MtlIbp(alpha=0.0, attack_epsilon_factor=2.0, regularisation=0.0)
    doubled = MtlIbp(alpha=0.0, regularisation=0.0)
    wide = make_step(epsilon=0.1)
    assert loss(make_model(), batch, step).total == doubled(make_model(), batch, wide).total


def test_l2_training_uses_the_l2_ball():
    batch = make_batch()
    l2 = CcIbp(regularisation=0.0)(make_model(), batch, make_step(ball=L2Ball)).parts
    linf = CcIbp(regularisation=0.0)(make_model(), batch, make_step()).parts
    assert l2["verified_loss"] < linf["verified_loss"]


def test_l1_counts_weights_only():
    model = make_model()
    expected = sum(model[i].weight.abs().sum() for i in (0, 4, 7))
    torch.testing.assert_close(l1_norm(model), expected)


@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.3])
def test_regularisers_stay_in_their_range_and_have_gradients(epsilon):
    model, batch = make_model(), make_batch()
    statistics = forward(model, batch.images).statistics
    region = LinfBall(epsilon).region(batch.images)
    _, activity = compute_margins(model, region, batch.labels, statistics, keep=True)
    assert len(activity.preactivations) == 2
    tight, balance = warmup_regularisers(activity)
    assert 0 <= tight <= 1 and 0 <= balance <= 2
    (tight + balance).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_regularisers_against_their_formulas():
    model, batch = make_model(batch_norm=False), make_batch()
    region = LinfBall(0.02).region(batch.images)
    _, activity = compute_margins(model, region, batch.labels, keep=True)
    tight = balance = 0.0
    width = float(region.hull.radius.mean())
    for layer in activity.preactivations.values():
        center, lower, upper = layer.center.detach(), layer.lower, layer.upper
        tight += max(0, 0.5 - width / float(layer.radius.detach().mean())) / 0.5 / 2
        on, off = (lower > 0).double(), (upper < 0).double()
        squares = (center - center.mean()) ** 2
        for ratio in ((center * on).mean() / -(center * off).mean(), (squares * on).sum() / (squares * off).sum()):
            balance += max(0, 0.5 - min(float(ratio), 1 / max(float(ratio), 1e-12))) / 0.5 / 2
    found = warmup_regularisers(activity)
    assert found[0].item() == pytest.approx(tight) and found[1].item() == pytest.approx(balance)


class TestCrownIbp:
    def test_margin_rows_give_the_margins(self):
        logits, labels = torch.randn(5, 7), torch.arange(5)
        found = (margin_rows(labels, logits) @ logits.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found, margins_of(logits, labels))

    def test_without_linear_bounds_it_is_ibp(self):
        model, batch = make_model(), make_batch()
        found = gradient(model, CrownIbp(beta=0.0, kappa=0.3, regularisation=0.0), batch, make_step())
        expected = gradient(model, Ibp(kappa=0.3, regularisation=0.0), batch, make_step())
        torch.testing.assert_close(found[0].total, expected[0].total)
        torch.testing.assert_close(found[1], expected[1])

    def test_with_them_alone_it_is_the_cross_entropy_of_the_linear_bounds(self):
        """In evaluation mode, where the statistics are the running ones."""
        model, batch, step = make_model().eval(), make_batch(), make_step()
        region, network = step.ball.region(batch.images), fold(model, batch.images.shape[1:])
        rows = margin_rows(batch.labels, model(batch.images))
        lower = bound_forms(network, region, rows, interval_bounds(network, region))
        found = CrownIbp(beta=1.0, regularisation=0.0)(model, batch, step)
        torch.testing.assert_close(found.total, margin_loss(lower).mean())

    def test_the_share_falls_along_the_ramp(self):
        model, batch = make_model(), make_batch()
        halfway = CrownIbp(beta=Ramp(1.0, 0.0), regularisation=0.0)(model, batch, make_step(ramp=0.5))
        fixed = CrownIbp(beta=0.5, regularisation=0.0)(model, batch, make_step(ramp=0.5))
        torch.testing.assert_close(halfway.total, fixed.total)

    def test_gradients_by_finite_differences(self):
        """Through linear bounds, interval bounds and batch statistics."""
        model, batch, step = make_model(), make_batch(4), make_step()
        loss = CrownIbp(beta=0.7, regularisation=0.0)
        _, slope = gradient(model, loss, batch, step)
        torch.manual_seed(3)
        direction = [torch.randn_like(p) for p in model.parameters()]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(model.parameters(), direction, strict=True):
                    p.add_(sign * 1e-6 * d)
            values.append(float(loss(model, batch, step).total))
            with torch.no_grad():
                for p, d in zip(model.parameters(), direction, strict=True):
                    p.sub_(sign * 1e-6 * d)
        expected = float(slope @ torch.cat([d.flatten() for d in direction]))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-5)
