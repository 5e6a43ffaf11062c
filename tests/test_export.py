"""Exports: onnxruntime and every reader see the network that is certified, and what is written is bound together."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import networks
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import yaml
from onnx import numpy_helper
from torch import Tensor, nn

import certtrain
from certtrain import pipeline
from certtrain.bounds import LinfBall, UnsupportedNode, trace
from certtrain.bounds.folded import Convolution, Dense, Diagonal
from certtrain.bounds.folding import fold
from certtrain.command_line import main
from certtrain.config import override, unstructure
from certtrain.data import Digits
from certtrain.errors import InputError
from certtrain.export import current_network, export_onnx, onnx_file, run
from certtrain.models import Cnn7, Mlp, Normalise, SmallCnn
from certtrain.pipeline import load_model, resume, train
from certtrain.recipe import load_config
from certtrain.run_folder import RunFolder
from certtrain.verifiers import Certify
from certtrain.verifiers.abcrown import configuration
from certtrain.verifiers.cascade import robustness, run_cascade
from certtrain.verifiers.onnx_network import read_onnx
from certtrain.verifiers.problem import Specification
from certtrain.verifiers.vnncomp import answer
from certtrain.verifiers.vnnlib import read_property

ROOT = Path(__file__).parents[1]
GREY = {"mean": (0.3,), "std": (0.35,)}


def digits(shape: tuple[int, ...], count: int = 20) -> Tensor:
    """Real images, (count, *shape)."""
    channels, height, width = shape
    test = Digits().load().test
    small = test.pixels(torch.arange(count * channels)).reshape(count, channels, 8, 8)
    return F.interpolate(small, (height, width), mode="bilinear").contiguous()


class Attention(nn.Module):
    """Traced by nobody here: a product of two tensors, and a softmax."""

    def __init__(self):
        super().__init__()
        self.query, self.last = nn.Linear(8, 8), nn.Linear(64, 4)

    def forward(self, x):
        x = x.flatten(1, 2)
        return self.last((torch.softmax(self.query(x) @ x.transpose(1, 2), -1) @ x).flatten(1))


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def residual() -> nn.Module:
    """With a normalisation, a pre-activation, a shortcut with weights of its own, and a difference."""
    first = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    other = nn.Sequential(nn.Conv2d(3, 3, 3, padding="same", bias=False), nn.ReLU())
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)]
    normalise = Normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return nn.Sequential(normalise, networks.Residual(first), networks.Residual(other, -1), *head)


def pools() -> nn.Module:
    convolution, linear = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 4)
    layers = [convolution, nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1, 1, count_include_pad=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, 1), nn.Flatten(), linear)


def smooth() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, stride=(2, 1), groups=2, bias=False), nn.LeakyReLU(0.1), nn.Dropout2d(0.5)]
    layers += [nn.Conv2d(4, 4, (2, 3), dilation=2), nn.Sigmoid(), nn.Flatten(), nn.Dropout(0.9), nn.Linear(8, 8)]
    return nn.Sequential(*layers, nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def circular() -> nn.Module:
    """What stands by itself: a batch norm without a layer, one after a ReLU; numbers for each pixel."""
    pixels = networks.Elementwise(torch.randn(2, 8, 8), torch.randn(1, 8, 1))
    layers = [nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2, affine=False), pixels]
    layers += [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(192)]
    return nn.Sequential(*layers, nn.Linear(192, 4))


MODELS = {
    "SmallCnn": (lambda: SmallCnn(**GREY, width=4, hidden=16).build((1, 8, 8), 10), (1, 8, 8)),
    "SmallCnn without norms": (lambda: SmallCnn(width=4, hidden=16, batch_norm=False).build((1, 8, 8), 10), (1, 8, 8)),
    "Mlp": (lambda: Mlp(**GREY, hidden=(16, 12), batch_norm=True).build((1, 8, 8), 10), (1, 8, 8)),
    "Cnn7": (
        lambda: Cnn7(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), width=2, hidden=16).build((3, 32, 32), 10),
        (3, 32, 32),
    ),
    "residual": (residual, (3, 8, 8)),
    "pools": (pools, (2, 8, 8)),
    "smooth": (smooth, (2, 8, 8)),
    "circular": (circular, (2, 8, 8)),
    "grey to RGB": (
        lambda: nn.Sequential(Normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), nn.Flatten(), nn.Linear(192, 4)),
        (1, 8, 8),
    ),
    "attention": (Attention, (1, 8, 8)),
}
UNTRACED = {"attention"}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return networks.randomise_norms(MODELS[name][0]())


def session(content: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def strings(message) -> Iterator[str]:
    """All that is text, however deep inside."""
    for field, value in message.ListFields():
        for item in value if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]:
            if isinstance(item, str):
                yield item
            elif isinstance(item, bytes) and field.name != "raw_data":
                yield item.decode(errors="replace")
            elif hasattr(item, "ListFields"):
                yield from strings(item)


@dataclasses.dataclass(frozen=True)
class Exported:
    name: str
    model: nn.Module
    images: Tensor
    file: onnx_file.OnnxFile

    @property
    def proto(self) -> onnx.ModelProto:
        return onnx.load_model_from_string(self.file.path.read_bytes())

    @property
    def weights(self) -> list[bytes]:
        found = [numpy_helper.to_array(weight) for weight in self.proto.graph.initializer]
        return sorted(array.tobytes() for array in found if array.dtype == "float32")


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> Exported:
    model, images = build(request.param), digits(MODELS[request.param][1])
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return Exported(request.param, model.train(), images, export_onnx(model, path, images))


class TestNetwork:
    def test_onnxruntime_agrees_at_any_batch_size(self, exported):
        with torch.no_grad():
            expected = exported.model.eval()(exported.images)
        magnitude = float(expected.abs().max())
        run = session(exported.file.path.read_bytes())
        for size in (1, 3, 7):
            (logits,) = run.run(["logits"], {"images": exported.images[:size].numpy()})
            assert logits.shape == (size, expected.shape[1])
            assert abs(logits - expected[:size].numpy()).max() <= 1e-5 * magnitude
        file = exported.file
        assert file.magnitude == pytest.approx(magnitude) and 0 <= file.difference <= 1e-5 * magnitude
        assert file.agreement == 1 and file.images == 20

    def test_it_says_what_it_wrote(self, exported):
        content, graph = exported.file.path.read_bytes(), exported.proto.graph
        assert exported.file.sha256 == hashlib.sha256(content).hexdigest()
        found = [node.op_type for node in graph.node]
        assert exported.file.operators == {kind: found.count(kind) for kind in found}
        assert [entry.version for entry in exported.proto.opset_import] == [exported.file.opset] == [18]
        assert exported.file.folded == (exported.name not in UNTRACED)

    def test_one_input_one_output_and_weights_inside(self, exported):
        onnx.checker.check_model(exported.proto, full_check=True)
        graph = exported.proto.graph
        assert [(given.name, len(graph.input)) for given in graph.input] == [("images", 1)]
        assert [(found.name, len(graph.output)) for found in graph.output] == [("logits", 1)]
        for value, rest in ((graph.input[0], exported.images.shape[1:]), (graph.output[0], None)):
            kind = value.type.tensor_type
            assert kind.elem_type == onnx.TensorProto.FLOAT
            first, *others = kind.shape.dim
            assert first.dim_param and not first.HasField("dim_value")  # whatever the batch
            assert rest is None or [size.dim_value for size in others] == list(rest)
        assert all(weight.data_location == onnx.TensorProto.DEFAULT for weight in graph.initializer)
        assert [path.name for path in exported.file.path.parent.iterdir()] == ["model.onnx"]

    def test_it_is_the_network_that_is_certified(self, exported):
        """The folded weights, bit for bit; a normalisation is a 1×1 convolution, and nothing else is left of it."""
        if exported.name in UNTRACED:
            with pytest.raises(UnsupportedNode):
                trace(exported.model)
            return
        expected: list[Tensor] = []
        for operation in fold(exported.model.eval(), exported.images.shape[1:]).operations:
            if isinstance(operation, (Dense, Convolution)):
                expected += [operation.weight, *([] if operation.bias is None else [operation.bias])]
            if isinstance(operation, Diagonal):
                assert exported.name in ("SmallCnn", "Mlp", "Cnn7", "residual", "circular", "grey to RGB")
                scale, shift = operation.scale, operation.shift
                if exported.name != "grey to RGB" and scale.shape[-2:] == (1, 1):
                    scale = torch.diag(scale.flatten())
                expected += [scale, shift]
        assert exported.weights == sorted(tensor.detach().numpy().tobytes() for tensor in expected)
        allowed = {"Conv", "Gemm", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "MaxPool", "AveragePool", "ReduceMean",
                   "Reshape", "Add", "Transpose"}  # fmt: skip
        allowed |= {"residual": {"Sub"}, "circular": {"Mul", "Pad"}}.get(exported.name, set())
        assert exported.file.operators.keys() <= allowed

    def test_a_normalisation_is_a_convolution(self, exported):
        normalisations = {"SmallCnn": 1, "Mlp": 1, "Cnn7": 1, "residual": 2, "circular": 2}
        sizes = [tuple(weight.dims) for weight in exported.proto.graph.initializer]
        channels = exported.images.shape[1]
        assert sizes.count((channels, channels, 1, 1)) == normalisations.get(exported.name, 0)

    def test_nothing_of_this_machine_is_in_it(self, exported):
        words = list(strings(exported.proto))
        assert {"images", "logits", "pytorch", "batch"} <= set(words)
        places = (str(ROOT), str(exported.file.path.parent), os.uname().nodename, "site-packages", ".py", "/")
        assert not [word for word in words for place in places if place in word]
        content = exported.file.path.read_bytes()
        assert b"site-packages" not in content and str(ROOT).encode() not in content

    def test_our_reader_gets_it_back(self, exported):
        if exported.name in UNTRACED:
            with pytest.raises(UnsupportedNode):
                read_onnx(exported.file.path)
            return
        network = read_onnx(exported.file.path)
        with torch.no_grad():
            expected, found = exported.model.eval()(exported.images), network.module(exported.images)
        assert network.shape == exported.images.shape[1:] and network.outputs == expected.shape[1]
        assert (found - expected).abs().max() <= 1e-5 * exported.file.magnitude

    def test_again_the_same_bytes(self, exported, tmp_path):
        again = export_onnx(exported.model, tmp_path / "again.onnx", exported.images[3:5])
        assert (tmp_path / "again.onnx").read_bytes() == exported.file.path.read_bytes()
        assert again.sha256 == exported.file.sha256 and again.images == 2


class TestTheModelIsLeftAsItWas:
    def mixed(self) -> nn.Module:
        """Some of it in training mode, some frozen, with gradients."""
        model = build("SmallCnn")
        model.train()
        model[2].eval()
        for parameter in (*model[1].parameters(), model[-1].bias):
            parameter.requires_grad_(False)
        model(digits((1, 8, 8), 4)).sum().backward()
        return model

    def state(self, model: nn.Module):
        tensors = {name: (id(t), t.device, t.requires_grad, t.detach().clone(), t.grad) for name, t in
                   (*model.named_parameters(), *model.named_buffers())}  # fmt: skip
        return {name: module.training for name, module in model.named_modules()}, tensors

    def assert_unchanged(self, model: nn.Module, before) -> None:
        modes, tensors = self.state(model)
        assert modes == before[0] and tensors.keys() == before[1].keys()
        for name, (*facts, value, gradient) in tensors.items():
            *expected, old, old_gradient = before[1][name]
            assert facts == expected and torch.equal(value, old) and gradient is old_gradient

    def test_after_success(self, tmp_path):
        model = self.mixed()
        before = self.state(model)
        export_onnx(model, tmp_path / "model.onnx", digits((1, 8, 8)))
        self.assert_unchanged(model, before)

    @pytest.mark.parametrize("wrong", ["shape", "parity"])
    def test_after_failure(self, wrong, tmp_path, monkeypatch):
        model = self.mixed()
        before = self.state(model)
        monkeypatch.setattr(onnx_file, "TOLERANCE", 0.0 if wrong == "parity" else 1.0)
        with pytest.raises(InputError if wrong == "parity" else RuntimeError):
            export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 1, 8, 8 if wrong == "parity" else 12))
        self.assert_unchanged(model, before)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("weights", [True, False], ids=["with parameters", "with buffers alone"])
    def test_on_a_gpu(self, weights, tmp_path):
        model = build("SmallCnn").cuda()
        if not weights:
            model = nn.Sequential(Normalise((0.5,), (0.5,)), nn.Flatten()).cuda()
        before = self.state(model)
        images = digits((1, 8, 8)).cuda()
        export_onnx(model, tmp_path / "model.onnx", images)
        assert {tensor[1].type for tensor in self.state(model)[1].values()} == {"cuda"} and model(images).is_cuda
        assert self.state(model)[0] == before[0]


class Off:
    """A session whose logits are shifted."""

    def __init__(self, real, by: float):
        self.real, self.by = real, by

    def __call__(self, *arguments, **keywords):
        made = self.real(*arguments, **keywords)

        class Session:
            def run(_, *asked):
                (logits,) = made.run(*asked)
                logits[0, 3] += self.by
                return [logits]

        return Session()


class TestParity:
    images = digits((1, 8, 8), 8)

    def shifted(self, monkeypatch, by: float) -> None:
        monkeypatch.setattr(onnxruntime, "InferenceSession", Off(onnxruntime.InferenceSession, by))

    def test_a_difference_is_refused_and_nothing_is_lost(self, tmp_path, monkeypatch):
        path, model = tmp_path / "model.onnx", build("Mlp")
        path.write_text("older")
        with torch.no_grad():
            assert model.eval()(self.images)[0].argmax() != 3
        self.shifted(monkeypatch, 100.0)
        with pytest.raises(
            InputError, match=r"differ from torch's by 100, predictions agree on 87\.50 % of 8"
        ) as error:
            export_onnx(model, path, self.images)
        assert str(error.value).startswith(f"{path}: not written") and "accepted: 1e-05 of the largest" in str(
            error.value
        )
        assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("by", [math.nan, math.inf])
    def test_what_is_no_number_is_refused(self, by, tmp_path, monkeypatch):
        self.shifted(monkeypatch, by)
        with pytest.raises(InputError, match=f"by {by}"):
            export_onnx(build("Mlp"), tmp_path / "model.onnx", self.images)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("share", [0.5, 2.0])
    def test_how_much_is_too_much(self, share, tmp_path, monkeypatch):
        model = build("Mlp")
        model[-1].weight.data *= 100  # of the magnitude, whatever that is
        with torch.no_grad():
            magnitude = float(model.eval()(self.images).abs().max())
        self.shifted(monkeypatch, share * 1e-5 * magnitude)
        if share < 1:
            found = export_onnx(model, tmp_path / "model.onnx", self.images)
            assert found.difference == pytest.approx(share * 1e-5 * magnitude, rel=0.1) and found.agreement == 1
        else:
            with pytest.raises(InputError, match="not written"):
                export_onnx(model, tmp_path / "model.onnx", self.images)

    def test_weights_that_are_no_numbers(self, tmp_path):
        model = build("Mlp")
        model[-1].bias.data[2] = math.nan
        with pytest.raises(InputError, match="by nan"):
            export_onnx(model, tmp_path / "model.onnx", self.images)
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.rand(3, 1, 8, 8).double(), r"torch\.float64 \(3, 1, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), r"torch\.uint8"),
        (torch.rand(0, 1, 8, 8), r"torch\.float32 \(0, 1, 8, 8\)"),
        (torch.rand(8), r"torch\.float32 \(8,\)"),
    ],
)
def test_bad_images(images, found, tmp_path):
    with pytest.raises(InputError, match=f"images: found {found}"):
        export_onnx(build("Mlp"), tmp_path / "model.onnx", images)
    assert not any(tmp_path.iterdir())


def test_what_torch_cannot_export(tmp_path, capfd):
    model = nn.Sequential(nn.Flatten(), Branch(), nn.Linear(64, 4)).train()
    with pytest.raises(InputError, match=r"torch cannot export it \(.*data-dependent") as error:
        export_onnx(model, tmp_path / "model.onnx", digits((1, 8, 8)))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert not any(tmp_path.iterdir()) and all(module.training for module in model.modules())
    assert not capfd.readouterr().out


COUNT = 30
TRAINED = {"export.images": str(COUNT), "certify.images": "40", "model.mean": "[0.3]", "model.std": "[0.35]"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    config = load_config(ROOT / "configs" / "smoke.yaml", TRAINED)
    return train(config, tmp_path_factory.mktemp("trained") / "run", quiet=True).path


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> RunFolder:
    """A finished and exported run, in the working directory."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path / "run")


