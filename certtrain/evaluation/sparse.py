"""Attacks that change few pixels, singly and in cascades such as Sparse-AutoAttack (arXiv 2405.05075)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import Attack, AttackResult, CornerSearch, Pgd0, Saif, SigmaZero, SparsePgd, SparseRs
from ..bounds import PerturbationSet, SparseBall
from ..config import unstructure
from ..errors import InputError
from ..step import Batch, Step
from .adversary import Adversary, Outcome, is_right, rows_of

SPARSE = (
    "spgd-u-STEPS, spgd-p-STEPS, sparse-rs-QUERIES, sparse-rs-large-QUERIES, corner-search, saif-STEPS, "
    "sigma-zero-STEPS, pgd0-STEPS, pgd0-STEPS-RESTARTS, sparse-autoattack, sparse-autoattack-large, each also "
    "-STEPS-QUERIES (such as sparse-autoattack-100-200)"
)


@dataclass(frozen=True)
class Searching(Adversary):
    """A cascade of attacks, each on the images that the earlier ones left.

    A stage's random numbers are keyed by the image's number and the stage's label only. A stage finds the same points
    alone, after other stages and in any batches, so that a cascade leaves no more images right than any of its stages.

    An image is lost if and only if the result of a stage is in the set and our own forward pass misclassifies it.

    Args:
        label: name of the row.
        stages: the attacks, each with the name under which its successes are counted.
    """

    label: str
    stages: tuple[tuple[str, Attack], ...]

    @property
    def name(self) -> str:
        return self.label

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(label for label, _ in self.stages) if len(self.stages) > 1 else ()

    def basis(self, batch_size: int) -> dict[str, Any]:
        return {"stages": {label: unstructure(attack) for label, attack in self.stages}}

    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        for label, attack in self.stages:
            if not attack.needs.matches(ball):
                return f"found a {ball.kind}; accepted: a {attack.needs.__name__}"
            try:
                attack.check_ball(ball, label)
            except InputError as error:
                return str(error).removeprefix(f"{label}.type: ")
        if model is None or images is None or not any(attack.takes_gradients for _, attack in self.stages):
            return ""
        with torch.enable_grad():
            differentiable = model(images.detach().requires_grad_()).requires_grad
        black_box = "sparse-rs-QUERIES or corner-search, which take none"
        return "" if differentiable else f"found logits without gradients in the images; accepted: {black_box}"

    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        lost, left = [Outcome()] * len(batch), torch.arange(len(batch), device=batch.labels.device)
        queries: dict[int, int] = {}
        for label, attack in self.stages:
            if not len(left):
                break
            part, around = rows_of(batch, left), ball.take(left)
            noise = replace(step.again(label).noise, positions=part.index)
            found = attack(model, part, around, replace(step, ball=around, noise=noise))
            claimed, broken = replayed(model, part, around, found)
            if (counted := found.trace.get("queries")) is not None:
                for row, count in zip(left.tolist(), counted.tolist(), strict=True):
                    queries[row] = queries.get(row, 0) + count
            for place in broken.nonzero().flatten().tolist():
                row = int(left[place])
                lost[row] = Outcome(label, lost[row].unconfirmed, details_of(around, part, found, place))
            for row in left[claimed & ~broken].tolist():
                lost[row] = Outcome(None, (*lost[row].unconfirmed, label))
            left = left[~broken]
        return [
            replace(found, details={"queries": queries[row], **found.details}) if row in queries else found
            for row, found in enumerate(lost)
        ]


def replayed(model: nn.Module, batch: Batch, ball: PerturbationSet, found: AttackResult) -> tuple[Tensor, Tensor]:
    """(claimed, broken), both (B,) bool: whether the attack reports a success or the network is wrong on its image, and
    whether the network is wrong on an image that is in the set."""
    wrong = ~is_right(model, found.images, batch.labels)
    claims = found.trace.get("found_at", torch.full_like(batch.labels, -1)) >= 0
    return claims | wrong, wrong & ball.contains(batch.images, found.images)


def details_of(ball: PerturbationSet, batch: Batch, found: AttackResult, row: int) -> dict[str, Any]:
    """Further fields of the line about the lost image ``row``."""
    details: dict[str, Any] = {}
    at = int(found.trace["found_at"][row]) if "found_at" in found.trace else -1
    if at >= 0:
        details["found_at"] = at
    return details | ball.change(batch.images[row], found.images[row])


def change_of(ball: SparseBall, image: Tensor, point: Tensor) -> list[list[Any]]:
    """The changed units as ``[[unit, [values]], …]``; see ``SparseBall.change``."""
    return ball.change(image, point)["change"]


def rebuilt(ball: SparseBall, image: Tensor, change: Sequence[Sequence[Any]]) -> Tensor:
    """The adversarial image of a line's ``change``: ``image`` (C, H, W) with the recorded values, bit for bit.

    Args:
        ball: a set with the same units; its k is not used.
    Raises:
        InputError: a unit or its values do not fit the image.
    """
    grouped = ball.grouped(image[None]).clone()
    members, units = grouped.shape[1:]
    for entry in change:
        fine = len(entry) == 2 and type(entry[0]) is int and 0 <= entry[0] < units
        if not fine or len(entry[1]) != members:
            raise InputError(
                f"change: found {entry!r}; accepted: [unit, values], a unit below {units} and {members} values"
            )
        grouped[0, :, entry[0]] = torch.tensor(entry[1], dtype=image.dtype, device=image.device)
    return ball.ungrouped(grouped, image.shape)[0]


def searching(name: str) -> Searching | None:
    """The attack of this name over a ``SparseBall``, or None."""
    for form, build in FORMS.items():
        if found := re.fullmatch(form.replace("N", "([1-9][0-9]{0,5})"), name):
            return Searching(name, tuple(build(*found.groups())))
    return None


Stages = list[tuple[str, Attack]]


def _spgd(which: str, steps: str) -> Stages:
    return [(f"spgd-{which}", SparsePgd(steps=int(steps), variant="unprojected" if which == "u" else "projected"))]


def _sparse_rs(large: str | None, queries: str) -> Stages:
    """Sparse-RS with the parameters published for CIFAR-10 and CIFAR-100; ``large``: for ImageNet-100 and GTSRB."""
    if large:
        return [("sparse-rs", SparseRs(queries=int(queries), p_init=0.3, objective="margin"))]
    return [("sparse-rs", SparseRs(queries=int(queries), p_init=0.8, objective="cross_entropy"))]


def _autoattack(large: str | None, steps: str | None, queries: str | None) -> Stages:
    """Sparse-AutoAttack; for large images it is published with 3000 queries of Sparse-RS and 10000 steps of sPGD."""
    steps, queries = steps or "10000", queries or ("3000" if large else "10000")
    return [*_spgd("u", steps), *_spgd("p", steps), *_sparse_rs(large, queries)]


FORMS: dict[str, Callable[..., Stages]] = {
    "spgd-(u|p)-N": _spgd,
    "sparse-rs(-large)?-N": _sparse_rs,
    "corner-search": lambda: [("corner-search", CornerSearch())],
    "saif-N": lambda steps: [("saif", Saif(steps=int(steps)))],
    "sigma-zero-N": lambda steps: [("sigma-zero", SigmaZero(steps=int(steps)))],
    "pgd0-N(?:-N)?": lambda steps, restarts: [("pgd0", Pgd0(steps=int(steps), restarts=int(restarts or 1)))],
    "sparse-autoattack(-large)?(?:-N-N)?": _autoattack,
}
"""Forms of names; N stands for a number."""
