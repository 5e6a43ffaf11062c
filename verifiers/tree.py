"""The open subproblems of branch and bound, in columns: an image's subproblems differ at its own open neurons alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .frontier import Frontier


@dataclass(frozen=True)
class Tree(Frontier):
    """Open subproblems, P of them. U columns stand for the neurons that an image's own bounds leave open.

    ``image``, ``clause``, ``branch`` (P,) int64; ``bound`` (P,); ``signs`` (P, U) int8; ``lower`` and ``upper`` (P, U)
    bound the neurons' inputs; slopes and multipliers (P, R, U). ``branch`` is the column to split at next.
    """

    clause: Tensor
    bound: Tensor
    branch: Tensor
    signs: Tensor
    lower: Tensor
    upper: Tensor
    alphas: Tensor
    betas: Tensor


def in_turns(image: Tensor, bound: Tensor, most: int) -> Tensor:
    """Which of P subproblems come next: the worst-bounded ones of each image, images taking turns."""
    order = torch.argsort(bound, stable=True)
    order = order[torch.argsort(image[order], stable=True)]
    own = image[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(own, own)  # among the image's own
    return order[torch.argsort(rank, stable=True)[:most]]


def columns_of(open_: Tensor) -> Tensor:
    """(B, U) the neurons that are open for each image, filled up with N."""
    most = max(1, int(open_.sum(1).max()) if open_.numel() else 1)
    order = torch.argsort(open_.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
    return torch.where(open_.gather(1, order), order, open_.shape[1])


def scattered(whole: Tensor, columns: Tensor, part: Tensor) -> Tensor:
    """``whole`` (…, N) with ``part`` written at ``columns``; a column N is nowhere."""
    room = torch.cat([whole, whole[..., :1]], -1)
    return room.scatter(-1, columns, part)[..., :-1]


def rows_of(clauses: Tensor) -> tuple[Tensor, int]:
    """(clauses, R): the rows of each clause, short ones filled up with their first row again."""
    count = int(clauses.max()) + 1 if len(clauses) else 0
    members = [(clauses == clause).nonzero().flatten() for clause in range(count)]
    most = max((len(m) for m in members), default=1)
    rows = [torch.cat([m, m[:1].expand(most - len(m))]) for m in members]
    return (torch.stack(rows) if rows else clauses.reshape(0, 1)), count
