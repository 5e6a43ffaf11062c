"""Each published recipe against its source: network, normalisation, initial weights, rates, attack mode and passes.

The figures of networks are logits of the released ones, with weights by formula (``filled``): they were computed from
the repositories at the commits named below, which are no part of this one. Counts of parameters cannot tell these nets
apart. Rates are those of the schedules that the sources build; passes those that move their running statistics.
"""

import dataclasses
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from certtrain.attacks.modes import buffers_kept
from certtrain.comparison import read_study
from certtrain.losses.adversarial import AdversarialLoss, AdversarialTraining
from certtrain.losses.adversarial.base import Wrapper
from certtrain.losses.adversarial.statistics import equal_momenta
from certtrain.models import CifarResNet, Cnn7, PreActResNet, SeNet, ShuffleNetV2, Vgg, WideResNet
from certtrain.noise import Noise
from certtrain.recipe import Config, load_config
from certtrain.step import Batch, State, Step
from certtrain.workflows.train import build_model

CONFIGS = Path(__file__).parents[1] / "configs"
CIFAR = (3, 32, 32)

# --- networks


def filled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """In float64 and evaluation mode, its layers filled by formula: the n-th, in the order of execution, of a shape."""
    seen: list[Any] = []
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
    layers = [layer for layer in model.double().eval().modules() if isinstance(layer, kinds)]
    hooks = [layer.register_forward_hook(lambda layer, *_: seen.append(layer)) for layer in layers]
    with torch.no_grad():
        model(torch.zeros(1, *shape, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    counts: dict[tuple[int, ...], int] = {}

    def wave(like: torch.Tensor, phase: int) -> torch.Tensor:
        places = torch.arange(like.numel(), dtype=torch.float64)
        return torch.sin(0.7 * places**1.1 + phase).reshape(like.shape)

    with torch.no_grad():
        for layer in seen:
            shape_ = tuple(layer.weight.shape)
            number = counts[shape_] = counts.get(shape_, 0) + 1
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.weight.copy_(1 + 0.3 * wave(layer.weight, number + 1))
                layer.bias.copy_(0.3 * wave(layer.bias, number + 2))
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.copy_(0.3 * wave(layer.bias, number + 3))
                layer.running_var.copy_(1.2 + wave(layer.bias, number + 4))
            else:
                layer.weight.copy_(2 * wave(layer.weight, number) / math.sqrt(layer.weight[0].numel()))
                if layer.bias is not None:
                    layer.bias.copy_(0.1 * wave(layer.bias, number + 1))
    return model


def first_logits(model: nn.Module, shape: tuple[int, ...]) -> list[float]:
    pixels = (torch.sin(torch.arange(math.prod(shape), dtype=torch.float64)) + 1) / 2
    with torch.no_grad():
        return filled(model, shape)(pixels.reshape(1, *shape))[0, :3].tolist()


NETWORKS = {
    # locuslab/fast_adversarial 54f7287, pdejorge/N-FGSM 0a9e4f0, tmllab/2023_NeurIPS_AAER 5ad2591,
    # OPTML-Group/Fast-BAT 926599d: PreActResNet18
    "shortcut from the input": [-2546.53369341, 78.9429819166, 27.0140625753],
    # tml-epfl/understanding-fast-adv-training ceed494: PreActResNet18
    "shortcut from the input, no last norm": [-99.1693217263, 0.486977410612, 9.98939417523],
    # csdongxian/AWP a7acf5d, AT_AWP: PreActResNet18
    "shortcut from the entry": [-1959.43624695, -229.091780872, 119.008249997],
    # Harry24k/catastrophic-overfitting 049809b: PRN18
    "shortcut from the entry, no last norm": [51.0264884734, -18.706019208, -5.30669768218],
    # CityU-MLO/sPGD 6624853: PreActResNet18 with softplus1
    "softplus": [-1944.0242279, -121.053051293, 200.533123428],
    # GeJulia/flc_pooling 983b2b5: PreActResNet18
    "flc": [-303.67221636, 17.5598099139, -4.71292493624],
    # depth 16, widen 2 of yaodongyu/TRADES 6e8e11b (ATTA 2c987de, MART 2d83e17: the same file), csdongxian/AWP a7acf5d,
    # Friendly-Adversarial-Training 80a0640; depth 14 of GAIRAT 16813b5, which counts two layers less
    "wide": [-341.113591551, -42.5370491795, -24.3799212628],
    # depth 16, widen 2 of Fast-BAT 926599d, which has a block more in each stage than its name says
    "wide, of Fast-BAT": [9129.48789639, 900.140563617, 481.591803233],
    # YisenWang/MART 2d83e17, imrahulr/hat 3177a4f, youuijin/QUB_Loss 422c162: ResNet18
    "resnet": [-463.466519297, 159.454764466, 137.021726119],
    # val-iisc/NuAT 8962290: ResNet18
    "resnet, active branches": [-756.243209383, 28.6566120289, -81.2908131947],
    # Friendly-Adversarial-Training 80a0640: SENet18; jiaxiaojunQAQ/FGSM-PGI fc15cfe: ShuffleNetV2(1), VGG16
    "senet": [11.9369040993, 7.01764604999, 10.4568891988],
    "shufflenet": [323954215.319, 12512749.9251, -26121725.8235],
    "vgg": [219.823342523, -8.27531308398, -8.99014088446],
    # width 4, linear size 16 of expressive-losses 3df64fa, eth-sri/CTBench 0f18162, ADA-research/CTRAIN d5a8371
    "cnn7 of 28": [2.59449598339, -6.87645741021, 9.75638157077],
    "cnn7 of 32": [2.55092834928, -2.15351248196, -1.08281520925],
    "cnn7 of 64": [2.10928773604, -2.25089695206, 1.00763884198],  # CTBench
    "cnn7 of 64, not strided": [-0.16710404413, 0.0145648664749, 0.853852666432],  # CTRAIN
}
"""The first three logits, for ten classes (200 at 64×64)."""


def narrowed(architecture: Any) -> Any:
    """Of the size of the net whose figures are known: without normalisation, wide nets and CNN7 smaller."""
    plain = dataclasses.replace(architecture, mean=(), std=())
    if isinstance(plain, WideResNet):
        return dataclasses.replace(plain, depth=16, widen=2)
    return dataclasses.replace(plain, width=4, hidden=16) if isinstance(plain, Cnn7) else plain


def check_network(architecture: Any, name: str, shape: tuple[int, ...] = CIFAR, classes: int = 10) -> None:
    found = first_logits(narrowed(architecture).build(shape, classes), shape)
    assert found == pytest.approx(NETWORKS[name], rel=1e-9), name


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (WideResNet(depth=22, widen=2), "wide, of Fast-BAT"),
        (SeNet(), "senet"),
        (ShuffleNetV2(), "shufflenet"),
        (Vgg(depth=16), "vgg"),
    ],
    ids=repr,
)
def test_networks_without_a_recipe(architecture, name):
    plain = dataclasses.replace(architecture)
    assert first_logits(plain.build(CIFAR, 10), CIFAR) == pytest.approx(NETWORKS[name], rel=1e-9)


