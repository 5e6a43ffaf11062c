"""Attacks that record their start, for the methods that need it: N-AAER and LAP."""

from .ascent import Ascent
from .base import Attack
from .sparse import SparsePgd

RECORDING = "an Ascent, or SparsePgd with keep: last"


def records_start(attack: Attack) -> bool:
    """Whether the attack's trace holds ``start`` (B, *shape), and ``logits`` (B, K) there."""
    return isinstance(attack, Ascent) or (isinstance(attack, SparsePgd) and attack.keep == "last")
