"""Quick measurements during training, never on the test split, which only the verifier and the evaluation use."""

from __future__ import annotations

import torch
from torch import nn

from ..attacks import Attack
from ..bounds import PerturbationSet, UnsupportedOperation, checked_logits, compute_margins, trace
from ..data import Split, in_order
from ..noise import Noise, key_of
from ..step import Step

BATCH = 512
COMPARED = 8
"""Number of images on which a model and its traced network are compared, before training and after each epoch."""


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, ball: PerturbationSet) -> dict[str, float]:
    """Clean accuracy of the model in evaluation mode, and IBP-certified accuracy if bounds support all its layers. The
    model's mode is restored."""
    training = model.training
    model.eval()
    certifiable = traceable(model, torch.Size(split.shape[1:]))
    correct = certified = 0
    for batch in in_order(split, BATCH):
        correct += int((model(batch.images).argmax(1) == batch.labels).sum())
        if certifiable:
            margins, _ = compute_margins(model, ball.region(batch.images), batch.labels)
            certified += int((margins > 0).all(1).sum())
    model.train(training)
    accuracy = {"validation_accuracy": correct / len(split)}
    return accuracy | ({"validation_certified_accuracy": certified / len(split)} if certifiable else {})


def attacked_accuracy(
    model: nn.Module, split: Split, ball: PerturbationSet, attack: Attack, seed: int, images: int | None = None
) -> float:
    """Share of a split's first ``images`` images that the model, in evaluation mode, classifies correctly under attack.

    Logits that are not finite count as wrong. The attack's noise is keyed by image and the same at every call. The
    model's mode and buffers are restored.
    """
    training = model.training
    model.eval()
    count = min(images or len(split), len(split))
    correct = 0
    for batch in in_order(split, BATCH, stop=count):
        step = Step.evaluation(ball, Noise(key_of(seed, "attacked accuracy"), batch.index))
        attacked = attack(model, batch, ball, step).images
        with torch.no_grad():
            logits = model(attacked)
        right = (logits.argmax(1) == batch.labels) & logits.isfinite().all(1)
        correct += int(right.sum())
    model.train(training)
    return correct / count


def check_program(model: nn.Module, split: Split) -> None:
    """Compare a model with its traced network on a split's first images. Does nothing if bounds do not support the
    model.

    Raises:
        InputError: they differ beyond rounding, or the logits of an image depend on other images.
    """
    if traceable(model, torch.Size(split.shape[1:])):
        checked_logits(model, split.pixels(torch.arange(min(COMPARED, len(split)))))


def traceable(model: nn.Module, shape: torch.Size | None = None) -> bool:
    """Whether bounds support all of the model's layers, for images of ``shape`` (needed where forward reads sizes)."""
    try:
        trace(model, shape)
    except UnsupportedOperation:
        return False
    return True
