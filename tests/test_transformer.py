"""Torch's transformer modules: values as torch computes them, bounds by sampling, export, and refusals by name."""

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from networks import Apply
from test_new_operation import assert_bounded, assert_trains
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from walking import pairs, walk

from certtrain.bounds import Interval, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.folding import fold
from certtrain.export import export_onnx
from certtrain.verifiers.onnx_network import read_onnx


def tokens(x: Tensor) -> Tensor:
    """(B, 1, 8, 8) → (B, 4, 16)."""
    return x.view(x.size(0), 4, 16)


def network(forward, **modules) -> nn.Module:
    """Four tokens of eight numbers, through ``forward(module, tokens)``, and a linear layer."""
    torch.manual_seed(0)
    layers = {"embed": nn.Linear(16, 8), "last": nn.Linear(32, 3), **modules}
    model = Apply(lambda m, x: m.last(forward(m, m.embed(tokens(x))).flatten(1)), **layers)
    for name, parameter in model.named_parameters():  # torch's own biases begin at 0
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def whole(m: nn.Module, x: Tensor) -> Tensor:
    y, _ = m.attend(x, x, x, need_weights=False)
    return y


def across(m: nn.Module, x: Tensor) -> Tensor:
    """Keys and values of other sizes than the queries, by name."""
    return m.attend(x, key=m.keys(x), value=m.values(x))[0]


def weighed(m: nn.Module, x: Tensor) -> Tensor:
    y, shares = m.attend(x, x, x)
    return y + m.widen(shares)


def by_head(m: nn.Module, x: Tensor) -> Tensor:
    y, shares = m.attend(x, x, value=x, average_attn_weights=False)
    return y * m.widen(shares[:, 1])


def layer(**options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)


def encoder(depth=2, norm=None, **options) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**options), depth, norm, enable_nested_tensor=False)


def through(m: nn.Module, x: Tensor) -> Tensor:
    return m.encoder(x)


def back(forward):
    """``forward`` of tokens whose batch is dimension 1."""
    return lambda m, x: forward(m, x.transpose(0, 1)).transpose(0, 1)


def by_hand(m: nn.Module, x: Tensor) -> Tensor:
    """A block with the batch as dimension 1 throughout, from tokens (B, E, L) to their mean and the first one's sum."""
    x = x.transpose(1, 2).permute(2, 0, 1)
    x = x + m.attend(m.norm(x), m.norm(x), m.norm(x))[0]
    x = F.dropout(x + torch.tanh(m.drop(m.linear(x))), 0.5, m.training)
    return torch.cat([x.mean(0), x[0], x[-1], x.permute(1, 2, 0)[:, :, 0]], 1)


NETWORKS = {
    "an encoder of sequences first": lambda: network(
        back(through),
        encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2, enable_nested_tensor=False),
    ),
    "attention of sequences first": lambda: network(back(whole), attend=nn.MultiheadAttention(8, 2)),
    "sequences first by hand": lambda: network(
        by_hand, attend=nn.MultiheadAttention(8, 2), norm=nn.LayerNorm(8), linear=nn.Linear(8, 8), drop=nn.Dropout(0.5)
    ),
    "attention": lambda: network(whole, attend=attention()),
    "attention without bias": lambda: network(whole, attend=attention(bias=False)),
    "attention over others": lambda: network(
        across, attend=attention(kdim=5, vdim=6), keys=nn.Linear(8, 5), values=nn.Linear(8, 6)
    ),
    "its weights": lambda: network(weighed, attend=attention(), widen=nn.Linear(4, 8)),
    "its weights by head": lambda: network(by_head, attend=attention(), widen=nn.Linear(4, 8)),
    "parametrized": lambda: network(
        whole, attend=parametrizations.weight_norm(attention(), "in_proj_weight")
    ),
    "an encoder": lambda: network(through, encoder=encoder(norm=nn.LayerNorm(8))),
    "a layer of SiLU": lambda: network(through, encoder=layer(activation=nn.SiLU())),
    "a layer of one head": lambda: network(through, encoder=nn.TransformerEncoderLayer(8, 1, 12, batch_first=True)),
    "a layer without bias": lambda: network(through, encoder=layer(bias=False)),
}  # fmt: skip
for first, activation in pairs([True, False], ["relu", "gelu", nn.ReLU, nn.GELU, F.gelu]):
    made = activation() if isinstance(activation, type) else activation
    NETWORKS[f"a layer of {made}, norm first {first}"] = lambda first=first, made=made: network(
        through, encoder=layer(norm_first=first, activation=made)
    )


@walk("name", NETWORKS)
def test_values_are_those_of_torch(name):
    model, images = NETWORKS[name](), torch.rand(5, 1, 8, 8)
    for kept in (True, False):  # without gradients torch takes another path through its layers
        with torch.set_grad_enabled(kept):
            torch.testing.assert_close(fold(model, images.shape[1:])(images), model(images), rtol=0, atol=3e-6)


