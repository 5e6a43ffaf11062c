"""Accuracies on the test images, clean, under attack, and certified by bounds, in one table."""

from .adversary import Adversary, Clean, Intervals, Outcome, RestartedPgd
from .autoattack import AutoAttack
from .question import AdversaryQuestion
from .relaxations import Relaxations
from .settings import Evaluate, adversary_of
from .sparse import Searching, change_of, rebuilt
from .table import Checkpoint, Contradiction, Evaluation, read_rows, unanswered, united

__all__ = [
    "Adversary", "AdversaryQuestion", "AutoAttack", "Checkpoint", "Clean", "Contradiction", "Evaluate", "Evaluation",
    "Intervals", "Outcome", "Relaxations", "RestartedPgd", "Searching", "adversary_of", "change_of", "read_rows",
    "rebuilt", "unanswered", "united",
]  # fmt: skip
