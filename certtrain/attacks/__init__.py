"""Attacks: configured objects with one call. Adding one is one file, and one line here."""

from .base import Attack, AttackResult
from .pgd import Pgd

__all__ = ["Attack", "AttackResult", "Pgd"]
