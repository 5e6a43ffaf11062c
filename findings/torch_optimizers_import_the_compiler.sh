#!/usr/bin/env bash
# torch 2.15.0: the first optimiser that an eager program constructs imports torch's compiler.
# A good guess: torch.optim.SGD([p], lr=0.1) stores a parameter and a number; with `import torch` paid and a backward
# pass done nothing is left to load, and torch._dynamo comes with the first torch.compile, certainly not where
# TORCHDYNAMO_DISABLE=1 and TORCH_COMPILE_DISABLE=1 switch compiling off.
# Seen instead: the constructor of an optimiser (SGD's too) imports torch._dynamo, parts of torch._inductor and sympy:
# 900 modules beside the 1,150 of `import torch`, 1.1 s of CPU beside its 1.5 s, 160 MiB of memory, once in a process,
# with those variables as without. The functional form, torch.optim.adam.adam, takes the same step and imports nothing.
# Runs without certtrain. PYTHON: an interpreter. Exits non-zero where the behaviour is another one.
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m venv "$site"
"$site/bin/python" -m pip install -q torch==2.15.0 numpy==2.4.6
cd "$site"
cat > once.py <<'PYTHON'
import json
import resource
import sys
import time


def state():
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts it in KiB
    return set(sys.modules), time.process_time(), memory


def since(start):
    modules, seconds, memory = state()
    new = modules - start[0]
    packages = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in new]
    return {"modules": len(new), "seconds": seconds - start[1], "MiB": memory - start[2], "packages": packages}


start = state()
import torch
from torch.optim.adam import adam

found = {"import torch": since(start)}
p = torch.nn.Parameter(torch.ones(3))
(p * p).sum().backward()
start = state()
if sys.argv[1] == "adam":
    moments, count = [torch.zeros(3) for _ in range(2)], [torch.tensor(0.0)]
    with torch.no_grad():
        adam([p], [p.grad], moments[:1], moments[1:], [], count, foreach=False, amsgrad=False, beta1=0.9, beta2=0.999,
             lr=0.001, weight_decay=0.0, eps=1e-8, maximize=False)
else:
    optimizer = getattr(torch.optim, sys.argv[1])([p], lr=0.001)
found["first"] = since(start)
if sys.argv[1] != "adam":
    start = state()
    optimizer.step()
    getattr(torch.optim, sys.argv[1])([p], lr=0.001)
    found["step, second"] = since(start)
print(json.dumps({**found, "version": torch.__version__, "p": p.detach().tolist()}))
PYTHON
bin/python - <<'PYTHON'
import json
import os
import subprocess
import sys

DISABLED = {"TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1"}


def once(what, variables):
    environment = {name: value for name, value in os.environ.items() if name not in DISABLED} | variables
    output = subprocess.run([sys.executable, "once.py", what], env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(output.stdout)


def show(what, found):
    amounts = f"{found['modules']:5} modules {found['seconds']:6.2f} s CPU {found['MiB']:5.0f} MiB"
    print(f"{what:42}{amounts}", *found["packages"])


changed, results = [], {}
for what, variables in (("SGD", {}), ("Adam", {}), ("Adam", DISABLED), ("adam", {})):
    found = results[what] = once(what, variables)
    if len(results) == 1:
        print("torch", found["version"], "python", sys.version.split()[0])
        show("import torch", found["import torch"])
    constructed, name = what != "adam", what + (", compiling switched off" if variables else "")
    show(name + (": constructor" if constructed else ", functional: step"), found["first"])
    heavy = found["first"]["modules"] > 500 and len(found["first"]["packages"]) == 3
    light = found["first"]["modules"] == 0
    later = "step, second" not in found or found["step, second"]["modules"] < 10
    if not ((heavy if constructed else light) and later) or found["import torch"]["packages"].count("torch._dynamo"):
        changed.append(name)
if results["Adam"]["p"] != results["adam"]["p"]:
    changed.append("the functional form takes another step")
if changed:
    sys.exit(f"behaviour changed: {changed}")
print("behaviour as described")
PYTHON
