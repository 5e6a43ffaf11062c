"""A network in two parts: an extractor of features, and the classifier that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import InputError
from .network import Network, Statistics, moved
from .operations import Entrywise, Input, Operation
from .tracing import trace


@dataclass(frozen=True)
class Halves:
    """Two networks, each of which ``forward``, ``compute_bounds`` and ``compute_margins`` take for a model.

    Args:
        extractor: from the images to the features.
        classifier: from the features to the logits.
        place: of the features in the whole network.
    """

    extractor: Network
    classifier: Network
    place: int

    def share(self, statistics: Statistics) -> tuple[Statistics, Statistics]:
        """The whole network's batch statistics, for the extractor and for the classifier."""
        first = {position: found for position, found in statistics.items() if position <= self.place}
        second = {position - self.place: found for position, found in statistics.items() if position > self.place}
        return first, second


def split(model: nn.Module | Network, activations: int) -> Halves:
    """Cut a network right behind an activation, so that ``activations`` of them are left to the classifier.

    With 0 the classifier is what follows the last activation, usually one linear layer.

    Raises:
        InputError: there are not that many, or a connection leads around the cut; says which cuts there are.
    """
    operations = trace(model).operations
    active = [place for place, operation in enumerate(operations) if isinstance(operation, Entrywise)]
    cuts = {left: place for left, place in enumerate(reversed(active)) if _is_cut(operations, place)}
    if activations not in cuts:
        accepted = ", ".join(map(str, cuts)) or "a network with an activation that all paths go through"
        raise InputError(f"the network: found no cut that leaves {activations} activations; accepted: {accepted}")
    place = cuts[activations]
    behind = [moved(operation, *(read - place for read in operation.inputs)) for operation in operations[place + 1 :]]
    classifier = Network((Input("features", ()), *behind))
    return Halves(Network(operations[: place + 1]), classifier, place)


def _is_cut(operations: Sequence[Operation], place: int) -> bool:
    """Whether all that comes later depends on earlier operations through this one alone."""
    later = operations[place + 1 :]
    return len(later) > 0 and all(read >= place for operation in later for read in operation.inputs)