@pytest.fixture
def known(trained, monkeypatch) -> None:
    """The network is not exported anew, which takes a second: its file is copied."""
    recorded = description(RunFolder(trained))["export"]["network"]

    def copied(model, path, images):
        shutil.copy(trained / "model.onnx", path)
        return onnx_file.OnnxFile(**{**recorded, "path": path})

    monkeypatch.setattr(run, "export_onnx", copied)


def description(folder: RunFolder) -> dict:
    return json.loads(folder.run.read_text())


def edit(folder: RunFolder, changes: dict[str, str]) -> None:
    found = description(folder)
    folder.run.write_text(json.dumps({**found, "config": override(found["config"], changes)}))


def without_export(folder: RunFolder) -> RunFolder:
    """As if it had been interrupted before its export."""
    found = description(folder)
    del found["export"]
    folder.run.write_text(json.dumps(found))
    shutil.rmtree(folder.specs)
    for path in (folder.onnx, folder.instances, folder.abcrown, folder.sums):
        path.unlink()
    return folder


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def sums(folder: RunFolder) -> dict[str, str]:
    lines = folder.sums.read_text().splitlines()
    return {line[66:]: line[:64] for line in lines if line[64:66] == "  "}


def assert_bound_together(folder: RunFolder, images: range, epsilon: float, timeout: float, boxes: bool = True) -> None:
    """What the run's files say of each other, and of the weights."""
    names = [f"{number:04d}.vnnlib" for number in images] if boxes else []
    assert sorted(path.name for path in folder.specs.iterdir()) == names
    rows = list(csv.reader(folder.instances.open()))
    assert rows == [["model.onnx", f"specs/{name}", f"{timeout:g}"] for name in names]
    files = ["model.onnx", *(f"specs/{name}" for name in names), "instances.csv", "abcrown.yaml"]
    assert sums(folder).keys() == set(files) and len(folder.sums.read_text().splitlines()) == len(files)
    for name, expected in sums(folder).items():
        assert hashlib.sha256((folder.path / name).read_bytes()).hexdigest() == expected
    found = description(folder)["export"]
    assert found["weights"] == hashlib.sha256(folder.model.read_bytes()).hexdigest()
    assert found["network"]["path"] == "model.onnx" and found["network"]["sha256"] == sums(folder)["model.onnx"]
    assert found["sums"] == {"path": "SHA256SUMS", "sha256": hashlib.sha256(folder.sums.read_bytes()).hexdigest()}
    assert found["network"]["folded"] and found["network"]["images"] == 359 and found["network"]["agreement"] == 1
    assert 0 <= found["network"]["difference"] <= 1e-5 * found["network"]["magnitude"]
    assert (found["epsilon"], found["timeout"]) == (epsilon, timeout)
    assert (found["properties"], found["first_image"]) == (len(names), images.start)
    assert yaml.safe_load(folder.abcrown.read_text()) == configuration(timeout, "cpu")
    assert current_network(folder, description(folder)) == folder.onnx
    ball, test = LinfBall(epsilon), Digits().load().test
    for name, number in zip(names, images, strict=boxes):
        (case,) = read_property(folder.specs / name, 64, 10).cases
        lower, upper = ball.ends(test.pixels(torch.tensor([number]))[0].flatten())
        assert torch.equal(case.lower.float(), lower) and torch.equal(case.upper.float(), upper)


