"""How many test images stay right: clean, attacked, and certified by bounds, in one table."""

from .adversary import Adversary, Clean, Intervals, Lost, RestartedPgd
from .autoattack import AutoAttack
from .records import Question, measure
from .relaxations import Relaxations
from .settings import Evaluate, adversary_of
from .sparse import Searching, change_of, rebuilt
from .table import Checkpoint, Contradiction, Evaluation, read_rows, unanswered, united

__all__ = [
    "Adversary", "AutoAttack", "Checkpoint", "Clean", "Contradiction", "Evaluate", "Evaluation", "Intervals", "Lost",
    "Question", "Relaxations", "RestartedPgd", "Searching", "adversary_of", "change_of", "measure", "read_rows",
    "rebuilt", "unanswered", "united",
]  # fmt: skip
