"""The order in which a file's layers are computed: by the numbers in names, by shapes, or as the user says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import InputError
from .layers import Layer
from .matching import mismatch

REGISTERED = "the file's own, in which modules were registered: taken for the order of use"
NAMED = "the only one that the numbers in the names and the shapes allow"
GIVEN = "given"


def name_of(layer: Layer) -> str:
    """The layer's name: ``layers.0`` for ``layers.0.weight``; for a numbered node its first tensor's name."""
    first = next(iter(layer.names.values()))
    path, _, role = first.rpartition(".")
    return first if role in ("param", "buffer") else path


def before(one: str, other: str) -> bool:
    """Whether the first difference of two names is a number, smaller in the first: layers.2 before layers.10."""
    for left, right in zip(_parts(one), _parts(other)):
        if left != right:
            return left.isdigit() and right.isdigit() and int(left) < int(right)
    return False


def arrange(
    found: Sequence[Layer], wanted: Sequence[Layer], order: Sequence[str], ordered: bool, prefix: str, where: str
) -> tuple[list[Layer], str]:
    """Sort the file's layers into the order of the architecture's; also return the reason for that order.

    Args:
        found: the file's layers, in the order of the file.
        wanted: the architecture's layers.
        order: names of layers, or prefixes of names, in the order of computation; empty to derive it.
        ordered: whether the file keeps an order.
        prefix: the common prefix of all names in the file.
    Returns:
        the layers and the reason. Where no order fits, the file's order as far as ``order`` allows: ``fit`` then
        reports the mismatch.
    Raises:
        InputError: ``order`` names a layer that is not there, or leaves one out; or layers of one shape could be
            exchanged, and no number in their names says which comes first.
    """
    ranks = _ranks(found, order, prefix, where)
    orders = _orders(found, wanted, ranks)
    if ordered and not order:
        own = list(found)
        disagrees = any(before(name_of(b), name_of(a)) for i, a in enumerate(own) for b in own[i + 1 :])
        if disagrees and orders and mismatch(own, list(wanted)) is None:
            _refuse(own, orders[0], where, "stand in the file against the numbers in their names")
        return own, REGISTERED
    if len(orders) > 1:
        one, other = orders
        _refuse(one, other, where, "fit each other's places, and nothing in their names says which comes first")
    as_ranked = [layer for _, layer in sorted(zip(ranks, found), key=lambda pair: pair[0])]
    return (orders[0] if orders else as_ranked), GIVEN if order else NAMED


def _refuse(one: Sequence[Layer], other: Sequence[Layer], where: str, why: str) -> None:
    exchanged = [name_of(a) for a, b in zip(one, other) if a is not b]
    # all names, not only those exchanged: a batch norm moves with its layer, and names may share a prefix
    names = ",".join(dict.fromkeys(name_of(layer) for layer in one))
    raise InputError(
        f"{where}: the layers {', '.join(exchanged)} {why}; accepted: --order with all layers in the order in which "
        f"they are computed, such as {names}"
    )


def _ranks(found: Sequence[Layer], order: Sequence[str], prefix: str, where: str) -> list[int]:
    """The position in ``order`` of each layer's name."""
    if not order:
        return [0] * len(found)
    names = [name_of(layer) for layer in found]
    given = [entry.strip().strip(".") for entry in order]
    twice = next((entry for entry in given if given.count(entry) > 1), None)
    if twice is not None:
        raise InputError(f"order: found {twice!r} twice; accepted: each of {', '.join(names)} once")
    ranks = []
    for name in names:
        short = name.removeprefix(prefix)
        fitting = [rank for rank, entry in enumerate(given) if _begins(name, entry) or _begins(short, entry)]
        if not fitting:
            raise InputError(f"order: found nothing of {name}, a layer of {where}; accepted: all of {', '.join(names)}")
        ranks.append(max(fitting, key=lambda rank: len(given[rank])))
    idle = [entry for rank, entry in enumerate(given) if rank not in ranks]
    if idle:
        raise InputError(f"order: found {idle[0]!r}, which no layer of {where} is called; accepted: {', '.join(names)}")
    return ranks


def _begins(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def _parts(name: str) -> list[str]:
    return re.findall(r"\d+|\D+", name)


def _orders(found: Sequence[Layer], wanted: Sequence[Layer], ranks: Sequence[int]) -> list[list[Layer]]:
    """Up to two orders in which the layers fit, among those that ranks and names allow."""
    if len(found) != len(wanted):
        return []
    names = [name_of(layer) for layer in found]
    count = range(len(found))
    earlier = [
        {i for i in count if ranks[i] < ranks[j] or (ranks[i] == ranks[j] and before(names[i], names[j]))}
        for j in count
    ]  # fmt: skip
    complete: list[list[Layer]] = []
    dead: set[frozenset[int]] = set()

    def search(done: list[int], left: frozenset[int]) -> bool:
        """Whether an order begins with ``done``; stops at the second complete order."""
        if not left:
            complete.append([found[i] for i in done])
            return True
        if left in dead:
            return False
        slot, any_ = wanted[len(done)], False
        for i in sorted(left):
            if not earlier[i] & left and (found[i].kind, found[i].shapes) == (slot.kind, slot.shapes):
                any_ |= search([*done, i], left - {i})
                if len(complete) > 1:
                    return True
        if not any_:
            dead.add(left)
        return any_

    search([], frozenset(count))
    return complete
