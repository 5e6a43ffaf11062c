"""Whole cascades on networks of ReLUs and other functions: against a grid, and with optimised parameters."""

import torch
from networks import Apply
from test_activations import grid, planar
from torch import Tensor, nn
from walking import walk

import certtrain
from certtrain.bounds.folding import fold
from certtrain.verifiers import Certify


def attention(_, x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], -1, 2)
    return (torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows.relu()).reshape(x.shape)


class Normed(nn.Module):
    """A layer norm of four features, and a ReLU."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(x.shape[0], -1, 4)).relu().reshape(x.shape)


MIXES = {
    "products": Apply(lambda _, x: x.relu() * torch.tanh(x.flip(1))),
    "quotients": Apply(lambda _, x: x.relu() / (x.flip(1).exp() + 1)),
    "attention": Apply(attention),
    "norms": Normed(),
}  # fmt: skip


@walk("name", MIXES)
def test_verdicts_are_never_wrong(name):
    """At radii from safe to hopeless; only input splitting is complete here, branching on signs is not."""
    model, images = planar(MIXES[name]), torch.rand(3, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    labels, seen = model(images).argmax(1), []
    assert not fold(model, images.shape[1:]).piecewise_linear
    settings = Certify(stages=("ibp", "crown", "alpha", "bab", "input_split"), timeout=20.0, alpha_steps=8)
    for epsilon in (0.005, 0.3):
        for verdict, image, label in zip(certtrain.certify(model, images, labels, epsilon, settings), images, labels):
            wrong = model(grid(image, epsilon)).argmax(1) != label
            seen.append(verdict.status)
            assert not (verdict.status == "verified" and wrong.any())
            if verdict.status == "falsified":
                assert verdict.counterexample is not None
                assert model(verdict.counterexample[None]).argmax(1) != label
                assert ((verdict.counterexample - image).abs() <= epsilon + 1e-6).all()
    assert "verified" in seen and "falsified" in seen
