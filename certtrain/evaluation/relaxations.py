"""Linear relaxations: certified accuracy beyond that of intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..bounds import PerturbationSet, UnsupportedOperation
from ..bounds.folding import fold
from ..errors import InputError
from ..labels import classes_of
from ..step import Batch, Step
from ..verifiers.cascade import run_cascade
from ..verifiers.problem import Problem, Specification
from ..verifiers.settings import Certify
from .adversary import Adversary, Outcome


@dataclass(frozen=True)
class Relaxations(Adversary):
    """Interval bounds, then CROWN-IBP (arXiv 1906.06316), then CROWN (arXiv 1811.00866), in nearest arithmetic; images
    that none of them proves are lost.

    Over a ``SparseBall`` intervals are vacuous after a convolution whose window has at most k units, while linear
    bounds are propagated back to the image, of which only k units may change.
    """

    certifies: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "crown"

    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        if model is None or images is None:
            return ""
        try:
            fold(model, images.shape[1:])
        except (UnsupportedOperation, InputError) as error:
            return str(error)
        return ""

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        if not len(batch):
            return []
        specification = Specification.robust(batch.labels, classes_of(model(batch.images[:1])))
        problem = Problem(model, ball.region(batch.images), specification, batch.index)
        verdicts = run_cascade(problem, Certify(stages=("ibp", "crown_ibp", "crown")).build(seed=0))
        return [Outcome(None if verdict.status == "verified" else "bounds") for verdict in verdicts]
