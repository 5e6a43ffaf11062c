"""Other people's checkpoints: re-declared as published, saved as they save them, imported, and compared."""

import collections
import itertools
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.bounds import LinfBall
from certtrain.command_line import main
from certtrain.data import Arrays
from certtrain.errors import InputError
from certtrain.export import current_network
from certtrain.importing.layers import layers_of
from certtrain.importing.matching import KNOWN
from certtrain.importing.parity import GEOMETRY, evaluate
from certtrain.models import Architecture, Cnn3, Cnn5, Cnn7, Gowal, Mlp, ResNet, SmallCnn
from certtrain.recipe import Config
from certtrain.run_folder import RunFolder
from certtrain.workflows.import_checkpoint import import_checkpoint
from certtrain.workflows.run import load_model

ROOT = Path(__file__).parents[1]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def convolutional(channels, side, classes, plan, hidden, norms=True, first=()):
    """A flat Sequential, as all three projects declare their nets; plan: (features, kernel, stride, padding)."""
    layers = list(first)
    for features, kernel, stride, padding in plan:
        layers.append(nn.Conv2d(channels, features, kernel, stride=stride, padding=padding))
        layers += [*([nn.BatchNorm2d(features)] if norms else []), nn.ReLU()]
        channels, side = features, (side + 2 * padding - kernel) // stride + 1
    layers.append(nn.Flatten())
    inputs = channels * side * side
    for features in hidden:
        layers += [nn.Linear(inputs, features), *([nn.BatchNorm1d(features)] if norms else []), nn.ReLU()]
        inputs = features
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def cnn7(width, last=1, more=0):
    wide = 2 * width
    plan = [(width, 3, 1, 1), (width, 3, 1, 1), (wide, 3, 2, 1), (wide, 3, 1, 1), (wide, 3, last, 1)]
    return plan + [(wide, 3, 1, 1)] * more


def cnn5(width, growth=2):
    return [(width, 3, 1, 1), (width, 4, 2, 1), (growth * width, 4, 2, 1)]


def cnn3(width, growth=2):
    return [(width, 5, 2, 2), (growth * width, 4, 2, 1)]


GOWAL = {
    "small": ([(16, 4, 2, 0), (32, 4, 1, 0)], [100]),
    "medium": ([(32, 3, 1, 0), (32, 4, 2, 0), (64, 3, 1, 0), (64, 4, 2, 0)], [512, 512]),
    "large": ([(64, 3, 1, 0), (64, 3, 1, 0), (128, 3, 2, 0), (128, 3, 1, 0), (128, 3, 1, 0)], [512]),
}


class AbstractNormalization(nn.Module):
    """CTBench: parameters without gradient, the spread called sigma, shape (1, C, 1, 1)."""

    def __init__(self, mean, sigma):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean).reshape(1, -1, 1, 1), requires_grad=False)
        self.sigma = nn.Parameter(torch.tensor(sigma).reshape(1, -1, 1, 1), requires_grad=False)

    def forward(self, x):
        return (x - self.mean) / self.sigma


class Wrapped(nn.Module):
    """CTBench's abstract Sequential and CTRAIN's models: everything lies in ``layers``."""

    def __init__(self, network):
        super().__init__()
        self.layers = network if isinstance(network, nn.Sequential) else nn.Sequential(network)

    def forward(self, x):
        return self.layers(x)


def trained(network: nn.Module) -> nn.Module:
    """Weights and statistics as after training: nothing is 0 or 1 any more, and predictions differ."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 3)
            module.num_batches_tracked.fill_(1000)
    return network.eval()


def numbered(network: nn.Module, first: int = 1) -> collections.OrderedDict:
    """The names in which auto_LiRPA's BoundedModule saves a network, and so CTRAIN: numbered nodes of its graph, in the
    order of the network's own state dict; activations and Flatten have numbers too, the counters are left out."""
    found, number, last = collections.OrderedDict(), first, ""
    for name, tensor in network.state_dict().items():
        layer, _, role = name.rpartition(".")
        if role == "num_batches_tracked":
            continue
        number += 1 if last and layer != last else 0  # some gaps
        kind = "buffer" if role.startswith("running") or role in ("mean", "std") else "param"
        found[f"/{number}.{kind}"] = tensor.clone()
        number, last = number + 1, layer
    return found


def arrays(folder: Path, shape=(3, 32, 32), classes=10, count=12) -> Arrays:
    generator = np.random.default_rng(0)
    path = folder / f"arrays{'x'.join(map(str, shape))}.npz"
    labels = np.arange(count) % classes
    images = generator.integers(0, 256, (count, *shape)).astype(np.uint8)
    labels[0] = classes - 1
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return Arrays(path=path)


def recipe(folder: Path, model: Architecture, shape=(3, 32, 32), **other) -> Config:
    certify = other.pop("certify", Config().certify)
    return Config(model=model, data=arrays(folder, shape), perturbation=LinfBall(2 / 255), certify=certify, **other)


def imported(folder: RunFolder) -> dict:
    return json.loads(folder.run.read_text())["imported"]


