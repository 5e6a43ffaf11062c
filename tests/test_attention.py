"""Scaled dot product attention: values as torch computes them, bounds by sampling, refusals."""

import pytest
import torch
import torch.nn.functional as F
from networks import Apply
from test_new_operation import assert_bounded
from torch import nn
from walking import walk

from certtrain.bounds import Interval, UnsupportedOperation, compute_bounds


def attending(**options) -> nn.Module:
    """Two heads of four numbers over four tokens."""
    torch.manual_seed(0)

    def forward(m, x):
        q, k, v = (layer(x.flatten(1)).view(x.size(0), 2, 4, 4) for layer in (m.q, m.k, m.v))
        return m.last(F.relu(F.scaled_dot_product_attention(q, k, v, **options).flatten(1)))

    layers = {name: nn.Linear(64, 32) for name in "qkv"}
    return Apply(forward, **layers, last=nn.Linear(32, 3))


@walk("options", [{}, {"scale": 2.0, "dropout_p": 0.0, "is_causal": False}])
def test_bounds_enclose_a_network_with_it(options):
    model = attending(**options).double().eval()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    for epsilon in (0.0, 1e-3, 0.05, 0.5):
        assert_bounded(model, images, epsilon)


@walk("options, words", [({"is_causal": True}, "is_causal=True"), ({"dropout_p": 0.1}, "dropout_p=0.1")])
def test_refusals_name_what_was_found(options, words):
    with pytest.raises(UnsupportedOperation, match=f"scaled_dot_product_attention.*found {words}; accepted: query"):
        compute_bounds(attending(**options).eval(), Interval.point(torch.rand(2, 1, 8, 8)))
