"""A first verdict loads no more than it needs (how long that takes is measured: ``benchmark_verification.py
first_verdict``)."""

import json
import subprocess
import sys
from pathlib import Path

from test_vnncomp import IDENTITY, box, save_network, save_property

ROOT = Path(__file__).parents[1]
HEAVY = ("numba", "scipy", "torchvision", "hypothesis", "rich", "sklearn", "matplotlib", "triton", "PIL", "onnxscript",
         "certtrain.data", "certtrain.training", "certtrain.losses", "certtrain.models", "certtrain.evaluation",
         "certtrain.diagnostics", "certtrain.recipe", "torch._dynamo", "torch._inductor")  # fmt: skip
ASK = """
import json, sys
from certtrain.command_line import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]))
"""


def test_nothing_is_imported_for_other_questions(tmp_path):
    network = save_network(tmp_path / "network.onnx", IDENTITY)
    asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 -1.0)))")
    words = [sys.executable, "-c", ASK, "verify", "--onnx", str(network), "--vnnlib", str(asked)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    word, said = run.stdout.splitlines()
    code, modules = json.loads(said)
    baseline = "import json, sys, torch, onnx, onnxruntime; print(json.dumps(sorted(sys.modules)))"
    needed = subprocess.run([sys.executable, "-c", baseline], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (word, code) == ("holds", 0)
    assert not set(HEAVY) & set(modules) - set(json.loads(needed.stdout))