@walk("name", NETWORKS)
def test_bounds_enclose_a_network_with_it(name):
    model = NETWORKS[name]().double()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    for epsilon in (0.0, 1e-3, 0.05):
        assert_bounded(model, images, epsilon)


@walk("name", ["attention over others", "an encoder"])
def test_networks_with_it_train(name):
    assert_trains(NETWORKS[name](), torch.rand(6, 1, 8, 8), torch.randint(0, 3, (6,)))


def test_dropout_follows_the_mode():
    from certtrain.bounds import forward

    model, images = network(whole, attend=attention(dropout=0.5)), torch.rand(3, 1, 8, 8)
    assert torch.equal(forward(model, images).logits, forward(model, images).logits)
    model.train()
    assert not torch.equal(forward(model, images).logits, forward(model, images).logits)
    torch.manual_seed(0)
    ours = torch.stack([forward(model, images).logits for _ in range(4000)])
    theirs = torch.stack([model(images) for _ in range(4000)])
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 5 * theirs.std(0).max() / 2000**0.5
    bounds = compute_bounds(model, Interval.point(images))
    torch.testing.assert_close(bounds.center, model.eval()(images), rtol=0, atol=1e-5)


@walk("name", ["attention without bias", "attention over others", "its weights", "parametrized", "an encoder",
               "a layer of one head", "a layer of gelu, norm first True"])  # fmt: skip
def test_the_exported_network_is_read_back(name, tmp_path):
    model, images = NETWORKS[name](), torch.rand(5, 1, 8, 8)
    export_onnx(model, tmp_path / "model.onnx", images)
    with torch.no_grad():
        found, wanted = read_onnx(tmp_path / "model.onnx").module(images), model(images)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


MASK = torch.zeros(4, 4)


def refused(model: nn.Module) -> str:
    with pytest.raises(UnsupportedOperation) as error:
        trace(model, torch.Size((1, 8, 8)))
        compute_bounds(model, Interval.point(torch.rand(2, 1, 8, 8)))
    return str(error.value)


REFUSED = {
    "attn_mask=mask": lambda: network(
        lambda m, x: m.attend(x, x, x, attn_mask=m.mask)[0], attend=attention(), mask=MASK
    ),
    "key_padding_mask=mask": lambda: network(lambda m, x: m.attend(x, x, x, m.mask)[0], attend=attention(), mask=MASK),
    "is_causal=True": lambda: network(lambda m, x: m.attend(x, x, x, is_causal=True)[0], attend=attention()),
    "src_mask=mask": lambda: network(lambda m, x: m.encoder(x, m.mask), encoder=layer(), mask=MASK),
    "src_key_padding_mask=mask": lambda: network(
        lambda m, x: m.encoder(x, src_key_padding_mask=m.mask), encoder=layer(), mask=MASK
    ),
    "mask=mask": lambda: network(lambda m, x: m.encoder(x, mask=m.mask), encoder=encoder(), mask=MASK),
    "add_bias_kv=True": lambda: network(whole, attend=attention(add_bias_kv=True)),
    "add_zero_attn=True": lambda: network(whole, attend=attention(add_zero_attn=True)),
    "batch_first=False and the batch as dimension 0": lambda: network(whole, attend=nn.MultiheadAttention(8, 2)),
    "batch_first=True and the batch as dimension 1": lambda: network(back(through), encoder=layer()),
    "flatten at 'flatten': found a value whose batch is dimension 1 since 'transpose'": lambda: network(
        back(lambda m, x: x.flatten(1))
    ),
    "BatchNorm1d at 'norm': found a value whose batch is dimension 1 since 'transpose'": lambda: network(
        back(lambda m, x: m.norm(x)), norm=nn.BatchNorm1d(2)
    ),
    "PReLU at 'slope': found a value whose batch is dimension 1 since 'transpose'": lambda: network(
        back(lambda m, x: m.slope(x)), slope=nn.PReLU(4)
    ),
    "found the sizes (4, 2, 8) of a value from a batch of 2": lambda: network(back(lambda m, x: x * x.shape[1])),
    "size at 'size_1': found a value whose batch is dimension 1 since 'transpose'": lambda: network(
        lambda m, x: x.view(x.transpose(0, 1).size(0), 4, 8)
    ),
    "2 dimensions": lambda: network(lambda m, x: m.attend(x[:, 0], x[:, 0], x[:, 0])[0], attend=attention()),
    "weights read": lambda: network(lambda m, x: x + m.attend(x, x, x, need_weights=False)[1], attend=attention()),
    "a weight that a hook computes": lambda: network(
        whole, attend=prune.random_unstructured(attention(), "in_proj_weight", 0.5)
    ),
    "[2] of 2 results": lambda: network(lambda m, x: m.attend(x, x, x)[2], attend=attention()),
    "the activation gelu": lambda: network(through, encoder=with_(layer(), activation=F.gelu)),
    "the activation GELU(approximate='tanh')": lambda: network(through, encoder=layer(activation=nn.GELU("tanh"))),
    "the activation silu": lambda: network(through, encoder=layer(activation=F.silu)),
    "norm1 of class RMSNorm": lambda: network(through, encoder=with_(layer(), norm1=nn.RMSNorm(8))),
    "TransformerEncoderLayer at 'encoder.layers.1' has forward hooks": lambda: network(
        through, encoder=hooked(encoder())
    ),
    "Own at 'encoder.layers.0' has no bound rule": lambda: network(
        through, encoder=nn.TransformerEncoder(Own(8, 2, 12, batch_first=True), 1, enable_nested_tensor=False)
    ),
}  # fmt: skip


