"""A network split into an extractor of features and a classifier of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import InputError
from .network import Network, Statistics, with_inputs
from .operations import Entrywise, Input, Operation
from .tracing import trace


@dataclass(frozen=True)
class Halves:
    """The two parts of a network; ``forward``, ``compute_bounds`` and ``compute_margins`` accept each as a model.

    Args:
        extractor: from the images to the features.
        classifier: from the features to the logits.
        place: position of the features in the whole network.
    """

    extractor: Network
    classifier: Network
    place: int

    def share(self, statistics: Statistics) -> tuple[Statistics, Statistics]:
        """The whole network's batch statistics, divided into the extractor's and the classifier's."""
        first = {position: one for position, one in statistics.items() if position <= self.place}
        second = {position - self.place: one for position, one in statistics.items() if position > self.place}
        return first, second


def split(model: nn.Module | Network, activations: int) -> Halves:
    """Split a network behind an activation, so that the classifier has ``activations`` activations.

    With 0 the classifier is the part behind the last activation, usually one linear layer.

    Raises:
        InputError: too few activations, or a connection bypasses the cut; lists the possible cuts.
    """
    operations = trace(model).operations
    active = [place for place, operation in enumerate(operations) if isinstance(operation, Entrywise)]
    cuts = {left: place for left, place in enumerate(reversed(active)) if _is_cut(operations, place)}
    if activations not in cuts:
        accepted = ", ".join(map(str, cuts)) or "a network with an activation that all paths go through"
        raise InputError(f"the network: found no cut that leaves {activations} activations; accepted: {accepted}")
    place = cuts[activations]
    behind = [with_inputs(one, *(read - place for read in one.inputs)) for one in operations[place + 1 :]]
    classifier = Network((Input("features", ()), *behind))
    return Halves(Network(operations[: place + 1]), classifier, place)


def _is_cut(operations: Sequence[Operation], place: int) -> bool:
    """Whether later operations depend on earlier ones only through the one at ``place``."""
    later = operations[place + 1 :]
    return len(later) > 0 and all(read >= place for operation in later for read in operation.inputs)