class TestRun:
    def test_its_files(self, here):
        assert_bound_together(here, range(COUNT), 0.02, 60.0)

    @pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
    def test_sha256sum_reads_the_sums(self, here):
        command = ["sha256sum", "--strict", "-c", here.sums.name]
        assert subprocess.run(command, cwd=here.path, capture_output=True).returncode == 0
        (here.specs / "0003.vnnlib").write_bytes((here.specs / "0003.vnnlib").read_bytes() + b" ")
        assert subprocess.run(command, cwd=here.path, capture_output=True).returncode == 1

    def test_properties_say_what_certificates_say(self, here):
        test = Digits().load().test
        model, _ = load_model(here.path)
        with torch.no_grad():
            wrong = model(test.pixels(torch.arange(COUNT))).argmax(1) != test.labels[:COUNT]
        assert 0 < wrong.sum() < COUNT  # such images have a property like any other
        logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).double()
        logits[0] = 0.0  # a tie is unsafe
        for number in range(COUNT):
            (case,) = read_property(here.specs / f"{number:04d}.vnnlib", 64, 10).cases
            assert case.lower.min() >= 0 and case.upper.max() <= 1 and (case.lower < case.upper).all()
            expected = Specification.robust(test.labels[number : number + 1], 10)
            found = Specification(case.rows[None], case.offsets[None], case.clauses)
            assert torch.equal(case.clauses, expected.clauses)
            assert torch.equal(found.values(logits), expected.values(logits))
            assert torch.equal(found.worst(found.values(logits)), expected.worst(expected.values(logits)))

    def test_again_with_other_words(self, here):
        before, old = everything_in(here.path), description(here)
        for stale in ("0007.vnnlib.compiled", ".0008.vnnlib.77.tmp"):
            (here.specs / stale).write_text("stale")
        (here.specs / ".ipynb_checkpoints").mkdir()  # somebody else's
        found = pipeline.export(here.path, images="3:6", epsilon=0.05, timeout=1234567.5, quiet=True)
        assert found == description(here)["export"] and found["timeout"] == 1234567.5
        assert [row[2] for row in csv.reader(here.instances.open())] == 3 * ["1234567.5"]
        pipeline.export(here.path, images=range(3, 6), epsilon=0.05, timeout=7, quiet=True)
        (here.specs / ".ipynb_checkpoints").rmdir()
        assert_bound_together(here, range(3, 6), 0.05, 7.0)
        new = description(here)
        assert list(new) == list(old) and {**new, "export": 0} == {**old, "export": 0}
        after = everything_in(here.path)
        assert before["model.onnx"] == after["model.onnx"] and before["specs/0003.vnnlib"] != after["specs/0003.vnnlib"]
        changed = {name for name in before if before[name] != after.get(name)} - {
            f"specs/{n:04d}.vnnlib" for n in range(30)
        }
        assert changed == {"run.json", "instances.csv", "abcrown.yaml", "SHA256SUMS"}
        pipeline.export(here.path, quiet=True)
        assert everything_in(here.path) == before

    def test_in_another_process_the_same_bytes(self, here):
        before = everything_in(here.path)
        command = [sys.executable, str(ROOT / "scripts" / "export.py"), "run"]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "" and "30 properties at epsilon 0.02" in done.stdout
        assert everything_in(here.path) == before

    @pytest.mark.parametrize("enabled", [True, False])
    def test_a_finished_run_that_lacks_its_export_is_resumed(self, enabled, here, trained):
        edit(without_export(here), {"export.enabled": str(enabled).lower()})
        verdicts = here.verdicts.path.read_bytes()
        assert resume(here.path, quiet=True).final()
        assert here.verdicts.path.read_bytes() == verdicts
        if enabled:
            assert_bound_together(here, range(COUNT), 0.02, 60.0)
            assert here.onnx.read_bytes() == (trained / "model.onnx").read_bytes()
            before = everything_in(here.path), here.onnx.stat().st_mtime_ns
            resume(here.path, quiet=True)
            assert (everything_in(here.path), here.onnx.stat().st_mtime_ns) == before
        else:
            assert not here.onnx.exists() and not here.specs.exists() and "export" not in description(here)

    def interrupted(self, monkeypatch, call) -> None:
        write, written = run.write_property, []

        def failing(path, *arguments):
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(path)
            write(path, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "write_property", failing)
            call()

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize("go_on", [resume, pipeline.export])
    def test_interrupted_it_is_finished(self, go_on, here, monkeypatch):
        without_export(here)
        self.interrupted(monkeypatch, lambda: resume(here.path, quiet=True))
        assert current_network(here, description(here)) is None
        go_on(here.path, quiet=True)
        assert_bound_together(here, range(COUNT), 0.02, 60.0)

    @pytest.mark.usefixtures("known")
    def test_interrupted_when_it_replaces_another(self, here, monkeypatch):
        self.interrupted(monkeypatch, lambda: pipeline.export(here.path, images="0:9", epsilon=0.5, quiet=True))
        assert not description(here)["export"]  # nothing is said of files that are half old, half new
        assert current_network(here, description(here)) is None
        pipeline.export(here.path, quiet=True)
        assert_bound_together(here, range(COUNT), 0.02, 60.0)

    @pytest.mark.usefixtures("known")
    def test_a_ball_that_is_no_box_has_no_properties(self, here):
        edit(here, {"perturbation.type": "L2Ball", "perturbation.epsilon": "0.02"})
        found = pipeline.export(here.path, timeout=5.0, quiet=True)
        assert found["properties"] == 0
        assert_bound_together(here, range(COUNT), 0.02, 5.0, boxes=False)

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize(("asked", "count"), [("0", 0), ("7", 7), ("null", 359), ("100000", 359)])
    def test_as_many_images_as_the_recipe_says(self, asked, count, here, monkeypatch):
        monkeypatch.setattr(run, "write_property", lambda path, *_: path.write_text("a property"))
        edit(here, {"export.images": asked, "export.timeout": "2.5"})
        found = pipeline.export(here.path, quiet=True)
        assert (found["properties"], found["timeout"]) == (count, 2.5) and len(list(here.specs.iterdir())) == count

    def test_a_network_that_is_not_current(self, here):
        assert current_network(here, description(here)) == here.onnx
        for path in (here.model, here.onnx):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert current_network(here, description(here)) is None
            path.write_bytes(content)
            assert current_network(here, description(here)) == here.onnx
        here.onnx.unlink()
        assert current_network(here, description(here)) is None
        assert current_network(here, {}) is None

    def test_parity_fails_and_the_older_export_stays(self, here, monkeypatch, capsys):
        before = everything_in(here.path)
        monkeypatch.setattr(onnx_file, "TOLERANCE", 0.0)
        assert main(["export", "run", "--epsilon", "0.3"]) == 2
        assert "run/model.onnx: not written" in capsys.readouterr().err and everything_in(here.path) == before


