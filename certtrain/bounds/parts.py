"""A network in two parts: an extractor of features, and the classifier that reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..errors import InputError
from . import program as p
from .forward import Statistics
from .tracing import trace


@dataclass(frozen=True)
class Halves:
    """Two programs, each of which ``forward``, ``compute_bounds`` and ``compute_margins`` take for a model.

    Args:
        extractor: from the images to the features.
        classifier: from the features to the logits.
        place: of the features in the whole program.
    """

    extractor: p.Program
    classifier: p.Program
    place: int

    def share(self, statistics: Statistics) -> tuple[Statistics, Statistics]:
        """The whole network's batch statistics, for the extractor and for the classifier."""
        first = {position: found for position, found in statistics.items() if position <= self.place}
        second = {position - self.place: found for position, found in statistics.items() if position > self.place}
        return first, second


def split(model: nn.Module | p.Program, activations: int) -> Halves:
    """Cut a network right behind an activation, so that ``activations`` of them are left to the classifier.

    With 0 the classifier is what follows the last activation, usually one linear layer.

    Raises:
        InputError: there are not that many, or a connection leads around the cut; says which cuts there are.
    """
    nodes = trace(model).nodes
    active = [place for place, node in enumerate(nodes) if getattr(node, "activation", None) is not None]
    cuts = {left: place for left, place in enumerate(reversed(active)) if _is_cut(nodes, place)}
    if activations not in cuts:
        accepted = ", ".join(map(str, cuts)) or "a network with an activation that all paths go through"
        raise InputError(f"the network: found no cut that leaves {activations} activations; accepted: {accepted}")
    place = cuts[activations]
    behind = [replace(node, inputs=tuple(read - place for read in node.inputs)) for node in nodes[place + 1 :]]
    classifier = p.Program((p.Input("features", ()), *behind))
    return Halves(p.Program(nodes[: place + 1]), classifier, place)


def _is_cut(nodes: tuple[p.Node, ...], place: int) -> bool:
    """Whether all that comes later depends on earlier nodes through this one alone."""
    return place < len(nodes) - 1 and all(read >= place for node in nodes[place + 1 :] for read in node.inputs)
