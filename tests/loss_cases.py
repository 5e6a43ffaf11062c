"""A small network, a batch and a step, in float64: what the tests of losses share."""

import torch
from torch import nn

from certtrain.bounds import LinfBall
from certtrain.noise import Noise
from certtrain.step import Batch, Step


def make_model(batch_norm=True) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm1d(16)] if batch_norm else [nn.Identity(), nn.Identity()]
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), norms[0], nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 16), norms[1], nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    return model.double().train()


def make_batch(count=12) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.rand(count, 1, 8, 8, dtype=torch.float64), torch.arange(count) % 5, torch.arange(count))


def make_step(epsilon=0.05, ramp=1.0, clean=False, ball=LinfBall) -> Step:
    largest = torch.tensor(0.05, dtype=torch.float64)
    radius = torch.tensor(epsilon, dtype=torch.float64)
    return Step(
        ball(0.05).with_epsilon(radius), radius, largest, 0.5, Noise(7, torch.arange(12)), ramp=ramp, clean=clean
    )


def gradient(model, loss, batch, step):
    model.zero_grad()
    terms = loss(model, batch, step)
    terms.total.backward()
    return terms, torch.cat(
        [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()]
    )