class TestSecondReader:
    """Our verifier on the files, against our verifier on the module."""

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize("epsilon", [0.02, 0.04])
    def test_the_front_door_answers_as_certify_does(self, epsilon, here):
        pipeline.export(here.path, epsilon=epsilon, quiet=True)
        model, _ = load_model(here.path)
        test = Digits().load().test
        verdicts = certtrain.certify(model, test.pixels(torch.arange(COUNT)), test.labels[:COUNT], epsilon)
        words = {"verified": "holds", "falsified": "violated", "misclassified": "violated"}
        found = [answer(here.onnx, here.specs / f"{number:04d}.vnnlib").word for number in range(COUNT)]
        assert found == [words[verdict.status] for verdict in verdicts]
        assert {verdict.status for verdict in verdicts} == words.keys()

    def test_the_same_bounds_come_out_of_the_file(self, here):
        test = Digits().load().test
        model, _ = load_model(here.path)
        images, labels = test.pixels(torch.arange(COUNT)), test.labels[:COUNT]
        found = []
        for stages in (("ibp",), ("crown_ibp",), ("crown",), ("attack", "alpha")):
            for network in (model, read_onnx(here.onnx).module):
                problem = robustness(network, images, labels, torch.arange(COUNT), 10, LinfBall(0.03))
                found.append(run_cascade(problem, Certify(stages=stages).build(0)))
            own, read = found[-2:]
            assert [verdict.status for verdict in own] == [verdict.status for verdict in read]
            tolerance = 1e-5 if "alpha" not in stages else 1e-3  # an ascent goes its own way
            for one, two in zip(own, read, strict=True):
                assert one.lower_bound == pytest.approx(two.lower_bound, abs=tolerance)
        assert len({tuple(verdict.status for verdict in verdicts) for verdicts in found}) > 1

    def test_counterexamples_have_to_fool_the_file_too(self, here, monkeypatch):
        asked = {"epsilon": 0.1, "images": range(COUNT), "certify": Certify(stages=("attack",)), "quiet": True}
        test = Digits().load().test
        all_images = test.pixels(torch.arange(COUNT)).flatten(1)
        seen = []

        def stubborn(proto):
            def replay(image: Tensor) -> Tensor:
                """Right about whatever image this one came from."""
                seen.append(image)
                nearest = (all_images - image.flatten()).abs().amax(1).argmin()
                return F.one_hot(test.labels[nearest], 10).float()

            return replay

        shutil.copytree(here.path, "other")
        monkeypatch.setattr(pipeline, "replay_session", stubborn)
        held = certtrain.verify("run", **asked).records
        assert seen and {record["status"] for record in held} == {"misclassified", "unknown"}
        Path("other/model.onnx").unlink()  # nothing to replay in
        assert "falsified" in {record["status"] for record in certtrain.verify("other", **asked).records}

    def test_it_is_onnxruntime_that_they_are_replayed_in(self, here, monkeypatch):
        ran, real = [], pipeline.replay_session

        def watched(proto):
            replay = real(proto)
            return lambda image: ran.append(replay(image)) or ran[-1]

        monkeypatch.setattr(pipeline, "replay_session", watched)
        found = certtrain.verify(
            "run", epsilon=0.1, images=range(COUNT), certify=Certify(stages=("attack",)), quiet=True
        ).records
        falsified = [record["status"] for record in found].count("falsified")
        assert 0 < falsified <= len(ran) and all(logits.shape == (10,) for logits in ran)


