"""The exported network: the folded one, bit for bit, as plain operators, equal to torch's in onnxruntime."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import networks
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from certtrain.bounds import UnsupportedOperation, trace
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import Convolution, Dense, Scale
from certtrain.data import Digits
from certtrain.errors import InputError
from certtrain.export import export_onnx, onnx_file
from certtrain.models import Cnn7, Mlp, Normalise, SmallCnn
from certtrain.verifiers.onnx_network import read_onnx

ROOT = Path(__file__).parents[1]
GREY = {"mean": (0.3,), "std": (0.35,)}


def digits(shape: tuple[int, ...], count: int = 20) -> Tensor:
    """Real images, (count, *shape)."""
    channels, height, width = shape
    test = Digits().load().test
    small = test.pixels(torch.arange(count * channels)).reshape(count, channels, 8, 8)
    return F.interpolate(small, (height, width), mode="bilinear").contiguous()


class Attention(nn.Module):
    """Products of two computed values, and a softmax."""

    def __init__(self):
        super().__init__()
        self.query, self.last = nn.Linear(8, 8), nn.Linear(64, 4)

    def forward(self, x):
        x = x.flatten(1, 2)
        return self.last((torch.softmax(self.query(x) @ x.transpose(1, 2), -1) @ x).flatten(1))


class RunningSums(nn.Module):
    """Traced by nobody here."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 4)

    def forward(self, x):
        return self.last(x.flatten(1).cumsum(1))


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


def gates() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.GELU("tanh"), nn.Linear(8, 4))


def sequences() -> nn.Module:
    """The image's rows as one sequence."""
    layers = [nn.Flatten(2), nn.Conv1d(2, 4, 5, 2, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(3, 2, 1)]
    layers += [nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular", groups=2), nn.ReLU(), nn.AvgPool1d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(24, 4))


def joined() -> nn.Module:
    """Each layer reads all earlier ones'."""
    dense = [networks.Joined(nn.Sequential(nn.Conv2d(c, 2, 3, padding=1), nn.ReLU())) for c in (2, 4, 6)]
    return nn.Sequential(*dense, nn.AvgPool2d(2), nn.Flatten(), networks.Joined(nn.Linear(128, 4)), nn.Linear(132, 4))


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
    "gates": (gates, (2, 8, 8)),
    "sequences": (sequences, (2, 8, 8)),
    "joined": (joined, (2, 8, 8)),
    "grey to RGB": (
        lambda: nn.Sequential(Normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), nn.Flatten(), nn.Linear(192, 4)),
        (1, 8, 8),
    ),
    "attention": (Attention, (1, 8, 8)),
    "running sums": (RunningSums, (1, 8, 8)),
}
UNTRACED = {"running sums"}
AGAIN, SLOW = {"residual", "gates", "running sums"}, pytest.mark.slow
"""Networks that are exported twice: folded convolutions, constants of the functions, and one that is not traced."""


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
        return sorted(array.tobytes() for array in found if array.dtype == "float32" and array.ndim)  # GELU has numbers


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
        """The folded weights, bit for bit; a normalisation is two 1×1 convolutions, and nothing else is left of it."""
        if exported.name in UNTRACED:
            with pytest.raises(UnsupportedOperation):
                trace(exported.model)
            return
        expected: list[Tensor] = []
        for operation in fold(exported.model.eval(), exported.images.shape[1:]).operations:
            if isinstance(operation, (Dense, Convolution)):
                product = exported.name == "attention" and operation.inputs == (1,)  # MatMul holds the transpose
                weight = operation.weight.T.contiguous() if product else operation.weight
                expected += [weight, *([] if operation.bias is None else [operation.bias])]
            if isinstance(operation, Scale):
                assert exported.name in ("SmallCnn", "Mlp", "Cnn7", "residual", "circular", "grey to RGB")
                (scale, shift), channels = operation.coefficients(), exported.images.shape[1]
                if scale.shape[-2:] in ((), (1, 1)) and shift.shape[-2:] in ((), (1, 1)):
                    outputs = max(channels, scale.numel(), shift.numel(), 3 if exported.name == "grey to RGB" else 1)
                    scale, shift = (vector.flatten().expand(outputs) for vector in (scale, shift))
                    grows = exported.name == "grey to RGB" and operation.inputs == (0,)
                    scale = scale if grows else torch.diag(scale)
                elif (scale == 1).all():
                    scale = None
                expected += [vector for vector in (scale, shift) if vector is not None and vector.any()]
        assert exported.weights == sorted(tensor.detach().numpy().tobytes() for tensor in expected)
        allowed = {"Conv", "Gemm", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "MaxPool", "AveragePool", "ReduceMean",
                   "Reshape", "Add", "Transpose"}  # fmt: skip
        allowed |= {
            "residual": {"Sub"}, "circular": {"Mul", "Pad"}, "sequences": {"Pad", "Squeeze", "Unsqueeze"},
            "gates": {"Div", "Erf", "Mul", "Pow"}, "joined": {"Concat"},
            "attention": {"MatMul", "Softmax"},
        }.get(exported.name, set())  # fmt: skip
        assert exported.file.operators.keys() <= allowed

    def test_a_normalisation_is_a_convolution(self, exported):
        normalisations = {"SmallCnn": 2, "Mlp": 2, "Cnn7": 2, "residual": 3, "circular": 2}
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
            with pytest.raises(UnsupportedOperation):
                read_onnx(exported.file.path)
            return
        network = read_onnx(exported.file.path)
        with torch.no_grad():
            expected, found = exported.model.eval()(exported.images), network.module(exported.images)
        assert network.shape == exported.images.shape[1:] and network.outputs == expected.shape[1]
        assert (found - expected).abs().max() <= 1e-5 * exported.file.magnitude

    @pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in AGAIN else SLOW) for name in MODELS])
    def test_again_the_same_bytes(self, name, tmp_path):
        model, images = build(name).train(), digits(MODELS[name][1])
        one = export_onnx(model, tmp_path / "one.onnx", images)
        again = export_onnx(model, tmp_path / "again.onnx", images[3:5])
        assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()
        assert again.sha256 == one.sha256 and again.images == 2


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
