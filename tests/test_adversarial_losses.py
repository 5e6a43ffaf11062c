"""QUB, the Bregman family, Fast-BAT and the plain methods: their formulas, bounds, gradients and special cases."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model, make_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from certtrain import devices
from certtrain.attacks import Ascent, CrossEntropy, KullbackLeibler, Linearisation, SquaredEuclidean, gradient_of
from certtrain.bounds import L2Ball, LinfBall
from certtrain.config import structure
from certtrain.errors import InputError
from certtrain.losses import (
    AdversarialTraining,
    Fait,
    FastBat,
    Fgsm,
    FgsmRs,
    Loss,
    Mer,
    NFgsm,
    Pgd2At,
    PgdAt,
    Qub,
    Score,
    Trades,
)  # fmt: skip
from certtrain.losses.adversarial import AdversarialLoss, quadratic_upper_bound
from certtrain.step import Batch, State

KL, SQUARED = KullbackLeibler(), SquaredEuclidean()
both_divergences = pytest.mark.parametrize("divergence", [KL, SQUARED], ids=["KL", "S"])
both_balls = pytest.mark.parametrize("ball", [LinfBall, L2Ball])
SMALL = Ascent(steps=2, step_size=0.5, attack_mode="batch")


def logits(count=2000, classes=10, scale=3.0, seed=0) -> torch.Tensor:
    return scale * torch.randn(count, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(count=2000, classes=10) -> torch.Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(9))


def cross_entropy(a, y):
    return F.cross_entropy(a, y, reduction="none")


class TestQub:
    @pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 20.0, 50.0])
    @pytest.mark.parametrize("classes", [2, 3, 10])
    def test_bounds_the_cross_entropy(self, scale, classes):
        z, a = logits(classes=classes, scale=scale), logits(classes=classes, scale=scale, seed=1)
        y = labels(classes=classes)
        plain, centred = (quadratic_upper_bound(z, a, y, bound=way) for way in ("published", "centred"))
        target = cross_entropy(a, y)
        slack = 1e-12 * (1 + plain.abs())
        assert (plain >= centred - slack).all() and (centred >= target - slack).all()
        assert (plain - target <= (a - z).square().sum(1) / 4 + slack).all()
        assert (quadratic_upper_bound(z, z, y) - cross_entropy(z, y)).abs().max() == 0

    def test_float32_rounding_is_all_that_may_break_it(self):
        z, a = logits().float(), logits(seed=1).float()
        assert (quadratic_upper_bound(z, a, labels()) - cross_entropy(a, labels())).min() >= -1e-5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_logits_keep_the_bound(self, dtype):
        z, a = logits(scale=60.0).to(dtype), logits(scale=60.0, seed=1).to(dtype)
        found = quadratic_upper_bound(z, a, labels())
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), quadratic_upper_bound(z.double(), a.double(), labels()), rtol=1e-5)

    def test_centred_ignores_a_constant_as_the_cross_entropy_does(self):
        z, a, shift = logits(), logits(seed=1), logits(classes=1, seed=2)
        found = quadratic_upper_bound(z, a + shift, labels(), bound="centred")
        assert torch.allclose(found, quadratic_upper_bound(z, a, labels(), bound="centred"), rtol=1e-11, atol=1e-10)
        assert not torch.allclose(quadratic_upper_bound(z, a + shift, labels()), quadratic_upper_bound(z, a, labels()))

    @pytest.mark.parametrize("detached", [False, True])
    def test_gradients_in_closed_form(self, detached):
        z, a, y = logits(50).requires_grad_(), logits(50, seed=1).requires_grad_(), labels(50)
        of_z, of_a = torch.autograd.grad(quadratic_upper_bound(z, a, y, detached=detached).sum(), (z, a))
        p, target = z.detach().softmax(1), F.one_hot(y, 10)
        change = (a - z).detach()
        assert torch.allclose(of_a, p - target + change / 2, atol=1e-13)
        curved = p * change - p * (p * change).sum(1, keepdim=True)  # the Hessian times the change
        assert torch.allclose(of_z, -change / 2 + (0 if detached else curved), atol=1e-13)

    def test_replaces_the_adversarial_term_and_keeps_the_rest(self):
        base = Fgsm(attack=SMALL)
        model, batch, step = make_model(False), make_batch(), make_step()
        images = SMALL(model, batch, step.ball, step).images
        expected = quadratic_upper_bound(model(batch.images), model(images), batch.labels).mean()
        assert torch.allclose(Qub(base=base)(model, batch, step).total, expected, rtol=1e-12)

    def test_of_trades_replaces_the_clean_term(self):
        base = Trades(attack=SMALL, weight=2.0)
        model, batch, step = make_model(False), make_batch(), make_step()
        images = SMALL.toward(KL)(model, batch, step.ball, step).images
        z, a = model(batch.images), model(images)
        expected = quadratic_upper_bound(z, a, batch.labels).mean() + 2 * KL.between(z, a).mean()
        assert torch.allclose(Qub(base=base)(model, batch, step).total, expected, rtol=1e-12)

    @pytest.mark.parametrize("base", [Fgsm(attack=SMALL), Trades(attack=SMALL), Mer(base=Fait(attack=SMALL, index=1))])
    def test_decreasing_is_affine_in_the_epoch(self, base):
        def value(loss, epoch=0):
            step = replace(make_step(), epoch=epoch, epochs=4)
            return loss(make_model(False), make_batch(), step).total.detach()

        static, plain = value(Qub(base=base)), value(base)
        for epoch in range(5):
            expected = (1 - epoch / 4) * static + epoch / 4 * plain
            assert torch.allclose(value(Qub(base=base, kind="decreasing"), epoch), expected, rtol=1e-12)

    @pytest.mark.parametrize("name", ["Score", "Mart", "Qub"])
    def test_refuses_by_name_what_it_cannot_bound(self, name):
        with pytest.raises(InputError, match=rf"^loss.base: found '{name}'; accepted: a method whose accuracy term"):
            structure(Loss, {"type": "Qub", "base": {"type": name}}, "loss")

    def test_refuses_a_loss_without_an_adversarial_example(self):
        with pytest.raises(InputError, match=r"^loss.base.type: found 'Ibp'; accepted: .*PgdAt"):
            structure(Loss, {"type": "Qub", "base": {"type": "Ibp"}}, "loss")


class TestDivergences:
    @both_divergences
    def test_definition(self, divergence):
        """ψ(p) - ψ(q) - <∇ψ(q), p - q>, the gradient by autograd."""
        z, a = logits(200), logits(200, seed=1)
        p, q = z.softmax(1), a.softmax(1).requires_grad_()

        def potential(r):
            return (r * r.log()).sum(1) if divergence is KL else r.square().sum(1)

        (slope,) = torch.autograd.grad(potential(q).sum(), q)
        expected = potential(p) - potential(q) - (slope * (p - q)).sum(1)
        found = divergence.between(z, a)
        assert torch.allclose(found, expected.detach(), atol=1e-12) and (found >= 0).all()
        assert torch.allclose(divergence.potential(z), potential(p), atol=1e-12)
        assert divergence.between(z, z + logits(200, 1, seed=3)).abs().max() < 1e-12  # constants change nothing
        assert (found > 1e-6).all()

    def test_kl_of_a_label_is_the_cross_entropy(self):
        a, y = logits(50), labels(50)
        sure = torch.where(F.one_hot(y, 10) == 1, 0.0, -800.0).double()
        assert torch.allclose(KL.between(sure, a), cross_entropy(a, y), atol=1e-12)

    @both_divergences
    def test_three_points(self, divergence):
        z, m, a = (logits(200, seed=seed) for seed in range(3))
        p1, middle, p2 = z.softmax(1), m.softmax(1), a.softmax(1)

        def slope(r):
            return r.log() + 1 if divergence is KL else 2 * r

        left = divergence.between(a, z) - divergence.between(a, m) - divergence.between(m, z)
        right = ((p2 - middle) * (slope(middle) - slope(p1))).sum(1)
        assert torch.allclose(left, right, atol=1e-11)

    @both_divergences
    @pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3, 0.9, 1.0])
    def test_a_split_on_the_segment_is_never_larger(self, divergence, alpha):
        z, a = logits(500), logits(500, seed=1)
        p1, p2 = z.softmax(1), a.softmax(1)
        middle = ((1 - alpha) * p1 + alpha * p2).log()
        gap = divergence.between(a, z) - divergence.between(a, middle) - divergence.between(middle, z)
        assert (gap >= -1e-12).all()
        if divergence is SQUARED:
            assert torch.allclose(gap, 2 * alpha * (1 - alpha) * (p2 - p1).square().sum(1), atol=1e-12)

    def test_of_two_classes_the_split_gains_exactly_between(self):
        p, m, q = (
            torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)
        )
        two = [torch.stack([r, 1 - r], 1).log() for r in (p, m, q)]
        gap = KL.between(two[0], two[2]) - KL.between(two[0], two[1]) - KL.between(two[1], two[2])
        between = (m >= torch.minimum(p, q)) & (m <= torch.maximum(p, q))
        clear = gap.abs() > 1e-9
        assert ((gap >= 0) == between)[clear].all() and clear.float().mean() > 0.99

    def test_the_pgd_at_bound_of_two_classes_fails_with_three(self):
        """CE >= CE + KL (Eq. 9 of the Bregman paper) is a statement about two classes."""
        p, q = torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0.4, 0.55, 0.05])
        assert -q[0].log() < -p[0].log() + KL.between(p.log()[None], q.log()[None])
        own = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
        first, second = torch.cartesian_prod(own, own).T
        keep = second <= first
        z, a = (torch.stack([r[keep], 1 - r[keep]], 1).log() for r in (first, second))
        assert (-a[:, 0] >= -z[:, 0] + KL.between(z, a) - 1e-12).all()

    @pytest.mark.parametrize("name", ["Jensen", "kl", 3])
    def test_an_unknown_one(self, name):
        with pytest.raises(InputError, match=r"^loss.divergence.type: found .*KullbackLeibler, SquaredEuclidean"):
            structure(Loss, {"type": "Trades", "divergence": {"type": name}}, "loss")


class TestBregmanFamily:
    def value(self, loss, **step):
        return loss(make_model(), make_batch(), make_step(**step)).total.detach()

    def test_without_weight_trades_is_clean_training(self):
        expected = cross_entropy(make_model()(make_batch().images), make_batch().labels).mean()
        assert torch.allclose(self.value(Trades(attack=SMALL, weight=0.0)), expected, rtol=1e-12)

    @both_divergences
    def test_fait_by_hand(self, divergence):
        attack = Ascent(steps=3, step_size=0.4, start="normal", start_scale=1e-3)
        loss = Fait(attack=attack, divergence=divergence, weight=3.0, index=2)
        model, batch, step = make_model(False), make_batch(), make_step()
        points = [attack.begin(batch, step.ball, step)]
        for _ in range(3):
            _, slope = gradient_of(model, points[-1], lambda a: divergence(a, model(batch.images).detach()))
            points.append(attack.move(batch.images, points[-1], slope, step.ball))
        z, m, a = model(batch.images), model(points[2]), model(points[3])
        distance = (divergence.between(z, m) + divergence.between(m, a)).mean()
        expected = cross_entropy(z, batch.labels).mean() + 3 * distance
        assert torch.allclose(loss(model, batch, step).total, expected, rtol=1e-12)

    def test_a_split_at_the_image_or_the_end_is_trades(self):
        loss = Fait(attack=SMALL, weight=4.0, index=1)
        model, batch, step = make_model(False), make_batch(), make_step()
        whole = Trades(attack=SMALL, weight=4.0)
        found = whole.attacked(model, batch, step)
        for middle in (batch.images, found.images):
            given = replace(found, trace={**found.trace, "iterate": middle})
            assert torch.allclose(
                loss.given(model, batch, step, given).total, whole.given(model, batch, step, found).total, rtol=1e-12
            )

    def test_in_the_mean_an_early_split_is_no_larger(self):
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)).double()
            batch, step = make_batch(), make_step(epsilon=0.1)
            loss = Fait(attack=Ascent(steps=10, start="normal", start_scale=1e-3), index=2)
            passes = loss.passes(model, batch, step, loss.attacked(model, batch, step), model(batch.images))
            whole = KL.between(passes.clean_logits, passes.adversarial).mean()
            split = KL.between(passes.clean_logits, passes.others["middle"]).mean()
            split = split + KL.between(passes.others["middle"], passes.adversarial).mean()
            assert split <= whole

    @pytest.mark.parametrize("name", ["Trades", "Fait", "Score"])
    @pytest.mark.parametrize(
        "attack",
        [{"start": "zero"}, {"start_scale": 0},
         {"type": "Transferred", "steps": 3, "start_scale": 0, "objective": None}],
    )  # fmt: skip
    def test_an_attack_that_could_not_leave_the_image(self, name, attack):
        """There the divergence's gradient is 0, and the loss would be clean training."""
        with pytest.raises(InputError, match=r"^loss.attack.start: found '.*'; accepted: a start off the image"):
            structure(Loss, {"type": name, "attack": attack}, "loss")
        climbing = {**attack, "objective": {"type": "CrossEntropy"}}
        assert structure(Loss, {"type": name, "attack": climbing}, "loss")

    @pytest.mark.parametrize("index", [0, 10, -1, 11])
    def test_an_index_outside(self, index):
        with pytest.raises(InputError, match=r"^loss.index: found .*; accepted: 1 to attack.steps - 1 = 9"):
            structure(Loss, {"type": "Fait", "index": index}, "loss")

    @pytest.mark.parametrize("base", [Trades(attack=SMALL), Fgsm(attack=SMALL)], ids=["trades", "fgsm"])
    def test_mer_without_weights_is_its_base(self, base):
        model, other = make_model(), make_model()
        first, slope = gradient(model, Mer(base=base, clean=0.0, adversarial=0.0), make_batch(), make_step())
        second, expected = gradient(other, base, make_batch(), make_step())
        assert torch.equal(first.total, second.total) and torch.equal(slope, expected)

    @both_divergences
    def test_mer_adds_the_potentials(self, divergence):
        base = Trades(attack=SMALL, weight=2.0)
        model, batch, step = make_model(False), make_batch(), make_step()
        images = base.attacked(model, batch, step).images
        z, a = model(batch.images), model(images)
        expected = (
            base(model, batch, step).total + (0.3 * divergence.potential(z) + 0.7 * divergence.potential(a)).mean()
        )
        found = Mer(base=base, clean=0.3, adversarial=0.7, divergence=divergence)(model, batch, step).total
        assert torch.allclose(found, expected, rtol=1e-12)

    def test_the_potentials_gradients(self):
        z = logits(50).requires_grad_()
        p = z.detach().softmax(1)
        (of_kl,) = torch.autograd.grad(KL.potential(z).sum(), z)
        (of_s,) = torch.autograd.grad(SQUARED.potential(z).sum(), z)
        entropy = -(p * p.log()).sum(1, keepdim=True)
        assert torch.allclose(of_kl, p * (p.log() + entropy), atol=1e-13)
        assert torch.allclose(of_s, 2 * p * (p - p.square().sum(1, keepdim=True)), atol=1e-13)
        flat = torch.zeros(1, 10, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(KL.potential(flat).sum(), flat)[0].abs().max() < 1e-15

    def test_score_by_hand(self):
        model, batch, step = make_model(False), make_batch(), make_step()
        loss = Score(attack=SMALL, weight=4.0)
        p, q = model(batch.images).softmax(1), model(loss.attacked(model, batch, step).images).softmax(1)
        expected = (p - F.one_hot(batch.labels, 5)).square().sum(1).mean() + 4 * (p - q).square().sum(1).mean()
        assert torch.allclose(loss(model, batch, step).total, expected, rtol=1e-12)

    @both_divergences
    def test_the_attack_climbs_the_loss_own_divergence(self, divergence):
        model, batch, step = make_model(False), make_batch(), make_step()
        loss = Trades(divergence=divergence, attack=Ascent(steps=5, start="normal", start_scale=1e-3))
        found = loss.attacked(model, batch, step).images
        alone = replace(loss.attack, objective=divergence)(model, batch, step.ball, step).images
        other = replace(loss.attack, objective=CrossEntropy())(model, batch, step.ball, step).images
        assert torch.equal(found, alone) and not torch.equal(found, other)


class TestFastBat:
    ATTACK = Linearisation(step_size=0.2, attack_mode="batch")

    def smooth(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 5)).double()

    @pytest.mark.parametrize("size", [0.02, 0.3, 2.0])
    def test_the_implicit_gradient_is_that_of_the_clamp(self, size):
        """1 / lambda = the step's size: autograd through the projection itself."""
        model, batch, step = self.smooth(), make_batch(), make_step()
        loss = FastBat(attack=self.ATTACK, step_size=size, implicit=None)
        terms, found = gradient(model, loss, batch, step)
        point = self.ATTACK(model, batch, step.ball, step).images.requires_grad_()
        ascended = F.cross_entropy(model(point), batch.labels, reduction="sum")
        (slope,) = torch.autograd.grad(ascended, point, create_graph=True)
        low = torch.maximum(batch.images - 0.05, torch.zeros(()))
        high = torch.minimum(batch.images + 0.05, torch.ones(()))
        images = torch.minimum(torch.maximum(point + size * slope, low), high)
        inside = (images > low) & (images < high)
        assert 0.01 < inside.double().mean() < 0.999 or size != 0.3
        expected = F.cross_entropy(model(images), batch.labels)
        model.zero_grad()
        expected.backward()
        reference = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert torch.allclose(terms.total, expected, rtol=1e-12)
        assert torch.allclose(found, reference, atol=1e-12) and reference.abs().max() > 1e-3

    def test_its_point_minimises_the_quadratic_over_the_box(self):
        model, batch, step = self.smooth(), make_batch(), make_step()
        loss = FastBat(attack=self.ATTACK, step_size=0.3)
        found = loss.attacked(model, batch, step)
        passes = loss.passes(model, batch, step, found, None)
        z, best = found.images, passes.images.detach()
        _, slope = gradient_of(model, z, lambda a: F.cross_entropy(a, batch.labels, reduction="none"))

        def quadratic(x):
            return (-(slope * (x - z)) + (x - z).square() / (2 * 0.3)).flatten(1).sum(1)

        for seed in range(30):
            change = 0.1 * (torch.rand(best.shape, generator=torch.Generator().manual_seed(seed)) - 0.5).double()
            for other in (best + change, batch.images + change, batch.images + 0.05 * change.sign()):
                assert (quadratic(step.ball.project(batch.images, other)) >= quadratic(best) - 1e-12).all()

    def test_the_sign_variant_has_no_implicit_gradient_and_is_fast_at(self):
        model, other = self.smooth(), self.smooth()
        batch, step = make_batch(), make_step()
        start = Ascent(steps=1, step_size=1e-30, start="uniform", attack_mode="batch")
        _, found = gradient(model, FastBat(attack=start, sign=True), batch, step)
        _, expected = gradient(other, FgsmRs(attack=Ascent(steps=1, step_size=1.25, attack_mode="batch")), batch, step)
        assert torch.allclose(found, expected, atol=1e-12)

    def test_without_it_the_loss_is_that_of_its_images(self):
        model, other = self.smooth(), self.smooth()
        batch, step = make_batch(), make_step()
        loss = FastBat(attack=self.ATTACK, step_size=0.3, implicit=0.0)
        images = loss.passes(model, batch, step, loss.attacked(model, batch, step), None).images
        _, found = gradient(model, loss, batch, step)
        other.zero_grad()
        F.cross_entropy(other(images), batch.labels).backward()
        assert torch.allclose(found, torch.cat([p.grad.flatten() for p in other.parameters()]), atol=1e-14)
        _, more = gradient(self.smooth(), replace(loss, implicit=0.1), batch, step)
        assert not torch.allclose(found, more, atol=1e-6)

    def test_a_doubled_batch_changes_nothing(self):
        batch, step = make_batch(), make_step()
        twice = Batch(batch.images.repeat(2, 1, 1, 1), batch.labels.repeat(2), batch.index.repeat(2))
        double = replace(step, noise=replace(step.noise, positions=step.noise.positions.repeat(2)))
        loss = FastBat(attack=self.ATTACK, step_size=0.3, implicit=None)
        _, once = gradient(self.smooth(), loss, batch, step)
        _, found = gradient(self.smooth(), loss, twice, double)
        assert torch.allclose(once, found, atol=1e-12)

    def test_a_masked_penalty_where_the_point_is_the_end(self):
        """z = delta* (a step of size 0): the implicit term is the gradient of |inside · slope|² / (2 lambda)."""
        model, batch, step = self.smooth(), make_batch(), make_step()
        batch = replace(batch, images=batch.images.clamp(0.1, 0.9))  # no pixel at an end of [0, 1]
        attack = Ascent(steps=1, step_size=1e-30, start="uniform", start_scale=0.5, attack_mode="batch")
        loss = FastBat(attack=attack, step_size=1e-300, implicit=0.1)
        _, whole = gradient(model, loss, batch, step)
        _, plain = gradient(model, replace(loss, implicit=0.0), batch, step)
        point = attack(model, batch, step.ball, step).images.requires_grad_()
        (slope,) = torch.autograd.grad(
            F.cross_entropy(model(point), batch.labels, reduction="sum"), point, create_graph=True
        )
        model.zero_grad()
        (0.1 * slope.square().sum() / (2 * len(batch))).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert torch.allclose((whole - plain)[: len(expected)], expected, atol=1e-12) and expected.abs().max() > 1e-6

    def test_refuses_other_balls(self):
        with pytest.raises(InputError, match="FastBat: found L2Ball for perturbation; accepted: LinfBall"):
            FastBat().check_ball(L2Ball(0.5))
        with pytest.raises(InputError, match="FastBat: found L2Ball"):
            Qub(base=FastBat()).check_ball(L2Ball(0.5))


