"""Diagnostics of a network's loss around its images and its weights. They change nothing."""

from .alignment import boundary_distortion, fgsm_pgd_cosine, gradient_alignment
from .hessian import Spectrum, hessian_spectrum
from .interpolation import Interpolation, interpolation
from .landscape import Landscape, landscape
from .logits import DivergenceSplit, QubGap, divergence_split, qub_gap
from .looking import each, spread
from .one_and_many import attacked
from .overlap import Overlap, between, overlap
from .table import DIAGNOSTICS, Diagnostic, Subject, check_balls, check_names, those_for, usual
from .weights import (
    GradientGap,
    WeightLandscape,
    adversarial_hessian,
    gradient_gap,
    weight_landscape,
)

__all__ = [
    "DIAGNOSTICS", "Diagnostic", "DivergenceSplit", "GradientGap", "Interpolation", "Landscape",
    "Overlap", "QubGap", "Spectrum", "Subject", "WeightLandscape", "adversarial_hessian", "attacked", "between",
    "boundary_distortion", "check_balls", "check_names", "divergence_split", "each", "fgsm_pgd_cosine",
    "gradient_alignment", "gradient_gap", "hessian_spectrum", "interpolation", "landscape", "overlap", "qub_gap",
    "spread", "those_for", "usual", "weight_landscape",
]  # fmt: skip