RUNS = {
    "no folder": ([], ["found no run folder", "export RUN_DIR"]),
    "not a folder": (["nowhere"], ["nowhere: found no run.json"]),
    "a file": (["run/run.json"], ["run/run.json"]),
    "two folders": (["run", "run"], ["'run'"]),
    "one image": (["run", "--images", "7"], ["images: found '7'", "start:stop", "359"]),
    "no images": (["run", "--images", "7:7"], ["images: found '7:7'"]),
    "images outside": (["run", "--images", "0:360"], ["images: found '0:360'", "<= 359"]),
    "images are missing": (["run", "--images"], ["--images"]),
    "negative epsilon": (["run", "--epsilon", "-0.1"], ["epsilon: found -0.1", ">= 0"]),
    "epsilon is NaN": (["run", "--epsilon", "nan"], ["--epsilon: found 'nan'", "a radius >= 0"]),
    "epsilon over 0": (["run", "--epsilon", "1/0"], ["--epsilon: found '1/0'"]),
    "no time": (["run", "--timeout", "0"], ["timeout: found 0", "seconds > 0"]),
    "endless": (["run", "--timeout", "inf"], ["--timeout: found 'inf'", "seconds > 0"]),
    "another device": (["run", "--device", "cpu"], ["--device: cannot be changed"]),
    "an abbreviation": (["run", "--eps", "0.1"], ["--eps: cannot be changed"]),
}  # fmt: skip