class TestAscent:
    def attacked(self, attack, ball=LinfBall, epsilon=0.05):
        model, batch, step = make_model().eval(), make_batch(), make_step(epsilon, ball=ball)
        return attack(model, batch, step.ball, step), batch, model, step

    def test_fgsm_by_hand(self):
        found, batch, model, _ = self.attacked(replace(Fgsm().attack, attack_mode="eval"))
        _, slope = gradient_of(model, batch.images, lambda a: cross_entropy(a, batch.labels))
        assert torch.equal(found.images, (batch.images + 0.05 * slope.sign()).clamp(0, 1))

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (replace(FgsmRs().attack, start="zero", step_size=1.0), Fgsm().attack),
            (Ascent(attack_mode="train", steps=1, step_size=1.25, start="uniform"), FgsmRs().attack),
            (replace(NFgsm().attack, start_scale=0.0, projected=True), Fgsm().attack),
            (replace(NFgsm().attack, start="zero"), Fgsm().attack),
        ],
    )
    @both_balls
    def test_reductions(self, first, second, ball):
        assert torch.equal(self.attacked(first, ball)[0].images, self.attacked(second, ball)[0].images)

    @pytest.mark.parametrize("start", ["zero", "uniform", "normal", "corners"])
    @both_balls
    def test_the_start(self, start, ball):
        found, batch, _, step = self.attacked(
            Ascent(steps=1, start=start, start_scale=0.01 if start == "normal" else 1), ball
        )
        first = found.trace["start"]
        assert step.ball.contains(batch.images, first, 1e-12).all()
        change = (first - batch.images).flatten(1)
        if start == "zero":
            assert torch.equal(first, batch.images)
        if start == "corners" and ball is LinfBall:
            inner = (batch.images > 0.05) & (batch.images < 0.95)
            assert torch.allclose((first - batch.images)[inner].abs(), torch.tensor(0.05).double())
        if start == "uniform" and ball is LinfBall:
            assert 0.02 < change.abs().mean() < 0.03
        if start != "zero":
            assert change.norm(dim=1).min() > 0

    def test_uniform_in_an_l2_ball(self):
        """The share of points within r is (r / epsilon)^d."""
        from certtrain.noise import Noise

        images = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64)
        change = L2Ball(0.2).sample(images, Noise(3, torch.arange(4000)), "start").flatten(1)
        lengths = change.norm(dim=1) / 0.2
        assert lengths.max() <= 1 + 1e-12
        for radius in (0.3, 0.5, 0.8):
            assert abs((lengths <= radius).double().mean() - radius**3) < 0.02
        assert change.mean(0).abs().max() < 0.01

    def test_the_l2_direction_is_the_gradient_over_its_norm(self):
        slope = torch.randn(5, 2, 3, 3, dtype=torch.float64)
        slope[0], slope[1], slope[2] = 0.0, slope[1] * 1e-200, slope[2] * 1e200
        found = L2Ball(0.1).direction(slope).flatten(1)
        assert torch.equal(found[0], torch.zeros(18).double())
        assert torch.allclose(found[1:].norm(dim=1), torch.ones(4).double())
        assert torch.allclose(found[3], slope[3].flatten() / slope[3].norm())

    def test_without_projection_the_wider_set_is_declared(self):
        attack = replace(NFgsm().attack, attack_mode="eval")
        found, batch, _, _ = self.attacked(attack)
        assert attack.allowed(LinfBall(0.05)) == LinfBall(0.05 * 3.0)
        size = (found.images - batch.images).abs().max()
        assert 0.1 < size <= 0.15 + 1e-12

    def test_the_iterate_and_the_counts(self):
        attack = Ascent(steps=4, record=2)
        found, batch, model, _ = self.attacked(attack)
        early, *_ = self.attacked(replace(attack, steps=2, record=0))
        assert torch.equal(found.trace["iterate"], early.images)
        correct = torch.zeros(12, dtype=torch.int64)
        for steps in range(4):
            points = (
                found.trace["start"] if steps == 0 else self.attacked(replace(attack, steps=steps, record=0))[0].images
            )
            correct += model(points).argmax(1) == batch.labels
        assert torch.equal(found.trace["correct"], correct)

    def test_probabilities_alone_steer_a_divergence(self):
        """Adding a constant to all logits changes nothing."""
        model, batch, step = make_model(False).eval(), make_batch(), make_step()

        class Shifted(nn.Module):
            def forward(self, x):
                return model(x) + 40 * x.flatten(1).sum(1, keepdim=True)

        for divergence in (KL, SQUARED):
            attack = Ascent(steps=3, start="uniform", objective=divergence)
            first = attack(model, batch, step.ball, step).images
            assert (first - attack(Shifted(), batch, step.ball, step).images).abs().max() < 1e-6

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"steps": 0}, "steps"), ({"step_size": 0.0}, "step_size"), ({"start": "middle"}, "start"),
            ({"start_scale": -1.0}, "start_scale"), ({"projected": False, "start": "normal"}, "start"),
            ({"record": 11}, "record"),
        ],
    )  # fmt: skip
    def test_bad_fields(self, fields, message):
        with pytest.raises(InputError, match=rf"^{message}: found"):
            Ascent(**fields)


