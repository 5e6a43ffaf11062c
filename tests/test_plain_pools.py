"""Pools that torch computes and ONNX does not know are written as Pad, Gather and plain pools, and read back."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import Apply
from torch import Tensor, nn
from walking import walk

from certtrain.bounds.folding import fold
from certtrain.bounds.operations.plain_pools import Axis, plain_pool
from certtrain.export import export_onnx
from certtrain.verifiers.onnx_network import read_onnx

PLAIN = {
    "average": nn.AvgPool2d(2),
    "average, padded": nn.AvgPool2d(3, 2, 1),
    "average, padding not counted": nn.AvgPool2d((2, 3), 2, (1, 1), count_include_pad=False),
    "average, last window cut off": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average, no window in the padding": nn.AvgPool2d(2, 3, 1, ceil_mode=True),
    "maximum, last window cut off": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "maximum, no window in the padding": nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    "maximum, dilated": nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True),
    "adaptive, even": nn.AdaptiveAvgPool2d((1, 4)),
    "sequence": nn.AvgPool1d(3, 2, 1),
    "maximum of a sequence": nn.MaxPool1d(4, 3, 2),
}
GATHERED = {
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "negative divisor": nn.AvgPool2d(3, 2, 1, divisor_override=-2),
    "some windows in the padding": nn.AvgPool2d((2, 3), (3, 2), 1, ceil_mode=True),
    "some maxima in the padding": nn.MaxPool2d((2, 3), (3, 2), 1, ceil_mode=True),
    "uneven": nn.AdaptiveAvgPool2d((3, 5)),
    "uneven maximum": nn.AdaptiveMaxPool2d((3, 5)),
    "more outputs than places": nn.AdaptiveMaxPool2d((9, 3)),
    "uneven sequence": nn.AdaptiveAvgPool1d(9),
    "uneven maximum of a sequence": nn.AdaptiveMaxPool1d(9),
    "as a function": Apply(lambda m, x: F.avg_pool2d(x, 2, divisor_override=5)),
}
POOLS = PLAIN | GATHERED


def image(name: str, *sizes: int) -> Tensor:
    torch.manual_seed(0)
    x = torch.rand(3, 2, *sizes) - 0.5
    return x.flatten(2) if "sequence" in name else x


@walk("name", POOLS)
def test_the_same_numbers(name):
    for sizes in ((7, 8), (6, 9), (4, 5), (8, 8)):
        x, pool = image(name, *sizes), POOLS[name]
        averages = "max" not in name and not isinstance(pool, nn.AdaptiveMaxPool2d)
        found = plain_pool(pool, x.shape[1:], averages=averages)(x)
        torch.testing.assert_close(found, pool(x), rtol=0, atol=1e-6 if averages else 0)


@walk("name", POOLS)
def test_it_is_exported_and_read_back(name, tmp_path: Path):
    x = image(name, 7, 8)
    model = nn.Sequential(nn.Identity() if x.ndim == 3 else nn.Conv2d(2, 3, 1), POOLS[name], nn.Flatten()).eval()
    file = export_onnx(model, tmp_path / "model.onnx", x)
    assert file.folded and ("Gather" in file.operators) == (name in GATHERED)
    assert {"AveragePool", "MaxPool", "GlobalAveragePool", "ReduceMean"} & file.operators.keys()
    network = read_onnx(tmp_path / "model.onnx")
    torch.testing.assert_close(network.module(x), model(x), rtol=0, atol=1e-6)
    fold(network.module, network.shape)


@pytest.mark.parametrize(
    "places, walk, ceil",
    [
        ([[0, 1], [2, 3]], (2, 0, 1), False),
        ([[0], [1, 2], [3]], (2, 1, 1), False),
        ([[0, 2], [1, 3]], (1, 0, 2), False),
        ([[0, 1, 2], [2, 3]], (2, 0, 1), True),
        ([[0, 1], [1], [2, 3]], None, False),
        ([[0, 1], [1, 2], [3]], None, True),
    ],
)
def test_regular_windows(places, walk, ceil):
    assert Axis(4, places).regular(ceil) == walk