# --- rates: (learning rate, momentum) at each step, as the sources' schedules give them

Rates = Callable[[int], list[tuple[float, float]]]
"""From the number of steps of an epoch."""


def of_torch(
    epochs: float, peak: float, make: Callable[[torch.optim.Optimizer, int], Any], momentum: float = 0.9
) -> Rates:
    def rates(steps: int) -> list[tuple[float, float]]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak, momentum=momentum)
        schedule, found = make(optimizer, steps), []
        for _ in range(round(epochs * steps)):
            group = optimizer.param_groups[0]
            found.append((group["lr"], group["momentum"]))
            optimizer.step()
            schedule.step()
        return found

    return rates


def cyclic(epochs: int, peak: float, up: float | None = None) -> Rates:
    """torch's CyclicLR: up to the middle if not said otherwise, momentum between 0.9 and 0.8."""
    rise = epochs / 2 if up is None else up

    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        scheduler: Any = torch.optim.lr_scheduler.CyclicLR  # takes halves of a step
        return scheduler(
            optimizer, base_lr=0.0, max_lr=peak, step_size_up=rise * steps,
            step_size_down=(epochs - rise) * steps,
        )  # fmt: skip

    return of_torch(epochs, peak, make)


def one_cycle(epochs: int, peak: float) -> Rates:
    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        one = torch.optim.lr_scheduler.OneCycleLR
        return one(optimizer, max_lr=peak, pct_start=0.25, steps_per_epoch=steps, epochs=epochs)

    return of_torch(epochs, peak, make)


