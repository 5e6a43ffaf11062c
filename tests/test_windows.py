"""Backward passes confined to what each entry sees: the same bounds as whole passes, at every geometry."""

from dataclasses import replace

import pytest
import torch
from networks import Residual
from torch import nn

from certtrain.bounds import L2Ball, LinfBall
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import FLOAT32, REAL
from certtrain.bounds.windows import Window, Windows

SHAPE = torch.Size([2, 16, 14])


def networks() -> dict[str, nn.Module]:
    """Of convolutions whose windows overlap the border, leave gaps, or do not agree in rows and columns."""
    torch.manual_seed(0)
    wide = {"padding": 1, "kernel_size": 3}
    return {
        "strides": nn.Sequential(
            nn.Conv2d(2, 4, **wide), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 6, **wide), nn.ReLU(),
            nn.Flatten(), nn.Linear(6 * 8 * 7, 5), nn.ReLU(), nn.Linear(5, 3),
        ),
        "odd": nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), (1, 2), (1, 0), groups=2), nn.LeakyReLU(0.1),
            nn.Conv2d(4, 6, (2, 3), (2, 1), (0, 2), dilation=(1, 2)), nn.ReLU(),
            nn.Conv2d(6, 6, **wide), nn.Conv2d(6, 3, 2), nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(126, 3),
        ),
        "gaps": nn.Sequential(
            nn.Conv2d(2, 4, 1, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
        ),
        "residual": nn.Sequential(
            nn.Conv2d(2, 4, **wide), nn.ReLU(),
            Residual(nn.Sequential(nn.Conv2d(4, 4, **wide), nn.ReLU(), nn.Conv2d(4, 4, **wide)), -1), nn.ReLU(),
            nn.Conv2d(4, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(168, 3),
        ),
        "diagonal": nn.Sequential(
            nn.BatchNorm2d(2), nn.Conv2d(2, 4, **wide), nn.ReLU(), nn.BatchNorm2d(4),
            nn.Conv2d(4, 2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(112, 3),
        ),
        "normalised": nn.Sequential(
            nn.BatchNorm2d(2), nn.Conv2d(2, 4, **wide), nn.ReLU(), nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, **wide), nn.Tanh(), nn.Conv2d(4, 2, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(112, 3),
        ),
    }  # fmt: skip


def folded(name: str, rounding=None):
    model = networks()[name].eval().double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1), nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias)
    with torch.no_grad():
        return replace(fold(model, SHAPE), rounding=rounding)


def seen_in_windows(network) -> list[bool]:
    return [Windows.behind(network, network.operations[number].inputs[0]) is not None for number in network.nonlinear]


CASES = [
    *((name, ball, None) for name in networks() for ball in (LinfBall(0.1), L2Ball(0.5))),
    *(
        (name, LinfBall(0.1), rounding)
        for name in ("strides", "odd", "residual", "diagonal")
        for rounding in (REAL, FLOAT32)
    ),
]


@pytest.mark.parametrize(("name", "ball", "rounding"), CASES, ids=str)
@torch.no_grad()
def test_the_same_bounds_as_whole_passes(name, ball, rounding, monkeypatch):
    network, region = (
        folded(name, rounding),
        ball.region(torch.rand(2 if ball.is_box else 1, *SHAPE, dtype=torch.float64)),
    )
    assert any(seen_in_windows(network))
    found = crown_bounds(network, region)
    monkeypatch.setattr(Windows, "behind", lambda *_: None)
    for number, whole in crown_bounds(network, region).items():
        assert torch.allclose(found[number].lower, whole.lower, rtol=0, atol=1e-12)
        assert torch.allclose(found[number].upper, whole.upper, rtol=0, atol=1e-12)


@torch.no_grad()
def test_small_memory_and_no_images(monkeypatch):
    network, images = folded("residual"), torch.rand(2, *SHAPE, dtype=torch.float64)
    expected = crown_bounds(network, LinfBall(0.1).region(images))
    monkeypatch.setattr("certtrain.bounds.memory.CHUNK", 20_000)
    for number, found in crown_bounds(network, LinfBall(0.1).region(images)).items():
        assert torch.allclose(found.lower, expected[number].lower, rtol=0, atol=1e-12)
    for found in crown_bounds(network, LinfBall(0.1).region(images[:0])).values():
        assert len(found.lower) == 0


def test_what_an_entry_sees():
    """By the gradient of one entry: nothing outside its window, and the window no larger than it need be."""
    model = networks()["odd"].double()
    network = fold(model, SHAPE)
    position = network.operations[network.nonlinear[1]].inputs[0]
    window = Windows.behind(network, position).of[0]
    image = torch.rand(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    out = network.values(image)[position]
    row, column = 3, 3
    (seen,) = torch.autograd.grad(nn.functional.softplus(out[0, :, row, column]).sum(), image)
    rows, columns = (seen[0].abs().sum(dim=(0, other)).nonzero().flatten() for other in (2, 1))
    for place, found, jump, start, size in zip((row, column), (rows, columns), window.jump, window.start, window.size):
        first, last = place * jump + start, place * jump + start + size - 1
        assert found.min() == max(0, first) and found.max() == min(last, (15, 13)[found is columns])


def test_windows_join():
    assert Window((2, 1), (-1, 0), (3, 4)).joined(Window((2, 1), (0, -2), (5, 3))) == Window((2, 1), (-1, -2), (6, 6))


@torch.no_grad()
def test_what_is_not_local_goes_whole():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 2)
    )
    assert not any(seen_in_windows(fold(model.eval(), SHAPE))[-1:])
    large = nn.Sequential(nn.Conv2d(2, 3, 15, padding=7), nn.ReLU(), nn.Conv2d(3, 3, 15, padding=7), nn.ReLU(),
                          nn.Flatten(), nn.Linear(672, 2)).eval()  # fmt: skip
    assert not seen_in_windows(fold(large, SHAPE))[-1]  # its windows are as large as the image
