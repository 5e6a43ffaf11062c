"""Recipes beside each other: a study is trained, evaluated, and becomes one table."""

from .running import Comparison, compare
from .study import Curve, Row, Study, Trial, read_study

__all__ = ["Comparison", "Curve", "Row", "Study", "Trial", "compare", "read_study"]
