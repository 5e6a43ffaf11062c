"""Training: schedules, the loop, checkpoints, and measurements on the validation split."""

from .averages import Averaging
from .interruption import Interrupted, StopRequest
from .loop import TrainingStopped, check_batches, fit
from .measuring import Measure
from .schedules import EpsilonSchedule, Linear, Smoothed
from .settings import Adam, AdamW, Optimiser, RAdam, Sgd, Training
from .update import Descend, NonFinite, UpdateRule

__all__ = [
    "Adam", "AdamW", "Averaging", "Descend", "EpsilonSchedule", "Interrupted", "Linear", "Measure", "NonFinite",
    "Optimiser", "RAdam", "Sgd", "Smoothed", "StopRequest", "Training", "TrainingStopped", "UpdateRule",
    "check_batches", "fit",
]  # fmt: skip
