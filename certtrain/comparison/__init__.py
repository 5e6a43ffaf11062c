"""Recipes beside each other: a study is trained, evaluated, and becomes one table."""

from .study import Curve, Row, Study, Trial, read_study

__all__ = ["Curve", "Row", "Study", "Trial", "read_study"]
