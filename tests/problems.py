"""Small problems for the tests of verifiers, and stages run by themselves."""

import torch
from torch import nn

from certtrain.bounds import LinfBall
from certtrain.bounds.folding import fold
from certtrain.verifiers import Finding, Problem, Specification, Stage
from certtrain.verifiers.bounds_so_far import BoundsSoFar


def linear_model(weight, bias=None, dtype=torch.float32) -> nn.Module:
    weight = torch.as_tensor(weight, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias, dtype=dtype))
    return nn.Sequential(nn.Flatten(), layer).eval()


def random_model(seed=0, classes=4) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes),
    )  # fmt: skip
    for norm in (model[1], model[5]):
        norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 2)
    return model.eval()


def random_images(count=40, seed=1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(count, 1, 4, 4)


def problem_of(model, images, labels, ball, classes=4) -> Problem:
    return Problem(model, ball.region(images), Specification.robust(labels, classes), torch.arange(len(images)))


def mostly_right(model, images) -> torch.Tensor:
    """The model's own choices, but every fifth."""
    labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return labels


def unknown(problem: Problem, network=None) -> BoundsSoFar:
    """What is known before the first stage. ``network``: the folded one, if it was made already."""
    rows = problem.region.images.new_full(problem.specification.offsets.shape, -torch.inf)
    return BoundsSoFar(network or fold(problem.network, problem.region.images.shape[1:]), rows, {})


def alone(stage: Stage, problem: Problem, known: BoundsSoFar | None = None) -> Finding:
    """A stage's finding, if it is the first."""
    with torch.no_grad():
        return stage(problem, known or unknown(problem))


def decided(finding: Finding) -> list[bool]:
    """Of each problem, whether the stage decided it."""
    return [status is not None for status in finding.statuses]


@torch.no_grad()
def tied(margin: float) -> Problem:
    """relu(x) - relu(-x) - x is 0, but only when both signs are known; the margin is a constant."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    model[1].weight.copy_(torch.tensor([[1.0], [-1.0], [1.0]])), model[1].bias.copy_(torch.tensor([-0.5, 0.5, 0.0]))
    model[3].weight.copy_(torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]))
    model[3].bias.copy_(torch.tensor([0.5 + margin, 0.0]))
    return problem_of(model, torch.full((1, 1, 1, 1), 0.45), torch.tensor([0]), LinfBall(0.2), 2)
