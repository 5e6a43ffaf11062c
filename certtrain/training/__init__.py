"""Training: schedules, the loop, checkpoints, and measurements on the validation split."""

from .interruption import Interrupted, StopRequest
from .loop import TrainingStopped, check_batches, fit
from .schedules import EpsilonSchedule, Linear, Smoothed
from .settings import Adam, Optimiser, Sgd, Training
from .update import Descend, NonFinite, UpdateRule

__all__ = [
    "Adam", "Descend", "EpsilonSchedule", "Interrupted", "Linear", "NonFinite", "Optimiser", "Sgd", "Smoothed",
    "StopRequest", "Training", "TrainingStopped", "UpdateRule", "check_batches", "fit",
]  # fmt: skip
