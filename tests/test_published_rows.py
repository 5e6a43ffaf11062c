"""The published recipes hold the numbers of the reference sheet, which stand here a second time, as tables."""

import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from walking import walk

from certtrain.config import read_yaml
from certtrain.losses import Ramp
from certtrain.models import Cnn7
from certtrain.recipe import Config, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = re.compile(r"((mnist_eps0\.[13]|cifar10_eps[28]|tinyimagenet|imagenet64)_[a-z]+|(ctbench|ctrain|sabr)/.+)")
RECIPES = [str(path.relative_to(CONFIGS).with_suffix("")) for path in sorted(CONFIGS.rglob("*.yaml"))]
ROWS = [name for name in RECIPES if PUBLISHED.fullmatch(name)]

# Typed from the reference sheet (sections 1.9, 1.10, 2 and 3), not from the recipes.
SHAPES = {"Mnist": (1, 28, 28), "Cifar10": (3, 32, 32), "TinyImageNet": (3, 64, 64), "ImageNet64": (3, 64, 64)}
CLASSES = {"Mnist": 10, "Cifar10": 10, "TinyImageNet": 200, "ImageNet64": 1000}
TRAINING_IMAGES = {"Mnist": 60_000, "Cifar10": 50_000, "TinyImageNet": 100_000, "ImageNet64": 1_281_167}
PARAMETERS = {"Mnist": 13_259_338, "Cifar10": 17_192_650, "TinyImageNet": 17_290_120, "ImageNet64": 17_700_520}
PIXELS = {
    "Cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "TinyImageNet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "ImageNet64": ((0.4815, 0.4578, 0.4082), (0.2153, 0.2111, 0.2121)),
}
CROP = {"Mnist": 0, "Cifar10": 2, "TinyImageNet": 4, "ImageNet64": 4}

