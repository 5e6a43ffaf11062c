"""ONNX operators that normalise by a value's own statistics: numbers and bounds."""

import numpy as np
import pytest
from test_onnx_network import Graph, agrees, read, the_same_weights, weights
from test_onnx_products import ROW, shaped
from walking import walk

from certtrain.errors import InputError

__all__ = ["read", "the_same_weights"]  # fixtures


def norm(kind, shape, opset, *sizes, **attributes):
    def build(graph):
        graph.opset = opset
        return graph(kind, shaped(graph, shape, 2.0), *[weights(*size) for size in sizes], **attributes)

    return build


NETWORKS = {
    "layer norm": (norm("LayerNormalization", (1, 3, 4), 17, (4,), (4,), epsilon=0.01), ROW),
    "layer norm without bias": (norm("LayerNormalization", (2, 3, 4), 17, (3, 4), axis=1, epsilon=0.1), ROW),
    "layer norm of all": (norm("LayerNormalization", (2, 4), 17, (2, 4), (2, 4), axis=0, epsilon=0.1), ROW),
    "layer norm of a vector": (norm("LayerNormalization", (5,), 17, (5,), epsilon=0.1), ROW),
    "instance norm": (norm("InstanceNormalization", (1, 2, 3, 2), 13, (2,), (2,), epsilon=0.1), ROW),
    "group norm": (norm("GroupNormalization", (1, 4, 3), 21, (4,), (4,), num_groups=2, epsilon=0.1), ROW),
    "rms norm": (norm("RMSNormalization", (1, 3, 4), 23, (4,), epsilon=0.1), ROW),
}


@walk("name", NETWORKS)
def test_numbers_are_onnxruntimes(read, name):
    build, shape = NETWORKS[name]
    graph = Graph(shape)
    model = graph.model(build(graph), ir=11 if graph.opset > 21 else 10)
    agrees(read(model))


def test_an_epsilon_of_zero_is_refused(read):
    graph = Graph(ROW)
    graph.opset = 17
    y = graph("LayerNormalization", "x", np.ones(5, np.float32), name="here", epsilon=0.0)
    with pytest.raises(InputError, match=r"LayerNormalization 'here': found epsilon=0.0; accepted: "):
        read(graph.model(y))
