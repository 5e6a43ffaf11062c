from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds import (
    Activity,
    Forward,
    Interval,
    Network,
    Region,
    Statistics,
    compute_activity,
    compute_margins,
    forward,
    split,
)  # fmt: skip
from ..errors import InputError, check
from ..step import Batch, Step
from .certified import CertifiedLoss, margin_loss, margins_of, verified_parts

MEMORY = 1 << 29
"""Bytes of points attacked at a time: 199 wrong classes of CNN7 on TinyImageNet take 26 MB for each image."""


@dataclass(frozen=True)
class Taps(CertifiedLoss):
    """TAPS (Mao et al., arXiv 2305.04574): intervals through an extractor, then an attack in the box of its features.

    kappa · CE(clean) + (1 - kappa) · L_TAPS · L_verified, batch means, once the ramp is done; plain intervals until
    then. L_TAPS is the loss of margins found by gradient descent in the box of features, separately for every wrong
    class. Its gradient flows into a side of the box as far as the point found lies near that side. Batch statistics are
    those of the clean pass. With ``accumulate`` each part multiplies its own means.

    The attack takes n steps of max(0.2, 2 / n) of the box's width (a fifth of that after 70 % of them where n >= 10),
    as CTBench does, from K - 1 points of features for each image: with many classes choose a cut with few features.

    Args:
        classifier_activations: activations behind the box of features. Published splits of CNN7's 21 modules:
            "17 4" is 1, "13 8" is 2, "10 11" is 3, "4 17" is 5.
        gradient_scale: multiplies the gradient of L_TAPS.
        threshold: the share of the width, measured from a side, over which a point's gradient to that side fades.
        latent_steps, latent_restarts: steps and restarts of the attack on features.
        shrink: as in ``Sabr``.
    """

    classifier_activations: int = 1
    gradient_scale: float = 4.0
    threshold: float = 0.5
    latent_steps: int = 10
    latent_restarts: int = 3
    shrink: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.classifier_activations >= 0, "classifier_activations", self.classifier_activations, "0 or more")
        check(self.gradient_scale > 0, "gradient_scale", self.gradient_scale, "a number > 0")
        check(0 < self.threshold <= 1, "threshold", self.threshold, "a share in (0, 1]")
        check(self.latent_steps >= 1, "latent_steps", self.latent_steps, "a whole number >= 1")
        check(self.latent_restarts >= 1, "latent_restarts", self.latent_restarts, "a whole number >= 1")
        check(0 < self.shrink <= 1, "shrink", self.shrink, "a number in (0, 1]")

    def check_model(self, model: nn.Module) -> None:
        try:
            split(model, self.classifier_activations)
        except InputError as error:
            raise InputError(f"loss.classifier_activations: {error}") from error

    def clean_gradient(self, step: Step) -> bool:
        return True  # the bounds use the clean pass' statistics, with their gradients

    def box(self, model: nn.Module, batch: Batch, step: Step) -> Interval | Region:
        """The set that the bounds propagate."""
        return step.ball.region(batch.images)

    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        box = self.box(model, batch, step)
        if step.ramp < 1:
            verified, activity = compute_margins(
                model, box, batch.labels, clean.statistics, keep=True, shrink=self.shrink
            )
            return margin_loss(verified).mean(), verified_parts(verified), activity
        halves = split(model, self.classifier_activations)
        first, second = halves.share(clean.statistics)
        features, activity = compute_activity(halves.extractor, box, first, shrink=self.shrink)
        verified, _ = compute_margins(halves.classifier, features, batch.labels, second, shrink=self.shrink)
        classifier = Classifier(halves.classifier, batch.labels, second)
        points = self.worst(classifier, features, clean.logits.shape[1] - 1, step)
        estimate = margin_loss(classifier(connected(features, points, self.threshold))).mean()
        scaled = estimate.detach() + self.gradient_scale * (estimate - estimate.detach())
        loss = scaled * margin_loss(verified).mean()
        return loss, verified_parts(verified) | {"estimated_loss": estimate}, activity

    def worst(self, classifier: "Classifier", features: Interval, wrong: int, step: Step) -> Tensor:
        """(B, wrong, *features): for each wrong class the point of the box with the smallest margin found."""
        center = features.center
        count = max(1, MEMORY // max(1, wrong * center[0].numel() * center.element_size()))
        parts = [slice(first, first + count) for first in range(0, len(center), count)]
        found = [
            self._worst(classifier.part(rows), features.map(lambda x, rows=rows: x[rows]), wrong, step.part(rows))
            for rows in parts
        ]
        return torch.cat(found)

    @torch.no_grad()
    def _worst(self, classifier: "Classifier", features: Interval, wrong: int, step: Step) -> Tensor:
        lower, width = features.lower.unsqueeze(1), (2 * features.radius).unsqueeze(1)
        upper = features.upper.unsqueeze(1)
        best, least = lower.expand(-1, wrong, *lower.shape[2:]), torch.inf
        for restart in range(self.latent_restarts):
            share = step.noise.uniform((wrong, *lower.shape[2:]), f"features/{restart}", lower.dtype)
            points, size = lower + share * width, max(0.2, 2 / self.latent_steps)  # of the width: reaches every side
            for number in range(self.latent_steps + 1):
                with torch.enable_grad():
                    at = points.requires_grad_()
                    margins = classifier(at)
                    total = margins.sum()
                smaller = margins.detach() < least
                least = torch.where(smaller, margins.detach(), least)
                best = torch.where(smaller.reshape(*smaller.shape, *[1] * (lower.ndim - 2)), points.detach(), best)
                if number == self.latent_steps:
                    break
                (gradient,) = torch.autograd.grad(total, at)
                points = torch.clamp(points.detach() - size * width * gradient.sign(), lower, upper)
                if self.latent_steps >= 10 and number + 1 == int(0.7 * self.latent_steps):
                    size *= 0.2
        return best


@dataclass(frozen=True)
class Classifier:
    """Map points of features (B, K - 1, *shape), one for each wrong class, to that class' margin there, (B, K - 1)."""

    program: Network
    labels: Tensor
    statistics: Statistics

    def part(self, rows: slice) -> "Classifier":
        return Classifier(self.program, self.labels[rows], self.statistics)

    def __call__(self, points: Tensor) -> Tensor:
        wrong = points.shape[1]
        logits = forward(self.program, points.flatten(0, 1), self.statistics).logits
        margins = margins_of(logits, self.labels.repeat_interleave(wrong))
        return margins.reshape(-1, wrong, wrong).diagonal(dim1=1, dim2=2)


def connected(box: Interval, points: Tensor, threshold: float) -> Tensor:
    """Connect ``points`` (B, J, *shape) of a box (B, *shape) to its sides, for gradients.

    The gradient to a side is 1 at that side and fades to 0 over ``threshold`` of the width; where the box has no width,
    each side gets one half.
    """
    lower, upper = box.lower.unsqueeze(1), box.upper.unsqueeze(1)
    with torch.no_grad():
        reach = threshold * (upper - lower)
        safe = torch.where(reach > 0, reach, 1)
        to_upper, to_lower = (
            torch.where(reach > 0, (1 - distance / safe).clamp(0, 1), 0.5)
            for distance in (upper - points, points - lower)
        )
    return points + to_lower * (lower - lower.detach()) + to_upper * (upper - upper.detach())
