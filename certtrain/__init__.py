"""certtrain: train image classifiers whose robustness can be proved, and prove it.

Importing this package costs nothing; each name below is imported when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bounds import Bounds, Box, Interval, L1Ball, L2Ball, LinfBall, SparseBall, compute_bounds
    from .export import export_onnx
    from .models import BinaryScore
    from .recipe import Config
    from .verifiers import certify
    from .verifiers.solving import solve
    from .workflows.compare import compare
    from .workflows.diagnose import diagnose
    from .workflows.evaluate import evaluate
    from .workflows.import_checkpoint import import_checkpoint
    from .workflows.run import load_model
    from .workflows.train import train
    from .workflows.verify import verify

_HOMES = {
    "BinaryScore": "models", "Bounds": "bounds", "Box": "bounds", "Interval": "bounds", "L1Ball": "bounds",
    "L2Ball": "bounds", "LinfBall": "bounds", "SparseBall": "bounds", "compute_bounds": "bounds",
    "Config": "recipe", "certify": "verifiers", "compare": "workflows.compare", "diagnose": "workflows.diagnose",
    "evaluate": "workflows.evaluate", "export_onnx": "export", "import_checkpoint": "workflows.import_checkpoint",
    "load_model": "workflows.run", "solve": "verifiers.solving", "train": "workflows.train",
    "verify": "workflows.verify",
}  # fmt: skip

__all__ = [
    "BinaryScore", "Bounds", "Box", "Config", "Interval", "L1Ball", "L2Ball", "LinfBall", "SparseBall", "certify",
    "compare", "compute_bounds", "diagnose", "evaluate", "export_onnx", "import_checkpoint", "load_model", "solve",
    "train", "verify",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'certtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
