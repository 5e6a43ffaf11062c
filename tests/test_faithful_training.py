"""Training and evaluation look at what was traced of a model: at the start and after each epoch, never per step."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.bounds import LinfBall
from certtrain.data import Digits
from certtrain.errors import InputError
from certtrain.evaluation import Intervals
from certtrain.export import Export
from certtrain.models import SmallCnn
from certtrain.noise import Noise
from certtrain.recipe import Config
from certtrain.step import Batch, Step
from certtrain.training import Smoothed, Training, evaluation
from certtrain.verifiers import Certify
from certtrain.workflows.train import train

TINY = Config(
    data=Digits(validation=0.1),
    model=SmallCnn(width=2, hidden=8),
    training=Training(epochs=3, batch_size=600, milestones=(), schedule=Smoothed(start=1, length=1)),
    certify=Certify(images=1),
    export=Export(enabled=False),
)


class Hiding(nn.Module):
    """Its first layer runs in bfloat16."""

    def __init__(self, size: int = 64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(size, 16), nn.Linear(16, 10)
        self.register_buffer("zero", torch.zeros(16))

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.first(x.flatten(1))
        return self.last(F.relu(z + self.zero))


def test_looked_at_before_training_and_after_each_epoch(tmp_path, monkeypatch):
    seen = []
    real = evaluation.checked_logits
    monkeypatch.setattr(evaluation, "checked_logits", lambda model, x: seen.append(len(x)) or real(model, x))
    train(TINY, tmp_path / "run", quiet=True)
    assert seen == [evaluation.COMPARED] * (1 + TINY.training.epochs)


def test_a_model_that_hides_something_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(SmallCnn, "build", lambda self, shape, classes: Hiding())
    with pytest.raises(InputError, match="traced"):
        train(dataclasses.replace(TINY, seed=1), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_evaluation_by_intervals_refuses_it():
    ball, index = LinfBall(0.01), torch.arange(4)
    batch = Batch(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), index)
    with pytest.raises(InputError, match="traced"):
        Intervals()(Hiding().eval(), batch, ball, Step.evaluation(ball, Noise(0, index)))
