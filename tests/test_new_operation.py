"""A new operation is one file of somebody's package: it traces, gets bounds, certifies, trains and exports."""

import importlib
import inspect
import sys

import pytest
import torch
from networks import Apply
from torch import nn

import certtrain
from certtrain.bounds import Interval, LinfBall, UnsupportedNode, compute_bounds, operations, trace
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.forward_linear import forward_bounds
from certtrain.bounds.operations import Nonlinear, Operation
from certtrain.export import export_onnx
from certtrain.losses import CcIbp

SOFTPLUS = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import Bounds, from_module
from certtrain.bounds.operations import Entrywise
from certtrain.bounds.relaxation import Lines


@dataclass(frozen=True, eq=False)
class Softplus(Entrywise):
    """log(1 + exp(x)): rising and convex."""

    kind: ClassVar[str] = "softplus"

    def value(self, x: Tensor) -> Tensor:
        return F.softplus(x)

    def image(self, x: Bounds) -> Bounds:
        return Bounds(self.value(x.lower), self.value(x.upper))

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        """A tangent below, the chord above."""
        first, last, middle = self.value(lower), self.value(upper), (lower + upper) / 2
        width = upper - lower
        chord = torch.where(width > 0, (last - first) / torch.where(width > 0, width, 1.0), torch.sigmoid(upper))
        above = torch.maximum(first - chord * lower, last - chord * upper)
        slope, error = torch.sigmoid(middle), self.kernel_error(lower, upper)
        return Lines(slope, chord, above + error, self.value(middle) - slope * middle - error)

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Softplus()


@from_module(nn.Softplus)
def softplus(tracing, path, source, module):
    return tracing.append(Softplus(path, (source,)))
