"""The published recipes of l0 training, against the numbers of the source, typed a second time."""

from pathlib import Path

import pytest

from certtrain.attacks import CrossEntropy, SparsePgd
from certtrain.bounds import SparseBall
from certtrain.comparison import read_study
from certtrain.losses import AdversarialTraining, SelfAdaptive, TradeOff, Trades
from certtrain.recipe import load_config
from certtrain.training import Sgd, SparseNoise

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS = {  # k at test and in training, batch, epochs, first epoch with soft labels, milestones
    "cifar10": (20, 120, 128, 100, 50, (25, 75)), "cifar100": (10, 60, 128, 100, 50, (25, 75)),
    "gtsrb": (12, 72, 128, 100, 50, (25, 75)), "imagenet100": (200, 1200, 48, 50, 25, (12.5, 37.5)),
}  # fmt: skip
NAMES = [path.stem for path in sorted((CONFIGS / "sparse").glob("*.yaml")) if path.stem.split("_")[0] in SETTINGS]
ONE_STEP = SparsePgd(steps=1, alpha=1.0, beta=1.0, patience=None, keep="last")
MANY_STEPS = SparsePgd(steps=20, alpha=0.25, beta=0.25, patience=10, keep="best", variant="coin")


def attack_of(one: bool, objective=None) -> SparsePgd:
    attack = ONE_STEP if one else MANY_STEPS
    return attack.toward(objective) if objective else attack


@pytest.mark.parametrize("name", NAMES)
def test_values(name):
    config = load_config(CONFIGS / "sparse" / f"{name}.yaml")
    training, loss = config.training, config.loss
    k, k_train, batch, epochs, start, milestones = SETTINGS[name.split("_")[0]]
    assert config.perturbation == SparseBall(k) and config.seed == 0
    assert training.epsilon(k, 0, 100) == k_train == config.perturbation.scaled(training.epsilon_multiplier).k
    assert (training.batch_size, training.epochs, training.milestones, training.decay) == (
        batch,
        epochs,
        milestones,
        0.1,
    )
    assert training.optimiser == Sgd(lr=0.05, momentum=0.9, weight_decay=5e-4) and training.clip is None
    kind = name.split("_", 1)[1]
    if kind == "sat_20":
        assert loss == AdversarialTraining(attack=attack_of(one=False)) and training.noise is None
        return
    objective = None if kind.endswith("_f") else CrossEntropy()
    base = Trades(attack=attack_of(kind.startswith("fast_ls"), objective), weight=6.0)
    assert loss == SelfAdaptive(base=base, momentum=0.9, start=start) and training.noise == SparseNoise(most=2.0)


def test_the_table_has_the_sixteen_combinations():
    rows = read_study(CONFIGS / "studies" / "sparse_table.yaml").rows
    found = {}
    for row in rows:
        loss, noise = row.config.loss, row.config.training.noise is not None
        soft = isinstance(loss, SelfAdaptive)
        base = loss.base if soft else loss
        climbs = isinstance(base, Trades) and base.attack.objective is None
        found.setdefault((type(base), climbs, soft, noise), []).append(row.config.training.epsilon_multiplier)
    kinds = [(AdversarialTraining, False), (TradeOff, False), (Trades, False), (Trades, True)]
    expected = {(*kind, soft, noise) for kind in kinds for soft in (False, True) for noise in (False, True)}
    assert set(found) == expected
    assert all(6.0 in multipliers for multipliers in found.values())
    assert sorted(found[Trades, False, True, True]) == [1.0, 2.0, 6.0]
