"""Fast-BAT with another lower level: the attack's objective in both steps and in the implicit gradient."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_step
from torch import Tensor, nn

from certtrain.attacks import CrossEntropy, KullbackLeibler, Linearisation, Margin, Objective, SquaredEuclidean
from certtrain.config import structure, unstructure
from certtrain.errors import InputError
from certtrain.losses import FastBat, Loss
from certtrain.step import Batch

ATTACK = Linearisation(step_size=0.2, attack_mode="batch")


@dataclass(frozen=True)
class SquaredLogits(Objective):
    """One of a user's own: half the squared length of the logits."""

    def reference(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.labels

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        return logits.square().sum(1) / 2


def by_hand(lower: Objective, logits: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
    """The sum over the batch, written down a second time."""
    if isinstance(lower, Margin):
        others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
        return (others.amax(1) - logits[torch.arange(len(labels)), labels]).sum()
    if isinstance(lower, KullbackLeibler):
        return F.kl_div(F.log_softmax(logits, 1), F.softmax(clean, 1), reduction="sum")
    if isinstance(lower, SquaredEuclidean):
        return (logits.softmax(1) - clean.softmax(1)).square().sum()
    if isinstance(lower, SquaredLogits):
        return (logits**2).sum() / 2
    return F.cross_entropy(logits, labels, reduction="sum")


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 5)).double()


@pytest.mark.parametrize("lower", [CrossEntropy(), Margin(), KullbackLeibler(), SquaredEuclidean(), SquaredLogits()])
@pytest.mark.parametrize("size", [0.02, 0.3, 2.0])
def test_the_implicit_gradient_is_autograd_s_through_the_projected_step(lower, size):
    """1 / lambda = the step's size; z is that of the same objective, and held fixed, as a divergence's reference is."""
    model, batch, step = smooth(), make_batch(), make_step()
    terms, found = gradient(model, FastBat(attack=ATTACK, step_size=size, implicit=None, lower=lower), batch, step)
    clean = model(batch.images).detach()

    start = replace(ATTACK, step_size=1e-300, objective=lower)(model, batch, step.ball, step).images.requires_grad_()
    (first,) = torch.autograd.grad(by_hand(lower, model(start), clean, batch.labels), start)
    low, high = (batch.images - 0.05).clamp(min=0), (batch.images + 0.05).clamp(max=1)
    point = torch.minimum(torch.maximum(start + 0.2 * first, low), high).detach().requires_grad_()

    ascended = by_hand(lower, model(point), clean, batch.labels)
    (slope,) = torch.autograd.grad(ascended, point, create_graph=True)
    images = torch.minimum(torch.maximum(point + size * slope, low), high)
    expected = F.cross_entropy(model(images), batch.labels)
    model.zero_grad()
    expected.backward()
    reference = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.allclose(terms.total, expected, rtol=1e-12)
    assert torch.allclose(found, reference, atol=1e-12) and reference.abs().max() > 1e-3
    inside = (images > low) & (images < high)
    assert bool(inside.any()) and not torch.equal(images, point)


def test_the_cross_entropy_is_the_default():
    batch, step = make_batch(), make_step()
    _, plain = gradient(smooth(), FastBat(attack=ATTACK), batch, step)
    _, named = gradient(smooth(), FastBat(attack=ATTACK, lower=CrossEntropy()), batch, step)
    assert torch.equal(plain, named)


def test_a_divergence_moves_no_running_statistics_of_its_own():
    """The passes of the cross-entropy alone: z, with the weights' gradient, and the images. (The attack keeps its.)"""
    moved = []
    for lower in (None, KullbackLeibler()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 5)).double().train()
        FastBat(attack=ATTACK, lower=lower)(model, make_batch(), make_step())
        moved.append(int(model[0].num_batches_tracked))  # type: ignore[arg-type]
    assert moved == [2, 2]


def test_recipes_name_it():
    loss = structure(Loss, {"type": "FastBat", "lower": {"type": "Margin"}})
    assert loss == FastBat(lower=Margin()) and structure(Loss, unstructure(loss)) == loss
    with pytest.raises(InputError, match=r"^lower\.type: found 'Distance'; accepted: .*Margin"):
        structure(Loss, {"type": "FastBat", "lower": {"type": "Distance"}})
