"""Training: schedules, the loop, checkpoints, and measurements on the validation split."""

from .averages import Averaging
from .diagnosing import Diagnose
from .guard import Guard
from .interruption import Interrupted, StopRequest
from .loop import TrainingStopped, check_images, fit
from .measuring import Measure
from .noising import InputNoise, SparseNoise
from .rates import Cycle
from .schedules import EpsilonSchedule, Linear, Smoothed
from .selection import Select
from .settings import Adam, AdamW, Optimiser, RAdam, Sgd, Training
from .update import Descend, NonFinite, UpdateRule
from .weight_perturbation import Awp, Lap

__all__ = [
    "Adam", "AdamW", "Averaging", "Awp", "Cycle", "Descend", "Diagnose", "EpsilonSchedule", "Guard", "InputNoise",
    "Interrupted", "Lap", "Linear", "Measure", "NonFinite", "Optimiser", "RAdam", "Select", "Sgd", "Smoothed",
    "SparseNoise", "StopRequest", "Training", "TrainingStopped", "UpdateRule", "check_images", "fit",
]  # fmt: skip