def by_epoch(epochs: int, rate: Callable[[int], float]) -> Rates:
    """Constant within an epoch; ``rate`` is a function of its number, counted from 1."""
    return lambda steps: [(rate(epoch), 0.9) for epoch in range(1, epochs + 1) for _ in range(steps)]


def falling(rate: float, epochs: int, *falls: int, first: int = 0) -> Rates:
    """A tenth from each of these epochs on, counted from ``first``."""
    return by_epoch(epochs, lambda epoch: rate * 0.1 ** sum(epoch - 1 + first >= fall for fall in falls))


def by_time(epochs: int, rate: Callable[[float], float]) -> Rates:
    """A function of the epochs that are done, this step included."""
    return lambda steps: [(rate((step + 1) / steps), 0.9) for step in range(epochs * steps)]


def gradalign(peak: float) -> Rates:
    """Up to epoch 12 of 30, down to the end."""
    return by_time(30, lambda time: peak * (time / 12 if time < 12 else (30 - time) / 18))


def nuclear(steps: int) -> list[tuple[float, float]]:
    """CyclicLR of 40 epochs up and 50 down, no longer called after 80; divided by 10 behind the epochs 85 and 90,
    counted from 0."""
    found = cyclic(90, 0.1, up=40)(steps)[: 80 * steps + 1]
    rate, momentum = found.pop()
    tail = [(rate * 0.1 ** ((epoch > 85) + (epoch > 90)), momentum) for epoch in range(80, 100) for _ in range(steps)]
    return found + tail


def bregman(steps: int) -> list[tuple[float, float]]:
    """Of the paper: 5 epochs of warm-up to 0.4, divided by 10 at 75 and 90 of the 100 behind it."""
    warm = [(0.4 * step / (5 * steps), 0.9) for step in range(5 * steps)]
    return warm + falling(0.4, 100, 75, 90)(steps)


# --- the table

FAST = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
BAT = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CKPT = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NONE = ((), ())
PLAIN, NORMAL, LINEAR = "torch", "fan out, no bias", "fan out, linear too"


@dataclass(frozen=True)
class Source:
    """What a released code does.

    Args:
        passes: the passes in training mode, each of which moves running statistics: c of the clean images, a of the
            adversarial ones, o of any others; None where the source is no code, or has no such order here.
        rates: None for schedules of ours.
        steps: of an epoch.
    """

    network: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    weights: str
    mode: str | None
    passes: str | None
    rates: Rates
    steps: int = 391


