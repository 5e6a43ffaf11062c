"""An operation written as CONTRIBUTING says, in one file of a package of one's own, traces, gets bounds, certifies,
trains and exports; and every operation has every rule."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from networks import Apply
from own_packages import forgotten, imported, written
from torch import Tensor, nn

import certtrain
from certtrain.bounds import Bounds, LinfBall, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.forward_linear import forward_bounds
from certtrain.bounds.operations import Input, LinearOperation, Nonlinear, Operation, Sigmoid, Unbounded
from certtrain.config import unstructure
from certtrain.export import export_onnx
from certtrain.losses import CcIbp
from certtrain.recipe import load_config
from certtrain.workflows.train import resume

LOG_SIGMOID = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.bounds import Bounds, from_module
from certtrain.bounds.operations import Entrywise
from certtrain.bounds.relaxation import Lines


@dataclass(frozen=True, eq=False)
class LogSigmoid(Entrywise):
    """-log(1 + exp(-x)): rising and concave."""

    kind: ClassVar[str] = "log sigmoid"

    def value(self, x: Tensor) -> Tensor:
        return F.logsigmoid(x)

    def image(self, x: Bounds) -> Bounds:
        return Bounds(self.value(x.lower), self.value(x.upper))

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        """The chord below, a tangent above."""
        first, last, middle = self.value(lower), self.value(upper), (lower + upper) / 2
        width = upper - lower
        chord = torch.where(width > 0, (last - first) / torch.where(width > 0, width, 1.0), torch.sigmoid(-upper))
        below = torch.minimum(first - chord * lower, last - chord * upper)
        slope, error = torch.sigmoid(-middle), self.kernel_error(lower, upper)
        return Lines(chord, slope, self.value(middle) - slope * middle + error, below - error)

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.LogSigmoid()


@from_module(nn.LogSigmoid)
def log_sigmoid(tracing, path, source, module):
    return tracing.append(LogSigmoid(path, (source,)))
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


@from_function("multiply")
def product(tracing, node, source):
    return tracing.append(Product(node.name, (source, tracing.position(node, node.args[1]))))
'''


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Callable[[str, str], ModuleType]]:
    """Write and import a file of a package of one's own; what it registers is forgotten afterwards."""
    with forgotten():
        yield partial(imported, tmp_path)


def with_log_sigmoid() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.LogSigmoid(), nn.Flatten(), nn.Linear(36, 8), nn.LogSigmoid(),
        nn.Linear(8, 3),
    )  # fmt: skip


def with_product() -> nn.Module:
    layers = {"first": nn.Linear(64, 8), "second": nn.Linear(64, 8), "last": nn.Linear(8, 3)}
    return Apply(
        lambda m, x: m.last(torch.relu(torch.multiply(m.first(x.flatten(1)), m.second(x.flatten(1))))), **layers
    )


CASES = {"log_sigmoid": (LOG_SIGMOID, with_log_sigmoid), "product": (PRODUCT, with_product)}


@pytest.mark.parametrize("case", CASES)
def test_a_new_operation_in_one_file(case, package, tmp_path):
    text, build = CASES[case]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedOperation):
        trace(build())
    mine = package(case, text)
    assert_complete(getattr(mine, case.title().replace("_", "")))
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


