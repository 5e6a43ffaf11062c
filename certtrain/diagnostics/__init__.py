"""Diagnostics: what a network's loss looks like around its images and its weights. They change nothing."""

from .alignment import boundary_distortion, fgsm_pgd_cosine, gradient_alignment
from .hessian import Spectrum, hessian_spectrum
from .landscape import Landscape, landscape
from .logits import DivergenceSplit, QubGap, divergence_split, qub_gap
from .looking import each, spread
from .table import DIAGNOSTICS, Subject, check_names

__all__ = [
    "DIAGNOSTICS", "DivergenceSplit", "Landscape", "QubGap", "Spectrum", "Subject", "boundary_distortion",
    "check_names", "divergence_split", "each", "fgsm_pgd_cosine", "gradient_alignment", "hessian_spectrum",
    "landscape", "qub_gap", "spread",
]  # fmt: skip
