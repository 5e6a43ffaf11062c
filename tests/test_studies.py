"""The studies and the recipes of adversarial training: what they say, and that each of them takes a step."""

import dataclasses
import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from certtrain.bounds import LinfBall
from certtrain.comparison import read_study
from certtrain.config import structure, unstructure
from certtrain.losses import Loss
from certtrain.losses.adversarial import AdversarialLoss, Qub
from certtrain.losses.certified import CertifiedLoss
from certtrain.losses.expressive import ExpressiveLoss
from certtrain.models import SmallCnn, WideResNet
from certtrain.noise import Noise
from certtrain.recipe import Config, load_config
from certtrain.step import Batch, State, Step

CONFIGS = Path(__file__).parents[1] / "configs"
STUDIES = [path.stem for path in sorted((CONFIGS / "studies").glob("*.yaml"))]
CERTIFIED = {
    "certified_digits": ExpressiveLoss, "architectures_digits": CertifiedLoss, "architectures_mnist": CertifiedLoss,
    "alpha_digits": CertifiedLoss, "alpha_mnist": CertifiedLoss,
}  # fmt: skip
RECIPES = [path.stem for path in sorted((CONFIGS / "adversarial").glob("*.yaml"))]

every_study = pytest.mark.parametrize("name", STUDIES)
every_recipe = pytest.mark.parametrize("name", RECIPES)

