"""auto_LiRPA's bounds of small networks, written to bounds.json: what tests/test_golden.py compares ours with.

Needs auto_LiRPA (from its git: https://github.com/Verified-Intelligence/auto_LiRPA) to be importable:

    PYTHONPATH=… .venv/bin/python tests/golden/make_bounds.py
"""

import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__).with_name("bounds.json")
METHODS = {
    "ibp": "IBP", "crown_ibp": "CROWN-IBP", "crown": "CROWN",
    "alpha_crown": "CROWN-Optimized",  # the margins' slopes, on top of CROWN's bounds of the neurons
    "joint": "CROWN-Optimized",  # the slopes of the neurons' own bounds as well
}  # fmt: skip
SHAPE, CLASSES, IMAGES = (1, 6, 6), 4, 3
EPSILONS = {"small": 0.02, "large": 0.1}


class Block(nn.Module):
    """relu(norm(conv(x)) + x)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


def mlp(*activations: nn.Module) -> list[nn.Module]:
    layers, features = [nn.Flatten()], 36
    for activation in activations:
        layers += [nn.Linear(features, 12), activation]
        features = 12
    return [*layers, nn.Linear(12, CLASSES)]


NETWORKS = {
    "mlp": lambda: mlp(nn.ReLU(), nn.ReLU(), nn.ReLU()),
    "cnn": lambda: [
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, CLASSES),
    ],
    "residual": lambda: [
        nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), Block(3), Block(3), nn.Flatten(), nn.Linear(27, CLASSES)
    ],
    "leaky_relu": lambda: mlp(nn.LeakyReLU(0.1), nn.LeakyReLU(0.3)),
    "smooth": lambda: mlp(nn.Sigmoid(), nn.Tanh()),
    "max_pool": lambda: [
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.MaxPool2d(2), nn.Flatten(),
        nn.ReLU(), nn.Linear(4, CLASSES),
    ],
}  # fmt: skip


def draw(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """float64 in [-1, 1], from whole numbers, whose stream is the same on every machine."""
    return torch.randint(-1000, 1001, tuple(shape), generator=generator).double() / 1000


def network(name: str) -> nn.Module:
    """float64, in evaluation mode; its weights come from its name's place in the table."""
    generator = torch.Generator().manual_seed(list(NETWORKS).index(name))
    model = nn.Sequential(*NETWORKS[name]()).double().eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                continue
            drawn = draw(value.shape, generator)
            if key.endswith("running_var"):
                drawn = drawn.abs() + 0.5
            elif value.ndim > 1:
                drawn = drawn * (3 / value[0].numel()) ** 0.5
            value.copy_(drawn)
    return model


def images() -> Tensor:
    """(B, *SHAPE), some pixels of which lie within epsilon of 0 or 1."""
    return (draw(torch.Size((IMAGES, *SHAPE)), torch.Generator().manual_seed(100)) + 1) / 2


def rows(model: nn.Module) -> Tensor:
    """All margins (B, K - 1, K) of the predicted classes."""
    own = model(images()).argmax(1)
    eye = torch.eye(CLASSES, dtype=torch.float64)
    return torch.stack([torch.stack([eye[y] - eye[j] for j in range(CLASSES) if j != y]) for y in own.tolist()])


def clamp(x: Tensor, min=None, max=None, plain=torch.clamp) -> Tensor:
    """With a gradient at both ends, as torch's had. auto_LiRPA's slopes start there: without it (torch 2.15) they
    never move, and its alpha-CROWN is its CROWN."""
    inside = plain(x.detach(), min, max)
    return torch.where(x == inside, x, inside)


def main() -> None:
    import auto_LiRPA  # type: ignore[import-not-found]

    torch.clamp = clamp
    cases: dict[str, dict[str, list]] = {}
    for (name, (size, epsilon)), (key, method) in itertools.product(
        itertools.product(NETWORKS, EPSILONS.items()), METHODS.items()
    ):
        dtype = torch.float32 if method == "CROWN-Optimized" else torch.float64  # its slopes are float32 in part
        torch.set_default_dtype(dtype)
        model, x = network(name), images().to(dtype)
        margins = rows(model).to(dtype)
        box = auto_LiRPA.PerturbationLpNorm(x_L=(x - epsilon).clamp(min=0), x_U=(x + epsilon).clamp(max=1))
        bounded = auto_LiRPA.BoundedModule(model.to(dtype), torch.empty_like(x), bound_opts={"conv_mode": "matrix"})
        given = auto_LiRPA.BoundedTensor(x, box)
        neurons = None
        if key == "alpha_crown":
            bounded.compute_bounds((given,), C=margins, method="CROWN", bound_upper=False)
            neurons = bounded.save_intermediate()
        lower, _ = bounded.compute_bounds((given,), C=margins, method=method, bound_upper=False, interm_bounds=neurons)
        cases.setdefault(f"{name}, {size}", {})[key] = [[float(f"{v:.10g}") for v in row] for row in lower.tolist()]
    versions = {"auto_LiRPA": auto_LiRPA.__version__, "torch": torch.__version__.split("+")[0]}
    FILE.write_text(json.dumps({"versions": versions, "lower bounds of all margins": cases}) + "\n")


if __name__ == "__main__":
    main()
