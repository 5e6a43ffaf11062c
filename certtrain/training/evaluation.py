"""Quick measurements while training, on the validation split; the test split is for the verifier alone."""

import torch
from torch import nn

from ..bounds import PerturbationSet, compute_margins, forward
from ..data import Split, in_order

BATCH = 512


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, ball: PerturbationSet) -> dict[str, float]:
    """Clean and IBP-certified accuracy of the model in evaluation mode; restores its mode."""
    training = model.training
    model.eval()
    correct = certified = 0
    for batch in in_order(split, BATCH):
        logits = forward(model, batch.images).logits
        margins, _ = compute_margins(model, ball.region(batch.images), batch.labels)
        correct += int((logits.argmax(1) == batch.labels).sum())
        certified += int((margins > 0).all(1).sum())
    model.train(training)
    return {"validation_accuracy": correct / len(split), "validation_certified_accuracy": certified / len(split)}
