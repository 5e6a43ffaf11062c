"""Verification: problems in, verdicts out. Installed as ``certtrain.verifiers``."""

if __name__ == "verifiers":  # imported by its folder's name in a checkout: hand over to the one real module
    from certtrain._alias import hand_over

    hand_over("verifiers")
else:
    from .cascade import certify, run_cascade
    from .embedded_question import EmbeddedQuestion
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

    __all__ = [
        "AlphaStage", "AttackStage", "BabStage", "Certify", "CleanStage", "CrownIbpStage", "CrownStage",
        "EmbeddedQuestion", "FalsifyStage", "Finding", "IbpStage", "InputSplitStage", "Judge", "Limits", "LirpaStage",
        "LocationStage", "Problem", "Search", "Specification", "Stage", "Verdict", "certify", "run_cascade",
    ]  # fmt: skip
