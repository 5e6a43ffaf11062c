"""Verification: problems in, verdicts out. Installed as ``certtrain.verifiers``."""

if __name__ == "verifiers":  # imported by its folder's name in a checkout: hand over to the one real module
    from certtrain._alias import hand_over

    hand_over("verifiers")
else:
    from typing import TYPE_CHECKING, Any

    from .cascade import certify, run_cascade
    from .difference_stage import DifferenceStage
    from .falsify import FalsifyStage
    from .limits import Limits
    from .lirpa import LirpaStage
    from .problem import Problem, Specification, Verdict
    from .search import Search
    from .settings import Certify
    from .stage import Finding, Judge, Stage
    from .stages import (
        AlphaStage,
        AttackStage,
        BabStage,
        CleanStage,
        CrownIbpStage,
        CrownStage,
        IbpStage,
        InputSplitStage,
        LocationStage,
    )

    if TYPE_CHECKING:
        from .embedded_question import EmbeddedQuestion

    __all__ = [
        "AlphaStage", "AttackStage", "BabStage", "Certify", "CleanStage", "CrownIbpStage", "CrownStage",
        "DifferenceStage", "EmbeddedQuestion", "FalsifyStage", "Finding", "IbpStage", "InputSplitStage", "Judge",
        "Limits", "LirpaStage", "LocationStage", "Problem", "Search", "Specification", "Stage", "Verdict", "certify",
        "run_cascade",
    ]  # fmt: skip

    def __getattr__(name: str) -> Any:
        """``EmbeddedQuestion``, imported at its first use: it needs data sets and console, a property neither."""
        if name != "EmbeddedQuestion":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .embedded_question import EmbeddedQuestion

        return EmbeddedQuestion