# Typed from the reference sheet (section 2), not from the recipes: model, epochs, batch, peak rate, weight decay,
# milestones or knots of the cycle, epsilon
SETTINGS = """
fgsm               PreActResNet  30 128 0.2  5e-4 0,12,30        8/255
fgsm_rs            PreActResNet  15 128 0.2  5e-4 0,7.5,15       8/255
n_fgsm             PreActResNet  30 128 0.2  5e-4 0,15,30        8/255
fgsm_ga            PreActResNet  30 128 0.3  5e-4 0,12,30        8/255
fgsm_ckpt          PreActResNet  30 128 0.3  5e-4 0,15,30        8/255
fgsm_pgi           CifarResNet  110 128 0.1  5e-4 100,105        8/255
free_at            PreActResNet  10 128 0.04 5e-4 0,5,10         8/255
atta               WideResNet    38  64 1/640 0.0128 29,35      31/1000
nu_at              CifarResNet  100  64 0.1  5e-4 0,40,80,86,91  8/255
n_aaer             PreActResNet  30 128 0.2  5e-4 0,15,30        8/255
n_lap              PreActResNet  30 128 0.2  5e-4 0,15,30        8/255
flc                PreActResNet  15 128 0.2  5e-4 0,7.5,15       8/255
pgd_at             CifarResNet  100 128 0.1  5e-4 70,85          8/255
pgd2_at            PreActResNet  20 128 0.2  5e-4 0,10,20        8/255
trades             WideResNet    76 128 0.1  2e-4 74             31/1000
mart               CifarResNet  120 128 0.01 3.5e-3 74,89,99     31/1000
gairat             WideResNet   120 128 0.1  2e-4 0,59,89,109    31/1000
friendly_trades    WideResNet    85 128 0.1  2e-4 74             31/1000
trades_awp         WideResNet   200 128 0.1  5e-4 99,149         8/255
at_awp             PreActResNet 200 128 0.1  5e-4 100,150        8/255
hat_teacher        CifarResNet   50 128 0.21 5e-4 0,12.5,50      0
hat                CifarResNet   50 128 0.21 5e-4 0,12.5,50      8/255
qub_static         CifarResNet  100 128 0.1  5e-4 70,85          8/255
qub_decreasing     CifarResNet  100 128 0.1  5e-4 70,85          8/255
fait               CifarResNet  105 512 0.4  5e-4 0,5,80,95      8/255
fait_mer           CifarResNet  105 512 0.4  5e-4 0,5,80,95      8/255
fait_squared       CifarResNet  105 512 0.4  5e-4 0,5,80,95      8/255
trades_mer         CifarResNet  105 512 0.4  5e-4 0,5,80,95      8/255
trades_mer_squared CifarResNet  105 512 0.4  5e-4 0,5,80,95      8/255
score              CifarResNet  105 512 0.4  5e-4 0,5,80,95      8/255
fast_bat           PreActResNet  20 128 0.2  5e-4 0,10,20        8/255
"""
# of the loss and the update, by path; fields that a default supplies are not repeated in the recipes
HYPER = """
fgsm_ckpt   attack.checkpoints=3 attack.reference=start attack.attack_mode=eval attack.step_size=1.25
fgsm_ga     weight=None detached=True clipped=False attack.step_size=1 attack.start=zero
fgsm_pgi    weight=10 true_mass=0.6 attack.momentum=0.3 attack.reset=40 attack.attack_mode=batch
free_at     replays=8
n_fgsm      attack.start_scale=2 attack.projected=False attack.step_size=1
fgsm_rs     attack.step_size=1.25 attack.projected=True
n_aaer      weight=1 loss_weight=1.5 logit_weight=0.15
nu_at       weight.end=4.5 weight.over=0.9 attack.start_scale=0.5
pgd_at      attack.steps=10 attack.step_size=0.25
pgd2_at     attack.steps=2 attack.step_size=0.5
trades      weight=6 attack.steps=10 attack.step_size=7/31 attack.start=normal attack.start_scale=0.001
mart        weight=5 attack.steps=10 attack.step_size=7/31 attack.start=normal
gairat      begin_epoch=59 offset=-1 attack.steps=10 attack.step_size=7/31 attack.start=uniform
friendly_trades weight=6 attack.steps=10 attack.step_size=7/31 attack.patience=0 attack.milestones=30,50,70
hat         weight=2.5 helper_weight=0.5 extrapolation=2 attack.steps=10
qub_static  kind=static bound=published detached=False base.attack.checkpoints=3 base.attack.reference=clean
qub_decreasing kind=decreasing bound=published base.true_mass=1 base.weight=10 base.attack.attack_mode=batch
fait        weight=12 index=2 attack.steps=10 attack.step_size=0.25
fait_mer    clean=1 adversarial=0 base.weight=30 base.index=2
trades_mer  clean=1 adversarial=0 base.weight=21
score       weight=4
fait_squared weight=8 divergence.type=SquaredEuclidean
trades_mer_squared clean=1 base.weight=10 divergence.type=SquaredEuclidean base.divergence.type=SquaredEuclidean
fast_bat    step_size=5000/255 implicit=0.1 sign=False attack.step_size=5000/255 attack.start=uniform
"""


def recipe(name: str) -> Config:
    return load_config(CONFIGS / "adversarial" / f"{name}.yaml")


def losses_of(name: str) -> list[Config]:
    """A study's recipes, one for each loss and update rule in it."""
    rows = read_study(CONFIGS / "studies" / f"{name}.yaml").rows
    return list({(row.config.loss, row.config.training.update): row.config for row in rows}.values())


def step_of(config: Config, radius: float, samples: int, shape: tuple[int, ...], epoch: int) -> tuple[Batch, Step]:
    generator = torch.Generator().manual_seed(0)
    images, index = torch.rand(samples, *shape, generator=generator), torch.arange(samples)
    images, drawn = config.training.augment(images, Noise(0, index))
    specs = config.loss.declare_state(shape, 10)
    pad = config.training.augment.pad
    state = State({k: spec.allocate(samples, samples, torch.device("cpu"), pad) for k, spec in specs.items()}, specs)
    epsilon = torch.tensor(radius)
    ball, epochs = config.perturbation.with_epsilon(epsilon), config.training.epochs
    step = Step(ball, epsilon, epsilon, epoch / epochs, Noise(7, index), state, epoch=epoch, epochs=epochs)
    return Batch(images, index % 10, index, drawn), step


