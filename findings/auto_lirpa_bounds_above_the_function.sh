#!/usr/bin/env bash
# auto_LiRPA 0.7.1 (a050a3d): lower bounds that a corner of the box refutes, without an error or a warning.
# A good guess: an operation that it converts is bounded rightly, or it raises, as it does for those it lacks
# ("There are unsupported operations"). Seen instead, by CROWN, in float64:
#   x ** 2, x ** 4         above the function where x changes sign (x * x is right, and so are odd powers)
#   x.repeat(1, 2)         above it (torch.cat of the same is right)
#   MaxPool2d(2, 2, 1)     above it (without padding it is right)
#   AvgPool2d(2, 2, 1, count_include_pad=False)   evaluated as if the padding counted, by every method
# Runs without certtrain. AUTO_LIRPA_SOURCE: a checkout to install from instead of the public address; PYTHON: an
# interpreter, whose torch is taken where it has one. Exits non-zero where the behaviour is another one.
set -euo pipefail
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
source=${AUTO_LIRPA_SOURCE:-git+https://github.com/Verified-Intelligence/auto_LiRPA@a050a3d61f4cb68b108fa7f07dcb3e4d7ef304df}
"$python" -c 'import torch, onnx' 2>/dev/null || "$python" -m pip install -q --target "$site" torch==2.8.0 onnx==1.19.0 numpy PyYAML
"$python" -m pip install -q --no-deps --target "$site" \
    appdirs==1.4.4 graphviz==0.21 packaging==25.0 setuptools==80.9.0 tqdm==4.67.1 "$source"
PYTHONPATH="$site" "$python" -W ignore - <<'PYTHON'
import itertools

import torch
from torch import nn

import auto_LiRPA

torch.set_default_dtype(torch.float64)
print("auto_LiRPA", auto_LiRPA.__version__, "torch", torch.__version__)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x).flatten(1)


def above(function, shape, method="CROWN"):
    """How far a lower bound of an output, or of one's negative, lies above the least value at the corners of [-1, 2]^n."""
    model, count = Apply(function), torch.Size(shape).numel()
    lower, upper = torch.full((1, *shape), -1.0), torch.full((1, *shape), 2.0)
    corners = torch.tensor(list(itertools.product((-1.0, 2.0), repeat=count))).reshape(-1, *shape)
    outputs = model(corners)
    identity = torch.eye(outputs.shape[1])
    rows = torch.cat([identity, -identity])[None]
    bounded = auto_LiRPA.BoundedModule(model, (lower + upper) / 2, bound_opts={"conv_mode": "matrix"})
    box = auto_LiRPA.PerturbationLpNorm(x_L=lower, x_U=upper)
    given = auto_LiRPA.BoundedTensor((lower + upper) / 2, box)
    bound = bounded.compute_bounds((given,), C=rows, method=method, bound_upper=False)[0].detach()
    return float((bound - (outputs @ rows[0].T).amin(0)).max())


pool, average = nn.MaxPool2d(2, 2, 1), nn.AvgPool2d(2, 2, 1, count_include_pad=False)
wrong = {
    "x ** 2": (lambda x: x**2, (2,)),
    "x ** 4": (lambda x: x**4, (2,)),
    "x.repeat(1, 2)": (lambda x: x.repeat(1, 2), (2,)),
    "MaxPool2d(2, 2, 1)": (pool, (1, 3, 3)),
    "AvgPool2d, padding not counted": (average, (1, 3, 3)),
}
right = {
    "x * x": (lambda x: x * x, (2,)),
    "x ** 3": (lambda x: x**3, (2,)),
    "torch.cat([x, x])": (lambda x: torch.cat([x, x], 1), (2,)),
    "MaxPool2d(2)": (nn.MaxPool2d(2), (1, 2, 2)),
}
with torch.no_grad():
    found = {name: above(*case) for name, case in {**wrong, **right}.items()}
for name, distance in found.items():
    print(f"{name:32} the bound is above the function by {distance:+.3g}")
assert all(found[name] > 0.01 for name in wrong), "one of the wrong ones is right now"
assert all(found[name] < 1e-9 for name in right), "one of the right ones is wrong now"
print("behaviour as described")
PYTHON