# 2.1: batch, epochs, ramp's start and length, milestones, train multiplier, attack's steps, size and factor,
# regularisation, steps in total
EXPRESSIVE = """
mnist_eps0.1  256  70  1 20   50,60  2      1 10.0  1    0.5   16450
mnist_eps0.3  256  70  1 20   50,60  1.334  1 10.0  1    0.5   16450
cifar10_eps2  128 160  2 80 120,140  1      8 0.25  2.1  0.5   62560
cifar10_eps8  128 260  2 80 180,220  1      1 10.0  1    0.5  101660
tinyimagenet  128 160  2 80 120,140  1      1 10.0  1    0.2  125120
imagenet64    128  80  2 20   60,70  1      1 10.0  1    0.2  800800
"""
# 2.1: method, alpha (tau), l1
EXPRESSIVE_COEFFICIENTS = """
mnist_eps0.1  ccibp 0.1  2e-6  mtlibp 1e-2 1e-5
mnist_eps0.3  ccibp 0.3  3e-6  mtlibp 8e-2 1e-6
cifar10_eps2  ccibp 1e-2 3e-6  mtlibp 4e-3 3e-6  expibp 9.5e-2 4e-6  sabr 0.03 3e-6
cifar10_eps8  ccibp 0.5  0     mtlibp 0.5  1e-7  expibp 0.5    0     sabr 0.6  0
tinyimagenet  ccibp 1e-2 5e-5  mtlibp 1e-2 5e-5  expibp 4e-2   5e-5
imagenet64    ccibp 5e-2 1e-5  mtlibp 5e-2 1e-5  expibp 5e-2   1e-5
"""
# 2.2: batch, epochs, ramp from and to (from 0), milestones, train multiplier, regularisation
CTBENCH = """
mnist_eps0.1  256  70  0  20   50,60  2  0.5
mnist_eps0.3  256  70  0  20   50,60  1  0.5
cifar10_eps2  128 160  1  81 120,140  1  0.5
cifar10_eps8  128 240  1 121 200,220  1  0.5
tinyimagenet  128 160  1  81 120,140  1  0.2
"""
# 2.2: robust weight, l1, then: tau, alpha, split, scale, attack's steps and restarts, factor, averaging from
CTBENCH_METHODS = """
mnist_eps0.1  ibp      .7 2e-6
mnist_eps0.1  crownibp .7 5e-6
mnist_eps0.1  sabr     .7 1e-6  tau=.4 n=10 r=3
mnist_eps0.1  taps     .7 2e-6  split=10|11 scale=4 n=10 r=3
mnist_eps0.1  staps    .7 5e-6  split=17|4 scale=4 tau=.4 n=10 r=3
mnist_eps0.1  mtlibp   .7 1e-5  alpha=.02 n=10 r=3 factor=1 from=65
mnist_eps0.1  ccibp    .7 1e-5  alpha=.02 n=10 r=3 factor=1 from=65
mnist_eps0.1  expibp   .7 1e-5  alpha=.02 n=10 r=3 factor=1 from=65
mnist_eps0.3  ibp      .7 2e-6
mnist_eps0.3  crownibp .7 1e-6
mnist_eps0.3  sabr     1  2e-6  tau=.9 n=5 r=3
mnist_eps0.3  taps     1  0     split=13|8 scale=4 n=5 r=3
mnist_eps0.3  staps    1  1e-5  split=17|4 scale=4 tau=.6 n=10 r=3
mnist_eps0.3  mtlibp   1  1e-6  alpha=.5 n=1 r=3 factor=1 from=65
cifar10_eps2  ibp      .8 1e-6
cifar10_eps2  crownibp 1  3e-6
cifar10_eps2  sabr     1  1e-6  tau=.1 n=5 r=3 shrink=.8
cifar10_eps2  taps     1  2e-6  split=4|17 scale=4 n=8 r=3 shrink=.8
cifar10_eps2  staps    1  1e-6  split=17|4 scale=2 tau=.1 n=8 r=3 shrink=.8
cifar10_eps2  mtlibp   .9 3e-6  alpha=.01 n=1 r=3 factor=2 from=150
cifar10_eps8  ibp      1  0
cifar10_eps8  crownibp 1  0
cifar10_eps8  sabr     1  0     tau=.9 n=5 r=3
cifar10_eps8  taps     1  0     split=17|4 scale=2 n=10 r=3
cifar10_eps8  staps    1  0     split=17|4 scale=2 tau=.9 n=10 r=3
cifar10_eps8  mtlibp   1  0     alpha=.6 n=1 r=3 factor=1 from=225
tinyimagenet  ibp      1  1e-5
tinyimagenet  crownibp 1  2e-5  from=150
tinyimagenet  sabr     1  5e-5  tau=.4 n=1 r=3
tinyimagenet  taps     .7 5e-5  split=17|4 scale=8 n=1 r=3
tinyimagenet  staps    1  5e-5  split=17|4 scale=4 tau=.6 n=1 r=3
tinyimagenet  mtlibp   .7 5e-5  alpha=.05 n=1 r=3 factor=1.5 from=150
tinyimagenet  ccibp    .7 5e-5  alpha=.05 n=1 r=3 factor=1 from=150
tinyimagenet  expibp   1  1e-6  alpha=.4 n=1 r=1 factor=1
"""
# 2.3: tau, l1, shrink, epochs, milestones and the epoch that ends the ramp (both in the code's own count, from 1)
SABR = """
mnist_eps0.1  .4 1e-5 1   70   50,60 22
mnist_eps0.3  .6 1e-6 1   70   50,60 22
cifar10_eps2  .1 1e-6 .8 160 120,140 82
cifar10_eps8  .7 0    1  180 140,160 82
tinyimagenet  .4 1e-6 1  180 140,160 82
"""
# 2.4: optimiser, lr, decay, warm-up, ramp, two lr steps, l1, regularisation, train multiplier, then alpha or tau,
# attack's steps and size, factor; or kappa's start and end
CTRAIN = """
cifar10_eps2_mtlibp_1 RAdam 5.8e-3 .115   5  83 12 29 1.4e-6 .41 1.17 alpha=2.2e-3 n=7 size=1.63 factor=2.27
cifar10_eps2_mtlibp_2 RAdam 2.8e-3 .128   4  74 15 33 1.1e-6 .36 1.08 alpha=1.3e-3 n=8 size=1.71 factor=1.94
cifar10_eps2_sabr     RAdam 9.1e-4 .124   3 104 27 13 4.8e-6 .39 1.55 tau=.012 n=4 size=1.19 factor=2.85
cifar10_eps2_ibp      AdamW 1.4e-3 .038   1  75 43 35 8.7e-7 .24 1.0  start=.26 end=.18
cifar10_eps2_crownibp AdamW 6.9e-4 .0125  3  74 52  0 6.6e-8 .13 1.0  start=.85 end=.63
cifar10_eps8_mtlibp_1 AdamW 1.2e-3 .0115  4 111 99 59 3.6e-7 .37 1.10 alpha=.49 n=10 size=1.14 factor=1.0
cifar10_eps8_mtlibp_2 Adam  1.1e-3 .151   1 142 22 17 6.3e-7 .88 1.0  alpha=.50 n=9 size=2.0 factor=1.0
cifar10_eps8_sabr     RAdam 5.0e-4 .209   5 147 94 39 7.9e-8 .77 1.0  tau=.5 n=5 size=2.0 factor=1.35
cifar10_eps8_ibp      AdamW 1.1e-3 .065   4 163 48 18 9.5e-8 .43 1.47 start=.71 end=.46
tinyimagenet_mtlibp   RAdam 2.5e-3 .055   5  87 19 36 7.3e-6 .32 1.30 alpha=1e-3 n=7 size=1.25 factor=2.28
"""
MODULES = ["normalise", *["conv", "norm", "relu"] * 5, "flatten", "linear", "norm", "relu", "linear"]  # of CNN7, 1.4
TYPES = {"ccibp": "CcIbp", "mtlibp": "MtlIbp", "expibp": "ExpIbp", "sabr": "Sabr", "ibp": "Ibp", "crownibp": "CrownIbp",
         "taps": "Taps", "staps": "Staps"}  # fmt: skip


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def named(fields: list[str]) -> dict[str, str]:
    return dict(field.split("=") for field in fields)