INPUT, BARE = "shortcut from the input", "shortcut from the input, no last norm"
SOURCES = {
    "fgsm": Source(BARE, NONE, LINEAR, "train", "ca", gradalign(0.2)),
    "fgsm_ga": Source(BARE, NONE, LINEAR, "train", "cao", gradalign(0.3)),
    "fgsm_rs": Source(INPUT, FAST, PLAIN, "train", "oa", cyclic(15, 0.2)),
    "free_at": Source(INPUT, FAST, PLAIN, None, "a", cyclic(10, 0.04)),  # here not with every replay
    "flc": Source("flc", FAST, PLAIN, "train", "oa", cyclic(15, 0.2)),
    "n_fgsm": Source(INPUT, FAST, PLAIN, "train", "oa", cyclic(30, 0.2)),
    "n_aaer": Source(INPUT, FAST, PLAIN, "train", "oa", cyclic(30, 0.2)),
    "n_lap": Source(INPUT, FAST, PLAIN, "train", None, cyclic(30, 0.2)),
    "fast_bat": Source(INPUT, BAT, PLAIN, "train", "ooaa", cyclic(20, 0.2, up=10), 352),
    "pgd2_at": Source(INPUT, BAT, PLAIN, "train", "ooa", cyclic(20, 0.2, up=10), 352),
    "fgsm_ckpt": Source("shortcut from the entry, no last norm", CKPT, PLAIN, "eval", "a", cyclic(30, 0.3)),
    "fgsm_pgi": Source("resnet", NONE, PLAIN, "batch", "oa", falling(0.1, 110, 100, 105)),  # its one pass is the loss'
    "atta": Source("wide", NONE, NORMAL, "eval", "a", falling(0.1 / 64, 38, 30, 36, first=1), 782),
    "nu_at": Source("resnet, active branches", NONE, PLAIN, "eval", "cac", nuclear, 766),
    "trades": Source("wide", NONE, NORMAL, "eval", "cac", falling(0.1, 76, 75, 90, 100, first=1)),
    "mart": Source("resnet", NONE, PLAIN, "eval", "ca", falling(0.01, 120, 75, 90, 100, first=1)),
    "gairat": Source(
        "wide", NONE, NORMAL, "eval", "a",
        by_epoch(120, lambda epoch: 0.1 / (1 if epoch < 60 else 10 if epoch < 90 else 100 if epoch < 110 else 200)),
    ),
    "friendly_trades": Source("wide", NONE, NORMAL, "eval", "ca", falling(0.1, 85, 75, 90, first=1)),
    "trades_awp": Source("wide", NONE, NORMAL, "eval", "acc", falling(0.1, 200, 100, 150, first=1)),
    "at_awp": Source(
        "shortcut from the entry", FAST, PLAIN, "train", "o" * 10 + "aac",
        by_time(200, lambda time: 0.1 if time < 100 else 0.01 if time < 150 else 0.001),
    ),
    "hat_teacher": Source("resnet", NONE, PLAIN, "eval", "c", one_cycle(50, 0.21)),
    "hat": Source("resnet", NONE, PLAIN, "eval", "cao", one_cycle(50, 0.21)),
    "pgd_at": Source("resnet", NONE, PLAIN, "train", "o" * 10 + "aa", falling(0.1, 100, 70, 85)),
    "qub_static": Source("resnet", NONE, PLAIN, "eval", "ca", falling(0.1, 100, 70, 85)),
    "qub_decreasing": Source("resnet", NONE, PLAIN, "batch", None, falling(0.1, 100, 70, 85)),  # oac there, coa here
    **{
        name: Source("resnet", NONE, PLAIN, mode, None, bregman, 98)
        for name, mode in (("fait", "eval"), ("fait_mer", "eval"), ("fait_squared", "eval"), ("score", "batch"),
                           ("trades_mer", "eval"), ("trades_mer_squared", "eval"))
    },
}  # fmt: skip
"""Of the Bregman paper there is no code: its net is taken to be the usual one, its attacks TRADES' and SCORE's."""

every_source = pytest.mark.parametrize("name", SOURCES)


def recipe(name: str) -> Config:
    return load_config(CONFIGS / "adversarial" / f"{name}.yaml")


def test_every_recipe_has_a_source():
    assert sorted(SOURCES) == [path.stem for path in sorted((CONFIGS / "adversarial").glob("*.yaml"))]


@every_source
def test_network_and_normalisation(name):
    config, source = recipe(name), SOURCES[name]
    assert (config.model.mean, config.model.std) == source.normalisation
    if isinstance(config.model, WideResNet):
        assert (config.model.depth, config.model.widen) == (34, 10)
    check_network(config.model, source.network)


@every_source
def test_rates(name):
    """At the first, a middle and the last step of every epoch; within a 10⁻⁵ of the peak."""
    training, source = recipe(name).training, SOURCES[name]
    wanted, steps = source.rates(source.steps), source.steps
    assert len(wanted) == training.epochs * steps
    optimizer = training.optimiser.build(nn.Linear(1, 1))
    for epoch in range(training.epochs):
        for step in (epoch * steps, epoch * steps + steps // 2, epoch * steps + steps - 1):
            training.set_rate(optimizer, step / steps)
            (group,) = optimizer.param_groups
            rate, momentum = wanted[step]
            assert group["lr"] == pytest.approx(rate, abs=1e-5 * training.optimiser.lr), (epoch, step)
            assert group["momentum"] == pytest.approx(momentum, abs=1e-5), (epoch, step)


def deviation(layer: nn.Conv2d | nn.Linear, weights: str) -> float:
    inward, outward = layer.weight[0].numel(), layer.weight[:, 0].numel()
    if weights == PLAIN or (isinstance(layer, nn.Linear) and weights == NORMAL):
        return 1 / math.sqrt(3 * inward)  # uniform within 1 / sqrt(inward)
    return math.sqrt(2 / (inward if isinstance(layer, nn.Linear) else outward))


@every_source
def test_initial_weights(name):
    """Deviations and distributions of every layer, of a narrow net; biases, and batch norms of 1 and 0."""
    config, source = recipe(name), SOURCES[name]
    small = {"depth": 16, "widen": 2} if isinstance(config.model, WideResNet) else {"width": 16}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **small))

    class Data:
        shape, classes = CIFAR, 10

    model = build_model(config, Data)  # type: ignore[arg-type]
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            wanted, found = deviation(layer, source.weights), layer.weight.detach()
            assert float(found.std()) == pytest.approx(wanted, rel=5 / math.sqrt(found.numel())), layer
            uniform = source.weights == PLAIN or (isinstance(layer, nn.Linear) and source.weights == NORMAL)
            assert (float(found.abs().max()) <= math.sqrt(3) * wanted * 1.0001) == uniform
            if layer.bias is not None:
                assert bool(layer.bias.any()) == (source.weights == PLAIN)
        elif isinstance(layer, nn.BatchNorm2d):
            assert bool((layer.weight == 1).all()) and not layer.bias.any()