METHODS = [cls for cls in AdversarialLoss.members().values() if "teacher" not in cls.__dataclass_fields__]


@pytest.mark.parametrize("method", [Fgsm, FgsmRs, NFgsm, PgdAt, Pgd2At, AdversarialTraining])
@both_balls
def test_adversarial_training_is_the_cross_entropy_of_its_images(method, ball):
    loss = method(attack=replace(method().attack_over(ball(0.1)), attack_mode="batch"))
    model, batch, step = make_model(False), make_batch(), make_step(ball=ball)
    images = loss.attacked(model, batch, step).images
    assert torch.allclose(loss(model, batch, step).total, F.cross_entropy(model(images), batch.labels), rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_all_losses_take_a_batch_of_one_and_report_what_they_see(method):
    from certtrain.step import State

    loss, model = method(), make_model(False)
    batch = make_batch(1)
    step = make_step()
    step = replace(step, noise=replace(step.noise, positions=torch.arange(1)))
    specs = loss.declare_state((1, 8, 8), 10)
    tensors = {name: spec.allocate(12, 1, torch.device("cpu")).double() for name, spec in specs.items()}
    terms = loss(model, batch, replace(step, state=State(tensors, specs)))
    assert terms.total.isfinite() and terms.total.ndim == 0
    assert {"adversarial_loss", "attacked_accuracy"} <= set(terms.parts)
    assert not any(part.requires_grad for part in terms.parts.values())


WAITING = {"NuAt": "every other batch has a singular value decomposition, which waits too"}
HOST_FREE = [cls for name, cls in AdversarialLoss.members().items() if name not in WAITING]


@both_balls
@pytest.mark.parametrize("method", HOST_FREE, ids=lambda cls: cls.__name__)
def test_no_step_waits_for_the_device(method, ball, monkeypatch):
    """Tensors without values: a branch, a number or a shape that depended on one would raise."""
    if "teacher" in method.__dataclass_fields__:
        pytest.skip("its network is read from a file; its formula is TRADES' own")
    if ball is L2Ball and method.__name__ not in ("AdversarialTraining", "Fait", "FgsmCkpt", "Atta", "Trades"):
        pytest.skip("the ball is the attack's matter: these have every kind of attack")
    monkeypatch.setattr(devices, "reading_waits", lambda values: True)
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        batch = Batch(torch.rand(12, 1, 8, 8), torch.arange(12) % 5, torch.arange(12))
        loss = method()
        specs = loss.declare_state((1, 8, 8), 10)
        tensors = {name: spec.allocate(12, 12, torch.device("cpu")) for name, spec in specs.items()}
        for epoch in range(2):
            step = replace(make_step(ball=ball), epoch=epoch, epochs=3, state=State(tensors, specs))
            loss(model, batch, step).total.backward()
