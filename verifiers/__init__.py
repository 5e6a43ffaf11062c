"""Verification: problems in, verdicts out. Installed as ``certtrain.verifiers``."""

if __name__ == "verifiers":  # imported by its folder's name in a checkout: hand over to the one real module
    from certtrain._alias import hand_over

    hand_over("verifiers")
else:
    from .cascade import Certify, certify, certify_split, run_cascade
    from .problem import Problem, Specification, Verdict
    from .stages import AttackStage, CleanStage, Finding, IbpStage, Stage

    __all__ = [
        "AttackStage", "Certify", "CleanStage", "Finding", "IbpStage", "Problem", "Specification", "Stage",
        "Verdict", "certify", "certify_split", "run_cascade",
    ]  # fmt: skip
