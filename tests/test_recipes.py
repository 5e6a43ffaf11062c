"""Every recipe parses, builds its model, and takes two steps on made-up images of the right size."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from certtrain.bounds import LinfBall
from certtrain.data import Arrays, Split
from certtrain.errors import InputError
from certtrain.noise import Noise
from certtrain.pipeline import build_model, load_model, train
from certtrain.recipe import Config, load_config
from certtrain.step import Batch, State, Step

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SHAPES = {"Digits": (1, 8, 8), "Mnist": (1, 28, 28), "Cifar10": (3, 32, 32)}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def made_up(shape) -> Split:
    torch.manual_seed(0)
    return Split(torch.randint(0, 256, (4, *shape)).to(torch.uint8), torch.arange(4))


@every_recipe
def test_takes_two_steps(path):
    config = load_config(path)
    split = made_up(SHAPES[type(config.data).__name__])

    class Data:
        shape, classes = tuple(split.images.shape[1:]), 10

    model = build_model(config, Data).train()  # type: ignore[arg-type]
    optimizer = config.training.optimiser.build(model)
    before = [parameter.clone() for parameter in model.parameters()]
    index = torch.arange(4)
    images, drawn = config.training.augment(split.pixels(index), Noise(0, index))
    batch = Batch(images, split.labels, index, drawn)
    epsilon = torch.tensor(config.perturbation.epsilon)
    for number in range(2):
        step = Step(config.perturbation.with_epsilon(epsilon), epsilon, epsilon, 0.5, Noise(number, index), State())
        figures = config.training.update(model, optimizer, config.loss, [(batch, step)], config.training.clip)
        assert np.isfinite(figures["loss"])
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_embedded_default_is_the_digits_recipe():
    assert load_config(ROOT / "configs" / "digits_ccibp.yaml") == Config()


def test_published_epsilons_are_exact_fractions():
    config = load_config(ROOT / "configs" / "cifar10_eps2_ccibp.yaml")
    assert config.perturbation == LinfBall(float(Fraction(2, 255)))
    steps = config.training.epochs * -(-50_000 // config.training.batch_size)
    assert steps == 62_560  # as the reference sheet counts


def test_the_smoke_recipe_runs_from_end_to_end(tmp_path):
    folder = train(load_config(ROOT / "configs" / "smoke.yaml"), tmp_path / "run", quiet=True)
    final = folder.final()
    assert final is not None and final["images"] == 100
    names = {path.name for path in folder.path.iterdir()}
    assert names == {
        "run.json", "metrics.jsonl", "model.safetensors", "resume.pt", "verdicts.jsonl", "verdicts",
        "model.onnx", "specs", "instances.csv", "abcrown.yaml", "SHA256SUMS",
    }  # fmt: skip


def test_your_own_arrays_train(tmp_path):
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz",
        train_images=random.random((64, 3, 8, 8)).astype(np.float32), train_labels=np.arange(64) % 3,
        test_images=random.random((10, 3, 8, 8)).astype(np.float32), test_labels=np.arange(10) % 3,
    )  # fmt: skip
    config = load_config(ROOT / "configs" / "smoke.yaml")
    config = dataclasses.replace(config, data=Arrays(path=tmp_path / "own.npz", validation=0.25))
    final = train(config, tmp_path / "run", quiet=True).final()
    assert final is not None and final["images"] == 10


def test_a_run_is_loaded_again(tmp_path):
    folder = train(load_config(ROOT / "configs" / "smoke.yaml"), tmp_path / "run", quiet=True)
    model, config = load_model(folder.path)
    assert config == load_config(ROOT / "configs" / "smoke.yaml") and not model.training
    test = config.data.load().test
    index = torch.arange(100)
    predictions = model(test.pixels(index)).argmax(1).tolist()
    assert predictions == [verdict["prediction"] for verdict in folder.verdicts]
    (folder.path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(folder.path)
