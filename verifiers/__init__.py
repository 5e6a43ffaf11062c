"""Verification: problems in, verdicts out. Installed as ``certtrain.verifiers``."""

if __name__ == "verifiers":  # imported by its folder's name in a checkout: hand over to the one real module
    from certtrain._alias import hand_over

    hand_over("verifiers")
else:
    from .cascade import certify, run_cascade
    from .embedded_question import EmbeddedQuestion
    from .limits import Limits
    from .problem import Problem, Specification, Verdict
    from .search import Search
    from .settings import Certify
    from .stages import (
        AlphaStage,
        AttackStage,
        BabStage,
        CleanStage,
        CrownStage,
        Finding,
        IbpStage,
        InputSplitStage,
        Judge,
        LocationStage,
        Stage,
    )

    __all__ = [
        "AlphaStage", "AttackStage", "BabStage", "Certify", "CleanStage", "CrownStage", "EmbeddedQuestion",
        "Finding", "IbpStage", "InputSplitStage", "Judge", "Limits", "LocationStage", "Problem", "Search",
        "Specification", "Stage", "Verdict", "certify", "run_cascade",
    ]  # fmt: skip
