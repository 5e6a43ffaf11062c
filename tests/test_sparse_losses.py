"""The losses of l0 training: formulas by hand, labels that are kept by sample, and noise beneath the attack."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model

from certtrain.attacks import CrossEntropy, KullbackLeibler, SparsePgd
from certtrain.bounds import LinfBall, SparseBall
from certtrain.errors import FieldError, InputError
from certtrain.losses import AdversarialTraining, Mart, Qub, SelfAdaptive, TradeOff, Trades
from certtrain.noise import Noise
from certtrain.step import Batch, State, Step
from certtrain.training import SparseNoise, Training

ONE_STEP = SparsePgd(steps=1, alpha=1.0, beta=1.0, patience=None, keep="last")
K, SAMPLES, CLASSES = 5, 30, 5


def make_step(state=None, specs=None, epoch=0, k=K, count=12):
    size = torch.tensor(float(k))
    ball = SparseBall(1).with_epsilon(size)
    state = State(state or {}, specs or {})
    return Step(ball, size, size, 0.5, Noise(7, torch.arange(count)), state, epoch=epoch, epochs=10)


def kept_by(loss):
    specs = loss.declare_state((1, 8, 8), CLASSES)
    return {name: spec.allocate(SAMPLES, 12, torch.device("cpu")) for name, spec in specs.items()}, specs


def passes_of(model, loss, batch, step):
    """(clean, adversarial) logits of a step, computed apart from the loss."""
    images = loss.attacked(model, batch, step).images
    return model(batch.images), model(images)


class TestTradeOff:
    @pytest.mark.parametrize("weight", [0.0, 0.75, 1.0])
    def test_formula(self, weight):
        model, batch, step = make_model(), make_batch(), make_step()
        loss = TradeOff(attack=ONE_STEP, weight=weight)
        clean, adversarial = passes_of(make_model(), loss, batch, step)
        first, second = F.cross_entropy(clean, batch.labels), F.cross_entropy(adversarial, batch.labels)
        torch.testing.assert_close(loss(model, batch, step).total, (1 - weight) * first + weight * second)

    def test_all_weight_on_the_attack_is_adversarial_training(self):
        batch, step = make_batch(), make_step()
        _, one = gradient(make_model(False), TradeOff(attack=ONE_STEP, weight=1.0), batch, step)
        _, other = gradient(make_model(False), AdversarialTraining(attack=ONE_STEP), batch, step)
        torch.testing.assert_close(one, other)

    def test_a_weight_is_a_share(self):
        with pytest.raises(FieldError, match="weight"):
            TradeOff(weight=1.5)


class TestTwoWaysOfTrades:
    def test_t_and_f_differ_in_their_images_alone(self):
        model, batch, step = make_model(), make_batch(), make_step()
        t, f = Trades(attack=replace(ONE_STEP, objective=CrossEntropy())), Trades(attack=ONE_STEP)
        for loss, objective in ((t, CrossEntropy()), (f, KullbackLeibler())):
            images = replace(ONE_STEP, objective=objective)(make_model(), batch, step.ball, step).images
            found = loss.attacked(make_model(), batch, step).images
            assert torch.equal(found, images) and (step.ball.changed(batch.images, found) <= K).all()
            clean, adversarial = (F.log_softmax(z, 1) for z in (model(batch.images), model(images)))
            divergence = (clean.exp() * (clean - adversarial)).sum(1).mean()
            expected = F.nll_loss(clean, batch.labels) + 6 * divergence
            torch.testing.assert_close(loss(make_model(), batch, step).total, expected)
        assert not torch.equal(
            t.attacked(make_model(), batch, step).images, f.attacked(make_model(), batch, step).images
        )


BASES = {
    "sAT": AdversarialTraining(attack=ONE_STEP), "TradeOff": TradeOff(attack=ONE_STEP),
    "sTRADES (T)": Trades(attack=replace(ONE_STEP, objective=CrossEntropy())), "sTRADES (F)": Trades(attack=ONE_STEP),
}  # fmt: skip
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


class TestSelfAdaptive:
    @every_base
    def test_it_is_the_base_until_it_starts(self, base):
        loss, batch = SelfAdaptive(base=base, start=3), make_batch()
        tensors, specs = kept_by(loss)
        _, one = gradient(make_model(), loss, batch, make_step(tensors, specs, epoch=2))
        _, other = gradient(make_model(), base, batch, make_step(epoch=2))
        assert torch.equal(one, other) and not tensors["soft_labels"].any()

    @every_base
    def test_formula_of_labels_weights_and_loss(self, base):
        loss, batch = SelfAdaptive(base=base, start=0, momentum=0.7), make_batch()
        tensors, specs = kept_by(loss)
        before = F.one_hot(batch.labels, CLASSES).float()
        step = make_step(tensors, specs)
        for _ in range(3):
            soft = replace(batch, targets=before)
            images = base.attacked(make_model(), soft, step).images
            model = make_model()
            clean = model(batch.images) if base.needs_clean else None
            adversarial = model(images)
            shown = adversarial if clean is None else clean
            after = 0.7 * before + 0.3 * F.softmax(shown.detach(), 1).float()
            weights = after.amax(1).double()

            def mean(logits, weights=weights, after=after):
                each = -(after.double() * F.log_softmax(logits, 1)).sum(1)
                return (weights * each).sum() / weights.sum()

            expected = mean(adversarial if base.term == "adversarial" else clean)
            if isinstance(base, TradeOff):
                expected = 0.25 * mean(clean) + 0.75 * mean(adversarial)
            if isinstance(base, Trades):
                p, q = F.log_softmax(clean, 1), F.log_softmax(adversarial, 1)
                expected = expected + 6 * (p.exp() * (p - q)).sum(1).mean()
            total = loss(make_model(), batch, step).total
            torch.testing.assert_close(total, expected)
            torch.testing.assert_close(tensors["soft_labels"][batch.index], after)
            before = after
        rows = tensors["soft_labels"]
        torch.testing.assert_close(rows[:12].sum(1), torch.ones(12))
        assert not rows[12:].any()

    def test_the_attack_sees_the_labels_before_the_visit(self):
        """Soft labels are swapped between classes: the attack goes another way."""
        loss, batch = SelfAdaptive(base=BASES["sAT"], start=0), make_batch()
        tensors, specs = kept_by(loss)
        tensors["soft_labels"][:12] = F.one_hot((batch.labels + 1) % CLASSES, CLASSES).float()
        found = loss.attacked(make_model(), batch, make_step(tensors, specs)).images
        swapped = replace(batch, labels=(batch.labels + 1) % CLASSES)
        assert torch.equal(found, ONE_STEP(make_model(), swapped, SparseBall(K), make_step()).images)

    def test_a_sample_s_label_is_its_own_in_whatever_order(self):
        loss, batch, order = SelfAdaptive(base=BASES["sTRADES (T)"], start=0), make_batch(), torch.randperm(12)
        model = make_model(False)
        ones, specs = kept_by(loss)
        loss(model, batch, make_step(ones, specs))
        others, _ = kept_by(loss)
        shuffled = Batch(batch.images[order], batch.labels[order], batch.index[order])
        loss(model, shuffled, make_step(others, specs))
        torch.testing.assert_close(ones["soft_labels"], others["soft_labels"])

    def test_two_passes_of_a_step_are_one_visit(self):
        loss, batch, model = SelfAdaptive(base=BASES["sTRADES (T)"], start=0), make_batch(), make_model(False)
        once, specs = kept_by(loss)
        loss(model, batch, make_step(once, specs))
        twice, _ = kept_by(loss)
        step = make_step(twice, specs)
        found = loss.attacked(model, batch, step)
        loss.given(model, batch, step, found)
        loss.given(model, batch, step, found)
        assert torch.equal(once["soft_labels"], twice["soft_labels"])

    def test_bases_without_a_plain_cross_entropy_are_refused(self):
        for base in (Mart(), Qub()):
            with pytest.raises(FieldError, match=r"base\.type"):
                SelfAdaptive(base=base)

    @pytest.mark.parametrize("bad", [{"momentum": 1.0}, {"momentum": -0.1}, {"start": -1}])
    def test_bad_fields(self, bad):
        with pytest.raises(FieldError, match=next(iter(bad))):
            SelfAdaptive(**bad)


class TestNoise:
    @pytest.mark.parametrize("unit", ["pixel", "feature", "row"])
    def test_counts_are_uniform_up_to_twice_k(self, unit):
        count = 4000
        images = torch.full((count, 1, 8, 8), 0.5)
        batch = Batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count))
        ball = SparseBall(3, unit=unit).with_epsilon(torch.tensor(3.0))
        step = replace(make_step(count=count), ball=ball)
        found = SparseNoise()(batch, step)
        changed = ball.changed(images, found.images)
        assert changed.min() == 0 and changed.max() == 6
        shares = changed.bincount(minlength=7) / count
        assert (shares - 1 / 7).abs().max() < 4 * math.sqrt(1 / 7 * 6 / 7 / count)
        assert ((found.images >= 0) & (found.images <= 1)).all()
        assert found.labels is batch.labels and found.index is batch.index

    def test_it_is_keyed(self):
        batch, step = make_batch(), make_step()
        once = SparseNoise()(batch, step).images
        torch.rand(3)
        assert torch.equal(SparseNoise()(batch, step).images, once)
        assert not torch.equal(SparseNoise()(batch, step.again("other")).images, once)

    def test_a_clean_step_has_no_noise(self):
        batch = make_batch()
        assert torch.equal(SparseNoise()(batch, make_step(k=0)).images, batch.images)

    def test_norms_have_no_such_noise(self):
        with pytest.raises(InputError, match="SparseBall"):
            Training(noise=SparseNoise()).check_ball(LinfBall(0.1))
        Training(noise=SparseNoise()).check_ball(SparseBall(2))
        with pytest.raises(FieldError, match="most"):
            SparseNoise(most=0)
