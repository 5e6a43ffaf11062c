"""AutoAttack (Croce and Hein, arXiv 2003.01690) from the package ``pyautoattack``, with each success replayed."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import PerturbationSet, SparseBall
from ..labels import classes_of
from ..noise import key_of
from ..step import Batch, Step
from .adversary import Adversary, Outcome, is_right, rows_of

NORMS = ("Linf", "L2")
_log = logging.getLogger(__name__)
_log.setLevel(logging.CRITICAL)  # its warnings about vanishing gradients would break the progress bar


@dataclass(frozen=True)
class AutoAttack(Adversary):
    """The attacks of AutoAttack one after the other, each on the images that the earlier ones left, with one restart.

    With ten classes or more they are those of version ``standard``, with its parameters: APGD on the cross-entropy,
    APGD on the targeted DLR loss, targeted FAB (nine targets each), Square. With fewer classes there are fewer targets;
    the targeted DLR loss is undefined with three classes, every DLR loss with two.

    The package's ``run_standard_evaluation`` is not used: it indexes targets that do not exist, cannot resume, ignores
    the model's mode and removes the function set by ``sys.settrace``. The result of an attack is projected onto the
    ball and counts if and only if our own forward pass misclassifies the projected point.

    Args:
        label: name of the row.
        steps: steps of APGD and FAB.
        queries: queries of Square.
        fab: whether to run FAB, the slowest attack.
    """

    label: str = "autoattack"
    steps: int = 100
    queries: int = 5000
    fab: bool = True

    @property
    def name(self) -> str:
        return self.label

    def basis(self, batch_size: int) -> dict[str, Any]:
        """The settings, including the batch size, because random numbers are drawn per batch."""
        return {"steps": self.steps, "queries": self.queries, "fab": self.fab, "batch_size": batch_size}

    def versions(self) -> dict[str, str]:
        return {"pyautoattack": metadata.version("pyautoattack")}

    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        if ball.norm not in NORMS:
            sparse = ", or sparse-autoattack" if SparseBall.matches(ball) else ""
            return f"found a {ball.kind}; accepted: LinfBall or L2Ball{sparse}"
        if importlib.util.find_spec("pyautoattack") is None:
            return "found no package pyautoattack; accepted: pip install 'certtrain[autoattack]', or other attacks"
        if images is not None and ball.norm == "L2" and min(images.shape[-2:]) < 5:
            return f"found images of {images.shape[-2]}×{images.shape[-1]}; accepted: 5×5 and larger, for l2 Square"
        return ""

    def plan(self, classes: int) -> tuple[str, ...]:
        """The attacks to run, in order."""
        match classes:
            case 2:
                names = ("apgd-ce", "fab", "square")
            case 3:
                names = ("apgd-ce", "apgd-dlr", "fab", "square")
            case _:
                names = ("apgd-ce", "apgd-t", "fab-t", "square")
        return tuple(name for name in names if self.fab or not name.startswith("fab"))

    def build(self, name: str, model: nn.Module, ball: PerturbationSet, classes: int, device: torch.device, seed: int):
        """An attack of the package; its ``perturb(images, labels)`` returns images."""
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack

        norm, epsilon, targets = ball.norm, float(ball.epsilon), min(9, classes - 1)
        shared: dict[str, Any] = {
            "n_restarts": 1, "eps": epsilon, "norm": norm, "seed": seed, "device": device, "verbose": False,
        }  # fmt: skip
        apgd = {**shared, "n_iter": self.steps, "eot_iter": 1, "rho": 0.75, "logger": _log}
        match name:
            case "apgd-ce" | "apgd-dlr":
                return APGDAttack(model, loss=name.removeprefix("apgd-"), **apgd)
            case "apgd-t":
                return APGDAttack_targeted(model, n_target_classes=targets, **apgd)
            case "fab" | "fab-t":
                fab = FABAttack_PT(model, n_iter=self.steps, n_target_classes=targets, **shared)
                fab.targeted = name == "fab-t"
                return fab
            case _:
                return SquareAttack(model, p_init=0.8, n_queries=self.queries, resc_schedule=False, **shared)

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        lost, left = [Outcome()] * len(batch), torch.arange(len(batch), device=batch.labels.device)
        if float(ball.epsilon) == 0:  # the only point is the image, which is right; the package would divide by 0
            return lost
        classes = classes_of(model(batch.images[:1]))
        seed = key_of(step.noise.key, "autoattack", int(batch.index[0])) & (2**31 - 1)
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            for name in self.plan(classes):
                if not len(left):
                    break
                part = rows_of(batch, left)
                attack = self.build(name, model, ball, classes, part.images.device, seed)
                found = attack.perturb(part.images.clone(), part.labels.clone()).detach()
                claimed, broken = replay(model, part, ball, found)
                for row in left[broken].tolist():
                    lost[row] = Outcome(name, lost[row].unconfirmed)
                for row in left[claimed & ~broken].tolist():
                    lost[row] = Outcome(None, (*lost[row].unconfirmed, name))
                left = left[~broken]
        return lost


def replay(model: nn.Module, batch: Batch, ball: PerturbationSet, found: Tensor) -> tuple[Tensor, Tensor]:
    """(claimed, broken), both (B,) bool: whether the network is wrong on ``found``, and on its projection to the ball.

    The projection counts even where ``found`` itself is outside the ball or right: it is a counterexample. Points with
    NaN or infinities have no projection.
    """
    claimed = ~is_right(model, found, batch.labels)
    points = found.isfinite().flatten(1).all(1)
    projected = ball.project(batch.images, torch.where(found.isfinite(), found, batch.images).clamp(0, 1))
    return claimed, points & ~is_right(model, projected, batch.labels)