@pytest.mark.parametrize(
    ("first", "middle", "last"), [(0.1192, 0.0263, 0.0186)], ids=["yaodongyu/TRADES 6e8e11b, WideResNet()"]
)
def test_deviations_of_the_whole_wide_resnet(first, middle, last):
    """sqrt(2 / (9 · 16)), sqrt(2 / (9 · 320)) and sqrt(2 / (9 · 640)), the first one of a small sample."""

    class Data:
        shape, classes = CIFAR, 10

    model = build_model(recipe("trades"), Data)  # type: ignore[arg-type]
    layers = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert float(layers[0].std().detach()) == pytest.approx(first, rel=0.12)  # a sample of 432
    assert float(layers[len(layers) // 2].std().detach()) == pytest.approx(middle, rel=5e-3)
    assert float(layers[-1].std().detach()) == pytest.approx(last, rel=5e-3)


# --- passes


class Recorder(nn.Module):
    """A net with one batch norm that records each pass in training mode: its images, and the momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3 * 4 * 4, 10)
        self.passes: list[tuple[torch.Tensor, float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.norm.running_mean
        assert before is not None
        before = before.clone()
        found = self.head(self.norm(x).flatten(1))
        assert self.norm.running_mean is not None and self.norm.momentum is not None
        if not torch.equal(before, self.norm.running_mean):
            self.passes.append((x.detach().clone(), self.norm.momentum))
        return found


def weights_of(sequence: list[tuple[str, float]]) -> dict[str, float]:
    """The weight of each kind of images in running statistics after passes with these momenta."""
    found: dict[str, float] = {}
    for kind, momentum in sequence:
        found = {other: weight * (1 - momentum) for other, weight in found.items()}
        found[kind] = found.get(kind, 0.0) + momentum
    return {kind: weight for kind, weight in found.items() if weight > 0}


def innermost(loss: AdversarialLoss) -> AdversarialLoss:
    return innermost(loss.base) if isinstance(loss, Wrapper) else loss


def step_of(config: Config, epoch: int) -> tuple[Batch, Step]:
    generator = torch.Generator().manual_seed(0)
    images, index = 0.3 + 0.4 * torch.rand(6, 3, 4, 4, generator=generator), torch.arange(6)
    specs = config.loss.declare_state((3, 4, 4), 10)
    state = State({k: spec.allocate(6, 6, torch.device("cpu"), 0) for k, spec in specs.items()}, specs)
    epsilon = torch.tensor(float(config.perturbation.epsilon))
    ball, epochs = config.perturbation.with_epsilon(epsilon), config.training.epochs
    step = Step(ball, epsilon, epsilon, epoch / epochs, Noise(7, index), state, epoch=epoch, epochs=epochs)
    return Batch(images, index, index), step


@every_source
def test_attack_mode(name):
    loss = innermost(recipe(name).loss)  # type: ignore[arg-type]
    attack = getattr(loss, "attack", None)
    assert (None if attack is None else attack.attack_mode) == SOURCES[name].mode


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.passes])
def test_passes_that_move_running_statistics(name, monkeypatch, tmp_path):
    """Each kind of images ends with the weight that the source's passes give it, in a step of the last epoch."""
    config, wanted = recipe(name), SOURCES[name].passes
    assert wanted is not None
    torch.manual_seed(0)
    model = Recorder().train()
    if hasattr(config.loss, "teacher"):
        monkeypatch.setattr("certtrain.losses.adversarial.hat.load_teacher", lambda *_: Recorder().eval())
    seen: list[torch.Tensor] = []
    kind = type(innermost(config.loss))  # type: ignore[arg-type]
    original = kind.passes

    def recorded(self, *words):
        passes = original(self, *words)
        seen.append(passes.images.detach())
        return passes

    @contextmanager
    def forgotten(_):  # what an attack, or AWP, restores
        count = len(model.passes)
        with buffers_kept(model):
            yield
        del model.passes[count:]

    monkeypatch.setattr(kind, "passes", recorded)
    for room in ("certtrain.attacks.base", "certtrain.training.weight_perturbation"):
        monkeypatch.setattr(f"{room}.buffers_kept", forgotten)
    batch, step = step_of(config, 0 if name == "fgsm_pgi" else config.training.epochs - 1)  # where its start is random
    optimizer = config.training.optimiser.build(model)
    model.passes.clear()
    replays = config.loss.replays
    config.training.update(model, optimizer, config.loss, [(batch, step)], None)
    assert replays == (8 if name == "free_at" else 1)  # each is a step

    def letter(images: torch.Tensor) -> str:
        if torch.equal(images, batch.images) and "c" in wanted:  # Free-AT's first ones are the clean ones
            return "c"
        return "a" if any(torch.equal(images, other) for other in seen) else "o"

    sequence = [(letter(images), momentum) for images, momentum in model.passes]
    if name == "hat_teacher":  # at epsilon 0 the adversarial images are the clean ones
        sequence = [("c", momentum) for _, momentum in sequence]
    assert weights_of(sequence) == pytest.approx(weights_of([(letter, 0.1) for letter in wanted])), sequence


def test_momenta_that_stand_for_a_sequence():
    """By hand: clean, adversarial, clean leave 0.1 + 0.081 and 0.09; of passes that are not listed nothing is left."""
    first, second = equal_momenta(["clean", "adversarial", "clean"], ["clean", "adversarial"], 0.1)
    assert second == pytest.approx(0.09) and first * (1 - second) == pytest.approx(0.181)
    assert equal_momenta(["clean", "adversarial"], ["clean", "adversarial"], 0.1) == pytest.approx([0.1, 0.1])
    assert equal_momenta(["adversarial"], ["clean", "adversarial"], 0.1) == pytest.approx([0, 0.1])
    assert equal_momenta(["clean"], ["clean", "adversarial"], 1.0) == pytest.approx([1, 0])


def test_repeated_passes_move_statistics_as_real_ones_would():
    """TRADES with its list against the same passes made one by one; weights get the same gradient either way."""
    config = recipe("trades")
    loss, plain = config.loss, dataclasses.replace(config.loss, statistics=())
    assert isinstance(loss, AdversarialTraining)
    batch, step = step_of(config, 0)
    torch.manual_seed(0)
    model = Recorder().double().train()
    batch = dataclasses.replace(batch, images=batch.images.double())
    other = Recorder().double().train()
    other.load_state_dict(model.state_dict())
    loss(model, batch, step).total.backward()
    found = loss.attacked(other, batch, step).images
    plain(other, batch, step).total.backward()
    with torch.no_grad():
        other(batch.images)
    assert not torch.equal(found, batch.images)
    for name, value in model.norm.named_buffers():
        if name != "num_batches_tracked":
            torch.testing.assert_close(value, other.norm.get_buffer(name), rtol=1e-12, atol=1e-12)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]
    assert model.norm.momentum == 0.1


# --- studies, sparse recipes and certified ones


STUDIES = {
    "fast_bat_table1": (INPUT, BAT), "fast_bat_strength": (INPUT, BAT), "epsilon16": (INPUT, FAST),
    "fast_bat_cifar100": (INPUT, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "fast_bat_tinyimagenet": (INPUT, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "qub_table": ("resnet", NONE), "fait_sweeps": ("resnet", NONE), "sparse_table": ("softplus", NONE),
    "sparse_multi_step": ("softplus", NONE), "sparse_mitigations": ("softplus", NONE),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_networks_of_studies(name):
    network, normalisation = STUDIES[name]
    for model in {row.config.model for row in read_study(CONFIGS / "studies" / f"{name}.yaml").rows}:
        if getattr(model, "downsampling", "stride") == "stride":  # one row of the mitigations is FLC pooling
            assert (model.mean, model.std) == normalisation
            check_network(model, network)


def test_architectures_of_fast_bat():
    """OPTML-Group/Fast-BAT 926599d: bottlenecks' shortcuts read the entry, WRN-16-8 has three blocks a stage."""
    rows = read_study(CONFIGS / "studies" / "fast_bat_table2.yaml").rows
    mean, std = BAT
    wide = WideResNet(depth=22, widen=8, dropout=0.1, mean=mean, std=std)
    assert {row.config.model for row in rows} == {PreActResNet(depth=50, mean=mean, std=std), wide}
    for row in rows:
        drawn = "he_fan_in_zero_linear" if row.config.model == wide else "default"
        assert row.config.training.initialisation == drawn


def test_modes_of_the_attacks_of_qub_s_table():
    """youuijin/QUB_Loss 422c162: one step and TRADES in evaluation mode, PGD and the prior in training mode."""
    modes = {"Fgsm": "eval", "FgsmRs": "eval", "FgsmCkpt": "eval", "FgsmGa": "eval", "Trades": "eval",
             "PgdAt": "train", "FgsmPgi": "batch", "NFgsm": "train"}  # fmt: skip
    seen = set()
    for row in read_study(CONFIGS / "studies" / "qub_table.yaml").rows:
        loss = innermost(row.config.loss)  # type: ignore[arg-type]
        kind = type(loss).__name__
        seen.add(kind)
        if kind != "FreeAt":
            assert loss.attack.attack_mode == modes[kind], row.label  # type: ignore[attr-defined]
    assert seen == {*modes, "FreeAt"}


SPARSE = {  # CityU-MLO/sPGD 6624853: no normalisation; rates by iterations, a tenth at a quarter and three quarters
    "cifar10": ("softplus", 100, 391), "cifar100": ("softplus", 100, 391), "gtsrb": ("softplus", 100, 307),
    "imagenet100": ("resnet 34", 50, 2640),
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((CONFIGS / "sparse").glob("*.yaml")), ids=lambda path: path.stem)
def test_sparse_recipes(path):
    data = path.stem.split("_")[0]
    if data == "digits":
        return
    config, (network, epochs, steps) = load_config(path), SPARSE[data]
    assert (config.model.mean, config.model.std) == NONE and config.training.initialisation == "default"
    if network == "softplus":
        check_network(config.model, network)
    else:  # 3×3 stem of stride 1 and no pool, at 224×224, too
        assert config.model == CifarResNet(depth=34)
        found = next(layer for layer in config.model.build((3, 64, 64), 10).modules() if isinstance(layer, nn.Conv2d))
        assert (found.kernel_size, found.stride) == ((3, 3), (1, 1))
    total = epochs * steps
    for step in range(0, total, steps // 2):
        wanted = 0.05 * 0.1 ** ((step >= total // 4) + (step >= 3 * total // 4))
        assert config.training.learning_rate(step / steps) == pytest.approx(wanted)


SHAPES = {"mnist": ((1, 28, 28), 10), "cifar10": (CIFAR, 10), "tinyimagenet": ((3, 64, 64), 200),
          "imagenet64": ((3, 64, 64), 200)}  # fmt: skip
MEANS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet64": ((0.4815, 0.4578, 0.4082), (0.2153, 0.2111, 0.2121)),
}
CERTIFIED = [
    path
    for folder in (".", "ctbench", "ctrain", "sabr")
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
    if path.stem.split("_")[0] in SHAPES
]


@pytest.mark.parametrize("path", CERTIFIED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_certified_recipes(path):
    """Network, normalisation, initial weights and attack mode; numbers stand in test_published_rows.py."""
    config, data, folder = load_config(path), path.stem.split("_")[0], path.parent.name
    shape, classes = SHAPES[data]
    unstrided = folder == "ctrain" and shape[1] == 64
    check_network(config.model, f"cnn7 of {shape[1]}{', not strided' if unstrided else ''}", shape, classes)
    own = ((0.1307,), (0.3081,)) if folder == "ctbench" else NONE
    assert (config.model.mean, config.model.std) == MEANS.get(data, own)
    assert config.training.initialisation == "shi"
    attack: Any = getattr(config.loss, "attack", None)
    if attack is not None:
        assert attack.attack_mode == ("clean" if folder == "ctbench" else "eval")
    half_width = getattr(config.loss, "half_width", None)
    if half_width is not None:  # tau · epsilon in eth-sri/SABR 1a6c258, expressive-losses 3df64fa, CTRAIN d5a8371
        assert half_width == ("clipped" if folder == "ctbench" else "epsilon")
