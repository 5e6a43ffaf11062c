#!/usr/bin/env bash
# torch 2.15.0, torch.fx: while one thread traces a model, every other thread's modules are handed to its tracer.
# A good guess: a trace touches the model that it is given, in the thread that runs it; torch.fx itself keeps the flag
# that says that a trace goes on per thread. So a server may trace one model while other threads serve others.
# Seen instead: nn.Module.__call__ is replaced for the whole process, so that meanwhile in another thread
#   an unrelated, ordinary module     raises NameError "module is not installed as a submodule"
#   a layer of the traced model       returns a Proxy in place of a tensor, and its call stands in the trace's graph
# Two traces at once of models that share nothing, which begin and end in the order a, b, a, b: b raises AssertionError
# "CURRENT_PATCHER is None in finally block" and a's replacement stays. With no trace going on and no other thread left,
# every ordinary module raises, new ones too, and model a returns Proxies, until the process ends.
# Runs without certtrain. PYTHON: an interpreter. Exits non-zero where the behaviour is another one.
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m venv "$site"
"$site/bin/python" -m pip install -q torch==2.15.0 numpy==2.4.6
cd "$site"
bin/python - <<'PYTHON'
import sys
import threading

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

print("torch", torch.__version__, "python", sys.version.split()[0])
ORIGINAL = nn.Module.__call__
SECONDS = 60


class Pausing(nn.Module):
    """One linear layer, after which forward waits to be told to go on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.inside, self.go = threading.Event(), threading.Event()

    def forward(self, x):
        x = self.layer(x)
        self.inside.set()
        assert self.go.wait(SECONDS)
        return x


class Trace(threading.Thread):
    """A trace in a thread of its own, which has reached the pause when the constructor returns."""

    def __init__(self, model):
        super().__init__(daemon=True)
        self.model, self.outcome = model, None
        self.start()
        assert model.inside.wait(SECONDS)

    def run(self):
        try:
            self.outcome = [f"{node.op} {node.target}" for node in fx.Tracer().trace(self.model).nodes]
        except Exception as error:
            self.outcome = f"{type(error).__name__}: {error}"

    def end(self):
        self.model.go.set()
        self.join(SECONDS)
        assert not self.is_alive()
        return self.outcome


def called(module):
    try:
        return type(module(x)).__name__
    except NameError as error:
        return f"NameError: {error}"


x, seen = torch.rand(2, 4), {}
ordinary = nn.Sequential(nn.Linear(4, 3), nn.ReLU())


def show(what, value):
    seen[what] = value
    print(f"{what:58} {value}")


show("no trace: an ordinary module", called(ordinary))
model = Pausing()
trace = Trace(model)
show("a trace elsewhere: is_fx_symbolic_tracing() here", is_fx_symbolic_tracing())
show("a trace elsewhere: an ordinary module", called(ordinary))
show("a trace elsewhere: a layer of the traced model", called(model.layer))
show("the trace has ended: its graph", trace.end())
show("the trace has ended: an ordinary module", called(ordinary))

first = Trace(Pausing())
second = Trace(Pausing())
show("two traces at once: the first one's outcome", first.end())
show("two traces at once: the second one's outcome", second.end())
show("both have ended: nn.Module.__call__ is torch's own", nn.Module.__call__ is ORIGINAL)
show("both have ended: threads", threading.active_count())
show("both have ended: an ordinary module", called(ordinary))
show("both have ended: a new module", called(nn.Linear(4, 1)))
show("both have ended: the model traced first", called(first.model))

refused = "NameError: module is not installed as a submodule"
graph = ["placeholder x", "call_module layer", "output output"]
expected = {
    "no trace: an ordinary module": "Tensor",
    "a trace elsewhere: is_fx_symbolic_tracing() here": False,
    "a trace elsewhere: an ordinary module": refused,
    "a trace elsewhere: a layer of the traced model": "Proxy",
    "the trace has ended: its graph": [*graph[:2], "get_attr _tensor_constant0", "call_module layer", graph[2]],
    "the trace has ended: an ordinary module": "Tensor",
    "two traces at once: the first one's outcome": graph,
    "two traces at once: the second one's outcome": "AssertionError: CURRENT_PATCHER is None in finally block",
    "both have ended: nn.Module.__call__ is torch's own": False,
    "both have ended: threads": 1,
    "both have ended: an ordinary module": refused,
    "both have ended: a new module": refused,
    "both have ended: the model traced first": "Proxy",
}
changed = [what for what in expected if seen[what] != expected[what]]
if changed:
    sys.exit(f"behaviour changed: {changed}")
print("behaviour as described")
PYTHON
