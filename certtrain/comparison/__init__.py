"""Comparison of recipes: a study, its trained and evaluated runs, and its table."""

from .study import Curve, Row, Study, Trial, read_study

__all__ = ["Curve", "Row", "Study", "Trial", "read_study"]