def assert_refused(folder: Path, capsys, words: list[str], mentions: list[str]) -> None:
    before = everything_in(folder)
    assert main(["export", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.endswith("\n") and said.err.count("\n") == 1 and not said.out
    for mention in [*mentions, "accepted"]:
        assert mention in said.err
    assert everything_in(folder) == before
    assert main(["export", *words, "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and shown.endswith(said.err)


class TestCommandLine:
    @pytest.mark.usefixtures("known")
    def test_options(self, here, capsys):
        assert main(["export", "run", "--images", "5:9", "--epsilon", "2/255", "--timeout", "3/2"]) == 0
        said = capsys.readouterr()
        assert_bound_together(here, range(5, 9), 2 / 255, 1.5)
        assert "4 properties at epsilon 0.00784314" in said.out and not said.err
        assert str(here.abcrown) in said.out and "run/instances.csv" in said.out and "run/SHA256SUMS" in said.out

    @pytest.mark.parametrize(("words", "mentions"), RUNS.values(), ids=RUNS)
    def test_bad_words(self, words, mentions, here, capsys):
        assert_refused(here.path.parent, capsys, words, mentions)

    def test_a_run_that_is_not_finished(self, here, capsys):
        without_export(here).model.unlink()
        assert_refused(here.path.parent, capsys, ["run"], ["model.safetensors", "found no weights", "--resume run"])

    def test_other_data(self, here, capsys):
        found = description(here)
        found["dataset"]["sha256"] = "0" * 64
        here.run.write_text(json.dumps(found))
        assert_refused(here.path.parent, capsys, ["run"], ["data: found images", "000000"])

    def test_training_ends_with_an_export(self, trained, here):
        """And the recipe in ``run.json`` says which."""
        assert description(here)["config"] == unstructure(load_config(ROOT / "configs" / "smoke.yaml", TRAINED))
        assert description(here)["config"]["export"] == {"enabled": True, "images": COUNT, "timeout": 60.0}