def epochs_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def recipe(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml")


def kind(component: object) -> str:
    return type(component).__name__


def as_in_sheet(value: float, text: str) -> bool:
    """Whether the value, rounded to the digits of the sheet's number, is that number."""
    return float(f"{value:.{len(Decimal(text).as_tuple().digits) - 1}e}") == float(text)


def same(name: str, found: dict, wanted: dict) -> None:
    assert {key: found[key] for key in wanted} == wanted, name


def ramp_of(config: Config) -> tuple[int, int]:
    return config.training.schedule.start, config.training.schedule.length


def test_the_tables_name_every_published_recipe():
    expressive = [f"{fields[0]}_{method}" for fields in rows(EXPRESSIVE_COEFFICIENTS) for method in fields[1::3]]
    ctbench = [f"ctbench/{setting}_{method}" for setting, method, *_ in rows(CTBENCH_METHODS)]
    others = [f"{folder}/{row[0]}" for folder, table in (("ctrain", CTRAIN), ("sabr", SABR)) for row in rows(table)]
    assert sorted(expressive + ctbench + others) == sorted(ROWS)
    assert (len(expressive), len(ctbench), len(others)) == (18, 34, 15)


@walk("name", [name for name in RECIPES if name in ROWS or re.search(r"eps\d", name)])
def test_epsilon_is_an_exact_fraction(name):
    found = re.search(r"eps(\d+\.\d+|\d+)", name)
    text = "1/255" if found is None else found[1] if "." in found[1] else f"{found[1]}/255"
    written = read_yaml(CONFIGS / f"{name}.yaml")["perturbation"]["epsilon"]
    assert str(written) == text
    assert recipe(name).perturbation.epsilon == float(Fraction(text))


@walk("name", ROWS)
def test_what_all_rows_share(name):
    """Normalisation and crops (1.10), clipping, and whose batch statistics are used where (1.5, 1.8)."""
    config = recipe(name)
    data, training = kind(config.data), config.training
    own, mnist = name.startswith("ctbench/"), data == "Mnist"
    assert (config.model.mean, config.model.std) == (
        PIXELS[data] if not mnist else ((0.1307,), (0.3081,)) if own else ((), ())
    )
    augment = training.augment
    assert (augment.pad, augment.flip, augment.padding) == (CROP[data], not mnist, "edge")
    assert training.clip == (None if name.startswith("sabr/") else 10)
    assert (training.initialisation, kind(training.schedule), training.accumulate) == ("shi", "Smoothed", 1)
    assert training.schedule.end <= training.epochs and config.perturbation.epsilon < 1
    mode = "clean" if name.startswith(("ctbench/", "sabr/")) else "adv"
    assert getattr(config.loss, "bn_mode", mode) == mode
    attack = getattr(config.loss, "attack", None)
    assert attack is None or attack.attack_mode == ("clean" if own else "eval")
    assert training.precise_bn == (own and name != "ctbench/cifar10_eps2_staps")


@pytest.mark.parametrize("row", rows(EXPRESSIVE), ids=lambda row: row[0])
def test_expressive_losses(row):
    setting, batch, epochs, start, length, milestones, multiplier, steps, size, factor, regularisation, total = row
    coefficients = next(fields[1:] for fields in rows(EXPRESSIVE_COEFFICIENTS) if fields[0] == setting)
    for method, coefficient, l1 in zip(*(coefficients[i::3] for i in range(3)), strict=True):
        config = recipe(f"{setting}_{method}")
        training, loss = vars(config.training), vars(config.loss)
        assert kind(config.loss) == TYPES[method]
        same(method, loss, {"tau" if method == "sabr" else "alpha": float(coefficient), "l1": float(l1), "kappa": 0})
        same(method, loss, {"regularisation": float(regularisation), "attack_epsilon_factor": float(factor)})
        same(method, vars(loss["attack"]), {"steps": int(steps), "step_size": float(size), "restarts": 1})
        same(method, training, {"batch_size": int(batch), "epochs": int(epochs), "milestones": epochs_of(milestones)})
        same(method, training, {"decay": 0.2, "epsilon_multiplier": float(multiplier), "averaging": None})
        assert vars(training["optimiser"]) == {"lr": 5e-4, "weight_decay": 0} and kind(training["optimiser"]) == "Adam"
        assert ramp_of(config) == (int(start), int(length))
        assert loss.get("confine", "attacked") == "attacked"
        assert training["epochs"] * -(-TRAINING_IMAGES[kind(config.data)] // training["batch_size"]) == int(total)


@walk("row", rows(CTBENCH_METHODS), ids=lambda row: f"{row[0]}-{row[1]}")
def test_ctbench(row):
    setting, method, weight, l1, *fields = row
    config, more = recipe(f"ctbench/{setting}_{method}"), named(fields)
    common = next(fields[1:] for fields in rows(CTBENCH) if fields[0] == setting)
    if (setting, method) == ("tinyimagenet", "expibp"):
        common[1:5] = "80", "1", "21", "60,70"  # the sheet has the 80 epochs; the rest is the released script's
    batch, epochs, first, last, milestones, multiplier, regularisation = common
    multiplier = {("mnist_eps0.3", "taps"): "4/3", ("cifar10_eps2", "sabr"): "3/2"}.get((setting, method), multiplier)
    training, loss = vars(config.training), vars(config.loss)
    assert kind(config.loss) == TYPES[method]
    same(method, loss, {"kappa": float(1 - Decimal(weight)), "l1": float(l1), "regularisation": float(regularisation)})
    same(method, training, {"batch_size": int(batch), "epochs": int(epochs), "milestones": epochs_of(milestones)})
    same(method, training, {"decay": 0.2, "epsilon_multiplier": float(Fraction(multiplier))})
    assert vars(training["optimiser"]) == {"lr": 5e-4, "weight_decay": 0} and kind(training["optimiser"]) == "Adam"
    assert ramp_of(config) == (int(first) + 1, int(last) - int(first))
    averaging = training["averaging"]
    assert (averaging and (averaging.start, averaging.every)) == ((int(more["from"]), 10) if "from" in more else None)
    keys = {"tau": "tau", "alpha": "alpha", "scale": "gradient_scale", "factor": "attack_epsilon_factor",
            "shrink": "shrink"}  # fmt: skip
    same(method, loss, {keys[key]: float(value) for key, value in more.items() if key in keys})
    if "shrink" not in more:
        assert loss.get("shrink", 1) == 1
    if method in ("taps", "staps"):
        extractor, classifier = map(int, more["split"].split("|"))
        assert extractor + classifier == len(MODULES)
        assert loss["classifier_activations"] == MODULES[extractor:].count("relu")
        same(method, loss, {"latent_steps": int(more["n"]), "latent_restarts": int(more["r"]), "threshold": 0.5})
    if "attack" in loss:
        size = 0.2 if method in ("sabr", "staps") else max(0.25, 2 / int(more["n"]))  # as its code passes them
        attack = {"steps": int(more["n"]), "restarts": int(more["r"]), "step_size": size}
        same(method, vars(loss["attack"]), attack)
    if method == "crownibp":
        same(method, loss, {"beta": 1, "fusion": True})
    assert loss.get("confine", "ball") == "ball"


@pytest.mark.parametrize("row", rows(SABR), ids=lambda row: row[0])
def test_sabr(row):
    setting, tau, l1, shrink, epochs, milestones, end = row
    config = recipe(f"sabr/{setting}")
    assert kind(config.loss) == "Sabr" and kind(config.training.optimiser) == "Adam"
    wanted = {"tau": float(tau), "l1": float(l1), "shrink": float(shrink), "confine": "ball", "regularisation": 0.5}
    same(setting, vars(config.loss), {**wanted, "kappa": 0, "attack_epsilon_factor": 1})
    same(setting, vars(config.loss.attack), {"steps": 8, "step_size": 0.5, "restarts": 1})  # type: ignore[attr-defined]
    earlier = tuple(epoch - 1 for epoch in epochs_of(milestones))
    same(setting, vars(config.training), {"epochs": int(epochs), "milestones": earlier, "epsilon_multiplier": 1})
    same(setting, vars(config.training), {"decay": 0.2, "averaging": None})
    assert config.training.batch_size == (256 if "mnist" in setting else 128) and config.training.optimiser.lr == 5e-4
    assert config.training.schedule.start == 2 and config.training.schedule.end == int(end) - 1


@pytest.mark.parametrize("row", rows(CTRAIN), ids=lambda row: row[0])
def test_ctrain(row):
    name, optimiser, lr, decay, warm, length, first, second, l1, regularisation, multiplier, *fields = row
    config, more = recipe(f"ctrain/{name}"), named(fields)
    training, loss = config.training, vars(config.loss)
    assert kind(config.loss) == TYPES[name.split("_")[2 if re.search(r"eps\d", name) else 1]]
    assert kind(training.optimiser) == optimiser
    assert training.optimiser.weight_decay == (0.01 if optimiser == "AdamW" else 0)  # torch's defaults, as CTRAIN
    numbers = [(training.optimiser.lr, lr), (training.decay, decay), (loss["l1"], l1)]
    numbers += [(loss["regularisation"], regularisation), (training.epsilon_multiplier, multiplier)]
    if "start" in more:
        assert isinstance(loss["kappa"], Ramp) and "attack" not in loss
        numbers += [(loss["kappa"].start, more["start"]), (loss["kappa"].end, more["end"])]
    else:
        assert loss["kappa"] == 0 and loss["attack"].steps == int(more["n"]) and loss["attack"].restarts == 1
        key = "tau" if "tau" in more else "alpha"
        numbers += [(loss[key], more[key]), (loss["attack"].step_size, more["size"])]
        numbers += [(loss["attack_epsilon_factor"], more["factor"])]
    for value, text in numbers:
        assert as_in_sheet(value, text), f"{name}: {value}, in the sheet {text}"
    assert ramp_of(config) == (int(warm) + 1, int(length))
    assert (training.milestones_from, training.milestones) == ("ramp_end", (int(first), int(first) + int(second)))
    assert (training.epochs, training.batch_size) == (260 if "eps8" in name else 160, 512)
    assert loss.get("confine", "ball") == "ball" and loss.get("beta", 1) == 1 and not loss.get("fusion")


def test_the_sheets_digits_are_told_from_others():
    assert as_in_sheet(0.0115002, ".0115") and not as_in_sheet(0.01156, ".0115")
    assert as_in_sheet(1.0793, "1.08") and not as_in_sheet(1.0793, "1.07")
    assert as_in_sheet(1.0, "1.0") and not as_in_sheet(1.1, "1.0")


def test_networks_have_the_published_size():
    """Built on the device that holds shapes alone; each kind of network once."""
    models = {(kind(config.data), config.model) for config in map(recipe, ROWS)}
    assert len(models) == 6  # MNIST with and without normalisation, TinyImageNet with CTRAIN's net and without
    for data, model in models:
        assert isinstance(model, Cnn7)
        with torch.device("meta"):
            built = model.build(SHAPES[data], CLASSES[data])
        wanted = 67_621_768 if data == "TinyImageNet" and model.last_stride == 1 else PARAMETERS[data]
        assert sum(parameter.numel() for parameter in built.parameters()) == wanted, model