def assert_same(folder: RunFolder, original: nn.Module, shape, mean=(), std=()) -> None:
    """Our logits of images in [0, 1] are the original's, in float64 and in float32."""
    model, config = load_model(folder.path)
    images = torch.rand(5, *shape)
    normalised = images.double()
    if mean:
        centre, scale = (torch.tensor(values).double().reshape(1, -1, 1, 1) for values in (mean, std))
        normalised = (normalised - centre) / scale
    with torch.no_grad():
        wanted = original.double()(normalised)
        torch.testing.assert_close(model(images), wanted.float(), atol=1e-5 * (1 + float(wanted.abs().max())), rtol=0)
        torch.testing.assert_close(model.double()(images.double()), wanted, atol=1e-6, rtol=0)
    assert float(wanted.std(0).min()) > 1e-6  # the images do differ
    parity = imported(folder)["parity"]
    assert parity["largest_difference"] < 1e-9 and parity["same_predictions"] == parity["images"] == 12
    assert config.model.activation == "relu"


class TestExpressiveLosses:
    """``0.weight``, in a checkpoint with the optimiser's state; normalisation in the data loader."""

    def save(self, path: Path, network: nn.Module) -> Path:
        optimizer = torch.optim.Adam(network.parameters())
        network.train()(torch.rand(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        network.eval()
        content = {"state_dict": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 160}
        torch.save(content, path / "ckpt_last")
        return path / "ckpt_last"

    def test_cnn7(self, tmp_path):
        original = trained(convolutional(3, 32, 10, cnn7(3), [8]))
        file = self.save(tmp_path, original)
        model = Cnn7(width=3, hidden=8, mean=MEAN, std=STD)
        folder = import_checkpoint(file, recipe(tmp_path, model), tmp_path / "run", quiet=True)
        assert_same(folder, original, (3, 32, 32), MEAN, STD)
        note = imported(folder)
        assert note["file"] == "ckpt_last" and len(note["sha256"]) == 64
        assert note["layout"] == {
            "names": "torch", "wrapper": "state_dict", "prefix": "", "beside": ["optimizer", "epoch"],
            "ignored": [f"{place}.num_batches_tracked" for place in (1, 4, 7, 10, 13, 17)],
        }  # fmt: skip
        assert note["normalisation"] == {"source": "given", "mean": list(MEAN), "std": list(STD)}
        assert note["batch_norm"] == "in the file: 6 layers with their running statistics"
        assert note["renaming"]["16.weight"] == "17.weight"  # ours begins with the normalisation
        assert len(note["renaming"]) == 7 * 2 + 6 * 4 and note["dtypes"] == ["float32"]

    def test_without_normalisation(self, tmp_path):
        """As on MNIST. The recorded renaming is the identity then."""
        original = trained(convolutional(1, 28, 10, cnn7(2), [6]))
        torch.save({"state_dict": original.state_dict(), "epoch": 70}, tmp_path / "mnist.pt")
        config = recipe(tmp_path, Cnn7(width=2, hidden=6), (1, 28, 28))
        folder = import_checkpoint(tmp_path / "mnist.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (1, 28, 28))
        renaming = imported(folder)["renaming"]
        assert renaming == {name: name for name in renaming}
        assert imported(folder)["normalisation"]["source"] == "none: nothing is published for Arrays"

    def test_64_pixels(self, tmp_path):
        original = trained(convolutional(3, 64, 10, cnn7(2, last=2), [8]))
        torch.save({"state_dict": original.state_dict()}, tmp_path / "tiny.pt")
        config = recipe(tmp_path, Cnn7(width=2, hidden=8), (3, 64, 64))
        folder = import_checkpoint(tmp_path / "tiny.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (3, 64, 64))


class TestCtbench:
    """``layers.1.weight`` in a bare state dict; normalisation inside, at ``layers.0``."""

    @pytest.mark.parametrize("norms", [True, False])
    def test_cnn5(self, tmp_path, norms):
        first = [AbstractNormalization(MEAN, STD)]
        original = Wrapped(trained(convolutional(3, 32, 10, cnn5(4), [9], norms, first)))
        assert "layers.0.sigma" in original.state_dict()
        torch.save(original.state_dict(), tmp_path / "model.ckpt")
        config = recipe(tmp_path, Cnn5(width=4, hidden=9, batch_norm=norms))
        folder = import_checkpoint(tmp_path / "model.ckpt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (3, 32, 32))
        note = imported(folder)
        assert note["normalisation"]["mean"] == list(MEAN) and note["normalisation"]["std"] == list(STD)
        assert note["normalisation"]["source"] == "inside the file: layers.0.mean and layers.0.sigma"
        assert note["layout"]["prefix"] == "layers." and note["layout"]["wrapper"] == ""
        assert note["batch_norm"] == (
            "in the file: 4 layers with their running statistics" if norms else "none in the file"
        )
        assert note["renaming"]["layers.1.weight"] == "1.weight"

    def test_folded_batch_norms(self, tmp_path):
        """Folded by hand: what remains has no batch norm, and is imported as such."""
        original = trained(convolutional(1, 28, 10, cnn3(3), []))
        folded = []
        for layer, norm in itertools.pairwise(original):
            if isinstance(norm, nn.BatchNorm2d):
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
                plain.weight.data = layer.weight.data * scale[:, None, None, None]
                plain.bias.data = (layer.bias - norm.running_mean) * scale + norm.bias
                folded.append(plain)
            elif not isinstance(layer, nn.BatchNorm2d):
                folded.append(layer)
        network = nn.Sequential(*folded, original[-1])
        torch.save(network.state_dict(), tmp_path / "folded.pt")
        config = recipe(tmp_path, Cnn3(width=3, batch_norm=False), (1, 28, 28))
        folder = import_checkpoint(tmp_path / "folded.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (1, 28, 28))

    @pytest.mark.parametrize("shape", ["(C,)", "(1, C, 1, 1)", "(C, 1, 1)", "one number"])
    def test_spellings_of_the_normalisation(self, tmp_path, shape):
        network = trained(convolutional(3, 32, 10, cnn3(2), []))
        for number, (centre, spread) in enumerate((("mean", "std"), ("mean", "sigma"), ("mu", "sigma"))):
            mean, std = ((0.4,), (0.2,)) if shape == "one number" else (MEAN, STD)
            view = {"(C,)": (3,), "(1, C, 1, 1)": (1, 3, 1, 1), "(C, 1, 1)": (3, 1, 1), "one number": ()}[shape]
            state = {f"normalize.{centre}": torch.tensor(mean).reshape(view)}
            state |= {f"normalize.{spread}": torch.tensor(std).reshape(view)}
            torch.save({**state, **network.state_dict()}, tmp_path / "n.pt")
            config = recipe(tmp_path, Cnn3(width=2))
            folder = import_checkpoint(tmp_path / "n.pt", config, tmp_path / f"run{number}", quiet=True)
            assert load_model(folder.path)[1].model.mean == mean
            assert_same(folder, network.float(), (3, 32, 32), mean * (3 // len(mean)), std * (3 // len(std)))
            network.float()


class TestCtrain:
    """auto_LiRPA's numbered nodes, in a bare state dict or a checkpoint; normalisation in the data loader."""

    def test_cnn7_in_a_checkpoint(self, tmp_path):
        original = trained(convolutional(3, 32, 10, cnn7(2), [5]))
        state = numbered(Wrapped(original))
        assert list(state)[:4] == ["/1.param", "/2.param", "/4.param", "/5.param"]
        content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}, "loss": torch.tensor(1.5)}
        torch.save(content, tmp_path / "3_checkpoint.pt")
        config = recipe(tmp_path, Cnn7(width=2, hidden=5, mean=MEAN, std=STD))
        folder = import_checkpoint(tmp_path / "3_checkpoint.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (3, 32, 32), MEAN, STD)
        layout = imported(folder)["layout"]
        assert layout["names"] == "auto_LiRPA" and layout["wrapper"] == "model_state_dict"
        assert layout["beside"] == ["epoch", "optimizer_state_dict", "loss"] and layout["ignored"] == []

    @pytest.mark.parametrize("plain", [True, False], ids=["torch", "auto_LiRPA"])
    @pytest.mark.parametrize("size", ["small", "medium"])
    def test_gowal(self, tmp_path, size, plain):
        original = trained(convolutional(1, 28, 10, *GOWAL[size], norms=False))
        model = Wrapped(original)
        torch.save(model.state_dict() if plain else numbered(model), tmp_path / "gowal.pt")
        config = recipe(tmp_path, Gowal(size=size), (1, 28, 28))
        folder = import_checkpoint(tmp_path / "gowal.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (1, 28, 28))

    def test_cnn9_nested_twice(self, tmp_path):
        """CTRAIN's CNN3 is a Sequential in a Sequential."""
        original = trained(convolutional(1, 28, 10, cnn7(1, more=2), [4]))
        torch.save(Wrapped(nn.Sequential(original)).state_dict(), tmp_path / "cnn9.pt")
        config = recipe(tmp_path, Cnn7(width=1, hidden=4, more=2), (1, 28, 28))
        folder = import_checkpoint(tmp_path / "cnn9.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (1, 28, 28))
        assert imported(folder)["renaming"]["layers.0.0.weight"] == "0.weight"

    def test_stride_1_at_64_pixels(self, tmp_path):
        original = trained(convolutional(3, 64, 10, cnn7(2), [8]))
        torch.save(numbered(original), tmp_path / "tiny.pt")
        config = recipe(tmp_path, Cnn7(width=2, hidden=8, last_stride=1), (3, 64, 64))
        folder = import_checkpoint(tmp_path / "tiny.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, original, (3, 64, 64))

    def test_normalisation_inside(self, tmp_path):
        """Buffers before all else."""
        network = trained(convolutional(3, 32, 10, cnn3(2), [4], norms=False))
        state = {"/1.buffer": torch.tensor(MEAN).reshape(3, 1, 1), "/2.buffer": torch.tensor(STD).reshape(3, 1, 1)}
        torch.save({**state, **numbered(network, 5)}, tmp_path / "n.pt")
        config = recipe(tmp_path, Cnn3(width=2, hidden=4, batch_norm=False))
        folder = import_checkpoint(tmp_path / "n.pt", config, tmp_path / "run", quiet=True)
        assert_same(folder, network, (3, 32, 32), MEAN, STD)


def test_classes_numbered_as_text(tmp_path):
    """Folders called 0 to 11 are sorted 0, 1, 10, 11, 2, …: the file's third output is class 10."""
    original = trained(convolutional(1, 28, 12, cnn3(2), []))
    torch.save(original.state_dict(), tmp_path / "a.pt")
    data = arrays(tmp_path, (1, 28, 28), classes=12)
    config = Config(model=Cnn3(width=2), data=data)
    folder = import_checkpoint(tmp_path / "a.pt", config, tmp_path / "run", class_order="text", quiet=True)
    model, _ = load_model(folder.path)
    images = torch.rand(4, 1, 28, 28)
    sorted_as_text = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:, sorted_as_text], original(images), atol=1e-5, rtol=0)
    assert imported(folder)["class_order"] == "text" and imported(folder)["parity"]["largest_difference"] < 1e-9
    with pytest.raises(InputError, match=r"^class_order: found 'name'"):
        import_checkpoint(tmp_path / "a.pt", config, class_order="name")  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "net.", "odd."])
def test_prefixes_and_orders(tmp_path, prefix, suffix):
    """A .safetensors file sorts its tensors; layer 10 comes behind layer 2 all the same."""
    original = trained(convolutional(1, 28, 10, cnn5(2), [5]))
    state = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    if suffix == "pt":
        torch.save({"model": {"net": state}}, tmp_path / "a.pt")
    else:
        safetensors.torch.save_file(dict(reversed(state.items())), tmp_path / "a.safetensors")
    config = recipe(tmp_path, Cnn5(width=2, hidden=5), (1, 28, 28))
    folder = import_checkpoint(tmp_path / f"a.{suffix}", config, tmp_path / "run", quiet=True)
    assert_same(folder, original, (1, 28, 28))
    layout = imported(folder)["layout"]
    assert layout["prefix"] == ("" if prefix == "odd." else prefix)
    assert layout["wrapper"] == ("model.net" if suffix == "pt" else "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(tmp_path, dtype):
    """Half precision is exact in float32; float64 is rounded, and the note says how far that moves logits."""
    original = trained(convolutional(1, 28, 10, cnn3(2), [])).double()
    with torch.no_grad():
        for tensor in (*original.parameters(), *original.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 1e-9) if dtype == torch.float64 else tensor.copy_(tensor.to(dtype))
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in original.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    config = recipe(tmp_path, Cnn3(width=2), (1, 28, 28))
    note = imported(import_checkpoint(tmp_path / "a.pt", config, tmp_path / "run", quiet=True))
    assert note["dtypes"] == [str(dtype).removeprefix("torch.")]
    difference = note["parity"]["largest_difference"]
    assert 1e-11 < difference < 1e-5 if dtype == torch.float64 else difference < 1e-12


@pytest.mark.parametrize("kind", KNOWN.values(), ids=KNOWN)
def test_the_file_is_evaluated_independently_of_our_models(kind):
    """The interpreter against each architecture, with and without batch norm: ours is the oracle here."""
    variants = {
        Cnn3: [Cnn3(width=2, growth=3, hidden=4, activation="tanh"), Cnn3(width=2, batch_norm=False)],
        Cnn5: [Cnn5(width=2, growth=3, hidden=4, activation="gelu"), Cnn5(width=2, hidden=3, batch_norm=False)],
        Cnn7: [Cnn7(width=2, hidden=4, activation="leaky_relu"), Cnn7(width=1, hidden=4, more=4, batch_norm=False)],
        Gowal: [Gowal(size=size, activation="silu") for size in GOWAL],
        Mlp: [Mlp(hidden=(5, 4), batch_norm=True, activation="sigmoid"), Mlp(hidden=())],
        SmallCnn: [SmallCnn(width=2, hidden=4), SmallCnn(width=2, hidden=4, batch_norm=False)],
    }[kind]
    for architecture in variants:
        model = trained(architecture.build((1, 28, 28), 3)).double()
        state = {name: t for name, t in model.state_dict().items() if not name.endswith("tracked")}
        geometry = f"Gowal {architecture.size}" if kind is Gowal else kind.__name__
        images = torch.rand(2, 1, 28, 28)
        with torch.no_grad():
            found = evaluate(layers_of(state, "it"), images, geometry, architecture.activation, (), ())
            torch.testing.assert_close(found, model(images.double()), atol=1e-12, rtol=0)
    assert {name.split()[0] for name in GEOMETRY} == {kind.__name__ for kind in KNOWN.values()}


# -- what is refused ----


def assert_refused(folder: Path, capsys, words: list[str], *mentions: str) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["import-checkpoint", *words, "--out", str(folder / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    for mention in (*mentions, "accepted"):
        assert mention in captured.err
    assert sorted(folder.rglob("*")) == before


def words(folder: Path, file: str, *more: str, architecture="cnn3", shape=(3, 32, 32)) -> list[str]:
    data = arrays(folder, shape)
    return [str(folder / file), "--architecture", architecture, "--data", "arrays", "--data.path", str(data.path),
            "--epsilon", "2/255", *more]  # fmt: skip


def saved(folder: Path, network: nn.Module, change=lambda state: state, file: str = "a.pt") -> None:
    torch.save(change(dict(network.state_dict())), folder / file)


def replaced(name: str, tensor) -> dict:
    return lambda state: {**state, name: tensor}


MISMATCHES = {
    "another width": (
        convolutional(3, 32, 10, cnn3(8), []),
        ["0.weight is (8, 3, 5, 5), expected (16, 3, 5, 5)", "accepted: --architecture Cnn3 --model.width 8, which"],
    ),
    "no batch norm": (
        convolutional(3, 32, 10, cnn3(16), [], norms=False),
        ["2.weight belongs to a convolution (32, 16, 4, 4), expected a batch norm (16,)",
         "--architecture Cnn3 --model.batch_norm false, which fits"],
    ),
    "another architecture": (
        convolutional(3, 32, 10, cnn7(4), [6]),
        ["0.weight is (4, 3, 3, 3), expected (16, 3, 5, 5)",
         "--architecture Cnn7 --model.width 4 --model.hidden 6, which fits"],
    ),
    "more convolutions": (convolutional(3, 32, 10, cnn7(2, more=4), [6]), ["--model.more 4, which fits"]),
    "a fully connected net": (convolutional(3, 32, 10, [], [6, 5]), ["--architecture Mlp --model.hidden '[6, 5]'"]),
    "a narrow layer in the middle": (
        convolutional(3, 32, 10, [(6, 3, 1, 1), (5, 3, 1, 1), *cnn7(6)[2:]], [7]),
        ["fits no known architecture for images of 3×32×32 and 10 classes",
         "nearest: --architecture Cnn7 --model.width 6 --model.hidden 7",
         "3.weight is (5, 6, 3, 3), expected (6, 6, 3, 3)"],
    ),
    "other images": (
        convolutional(1, 28, 10, cnn3(16), []),
        ["fits no known architecture for images of 3×32×32", "0.weight is (16, 1, 5, 5), expected (16, 3, 5, 5)"],
    ),
    "another number of classes": (
        convolutional(3, 32, 7, cnn3(16), []),
        ["nearest: --architecture Cnn3", "7.weight is (7, 2048), expected (10, 2048)"],
    ),
    "a layer too few": (
        convolutional(3, 32, 10, cnn7(4), [6])[:-1],
        ["nothing follows 17.weight, expected a linear (10, 6)"],
    ),
    "a layer too many": (
        nn.Sequential(*convolutional(3, 32, 10, cnn3(16), []), nn.Linear(10, 10)),
        ["fits no known architecture", "nearest: --architecture Cnn3", "8.weight belongs to a linear (10, 10)"],
    ),
    "a layer behind all": (
        nn.Sequential(*convolutional(3, 32, 10, cnn3(16), []), nn.BatchNorm1d(10)),
        ["--model.hidden 10, but nothing follows 8.weight, expected a linear (10, 10)"],
    ),
    "no bias": (
        nn.Sequential(nn.Conv2d(3, 16, 5, bias=False), *convolutional(3, 32, 10, cnn3(16), [])[1:]),
        ["the bias of 0.weight is missing, expected (16,)"],
    ),
    "a residual net": (
        ResNet(width=4).build((3, 32, 32), 10),
        ["fits no known architecture", "nearest"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_what_does_not_fit_is_refused(tmp_path, capsys, case):
    network, mentions = MISMATCHES[case]
    saved(tmp_path, network)
    assert_refused(tmp_path, capsys, words(tmp_path, "a.pt"), *mentions)


def test_the_words_that_fit_do_fit(tmp_path, capsys):
    """The line that names what would fit, taken at its word."""
    saved(tmp_path, convolutional(3, 64, 10, cnn7(2), [6]))
    assert main(["import-checkpoint", *words(tmp_path, "a.pt", shape=(3, 64, 64))]) == 2
    said = capsys.readouterr().err.partition("accepted: ")[2].partition(", which fits")[0].split()
    assert said == ["--architecture", "Cnn7", "--model.width", "2", "--model.hidden", "6", "--model.last_stride", "1"]
    more = [*said[2:], "--out", str(tmp_path / "run")]
    assert main(["import-checkpoint", *words(tmp_path, "a.pt", *more, architecture=said[1], shape=(3, 64, 64))]) == 0


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys):
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert_refused(
        tmp_path, capsys, words(tmp_path, "evil.pt"), "evil.pt: found the Python object", "system", "run code"
    )
    assert not (tmp_path / "ran").exists()
    torch.save(convolutional(3, 32, 10, cnn3(16), []), tmp_path / "whole.pt")
    assert_refused(tmp_path, capsys, words(tmp_path, "whole.pt"), "Sequential, which is not loaded")


GOOD = convolutional(3, 32, 10, cnn3(16), [])
ONES = torch.ones(3)
CONTENTS = {
    "NaN": (replaced("0.weight", torch.full((16, 3, 5, 5), float("nan"))), ["0.weight: found a value that is not"]),
    "infinity": (replaced("7.bias", torch.full((10,), float("inf"))), ["7.bias: found a value that is not finite"]),
    "beyond float32": (replaced("7.bias", torch.full((10,), 1e300, dtype=torch.float64)), ["7.bias: found", "float32"]),
    "negative variance": (replaced("4.running_var", -torch.ones(32)), ["4.running_var: found a negative variance"]),
    "integers": (replaced("0.bias", torch.ones(16).int()), ["0.bias: found a tensor of torch.int32"]),
    "text": (replaced("0.bias", "zeros"), ["0.bias: found str"]),
    "an unknown tensor": (replaced("alpha", torch.ones(3)), ["alpha (3,), which is no layer of a known kind"]),
    "an unknown tensor of a layer": (replaced("0.mask", torch.ones(16)), ["0.mask (16,)"]),
    "a bias of another size": (replaced("0.bias", torch.ones(15)), ["0.bias (15,)", "no layer of a known kind"]),
    "half a batch norm": (lambda s: {n: t for n, t in s.items() if n != "1.running_var"}, ["1.running_mean (16,)"]),
    "a late normalisation": (lambda s: {**s, "n.mean": torch.ones(3), "n.std": torch.ones(3)}, ["n.mean behind other"]),
    "two spellings": (lambda s: {"n.mean": ONES, "n.mu": ONES, "n.std": ONES, **s}, ["n.mu"]),
    "no spread": (lambda s: {"n.mean": ONES, "n.std": 0 * ONES, **s}, ["n.std: found 0, 0, 0", "all > 0"]),
    "a spread of NaN": (lambda s: {"n.mean": ONES, "n.std": ONES / 0 - ONES / 0, **s}, ["n.std: found a value"]),
    "four channels": (lambda s: {"n.mean": torch.ones(4), "n.std": torch.ones(4), **s}, ["n.mean: found 1, 1, 1, 1"]),
    "a normalisation alone": (lambda s: {"n.mean": ONES[None], "n.std": ONES[None]}, ["and no layer behind it"]),
    "nothing": (lambda s: {}, ["a mapping of nothing and no state dict"]),
    "something else": (lambda s: {"epoch": 3, "weights": [1]}, ["a mapping of epoch, weights and no state dict"]),
    "a list": (lambda s: list(s.values()), ["found list"]),
    "a tensor": (lambda s: s["0.weight"], ["found Tensor"]),
    "only vectors": (lambda s: {"a.weight": torch.ones(3)}, ["no state dict"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_content_that_is_refused(tmp_path, capsys, case):
    change, mentions = CONTENTS[case]
    saved(tmp_path, GOOD, change)
    assert_refused(tmp_path, capsys, words(tmp_path, "a.pt"), "a.pt", *mentions)


NUMBERED = {
    "three vectors": (["/1.param", "/2.param", "/3.param"], [(4, 4), (4,), (4,)]),
    "one buffer": (["/1.param", "/2.param", "/3.param", "/4.param", "/5.buffer"], [(4, 4), (4,), (4,), (4,), (4,)]),
    "three buffers": (
        ["/1.param", "/2.param", "/3.param", "/4.buffer", "/5.buffer", "/6.buffer"],
        [(4, 4), *[(4,)] * 5],
    ),
    "buffers alone": (["/1.param", "/2.buffer", "/3.buffer"], [(4, 4), (4,), (4,)]),
    "one buffer before all": (["/1.buffer", "/2.param"], [(4,), (4, 4)]),
    "a vector before all": (["/1.param", "/2.buffer", "/3.param"], [(4, 3), (2,), (4, 4)]),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_numbered_tensors_that_make_no_layer_are_refused_by_name(case):
    names, shapes = NUMBERED[case]
    with pytest.raises(InputError, match=r"it: found .*/\d.*accepted"):
        layers_of({name: torch.zeros(shape) for name, shape in zip(names, shapes)}, "it")


def test_logits_that_are_not_finite_are_refused(tmp_path, capsys):
    """Finite weights, whose network is not."""
    network = convolutional(1, 28, 10, cnn7(1, more=4), [3], norms=False)
    saved(tmp_path, network, lambda state: {name: torch.full_like(t, 1e38) for name, t in state.items()})
    more = ["--model.width", "1", "--model.hidden", "3", "--model.more", "4", "--model.batch_norm", "false"]
    found = words(tmp_path, "a.pt", *more, architecture="cnn7", shape=(1, 28, 28))
    assert_refused(tmp_path, capsys, found, "a.pt: found logits up to inf by the file's own tensors")


def test_a_model_that_computes_something_else_is_refused(tmp_path, capsys, monkeypatch):
    """The comparison bites: another stabiliser, and a padding that keeps every shape."""
    from certtrain.importing import parity

    saved(tmp_path, trained(convolutional(3, 32, 10, cnn3(16), [])))
    with monkeypatch.context() as patch:
        patch.setattr(parity, "EPSILON", 0.1)
        assert_refused(tmp_path, capsys, words(tmp_path, "a.pt"), "differ from the model's by")
    monkeypatch.setitem(GEOMETRY, "Cnn3", ((2, 3), (2, 0)))  # 17 pixels instead of 16, then 7
    with pytest.raises(RuntimeError):
        main(["import-checkpoint", *words(tmp_path, "a.pt")])
    monkeypatch.setitem(GEOMETRY, "Cnn3", ((2, 3), (2, 1)))  # 17 pixels instead of 16, then 8 all the same
    assert_refused(tmp_path, capsys, words(tmp_path, "a.pt"), "differ from the model's by")


def test_files_that_are_none(tmp_path, capsys):
    saved(tmp_path, GOOD)
    content = (tmp_path / "a.pt").read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 5):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        assert_refused(tmp_path, capsys, words(tmp_path, "cut.pt"), "cut.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert_refused(tmp_path, capsys, words(tmp_path, "cut.safetensors"), "cut.safetensors")
    (tmp_path / "text.pt").write_text("weights")
    assert_refused(tmp_path, capsys, words(tmp_path, "text.pt"), "text.pt")
    assert_refused(tmp_path, capsys, words(tmp_path, "missing.pt"), "missing.pt: no such file")
    assert_refused(tmp_path, capsys, words(tmp_path, "missing.safetensors"), "missing.safetensors: no such file")
    assert_refused(tmp_path, capsys, words(tmp_path, "."), "cannot be read")


def test_words_that_are_refused(tmp_path, capsys):
    saved(tmp_path, GOOD)
    good = words(tmp_path, "a.pt")
    assert_refused(tmp_path, capsys, good[1:], "found no file", "import-checkpoint FILE --architecture NAME")
    assert_refused(tmp_path, capsys, [], "found no file")
    for name in ("architecture", "data", "epsilon"):
        place = good.index(f"--{name}")
        assert_refused(tmp_path, capsys, good[:place] + good[place + 2 :], f"--{name}: must be given")
    swapped = {
        "cnn8": "--architecture: found 'cnn8'; accepted: Cnn3, Cnn5, Cnn7, Gowal, Mlp, SmallCnn",
        "resnet": "--architecture: found 'resnet'",
    }
    for name, mention in swapped.items():
        assert_refused(tmp_path, capsys, words(tmp_path, "a.pt", architecture=name), mention)
    place = good.index("arrays")
    assert_refused(
        tmp_path, capsys, [*good[:place], "Nothing", *good[place + 1 :]], "--data: found 'Nothing'", "Arrays", "Mnist"
    )
    for more, mention in (
        (["--loss.alpha", "0.1"], "--loss.alpha: cannot be given here"),
        (["--training.epochs", "3"], "--training.epochs: cannot"),
        (["--model.type", "Mlp"], "--model.type: cannot"),
        (["--model.widht", "3"], "model.widht: no such field"),
        (["--model.width", "0"], "model.width: found 0"),
        (["--mean", "0.5"], "mean: found (0.5,)"),
        (["--mean", "0.5,0.5", "--std", "1,1"], "mean: found 2 numbers; accepted: 3"),
        (["--mean", "half", "--std", "1"], "model.mean: found ['half']"),
        (["--data.path", str(tmp_path / "none.npz")], "none.npz: no such file"),
        (["stray"], "stray"),
        (["--class-order", "names"], "--class-order: invalid choice: 'names'"),
    ):
        assert_refused(tmp_path, capsys, [*good, *more], mention)
    place = good.index("2/255")
    assert_refused(tmp_path, capsys, [*good[:place], "-1", *good[place + 1 :]], "epsilon")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    saved(tmp_path, GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("text")
    assert_refused(tmp_path, capsys, words(tmp_path, "a.pt"), "out: found other files")


def test_a_residual_net_is_refused_in_python_too(tmp_path):
    with pytest.raises(InputError, match=r"model\.type: found ResNet; accepted for an import: Cnn3"):
        import_checkpoint(tmp_path / "a.pt", Config(model=ResNet()))


def test_given_normalisation_must_be_the_files_own(tmp_path, capsys):
    first = [AbstractNormalization(MEAN, STD)]
    saved(tmp_path, trained(convolutional(3, 32, 10, cnn3(16), [], first=first)))
    given = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    other = ["--mean", "0.4914, 0.4822, 0.4466", "--std", given[3]]
    assert_refused(
        tmp_path, capsys, words(tmp_path, "a.pt", *other), "mean: found 0.4914, 0.4822, 0.4466", "the file's own"
    )
    none = ["--mean", "0", "--std", "1"]
    assert_refused(tmp_path, capsys, words(tmp_path, "a.pt", *none), "mean: found 0, but the file normalises inside")
    assert main(["import-checkpoint", *words(tmp_path, "a.pt", *given), "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("data", "shape", "numbers", "mean", "source"),
    [
        ("Cifar10", (3, 32, 32), False, MEAN, "outside the file: published for Cifar10"),
        ("Cifar10", (3, 32, 32), True, MEAN, "outside the file: published for Cifar10"),
        ("Mnist", (1, 28, 28), False, (), "none, as expressive-losses does on MNIST"),
        ("Mnist", (1, 28, 28), True, (0.1307,), "outside the file: as CTRAIN"),
        ("Digits", (1, 28, 28), True, (), "none: nothing is published for Digits"),
    ],
)
def test_published_normalisations(tmp_path, monkeypatch, capsys, data, shape, numbers, mean, source):
    import certtrain.data

    network = trained(convolutional(shape[0], shape[1], 10, cnn3(2), []))
    torch.save(numbered(network) if numbers else network.state_dict(), tmp_path / "a.pt")
    made_up = arrays(tmp_path, shape).load()
    monkeypatch.setattr(getattr(certtrain.data, data), "load", lambda _: made_up)
    command = ["import-checkpoint", str(tmp_path / "a.pt"), "--architecture", "CNN3", "--data", data.lower()]
    more = ["--epsilon", "0.1", "--model.width", "2"]
    assert main([*command, *more, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"imported: {tmp_path / 'run'} (14 tensors of a.pt)" in said and "of the first 12 test images" in said
    note = imported(RunFolder(tmp_path / "run"))["normalisation"]
    assert note["source"].startswith(source) and tuple(note["mean"]) == mean and source in said
    assert main([*command, *more, "--mean", "0", "--std", "1", "--out", str(tmp_path / "none")]) == 0
    note = imported(RunFolder(tmp_path / "none"))["normalisation"]
    assert note == {"source": "given: none", "mean": [], "std": []}


# -- what becomes of it ----


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, nn.Module]:
    """CTBench's layout of a small net for the digits, imported by the script; and the network."""
    folder = tmp_path_factory.mktemp("imported")
    torch.manual_seed(1)
    original = trained(convolutional(1, 8, 10, cnn3(4), [], first=[AbstractNormalization((0.3,), (0.35,))]))
    from certtrain.data import Digits

    digits = Digits().load().train
    images = digits.pixels(torch.arange(len(digits)))
    optimizer = torch.optim.Adam(original.parameters(), lr=1e-2)
    original.train()
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(original(images), digits.labels).backward()
        optimizer.step()
    torch.save(Wrapped(original.eval()).state_dict(), folder / "model.ckpt")
    options = ["--epsilon", "2/255", "--model.width=4", "--data", "digits", "--out", "run", "--certify.images", "20",
               "--certify.stages", "[ibp, crown]", "--export.images", "3"]  # fmt: skip
    script = ROOT / "scripts" / "import_checkpoint.py"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(script), *options, "model.ckpt", "--architecture", "cnn3"])
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    return folder / "run", original


def test_a_run_folder_as_training_leaves_one(run):
    path, original = run
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "run.json"]
    description = json.loads((path / "run.json").read_text())
    assert description["config"]["perturbation"] == {"type": "LinfBall", "epsilon": 2 / 255}
    assert description["config"]["model"]["mean"] == [0.3] and description["dataset"]["shape"] == [1, 8, 8]
    assert {"versions", "seed", "device", "threads", "dataset", "started", "imported"} <= set(description)
    assert description["imported"]["parity"]["correct"] > 80
    assert str(path.parent) not in (path / "run.json").read_text()
    model, config = load_model(path)
    images = torch.rand(9, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), original(images), atol=1e-5, rtol=0)
    assert config.certify.stages == ("ibp", "crown")


def test_verify_and_export_take_it(run, capsys):
    path, original = run
    assert main(["verify", str(path), "--images", "0:20"]) == 0
    verdicts = [json.loads(line) for line in (path / "verdicts.jsonl").read_text().splitlines()]
    assert len(verdicts) == 20
    from certtrain.data import Digits

    test = Digits().load().test
    wrong = original(test.pixels(torch.arange(20))).argmax(1) != test.labels[:20]
    assert [line["status"] == "misclassified" for line in sorted(verdicts, key=lambda v: v["index"])] == wrong.tolist()
    assert sum(line["status"] == "verified" for line in verdicts) > 0
    assert main(["export", str(path)]) == 0
    folder, description = RunFolder.open(path)
    assert current_network(folder, description) == folder.onnx and description["imported"]["parity"]["images"] == 100
    assert main(["verify", str(path), "--images", "0:5", "--epsilon", "1/255"]) == 0


def test_resume_is_refused(run, capsys):
    """There is nothing to go on with, and training from the start would write over the imported weights."""
    path, _ = run
    before = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
    assert main(["train", "--resume", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: found an imported network; accepted: ") and said.count("\n") == 1
    assert {file: file.read_bytes() for file in path.iterdir() if file.is_file()} == before