'''

PRODUCT = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from certtrain.bounds import Bounds, Interval, from_function
from certtrain.bounds.operations import Function, Nonlinear
from certtrain.bounds.relaxation import InputLines, Relaxation


@dataclass(frozen=True)
class Planes(Relaxation):
    """McCormick's planes of xy over [a, b] x [c, d]: c x + a y - a c below, d x + a y - a d above."""

    a: Tensor
    c: Tensor
    d: Tensor

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        a, c, d = (end.unsqueeze(1) for end in (self.a, self.c, self.d))
        up, down = forms.clamp(min=0), forms.clamp(max=0)
        least = (-up * a * c - down * a * d).flatten(2).sum(-1)
        return (up * c + down * d, forms * a), constants + least

    def forward(self, *inputs: InputLines) -> InputLines:
        x, y = inputs

        def scaled(lines: InputLines, factor: Tensor) -> InputLines:
            up, down = factor.clamp(min=0).unsqueeze(1), factor.clamp(max=0).unsqueeze(1)
            return InputLines(up * lines.lower + down * lines.upper, up * lines.upper + down * lines.lower)

        y = scaled(y, self.a)
        lower, upper = scaled(x, self.c).lower + y.lower, scaled(x, self.d).upper + y.upper
        lower[:, -1] -= self.a * self.c
        upper[:, -1] -= self.a * self.d
        return InputLines(lower, upper)

    def map(self, function):
        return Planes(function(self.a), function(self.c), function(self.d))


@dataclass(frozen=True, eq=False)
class Product(Nonlinear):
    """Two computed values, multiplied entry by entry."""

    kind: ClassVar[str] = "product"

    @property
    def piecewise_linear(self) -> bool:
        return False

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def interval(self, x: Interval, y: Interval) -> Interval:
        corners = torch.stack([x.lower * y.lower, x.lower * y.upper, x.upper * y.lower, x.upper * y.upper])
        return Interval.from_bounds(corners.amin(0), corners.amax(0))

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Planes:
        x, y = bounds
        return Planes(x.lower, y.lower, y.upper)

    def magnitude(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def roundings(self, shape: torch.Size) -> int:
        return 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.mul)


@from_function("mul")
def product(tracing, node, source):
    return tracing.append(Product(node.name, (source, tracing.position(node, node.args[1]))))
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Import a file of a package of its own; what it registers is forgotten afterwards."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for table in (operations.registry.MODULES, operations.registry.FUNCTIONS):
        for name in ("copy", "update"):
            assert hasattr(table, name)
    modules, functions = dict(operations.registry.MODULES), dict(operations.registry.FUNCTIONS)

    def write(name: str, text: str):
        (tmp_path / "mine" / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(f"mine.{name}")

    yield write
    for table, before in ((operations.registry.MODULES, modules), (operations.registry.FUNCTIONS, functions)):
        table.clear(), table.update(before)
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def with_softplus() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(36, 8), nn.Softplus(),
        nn.Linear(8, 3),
    )  # fmt: skip


def with_product() -> nn.Module:
    layers = {"first": nn.Linear(64, 8), "second": nn.Linear(64, 8), "last": nn.Linear(8, 3)}
    return Apply(lambda m, x: m.last(torch.relu(m.first(x.flatten(1)) * m.second(x.flatten(1)))), **layers)


CASES = {"softplus": (SOFTPLUS, with_softplus), "product": (PRODUCT, with_product)}


@pytest.mark.parametrize("case", CASES)
def test_a_new_operation_in_one_file(case, package, tmp_path):
    text, build = CASES[case]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedNode):
        trace(build())
    package(case, text)
    model, images, labels = build(), torch.rand(6, 1, 8, 8), torch.randint(0, 3, (6,))
    assert_trains(model, images, labels)
    model.eval()
    for epsilon in (0.0, 0.02, 0.2):
        assert_bounded(model.double(), images.double(), epsilon)
    model.float()
    found = certtrain.certify(model, images, model(images).argmax(1), 1e-4)
    assert {verdict.status for verdict in found} == {"verified"}
    # its own parity check against onnxruntime refuses a graph that computes something else
    export_onnx(model, tmp_path / "model.onnx", images)


def assert_trains(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """A certified loss falls, and its gradients reach every weight."""
    certified = []
    ascent = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        ascent.zero_grad()
        bounds = compute_bounds(model.train(), LinfBall(0.01).region(images))
        worst = bounds.upper.scatter(1, labels[:, None], bounds.lower.gather(1, labels[:, None]))
        loss = nn.functional.cross_entropy(worst, labels)
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        ascent.step()
        certified.append(loss.item())
    assert certified[-1] < 0.8 * certified[0]


def assert_bounded(model: nn.Module, images: torch.Tensor, epsilon: float) -> None:
    """All kinds of bounds enclose the network at corners and inside."""
    region, network = LinfBall(epsilon).region(images), fold(model, images.shape[1:])
    hull = region.hull
    forms = torch.randn(len(images), 5, 3, dtype=images.dtype)
    every = [interval_bounds(network, region), crown_bounds(network, region), forward_bounds(network, region)]
    lows = [bound_forms(network, region, forms, bounds) for bounds in every[:2]]
    outer = compute_bounds(model, region)
    for _ in range(50):
        point = hull.center + hull.radius * (2 * torch.rand_like(images) - 1).sign() * torch.rand(6, 1, 1, 1).round()
        values = network.values(point)
        torch.testing.assert_close(values[-1], model(point))
        assert outer.contains(values[-1], 1e-9).all()
        for bounds in every:
            for number, found in bounds.items():
                read = network.join_bounds([Bounds_of(values[i]) for i in network.operations[number].inputs]).lower
                assert ((found.lower - 1e-9 <= read) & (read <= found.upper + 1e-9)).all()
        for low in lows:
            assert (low <= (forms @ values[-1].unsqueeze(-1)).squeeze(-1) + 1e-9).all()


def Bounds_of(value):
    return Interval.point(value).bounds()


def concrete(kind: type) -> list[type]:
    """The classes of the package derived from it that can be made."""
    found = [kind] if not inspect.isabstract(kind) else []
    return found + [each for child in kind.__subclasses__() for each in concrete(child)]


def test_a_missing_rule_is_an_error():
    """Each rule that the base declares is required: a class without it cannot be made."""

    class Nothing(Operation):
        pass

    required = Operation.__abstractmethods__
    assert required >= {"__call__", "interval", "backward", "forward_lines", "magnitude", "roundings", "module", "fold"}
    with pytest.raises(TypeError, match="abstract"):
        Nothing("path", (0,))
    assert "relax" in Nonlinear.__abstractmethods__


def test_every_operation_has_every_rule():
    """All operations × all rules, in the folder of operations: each rule is there, with the base's parameters."""
    ours = [kind for kind in concrete(Operation) if kind.__module__.startswith("certtrain.")]
    assert len(ours) >= 17
    rules = [name for name, value in vars(Operation).items() if callable(value) and not name.startswith("__")]
    for kind in ours:
        for rule in ("__call__", *rules):
            found = getattr(kind, rule)
            assert not getattr(found, "__isabstractmethod__", False), (kind.__name__, rule)
            assert inspect.getdoc(found) or rule == "__call__", (kind.__name__, rule)
        assert kind.__module__ != Operation.__module__ or kind.__name__ == "Input", kind


def test_cc_ibp_takes_a_network_with_it(package):
    package("softplus", SOFTPLUS)
    CcIbp(alpha=0.1).check_model(with_softplus())
