"""How many test images stay right: clean, attacked, and certified by intervals, in one table."""

from .adversary import Adversary, Clean, Intervals, Lost, RestartedPgd
from .autoattack import AutoAttack
from .records import Question, measure
from .settings import Evaluate, adversary_of
from .table import Checkpoint, Contradiction, Evaluation, read_rows, unanswered, united

__all__ = [
    "Adversary", "AutoAttack", "Checkpoint", "Clean", "Contradiction", "Evaluate", "Evaluation", "Intervals", "Lost",
    "Question", "RestartedPgd", "adversary_of", "measure", "read_rows", "unanswered", "united",
]  # fmt: skip