def assert_trains(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A certified loss falls, and its gradients reach every weight."""
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        bounds = compute_bounds(model.train(), LinfBall(0.01).region(images))
        worst = bounds.upper.scatter(1, labels[:, None], bounds.lower.gather(1, labels[:, None]))
        loss = nn.functional.cross_entropy(worst, labels)
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def assert_bounded(model: nn.Module, images: Tensor, epsilon: float) -> None:
    """All kinds of bounds enclose the network's values at corners of the box and inside it."""
    region, network = LinfBall(epsilon).region(images), fold(model, images.shape[1:])
    forms = torch.randn(len(images), 5, 3, dtype=images.dtype)
    every = [interval_bounds(network, region), crown_bounds(network, region), forward_bounds(network, region)]
    least = [bound_forms(network, region, forms, bounds) for bounds in every[:2]]
    logits, hull = compute_bounds(model, region), region.hull
    for _ in range(50):
        shares = (2 * torch.rand_like(images) - 1).sign() * torch.rand(len(images), 1, 1, 1).round()
        values = network.values(hull.center + hull.radius * shares)
        torch.testing.assert_close(values[-1], model(values[0]))
        assert logits.contains(values[-1], 1e-9).all()
        for bounds in every:
            for number, found in bounds.items():
                points = [Bounds(values[source], values[source]) for source in network.operations[number].inputs]
                read = network.join_bounds(points).lower
                assert ((found.lower - 1e-9 <= read) & (read <= found.upper + 1e-9)).all()
        for rows in least:
            assert (rows <= (forms @ values[-1].unsqueeze(-1)).squeeze(-1) + 1e-9).all()


def concrete(kind: type[Operation]) -> list[type[Operation]]:
    """The classes derived from it that can be made, itself included."""
    found = [] if inspect.isabstract(kind) else [kind]
    return found + [each for child in kind.__subclasses__() for each in concrete(child)]


def rules_of(base: type[Operation]) -> list[str]:
    """The methods that a base declares."""
    return [name for name, value in vars(base).items() if inspect.isfunction(value) and is_public(name)]


def is_public(name: str) -> bool:
    return name == "__call__" or not name.startswith("_")


EMPTY, ANY_INPUTS = inspect.Parameter.empty, ("*", inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.empty)


def form_of(rule: Callable) -> list[tuple]:
    """Name, kind and default of each parameter; of one like ``*inputs`` any name will do, and ``**_`` says nothing."""
    parameters = inspect.signature(rule).parameters.values()
    forms = [ANY_INPUTS if one.kind is one.VAR_POSITIONAL else (one.name, one.kind, one.default) for one in parameters]
    return [form for form in forms if form[1] is not inspect.Parameter.VAR_KEYWORD]


def assert_complete(kind: type[Operation]) -> None:
    """Each rule of its bases is there, has a docstring, and takes what the base says that it is given.

    Where the base takes ``*inputs``, an operation may name its own instead: the same number in each such rule.
    """
    numbers = set()
    for base in (Operation, LinearOperation, Nonlinear, Unbounded):
        for rule in rules_of(base) if issubclass(kind, base) else []:
            method, place = getattr(kind, rule), (kind.__name__, rule)
            assert not getattr(method, "__isabstractmethod__", False), place
            assert inspect.getdoc(method), place
            found, wanted = form_of(method), form_of(getattr(base, rule))
            if ANY_INPUTS in wanted and ANY_INPUTS not in found:
                first, count = wanted.index(ANY_INPUTS), len(found) - len(wanted) + 1
                assert count and all(default is EMPTY for _, _, default in found[first : first + count]), place
                found[first : first + count] = [ANY_INPUTS]
                numbers.add(count)
            assert found == wanted, place
    assert len(numbers) <= 1, (kind.__name__, numbers)


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
    """All operations × all rules."""
    ours = [kind for kind in concrete(Operation) if kind.__module__.startswith("certtrain.")]
    assert len(ours) >= 17
    assert {kind for kind in ours if kind.__module__ == Operation.__module__} == {Input}
    for kind in ours:
        assert_complete(kind)


OTHER_FORMS: dict[str, Callable] = {
    "roundings": lambda self: 2,
    "interval": lambda self, x, y: x,  # where values have one input
    "magnitude": lambda self, x=None: x,
    "relax": lambda self, *bounds, slopes=None: None,
    "window": lambda self, window, sizes: None,
    "module": lambda self, shape=None: None,
}


@pytest.mark.parametrize("rule", OTHER_FORMS)
def test_the_walk_sees_a_rule_of_another_form(rule):
    def kept(self):
        """A rule that the base does not know."""

    OTHER_FORMS[rule].__doc__ = "A rule."
    assert_complete(type("Kept", (Sigmoid,), {"kept": kept}))
    with pytest.raises(AssertionError, match=rf"\('Other', '{rule}'\)|\('Other', \{{1, 2\}}\)"):
        assert_complete(type("Other", (Sigmoid,), {rule: OTHER_FORMS[rule]}))


def test_cc_ibp_takes_a_network_with_it(package):
    package("log_sigmoid", LOG_SIGMOID)
    CcIbp(alpha=0.1).check_model(with_log_sigmoid())


SOFT_NET = """
from dataclasses import dataclass

from torch import nn

from certtrain.models import Architecture

from . import log_sigmoid


@dataclass(frozen=True)
class SoftNet(Architecture):
    def layers(self, shape, classes):
        channels, height, width = shape
        return [nn.Flatten(), nn.Linear(channels * height * width, 12), nn.LogSigmoid(), nn.Linear(12, classes)]
"""


def test_a_run_finds_it_again_through_its_model(tmp_path):
    """The module of the architecture imports the operation's."""
    written(tmp_path, "log_sigmoid", LOG_SIGMOID)
    named = [written(tmp_path, "soft_net", SOFT_NET)]
    config = unstructure(load_config(Path(__file__).parents[1] / "configs" / "smoke.yaml"))
    config |= {"model": {"type": "mine.soft_net:SoftNet"}}
    config["certify"] |= {"images": 10}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    with forgotten():
        run = certtrain.train(tmp_path / "recipe.yaml", tmp_path / "run", plugins=named, quiet=True)
        before = [line["status"] for line in run.verdicts]
        assert "verified" in before and run.path.joinpath("model.onnx").is_file()
    with forgotten():
        found = certtrain.verify(run.path, images="0:20", plugins=named, quiet=True)
        assert [line["status"] for line in found.records][:10] == before and len(found.records) == 20
        assert resume(run.path, plugins=named, quiet=True).final() == run.final()
