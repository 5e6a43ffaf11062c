"""Any method of adversarial training as the adversarial term of a certified loss."""

import pytest
import torch
from loss_cases import gradient, make_batch, make_model, make_step
from walking import walk

from certtrain.attacks import Ascent
from certtrain.config import structure
from certtrain.errors import InputError
from certtrain.losses import AdversarialTraining, CcIbp, ExpIbp, FastBat, Fgsm, Loss, Mer, MtlIbp, NFgsm, Qub, Trades
from certtrain.losses.adversarial import AdversarialLoss

ATTACK = Ascent(steps=2, step_size=0.5, attack_mode="batch")  # running statistics differ with the order of passes
certified = pytest.mark.parametrize("kind", [CcIbp, MtlIbp, ExpIbp])
METHODS = [cls for cls in AdversarialLoss.members().values() if "teacher" not in cls.__dataclass_fields__]


def both(first, second, **step):
    """Totals and gradients of two losses of the same network and batch."""
    results = []
    for loss in (first, second):
        model = make_model()
        terms, found = gradient(model, loss, make_batch(), make_step(**step))
        results += [terms.total.detach(), found]
    return results


@certified
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bn_mode", ["adv", "clean"])
def test_plain_adversarial_training_is_the_loss_own_attack(kind, alpha, bn_mode):
    plain = kind(attack=ATTACK, alpha=alpha, bn_mode=bn_mode, kappa=0.2)
    method = kind(adversarial=AdversarialTraining(attack=ATTACK), alpha=alpha, bn_mode=bn_mode, kappa=0.2)
    total, slope, other, other_slope = both(plain, method, ramp=0.5)
    assert torch.allclose(total, other, rtol=1e-10) and torch.allclose(slope, other_slope, atol=1e-9)


@certified
@pytest.mark.parametrize(
    "method", [Qub(base=Fgsm(attack=ATTACK)), Trades(attack=ATTACK), NFgsm(), FastBat()], ids=lambda m: type(m).__name__
)
def test_alpha_0_is_the_method_alone(kind, method):
    loss = kind(adversarial=method, alpha=0.0, kappa=0.0, regularisation=0.0)
    total, slope, other, other_slope = both(loss, method)
    assert torch.allclose(total, other, rtol=1e-10) and torch.allclose(slope, other_slope, atol=1e-9)


@pytest.mark.parametrize("method", [Qub(), Trades(), FastBat()], ids=lambda m: type(m).__name__)
def test_alpha_1_of_mtl_ibp_is_ibp(method):
    total, _, other, _ = both(MtlIbp(adversarial=method, alpha=1.0), MtlIbp(alpha=1.0, attack=ATTACK))
    assert total.isfinite() and other.isfinite()


def test_cc_ibp_mixes_the_bounds_into_the_logits_that_qub_bounds():
    """By hand, from the method's own passes."""
    from certtrain.bounds import compute_margins, forward
    from certtrain.losses.adversarial import quadratic_upper_bound

    model, batch, step, alpha = make_model(), make_batch(), make_step(), 0.25
    loss = CcIbp(adversarial=Qub(base=Fgsm(attack=ATTACK)), alpha=alpha)
    images = ATTACK(model, batch, step.ball, step).images
    clean, attacked = forward(model, batch.images), forward(model, images)
    lower, _ = compute_margins(model, step.ball.region(batch.images), batch.labels, attacked.statistics)
    mixed = attacked.logits.clone()
    for row, label in enumerate(batch.labels.tolist()):
        others = [k for k in range(5) if k != label]
        for place, other in enumerate(others):
            margin = attacked.logits[row, label] - attacked.logits[row, other]
            mixed[row, other] = attacked.logits[row, label] - (alpha * lower[row, place] + (1 - alpha) * margin)
    expected = quadratic_upper_bound(clean.logits, mixed, batch.labels).mean()
    assert torch.allclose(loss(model, batch, step).total, expected, rtol=1e-10)


@certified
@walk("method", METHODS, ids=lambda cls: cls.__name__)
def test_every_method_supplies_the_term(kind, method):
    if kind is ExpIbp and method().may_be_negative:
        with pytest.raises(InputError, match=rf"^adversarial: found '{method.__name__}'; accepted: .*never negative"):
            kind(adversarial=method())
        return
    loss = kind(adversarial=method(), alpha=0.3)
    model, batch, step = make_model(), make_batch(), make_step()
    specs = loss.declare_state((1, 8, 8), 10)
    from dataclasses import replace

    from certtrain.step import State

    tensors = {name: spec.allocate(12, 12, torch.device("cpu")).double() for name, spec in specs.items()}
    terms, slope = gradient(model, loss, batch, replace(step, state=State(tensors, specs)))
    assert terms.total.isfinite() and slope.isfinite().all() and slope.abs().sum() > 0
    assert {"adversarial_loss", "verified_loss", "clean_loss"} <= set(terms.parts)


def test_one_line_of_yaml():
    found = structure(Loss, {"type": "MtlIbp", "adversarial": {"type": "Qub", "base": {"type": "NFgsm"}}})
    assert found == MtlIbp(adversarial=Qub(base=NFgsm()))


def test_a_negative_loss_has_no_geometric_mean():
    with pytest.raises(InputError, match=r"^loss.adversarial: found 'Qub'; accepted: .*never negative"):
        structure(Loss, {"type": "ExpIbp", "adversarial": {"type": "Qub", "base": {"type": "Mer"}}}, "loss")
    assert ExpIbp(adversarial=Qub(base=Trades())) and Mer()
