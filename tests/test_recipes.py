"""Every recipe parses, is documented, builds its model, and takes two steps on made-up images of the right size."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from walking import walk

from certtrain.config import read_yaml
from certtrain.data import Arrays, Augment
from certtrain.errors import InputError
from certtrain.models import CifarResNet, Cnn7
from certtrain.noise import Noise
from certtrain.recipe import Config, load_config
from certtrain.run_folder import RunFolder
from certtrain.step import Batch, State, Step
from certtrain.workflows.run import load_model
from certtrain.workflows.train import build_model, train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
EVERY = [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob("*.yaml"))]
RECIPES = [name for name in EVERY if not name.startswith(("adversarial/", "studies/"))]  # those: tests/test_studies.py
DATA = {  # shape of an image, classes, training images
    "Digits": ((1, 8, 8), 10, 1438), "Mnist": ((1, 28, 28), 10, 60_000), "FashionMnist": ((1, 28, 28), 10, 60_000),
    "Cifar10": ((3, 32, 32), 10, 50_000), "Cifar100": ((3, 32, 32), 100, 50_000), "Svhn": ((3, 32, 32), 10, 73_257),
    "TinyImageNet": ((3, 64, 64), 200, 100_000), "ImageNet64": ((3, 64, 64), 1000, 1_281_167),
    "Gtsrb": ((3, 32, 32), 43, 39_209), "ImageNet100": ((3, 64, 64), 100, 126_689),  # smaller images than its own
}  # fmt: skip
SAMPLES = 3
WHOLE = ("cifar10_eps2_ccibp.yaml", "cifar10_eps8_ccibp.yaml")  # one with eight steps of attack, one with one

every_recipe = pytest.mark.parametrize("name", RECIPES)


def made_up(config: Config) -> tuple[Batch, type]:
    """A batch of images, and what ``build_model`` asks of a data set."""
    image_shape, count, _ = DATA[type(config.data).__name__]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, *image_shape), generator=generator).float() / 255
    index = torch.arange(SAMPLES)
    images, drawn = config.training.augment(images, Noise(0, index))

    class Data:
        shape, classes = image_shape, count

    return Batch(images, index * (count - 1) // (SAMPLES - 1), index, drawn), Data


@every_recipe
def test_takes_two_steps(name):
    """One in the middle of the ramp and one after it (TAPS does something else there), by the recipe's own schedule.

    CNN7 is narrowed, but for two recipes: all of its layers and of the recipe's passes remain, and 70 recipes of 17
    million parameters take minutes.
    """
    config = load_config(CONFIGS / name)
    if config.training.augment.resized_crop:  # from the images that are stored, which are not made up here
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, augment=Augment()))
    if isinstance(config.model, Cnn7) and name not in WHOLE:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=4, hidden=16))
    if isinstance(config.model, CifarResNet):  # made for images of 224×224
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=8))
    batch, data = made_up(config)
    model = build_model(config, data).train()  # type: ignore[arg-type]
    config.loss.check_model(model)
    training, ball = config.training, config.perturbation
    optimizer = training.optimiser.build(model)
    specs = config.loss.declare_state(data.shape, data.classes)  # type: ignore[attr-defined]
    state = State({key: spec.allocate(SAMPLES, SAMPLES, torch.device("cpu")) for key, spec in specs.items()}, specs)
    largest = ball.epsilon * training.epsilon_multiplier
    per_epoch = -(-DATA[type(config.data).__name__][2] // training.batch_size)
    first, last = training.schedule.steps(per_epoch)
    for number in ((first + last) // 2, last):
        radius = training.epsilon(ball.epsilon, number, per_epoch)
        assert radius == pytest.approx(largest) if number == last else 0 < radius < largest
        epsilon, ramp = torch.tensor(radius), training.schedule.done(number, per_epoch)
        step = Step(
            ball.with_epsilon(epsilon), epsilon, torch.tensor(largest), number / (training.epochs * per_epoch),
            Noise(number, batch.index), state, ramp,
        )  # fmt: skip
        before = [parameter.clone() for parameter in model.parameters()]
        figures = training.update(model, optimizer, config.loss, [(batch, step)], training.clip)
        assert all(np.isfinite(value) for value in figures.values()), figures
        assert figures["loss"] > 0 and figures.get("verified_loss", 1.0) > 0
        assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@walk("name", RECIPES)
def test_is_documented(name):
    """By its path; recipes of ours that have a folder, by the folder."""
    text = (ROOT / "docs" / "recipes.md").read_text() + (ROOT / "README.md").read_text()
    folder = name.rpartition("/")[0]
    own = folder not in ("", "ctbench", "ctrain", "sabr")
    assert re.search(rf"(?<![\w/.]){re.escape(folder + '/' if own else name)}", text.replace("configs/", ""))


def test_documented_recipes_exist():
    found = set(re.findall(r"`(?:configs/)?((?:\w+/)?[\w.]+\.yaml)`", (ROOT / "docs" / "recipes.md").read_text()))
    assert found and found <= set(RECIPES), found - set(RECIPES)


def test_names_are_unique():
    """A run's folder is named after its recipe."""
    names = [read_yaml(CONFIGS / name)["name"] for name in EVERY]
    assert len(set(names)) == len(names)


def test_the_embedded_default_is_the_digits_recipe():
    assert load_config(ROOT / "configs" / "digits_ccibp.yaml") == Config()


def test_the_smoke_recipe_runs_from_end_to_end(smoke):
    folder = RunFolder(smoke)
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


def test_a_run_is_loaded_again(run):
    folder = RunFolder(run)
    model, config = load_model(folder.path)
    assert config == load_config(ROOT / "configs" / "smoke.yaml") and not model.training
    test = config.data.load().test
    index = torch.arange(100)
    predictions = model(test.pixels(index)).argmax(1).tolist()
    assert predictions == [verdict["prediction"] for verdict in folder.verdicts]
    (folder.path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(folder.path)