def takes_a_step(config: Config, model: torch.nn.Module, shape: tuple[int, ...], samples: int) -> None:
    training = config.training
    training.update.check_loss(config.loss)
    optimizer = training.optimiser.build(model)
    training.set_rate(optimizer, training.epochs / 2)
    for epoch in (0, training.epochs - 1):
        batch, step = step_of(config, float(config.perturbation.epsilon), samples, shape, epoch)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        figures = training.update(model, optimizer, config.loss, [(batch, step)], training.clip)
        assert all(math.isfinite(value) for value in figures.values()), figures
        assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


# --- recipes


def test_the_tables_name_every_recipe():
    assert sorted(line.split()[0] for line in SETTINGS.strip().splitlines()) == RECIPES


@pytest.mark.parametrize("line", SETTINGS.strip().splitlines(), ids=lambda line: line.split()[0])
def test_recipes_hold_the_published_settings(line):
    name, model, epochs, batch, rate, decay, knots, epsilon = line.split()
    config = recipe(name)
    training = config.training
    assert (type(config.model).__name__, training.epochs, training.batch_size) == (model, int(epochs), int(batch))
    assert training.optimiser.lr == float(Fraction(rate)) and training.optimiser.weight_decay == float(decay)
    found = training.milestones if training.cycle is None else training.cycle.epochs
    assert sorted({float(round(epoch, 1)) for epoch in found}) == [float(knot) for knot in knots.split(",")]
    assert config.perturbation == LinfBall(float(Fraction(epsilon)))
    if isinstance(config.model, WideResNet):
        assert (config.model.depth, config.model.widen) == (34, 10)


@pytest.mark.parametrize("line", HYPER.strip().splitlines(), ids=lambda line: line.split()[0])
def test_recipes_hold_the_published_hyper_parameters(line):
    name, *wanted = line.split()
    loss = unstructure(recipe(name).loss)
    for path, text in (pair.split("=") for pair in wanted):
        value = loss
        for key in path.split("."):
            value = value[key]
        if isinstance(value, list):
            assert value == [int(number) for number in text.split(",")]
        elif isinstance(value, (str, bool)) or value is None:
            assert str(value) == text
        else:
            assert value == pytest.approx(float(Fraction(text)), rel=1e-12), path


@every_recipe
def test_recipes_are_adversarial_training(name):
    config = recipe(name)
    assert isinstance(config.loss, AdversarialLoss) and config.name == f"adversarial_{name}"
    training = config.training
    assert training.schedule.length == 0 and training.epsilon_multiplier == 1 and training.clip is None
    assert training.epsilon(0.5, 0, 391) == 0.5 and not training.initialisation.startswith("shi")
    assert not config.certify.enabled and not config.export.enabled and config.evaluate.enabled
    assert bool(training.select) == (config.data.validation > 0)
    head = [line for line in (CONFIGS / "adversarial" / f"{name}.yaml").read_text().splitlines() if line[0] == "#"]
    assert "Not run here: needs a GPU." in " ".join(line.lstrip("# ") for line in head)


@every_recipe
def test_recipes_take_steps(name, tmp_path):
    """Their own net, narrowed, and their own loss, at the first and the last epoch."""
    config = recipe(name)
    small = {"depth": 10, "width": 4, "widen": 1} if isinstance(config.model, WideResNet) else {"width": 4}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **small))
    torch.manual_seed(0)
    model = config.model.build((3, 32, 32), 10)
    if hasattr(config.loss, "teacher"):
        import safetensors.torch

        safetensors.torch.save_file(model.state_dict(), tmp_path / "teacher.safetensors")
        config = dataclasses.replace(
            config, loss=dataclasses.replace(config.loss, teacher=tmp_path / "teacher.safetensors")
        )
    config.loss.check_model(model)
    takes_a_step(config, model.train(), (3, 32, 32), 3)


