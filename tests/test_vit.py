"""The vision transformer: its definition, every loss, certification, export, and initialisation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from loss_cases import make_step
from test_new_operation import assert_bounded
from torch import Tensor, nn
from walking import pairs, walk

import certtrain
from certtrain.bounds import LinfBall, compute_margins, forward
from certtrain.data import Digits
from certtrain.errors import InputError
from certtrain.export import export_onnx
from certtrain.losses import Loss
from certtrain.models import CifarResNet, PreActResNet, Vit, initialise_for_ibp, zero_branches
from certtrain.models.initialisation import ends_of_branches
from certtrain.step import Batch, State
from certtrain.verifiers import Certify
from certtrain.verifiers.onnx_network import read_onnx

SMALL = Vit(patch=4, depth=2, width=8, heads=2)
FORMS = [
    dataclasses.replace(SMALL, norm=norm, pool=pool, activation=activation)
    for norm, pool, activation in pairs(["layer", "batch", "none"], ["mean", "class"], ["relu", "gelu"])
]


def build(architecture: Vit, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    model = architecture.build((1, 8, 8), classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def attended(layers: dict[str, nn.Module], x: Tensor, heads: int) -> Tensor:
    """Multi-head attention by torch's own function, from a block's linear layers."""
    q, k, v, out = (layers[name] for name in ("query", "key", "value", "out"))
    weight, bias = (torch.cat([getattr(layer, name) for layer in (q, k, v)]) for name in ("weight", "bias"))
    x = x.transpose(0, 1)
    y, _ = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], heads, weight, bias, None, None, False, 0.0, out.weight, out.bias, training=False
    )
    return y.transpose(0, 1)


@walk("architecture", FORMS)
def test_it_is_its_definition(architecture):
    model, images = build(architecture).eval(), torch.rand(3, 1, 8, 8)
    patches, first, second, norm, _, last = model
    x = F.unfold(images, 4, stride=4).transpose(1, 2) @ patches.embed.weight.flatten(1).T + patches.embed.bias
    if architecture.pool == "class":
        x = torch.cat([torch.zeros(3, 1, 8), x], 1)
    x = x + patches.position
    for block in (first, second):
        before, attention = block[0].branch
        x = x + attended(dict(attention.named_children()), before(x), 2)
        x = x + block[1].branch(x)
    x = norm(x)
    x = x.mean(1) if architecture.pool == "mean" else x[:, 0]
    torch.testing.assert_close(model(images), last(x))
    torch.testing.assert_close(forward(model, images).logits, last(x))


@walk("architecture", FORMS)
def test_bounds_enclose_it(architecture):
    model, images = build(architecture, 3).eval().double(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    for epsilon in (1e-3, 0.05):
        assert_bounded(model, images, epsilon)


@walk("norm", ["layer", "batch"])
def test_the_exported_network_is_read_back(norm, tmp_path):
    model, images = build(dataclasses.replace(SMALL, norm=norm, pool="class")).eval(), torch.rand(5, 1, 8, 8)
    export_onnx(model, tmp_path / "model.onnx", images)
    found = read_onnx(tmp_path / "model.onnx").module
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(images), rtol=0, atol=1e-5)
        region, labels = LinfBall(1e-3).region(images), model(images).argmax(1)
        ours, read = (compute_margins(network, region, labels)[0] for network in (model, found))
    torch.testing.assert_close(read, ours, rtol=1e-3, atol=1e-3)  # norms are recognised, and bounded as such


@walk("kind", [kind for kind in Loss.members().values() if kind.__module__.startswith("certtrain.")])
def test_every_loss_takes_it(kind):
    """One step with finite gradients, which reach every weight."""
    fields = {field.name for field in dataclasses.fields(kind)}
    if "teacher" in fields or kind.__name__ in ("Taps", "Staps"):
        pytest.skip("reads a trained network from a file, or cuts where all paths go through one activation")
    loss, model = kind(), build(dataclasses.replace(SMALL, norm="batch", depth=1)).train()
    step = make_step(0.01)
    step = dataclasses.replace(step, epsilon=step.epsilon.float(), epsilon_max=step.epsilon_max.float(),
                               ball=LinfBall(0.01))  # fmt: skip
    batch = Batch(torch.rand(12, 1, 8, 8), torch.arange(12) % 10, torch.arange(12))
    loss.check_model(model)
    specs = loss.declare_state((1, 8, 8), 10)
    tensors = {name: spec.allocate(12, 12, torch.device("cpu")) for name, spec in specs.items()}
    total = loss(model, batch, dataclasses.replace(step, state=State(tensors, specs))).total
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), kind


def test_certification_decides_images():
    model, split = build(dataclasses.replace(SMALL, norm="batch")), Digits().load().train
    images, labels = split.pixels(torch.arange(200)), split.labels[:200]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    found = certtrain.certify(model, images[:8], labels[:8], 2e-3)
    stages = {verdict.stage for verdict in found if verdict.status == "verified"}
    assert stages and stages <= {"ibp", "crown_ibp", "crown", "alpha"}
    for verdict, image, label in zip(found, images, labels):
        if verdict.status == "verified":
            points = image + 2e-3 * (2 * torch.rand(200, 1, 8, 8) - 1).sign()
            assert (model(points.clamp(0, 1)).argmax(1) == label).all()


def test_its_inputs_are_split_where_they_are_few():
    """Sixteen pixels: what linear bounds leave open is decided by halves of the box."""
    torch.manual_seed(0)
    model, split = Vit(patch=2, depth=1, width=8, heads=2, norm="batch").build((1, 4, 4), 10), Digits().load().train
    images, labels = F.avg_pool2d(split.pixels(torch.arange(400)), 2), split.labels[:400]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    settings = Certify(stages=("ibp", "crown_ibp", "attack", "crown", "input_split"), timeout=60)
    found = certtrain.certify(model.eval(), images[:12], labels[:12], 0.012, settings)
    assert "input_split" in {verdict.stage for verdict in found}
    assert {verdict.status for verdict in found} <= {"verified", "falsified", "misclassified"}


@walk("fields, shape, words", [
    ({"patch": 3}, (1, 8, 8), "model.patch: found 3 for images of 8×8"),
    ({"heads": 5}, (1, 8, 8), "heads: found 5; accepted: a divisor of width, 48"),
    ({"norm": "instance"}, (1, 8, 8), "norm: found instance; accepted: layer, batch, none"),
    ({"pool": "max"}, (1, 8, 8), "pool: found max; accepted: mean, class"),
    ({"depth": 0}, (1, 8, 8), "depth: found 0"),
])  # fmt: skip
def test_refusals(fields, shape, words):
    with pytest.raises(InputError) as error:
        Vit(**fields).build(shape, 10)
    assert words in str(error.value).replace("'", "")


class TestInitialisation:
    def test_the_ends_of_branches_are_found(self):
        model = build(SMALL)
        expected = [end for block in model[1:3] for end in (block[0].branch[1].out, block[1].branch[3])]
        assert ends_of_branches(model) == expected
        zero_branches(model)
        x = torch.rand(2, 1, 8, 8)
        torch.testing.assert_close(model[:3](x), model[0](x), rtol=0, atol=0)

    def test_of_residual_nets(self):
        """A batch norm at the end of a branch; a block whose shortcut has weights keeps both of its branches."""
        assert all(
            isinstance(layer, nn.BatchNorm2d) for layer in ends_of_branches(CifarResNet().build((3, 32, 32), 10))
        )
        pre = PreActResNet(width=2).build((3, 32, 32), 10)
        ends = ends_of_branches(pre)
        assert len(ends) == 5 and all(isinstance(layer, nn.Conv2d) for layer in ends)

    @walk("norm", ["batch", "layer"])
    def test_boxes_keep_their_width_through_blocks(self, norm):
        """Relative to the logits' spread, the bounds' width is several times less than from Shi et al.'s weights."""
        widths = []
        for zero in (False, True):
            model, images = build(dataclasses.replace(SMALL, norm=norm, depth=4)), torch.rand(32, 1, 8, 8)
            initialise_for_ibp(model)
            if zero:
                zero_branches(model)
            model.train()
            own = forward(model, images)
            bounds = certtrain.bounds.compute_bounds(model, LinfBall(1e-4).region(images), own.statistics)
            widths.append(float((bounds.radius.mean() / own.logits.std(0).mean()).detach()))
        assert widths[1] < widths[0] / 4
