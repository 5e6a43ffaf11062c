"""Every ONNX operator with a rule, in every version of its meaning: the numbers are onnxruntime's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx.defs
import pytest
import torch
from operator_table import FOUR, IMAGE, ONNX, Example, of, of_operator, whole
from walking import walk

from certtrain.bounds import Interval, compute_bounds
from certtrain.errors import InputError
from certtrain.verifiers.onnx_network import OnnxNetwork, replay_session
from certtrain.verifiers.onnx_operators import RULES

FIRST, LAST = 7, 23
"""The opsets that onnxruntime 1.31 promises to run."""
REDUCTIONS = {name for name in RULES if name.startswith("Reduce")}

MEANINGS: dict[str, list[Example]] = {
    "BatchNormalization": [of(abs(FOUR) + 1, FOUR, FOUR, abs(FOUR) + 1, shape=IMAGE, epsilon=0.1)],
    "Clip": [of(np.float32(0.1)), of("", np.float32(0.1)), of()],
    "LogSoftmax": [of(shape=(1, 2, 3)), of(shape=(1, 2, 3), axis=1), of(shape=(1, 2, 3), axis=-1)],
    "Pad": [of(whole(0, 1, 0, 2), mode="edge"), of(whole(0, 1, 0, 2), mode="reflect")],
    "ReduceMax": [of(shape=IMAGE), of(whole(1, 3), shape=IMAGE, keepdims=0)],
    "ReduceMean": [of(shape=IMAGE), of(whole(-1), shape=IMAGE, keepdims=0)],
    "ReduceSum": [of(shape=IMAGE), of(whole(1, 3), shape=IMAGE, keepdims=0)],
    "Softmax": [of(shape=(1, 2, 3)), of(shape=(1, 2, 3), axis=1), of(shape=(1, 2, 3), axis=-1)],
}  # fmt: skip
"""Uses whose meaning changed, beside those of the table of operators."""


def as_attribute(example: Example, place: int, name: str, *, single: bool = False) -> Example:
    """The example with a constant input as an attribute, as older versions have it."""
    if len(example.inputs) <= place:
        return example
    value = example.inputs[place]
    inputs = (*example.inputs[:place], *example.inputs[place + 1 :])
    if isinstance(value, str):
        return replace(example, inputs=inputs)
    value = value.item() if single else value.flatten().tolist()
    return replace(example, inputs=inputs, attributes=example.attributes | {name: value})


def at(name: str, example: Example, version: int) -> Example:
    """The example as the given opset writes it."""
    example = replace(example, opset=version)
    by_attribute = {**dict.fromkeys(REDUCTIONS - {"ReduceSum"}, 18), "ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}
    if version < by_attribute.get(name, 0):
        return as_attribute(example, 1, "axes")
    if name == "Split" and version < 13:
        return as_attribute(example, 1, "split")
    if name == "Slice" and version < 10:
        return as_attribute(as_attribute(as_attribute(example, 3, "axes"), 2, "ends"), 1, "starts")
    if name == "Clip" and version < 11:
        return as_attribute(as_attribute(example, 2, "max", single=True), 1, "min", single=True)
    if name == "Pad" and version < 11:
        return as_attribute(as_attribute(example, 2, "value", single=True), 1, "pads")
    if name == "Upsample" and version < 9:
        return as_attribute(example, 1, "scales")
    if name in ("Max", "Mean", "Min", "Sum") and version < 8:  # without broadcasting
        rows = (value if isinstance(value, str) else value.reshape(example.shape) for value in example.inputs)
        return replace(example, inputs=tuple(rows))
    if name == "Resize" and 11 <= version < 13:
        return replace(example, inputs=(example.inputs[0], np.zeros(0, np.float32), example.inputs[2]))
    if name == "Resize" and version < 11:
        return replace(example, inputs=(example.inputs[0], example.inputs[2]))
    return example


def versions(name: str) -> list[int]:
    """The opsets in which the operator's meaning or form changed, and the first that onnxruntime runs."""
    every = [schema for schema in onnx.defs.get_all_schemas_with_history() if schema.name == name and not schema.domain]
    begun = {max(schema.since_version, FIRST) for schema in every if schema.since_version <= LAST}
    return sorted(version for version in begun if not onnx.defs.get_schema(name, version).deprecated)