# --- studies


@every_study
def test_studies_are_read(name, tmp_path):
    study = read_study(CONFIGS / "studies" / f"{name}.yaml")
    assert study.name == name and study.seeds == ((0,) if name.endswith("_mnist") and name in CERTIFIED else (0, 1, 2))
    trials, certified = list(study.trials(tmp_path)), name in CERTIFIED
    assert len({trial.path for trial in trials}) == len(trials) == len(study.seeds) * len(study.rows)
    for row in study.rows:
        assert structure(Config, unstructure(row.config)) == row.config
        assert isinstance(row.config.loss, CERTIFIED.get(name, AdversarialLoss)) and "," not in row.label
        assert row.config.certify.enabled == certified and row.config.evaluate.attacks
    shared = {(row.config.data, row.config.training.batch_size, row.config.certify) for row in study.rows}
    assert len(shared) == 1  # rows differ in what they compare, not in their data
    assert all(
        one.loss != other.loss or one != other for one, other in itertools.pairwise(r.config for r in study.rows)
    )


@every_study
def test_curves_are_of_what_is_measured(name):
    """The names of diagnostics, of lines that the recipes write."""
    study = read_study(CONFIGS / "studies" / f"{name}.yaml")
    written = {"alignment": {"gradient_alignment"}, "split": {"divergence", "divergence_split"}}
    for curve in study.curves:
        for row in study.rows:
            training = row.config.training
            if curve.kind == "diagnosis":
                assert training.diagnose is not None
                known = set().union(*(written[what] for what in training.diagnose.what))
                assert {metric.partition(".")[0] for metric in (curve.metric, *curve.beside)} <= known
            else:
                assert curve.metric == "validation_attacked_accuracy" and training.select is not None


@every_study
def test_losses_of_studies_take_steps(name):
    """On a small net: what is tried is the losses and update rules."""
    for config in losses_of(name):
        torch.manual_seed(0)
        model = SmallCnn(width=2, hidden=8).build((1, 8, 8), 10).train()
        takes_a_step(config, model, (1, 8, 8), 6)


def test_the_studies_of_the_sources_have_their_rows():
    rows = {name: read_study(CONFIGS / "studies" / f"{name}.yaml").rows for name in STUDIES}
    for base in ("FGSM-CKPT", "FGSM-GA", "N-FGSM", "FGSM-PGI", "PGD-AT", "TRADES"):
        found = {row.config.loss for row in rows["qub_table"] if row.group == f"{base} + QUB"}
        (plain,) = (row.config.loss for row in rows["qub_table"] if row.label == base)
        kinds = itertools.product(("static", "decreasing"), ("published", "centred"))
        assert found == {Qub(base=plain, kind=kind, bound=bound) for kind, bound in kinds}  # type: ignore[arg-type]
    weights = {3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0}
    for group in ("TRADES", "Friendly TRADES", "FAIT", "TRADES-MER"):
        losses: list[Loss] = [row.config.loss for row in rows["fait_sweeps"] if row.group == group]
        assert {getattr(getattr(loss, "base", loss), "weight") for loss in losses} == weights  # noqa: B009
    fait = [row.config.loss for row in rows["fait_sweeps"] if type(row.config.loss).__name__ == "Fait"]
    assert {getattr(loss, "index") for loss in fait if getattr(loss, "weight") == 12} == set(range(1, 10))  # noqa: B009
    for name in ("fast_bat_table1", "fast_bat_strength"):
        for row in rows[name]:
            if "Fast-BAT" in row.group:
                size = 5000 / 255 if row.config.perturbation.epsilon <= 8 / 255 else 2000 / 255
                assert row.config.loss.step_size == row.config.loss.attack.step_size == size  # type: ignore[attr-defined]
    assert {row.config.perturbation.epsilon for row in rows["epsilon16"]} == {16 / 255}
