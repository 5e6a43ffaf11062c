"""Vision transformers."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, check
from .base import ACTIVATIONS, Architecture


@dataclass(frozen=True)
class Vit(Architecture):
    """A vision transformer (arXiv 2010.11929) with pre-norm blocks, small enough to be trained with interval bounds.

    Patches of the image become tokens by a convolution; learned positions are added. A block is x + attention(norm(x)),
    then x + perceptron(norm(x)), where the perceptron is linear, activation, linear. At the end a norm, and a linear
    layer on the tokens' mean or on the class token.

    Args:
        patch: side of the square patches, in pixels; it divides the image's sides.
        depth: number of blocks. width: features of a token. heads: of the attention; they divide the width.
        expansion: hidden features of a block's perceptron over the width.
        norm: ``layer`` norms; ``batch`` norms, which are linear in evaluation mode (the networks of VNN-COMP's vit
            benchmark); or ``none``.
        pool: what the last layer reads, the ``mean`` of all tokens or a ``class`` token.
    """

    patch: int = 4
    depth: int = 2
    width: int = 48
    heads: int = 4
    expansion: int = 2
    norm: Literal["layer", "batch", "none"] = "layer"
    pool: Literal["mean", "class"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "depth", "width", "heads", "expansion"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        check(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width, {self.width}")
        check(self.norm in NORMS, "norm", self.norm, ", ".join(NORMS))
        check(self.pool in ("mean", "class"), "pool", self.pool, "mean, class")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        channels, height, width = shape
        if height % self.patch or width % self.patch:
            raise InputError(
                f"model.patch: found {self.patch} for images of {height}×{width}; accepted: a divisor of both sides"
            )
        tokens = (height // self.patch) * (width // self.patch)
        embed = Patches(channels, self.width, self.patch, tokens, class_token=self.pool == "class")
        pool = ClassToken() if self.pool == "class" else MeanToken()
        return [embed, *(self._block() for _ in range(self.depth)), self._norm(), pool, nn.Linear(self.width, classes)]

    def _block(self) -> nn.Module:
        hidden = self.expansion * self.width
        perceptron = [nn.Linear(self.width, hidden), ACTIVATIONS[self.activation](), nn.Linear(hidden, self.width)]
        attention = Added(nn.Sequential(self._norm(), SelfAttention(self.width, self.heads)))
        return nn.Sequential(attention, Added(nn.Sequential(self._norm(), *perceptron)))

    def _norm(self) -> nn.Module:
        return NORMS[self.norm](self.width)


class Patches(nn.Module):
    """(B, C, H, W) → (B, tokens, features): each patch by one linear map, plus its learned position.

    A class token comes first and has no patch: what is learned is its sum with its position.
    """

    def __init__(self, channels: int, features: int, patch: int, tokens: int, class_token: bool):
        super().__init__()
        self.embed = nn.Conv2d(channels, features, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, tokens + class_token, features).normal_(std=0.02))
        self.class_token = class_token

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.class_token:
            x = F.pad(x, (0, 0, 1, 0))
        return x + self.position


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens (B, L, E), its linear layers apart and its softmax written out, so that
    initialisations and other verifiers see them."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))
        self.heads, self.scale = heads, 1 / math.sqrt(features // heads)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._apart(layer(x)) for layer in (self.query, self.key, self.value))
        shares = torch.softmax(query * self.scale @ key.transpose(-2, -1), -1)
        return self.out((shares @ value).transpose(1, 2).flatten(2))

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Added(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class TokenBatchNorm(nn.Module):
    """A batch norm of tokens (B, L, E) by feature, over the batch and all tokens."""

    def __init__(self, features: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class MeanToken(nn.Module):
    """The mean of tokens, (B, L, E) → (B, E)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ClassToken(nn.Module):
    """The first token, (B, L, E) → (B, E)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "batch": TokenBatchNorm, "none": nn.Identity}
