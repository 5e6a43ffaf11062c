"""Attacks with small budgets: what the tests of all attacks share."""

from certtrain.attacks import Attack

ATTACKS = [cls for cls in Attack.members().values() if cls.__module__.startswith("certtrain.")]
QUICK = {
    "SparseRs": {"queries": 30}, "CornerSearch": {"per_size": 20, "best": 10}, "Pgd0": {"steps": 8, "restarts": 2},
    "Saif": {"steps": 20}, "SigmaZero": {"steps": 20},
}  # fmt: skip
"""Smaller budgets of attacks whose own take minutes."""


def quick(kind: type[Attack], **fields) -> Attack:
    return kind(**QUICK.get(kind.__name__, {}), **fields)