def compare(network: OnnxNetwork, note: str) -> None:
    """Values at random points and edges are onnxruntime's, on both levels of optimisation, and lie within bounds."""
    replay, noise = replay_session(network.model), torch.Generator().manual_seed(0)
    points = [torch.rand(network.shape, generator=noise) for _ in range(2)]
    points += [torch.zeros(network.shape), torch.ones(network.shape), torch.randn(network.shape, generator=noise)]
    box = compute_bounds(network.module, Interval.from_bounds(-torch.ones(1, 6), torch.ones(1, 6)))
    for x in points:
        theirs = replay(x)
        assert len(theirs) == 2, f"{note}: onnxruntime refuses the optimised graph"
        size = 2e-6 * float(theirs.nan_to_num().abs().max()) + 1e-12
        torch.testing.assert_close(
            network.module(x[None]).expand_as(theirs), theirs, rtol=0, atol=size, equal_nan=True,
            msg=lambda text: f"{note}: {text}",
        )  # fmt: skip
        if x.abs().max() <= 1 and box.lower.isfinite().all():
            assert box.contains(theirs, size).all(), note


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_version_is_read_by_its_own_meaning(name: str, tmp_path: Path):
    tried = 0
    for version in versions(name):
        for example in [*ONNX.get(name, [Example()]), *MEANINGS.get(name, [])]:
            network = of_operator(name, at(name, example, version), tmp_path)
            compare(network, f"opset {version}, {example}")
            tried += 1
    assert tried


def test_group_norms_of_groups_scales_are_refused(tmp_path: Path):
    """Opset 18's GroupNormalization has a scale for each group; the standard withdrew it."""
    example = of(FOUR[:2], FOUR[:2], shape=IMAGE, num_groups=2, opset=18)
    with pytest.raises(InputError, match=r"one\.onnx: .*GroupNormalization"):
        of_operator("GroupNormalization", example, tmp_path)


LATER = {
    "Pad of some axes": ("Pad", of(whole(1, 2), np.float32(0.3), whole(1), opset=18)),
    "Pad around": ("Pad", of(whole(0, 1, 0, 2), mode="wrap", opset=19)),
    "Resize of some axes": ("Resize", of("", np.array([2, 2], np.float32), shape=IMAGE, axes=[2, 3], opset=18)),
    "Resize to sizes": ("Resize", of("", "", whole(1, 4, 6, 5), shape=IMAGE, mode="linear", opset=13,
                                     coordinate_transformation_mode="align_corners")),
    "Resize of opset 10, down": ("Resize", of(np.array([1, 1, 0.5, 0.5], np.float32), shape=IMAGE, opset=10)),
    "Upsample by lines": ("Upsample", of(np.array([1, 1, 2, 2], np.float32), shape=IMAGE, mode="linear", opset=9)),
    "no axes": ("ReduceSum", of(shape=IMAGE, noop_with_empty_axes=1, opset=13)),
    "no axes of a mean": ("ReduceMean", of(shape=IMAGE, noop_with_empty_axes=1, opset=18)),
    "no axes of a maximum": ("ReduceMax", of(shape=IMAGE, noop_with_empty_axes=1, opset=18)),
    "no axes of a norm": ("ReduceL2", of(shape=IMAGE, shift=4.0, noop_with_empty_axes=1, opset=18)),
    "parts of one size": ("Split", of(axis=1, num_outputs=2, outputs=2, opset=18)),
    "zero stays": ("Reshape", of(whole(0, 2, 2), opset=14)),
}  # fmt: skip


@walk("name", LATER)
def test_what_versions_added(tmp_path, name):
    kind, example = LATER[name]
    compare(of_operator(kind, example, tmp_path), name)
