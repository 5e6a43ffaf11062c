#!/usr/bin/env bash
# auto_LiRPA 0.7.1 (a050a3d): lower bounds that a corner of the box refutes, without an error or a warning.
# A good guess: an operation that it converts is bounded rightly, or it raises, as it does for those it lacks
# ("There are unsupported operations"). Seen instead, by CROWN, in float64:
#   x ** 2, x ** 4         above the function on [1, 2]: the chord is the lower line (x * x and odd powers are right)
#   x.repeat(1, 2)         above a sum over both copies, where inputs' ranges differ (torch.cat([x, x], 1) is right)
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


def above(function, lower, upper):
    """How far CROWN's lower bound of an output, its negative, or the weighted sum of all lies above a corner's value."""
    model, lower, upper = Apply(function), torch.tensor(lower)[None], torch.tensor(upper)[None]
    share = torch.tensor(list(itertools.product((0.0, 1.0), repeat=lower.numel()))).reshape(-1, *lower.shape[1:])
    outputs = model(lower + share * (upper - lower))
    identity = torch.eye(outputs.shape[1])
    rows = torch.cat([identity, -identity, torch.linspace(-1, 1, len(identity))[None]])
    bounded = auto_LiRPA.BoundedModule(model, (lower + upper) / 2, bound_opts={"conv_mode": "matrix"})
    box = auto_LiRPA.PerturbationLpNorm(x_L=lower, x_U=upper)
    given = auto_LiRPA.BoundedTensor((lower + upper) / 2, box)
    bound = bounded.compute_bounds((given,), C=rows[None], method="CROWN", bound_upper=False)[0].detach()
    return float((bound - (outputs @ rows.T).amin(0)).max())


positive, mixed = ([1.0, 1.0], [2.0, 2.0]), ([-1.0, 0.0], [2.0, 1.0])
image = ([[[-1.0] * 3] * 3], [[[2.0] * 3] * 3])
pool, average = nn.MaxPool2d(2, 2, 1), nn.AvgPool2d(2, 2, 1, count_include_pad=False)
wrong = {
    "x ** 2": (lambda x: x**2, *positive),
    "x ** 4": (lambda x: x**4, *positive),
    "x.repeat(1, 2)": (lambda x: x.repeat(1, 2), *mixed),
    "MaxPool2d(2, 2, 1)": (pool, *image),
    "AvgPool2d, padding not counted": (average, *image),
}
right = {
    "x * x": (lambda x: x * x, *positive),
    "x ** 3": (lambda x: x**3, *positive),
    "torch.cat([x, x], 1)": (lambda x: torch.cat([x, x], 1), *mixed),
    "MaxPool2d(3)": (nn.MaxPool2d(3), *image),
}
with torch.no_grad():
    found = {name: above(*case) for name, case in {**wrong, **right}.items()}
for name, distance in found.items():
    print(f"{name:32} the bound is above the function by {distance:+.3g}")
assert all(found[name] > 0.01 for name in wrong), "one of the wrong ones is right now"
assert all(found[name] < 1e-9 for name in right), "one of the right ones is wrong now"
print("behaviour as described")
PYTHON
