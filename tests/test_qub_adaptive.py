"""QUB's adaptive bound: of the Hessian's norm between two predictions, and so of the cross-entropy; in float64."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import make_batch, make_step
from torch import nn

from certtrain.config import structure
from certtrain.errors import InputError
from certtrain.losses import Fgsm, Loss, Qub
from certtrain.losses.adversarial.qub import curvature, quadratic_upper_bound

SCALES = [0.01, 0.3, 1.0, 5.0, 20.0]


def pairs(scale: float, classes: int = 10, count: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, half of them far ahead in one class at both ends, and labels."""
    generator = torch.Generator().manual_seed(0)
    first, change = torch.randn(2, count, classes, generator=generator, dtype=torch.float64)
    first[: count // 2, 3] += 4
    return scale * first, scale * (first + change), torch.arange(count) % classes


def norms(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(1)
    return torch.linalg.matrix_norm(torch.diag_embed(p) - p[:, :, None] * p[:, None], ord=2)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_it_bounds_the_hessian_along_the_whole_segment(scale, classes):
    first, second, _ = pairs(scale, classes if classes > 3 else 4, 200)
    bound = curvature(first, second)
    assert bool((bound <= 0.5).all())
    for share in torch.linspace(0, 1, 41, dtype=torch.float64):
        assert bool((norms(torch.lerp(first, second, share)) <= bound + 1e-12).all())
    if scale != 0.3:  # where it depends on the number of classes whether a prediction is sure enough
        assert bool((bound < 0.49).any()) == (scale >= 1)


def test_it_is_attained():
    """Two classes: the Hessian's norm is 2 p (1 - p), so that the bound is exact at the nearer end."""
    first = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[2.0, 0.0], [4.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    p = torch.sigmoid(torch.tensor([2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(curvature(first, second), torch.cat([2 * p * (1 - p), torch.tensor([0.5]).double()]))


@pytest.mark.parametrize("scale", SCALES)
def test_the_loss_is_an_upper_bound_below_the_centred_one(scale):
    first, second, labels = pairs(scale)
    adaptive = quadratic_upper_bound(first, second, labels, bound="adaptive")
    centred = quadratic_upper_bound(first, second, labels, bound="centred")
    exact = F.cross_entropy(second, labels, reduction="none")
    assert bool((adaptive >= exact - 1e-9 * (1 + scale)).all()) and bool((adaptive <= centred + 1e-12).all())
    assert bool((adaptive < centred - 1e-6).any()) == (scale >= 1)
    shifted = quadratic_upper_bound(first, second + 3, labels, bound="adaptive")
    torch.testing.assert_close(shifted, adaptive, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        quadratic_upper_bound(first, first, labels, bound="adaptive"), F.cross_entropy(first, labels, reduction="none")
    )


def test_confident_float32_networks_keep_a_curvature():
    """Where 1 - p is below a rounding error of 1."""
    first, second = torch.tensor([[30.0, 0, 0]]), torch.tensor([[40.0, 0, 0]])
    found = float(curvature(first, second))
    assert found == pytest.approx(2 * 2 * float(torch.exp(torch.tensor(-30.0))), rel=1e-5) and found > 0


def test_its_gradient_is_that_of_a_constant():
    first, second, labels = pairs(1.0, count=20)
    leaves = first.requires_grad_(), second.requires_grad_()
    quadratic_upper_bound(*leaves, labels, bound="adaptive").sum().backward()
    held = curvature(first, second)
    one, two = first.detach().requires_grad_(), second.detach().requires_grad_()
    change = two - one
    linear = (change * (one.softmax(1) - F.one_hot(labels, 10))).sum(1)
    square = change.square().sum(1) - change.sum(1).square() / 10
    (F.cross_entropy(one, labels, reduction="none") + linear + held / 2 * square).sum().backward()
    assert one.grad is not None and two.grad is not None and first.grad is not None and second.grad is not None
    torch.testing.assert_close(first.grad, one.grad)
    torch.testing.assert_close(second.grad, two.grad)


def test_a_step_and_a_recipe():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    loss = structure(Loss, {"type": "Qub", "bound": "adaptive", "base": {"type": "Fgsm"}})
    assert loss == Qub(base=Fgsm(), bound="adaptive")
    totals = [
        float(Qub(base=Fgsm(), bound=bound)(model, make_batch(), make_step()).total.detach())
        for bound in ("adaptive", "centred", "published")
    ]
    assert totals == sorted(totals)
    with pytest.raises(InputError, match=r"^bound: found 'local'; accepted: published, centred, adaptive"):
        structure(Loss, {"type": "Qub", "bound": "local"})
