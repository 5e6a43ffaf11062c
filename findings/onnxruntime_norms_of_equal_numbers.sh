#!/usr/bin/env bash
# onnxruntime 1.31.1: the optimisation level moves the outputs of an exported layer norm by percents, not by roundings.
# A good guess: the default optimisations fuse operators and sum in another order, so outputs move by about 1e-6 of
# their size, and 1e-5 is a safe tolerance between two runs of one file.
# Seen instead: exporters below opset 17 write a layer norm as ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div. In a row
# of equal numbers, as a patch of plain background gives, the difference from the mean should be 0. The chain computes
# the mean's rounding error instead and divides it by the root of epsilon (1e-5): outputs of up to some 1e-2. The fused
# LayerNormalization, which the default level puts in the chain's place, gives exactly 0. Other rows agree to 1e-6.
# Verifiers that replay counterexamples, and tests of exports, meet two networks in one file.
# Runs without certtrain. PYTHON: an interpreter. Exits non-zero where the behaviour is another one.
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m venv "$site"
"$site/bin/python" -m pip install -q onnx==1.23.2 onnxruntime==1.31.1
cd "$site"
bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

print("onnxruntime", version("onnxruntime"), "onnx", version("onnx"), "python", sys.version.split()[0])
WIDTH = 48
constants = {"two": np.float32(2), "epsilon": np.float32(1e-5),
             "weight": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)}
nodes = [
    helper.make_node("ReduceMean", ["x"], ["mean"], axes=[-1]), helper.make_node("Sub", ["x", "mean"], ["apart"]),
    helper.make_node("Pow", ["apart", "two"], ["squares"]), helper.make_node("ReduceMean", ["squares"], ["variance"], axes=[-1]),
    helper.make_node("Add", ["variance", "epsilon"], ["sum"]), helper.make_node("Sqrt", ["sum"], ["deviation"]),
    helper.make_node("Div", ["apart", "deviation"], ["ratio"]), helper.make_node("Mul", ["ratio", "weight"], ["scaled"]),
    helper.make_node("Add", ["scaled", "bias"], ["y"]),
]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in "xy"]
graph = helper.make_graph(nodes, "layer norm", ends[:1], ends[1:],
                          [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8).SerializeToString()


def session(level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


levels = onnxruntime.GraphOptimizationLevel
plain, default = session(levels.ORT_DISABLE_ALL), session(levels.ORT_ENABLE_ALL)
draw = np.random.default_rng(0)
apart = {"rows of equal numbers": 0.0, "other rows": 0.0}
for _ in range(200):
    value = np.float32(draw.uniform(1, 1000))
    for kind, row in (("rows of equal numbers", np.full((1, WIDTH), value)), ("other rows", draw.normal(size=(1, WIDTH)))):
        outputs = [run.run(None, {"x": row.astype(np.float32)})[0] for run in (plain, default)]
        apart[kind] = max(apart[kind], float(abs(outputs[0] - outputs[1]).max()))
        if kind == "rows of equal numbers" and outputs[1].any():
            sys.exit(f"the default level no longer gives 0 for equal numbers: {outputs[1].ravel()[:3]}")
print("largest difference between the two levels:", apart)
if not (apart["rows of equal numbers"] > 1e-3 and apart["other rows"] < 1e-5):
    sys.exit("another behaviour")
PYTHON