class Own(nn.TransformerEncoderLayer):
    """Has the rule of its base only if its forward is the base's, which nobody traces."""

    def forward(self, src, **_):
        return 2 * super().forward(src)


def with_(module: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module: nn.TransformerEncoder) -> nn.Module:
    module.layers[1].register_forward_hook(lambda *_: None)
    return module


@walk("words", REFUSED)
def test_refusals_name_what_was_found(words):
    message = refused(REFUSED[words]())
    assert words in message and ("; accepted: " in message or "; supported: " in message)


OPERANDS = {
    "Linear at 'fc': found argument 1": (nn.Linear(8, 8), lambda m, x: m.fc(x, x)),
    "ConvTranspose1d at 'fc': found output_size=": (
        nn.ConvTranspose1d(4, 4, 2, 2),
        lambda m, x: m.fc(x, [17])[..., :8],
    ),
    "LayerNorm at 'fc': found weight=": (nn.LayerNorm(8), lambda m, x: m.fc(x, weight=x)),
}


@walk("words", OPERANDS)
def test_other_arguments_of_a_module_are_refused(words):
    fc, forward = OPERANDS[words]
    message = refused(network(forward, fc=fc))
    assert words in message and "; accepted: its input alone" in message


@walk("forward", [
    lambda m, x: m.fc(input=x)[..., :8],
    lambda m, x: m.fc(x, None)[..., :8],
    lambda m, x: m.fc(x, output_size=None)[..., :8],
    lambda m, x: m.fc(output_size=None, input=x)[..., :8],
])  # fmt: skip
def test_a_module_may_be_given_its_defaults(forward):
    model, images = network(forward, fc=nn.ConvTranspose1d(4, 4, 2, 2)), torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(compute_bounds(model, Interval.point(images)).center, model(images))


def joined(forward, dim=1, **constants) -> nn.Module:
    """Four tokens of four numbers, joined with constants."""
    torch.manual_seed(0)

    def run(m, x):
        return m.last(torch.cat(forward(m, m.first(x.flatten(1)).view(x.size(0), 4, 4), x.size(0)), dim).flatten(1))

    tensors = {name: nn.Parameter(torch.randn(shape)) for name, shape in constants.items()}
    model = Apply(run, first=nn.Linear(64, 16), last=nn.LazyLinear(3), **tensors)
    with torch.no_grad():
        model(torch.rand(1, 1, 8, 8))
    return model.eval()


TOKENS = {
    "one in front": lambda: joined(lambda m, x, n: [m.token.expand(n, -1, -1), x], token=(1, 1, 4)),
    "behind": lambda: joined(lambda m, x, n: [x, m.token.expand(n, 2, 4)], dim=-2, token=(1, 1, 4)),
    "around two": lambda: joined(
        lambda m, x, n: [m.one.expand(n, 4, 1), m.one.expand(n, -1, -1), x, m.two.expand(n, -1, -1), -x, x], dim=2,
        one=(1, 4, 1), two=(1, 4, 2),
    ),
}  # fmt: skip


@walk("name", TOKENS)
def test_constants_beside_values_are_enclosed(name):
    model, images = TOKENS[name](), torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(fold(model, images.shape[1:])(images), model(images))
    for epsilon in (0.0, 0.05):
        assert_bounded(model.double(), images.double(), epsilon)


def test_torchvisions_vision_transformer(tmp_path):
    """A class token, positions, layer norms and GELU: bounds, and its export."""
    torch.manual_seed(0)
    model = zoo.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.rand(2, 3, 8, 8)
    export_onnx(model, tmp_path / "model.onnx", images)
    with torch.no_grad():
        found, wanted = read_onnx(tmp_path / "model.onnx").module(images), model(images)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert_bounded(model.double(), images.double(), 1e-3)


def test_constants_of_several_images_are_refused():
    model = joined(lambda m, x, n: [x, m.token.expand(n, 4, 1)], dim=2, token=(1, 4, 1))
    model.function = lambda m, x: torch.cat([x.flatten(1).view(x.size(0), 4, 16), m.token], 2)
    model.token = nn.Parameter(torch.randn(3, 4, 1))
    assert "cat at 'cat': found a constant of shape (3, 4, 1); accepted: one row" in refused(model)
