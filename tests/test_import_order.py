"""Checkpoints whose names do not say the order of their layers, and such as hold weights in parts."""

import re
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.models import Cnn3, Mlp
from certtrain.workflows.import_checkpoint import import_checkpoint
from certtrain.workflows.run import load_model
from tests.test_import_checkpoint import cnn3, convolutional, imported, recipe, trained

SHAPE = (1, 8, 8)


def mlp(widths=(16, 16, 16)):
    torch.manual_seed(0)
    layers, inputs = [nn.Flatten()], 64
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def renamed(network, names):
    """Its linear layers' tensors under other names."""
    layers = [module for module in network if isinstance(module, nn.Linear)]
    return {f"{name}.{role}": tensor.clone() for name, layer in zip(names, layers, strict=True)
            for role, tensor in layer.state_dict().items()}  # fmt: skip


def bring(tmp_path, state, file="net.safetensors", model=None, **options):
    path = tmp_path / file
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    model = model or Mlp(hidden=(16, 16, 16))
    return import_checkpoint(path, recipe(tmp_path, model, SHAPE), tmp_path / "run", quiet=True, **options)


def assert_is(folder, network):
    model, _ = load_model(folder.path)
    x = torch.rand(5, *SHAPE)
    torch.testing.assert_close(model(x), network.eval()(x), rtol=1e-4, atol=1e-5)


FIXED = {
    "numbers": ["layers.0", "layers.2", "layers.4", "layers.10"],
    "numbers that text would sort otherwise": ["fc8", "fc9", "fc10", "fc11"],
    "shapes at the ends": ["top", "mid1", "mid2", "bottom"],
    "nested numbers": ["block1.fc2", "block2.fc1", "block10.fc0", "head"],
}


@pytest.mark.parametrize("kind", FIXED)
def test_numbers_and_shapes_fix_the_order(tmp_path, kind):
    network = mlp()
    folder = bring(tmp_path, renamed(network, FIXED[kind]))
    assert_is(folder, network)
    assert imported(folder)["order"].startswith("the only one")


OPEN = {
    "words": ["embed", "second", "next", "top"],
    "words that happen to be sorted": ["a", "b", "c", "d"],
    "numbers behind different words": ["embed", "fc1", "conv2", "top"],
    "a number and none": ["embed", "fc", "fc2", "top"],
    "numbers written twice": ["embed", "fc01", "fc1", "top"],
}


@pytest.mark.parametrize("kind", OPEN)
def test_what_names_leave_open_is_asked_for(tmp_path, kind):
    network, names = mlp(), OPEN[kind]
    with pytest.raises(InputError, match="--order") as error:
        bring(tmp_path, renamed(network, names))
    assert names[1] in str(error.value) and names[2] in str(error.value)
    assert not (tmp_path / "run").exists()
    folder = bring(tmp_path, renamed(network, names), order=names)
    assert_is(folder, network)
    assert imported(folder)["order"] == "given"


def test_batch_norms_go_with_their_numbers(tmp_path):
    """Natural sorting alone would put all batch norms first."""
    torch.manual_seed(0)
    network = trained(convolutional(1, 8, 10, cnn3(4, growth=1), []))
    names = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2"}
    state = {}
    for name, tensor in network.state_dict().items():
        place, _, role = name.partition(".")
        state[f"{names.get(place, 'fc1' if place == '7' else 'fc2')}.{role}"] = tensor
    with torch.no_grad():
        folder = bring(tmp_path, state, model=Cnn3(width=4, growth=1, hidden=None))
    assert_is(folder, network)


def test_order_by_beginnings_and_behind_a_prefix(tmp_path):
    network = mlp()
    state = renamed(network, ["module.start", "module.part.0", "module.part.1", "module.end"])
    assert_is(bring(tmp_path, state, order=["start", "part", "module.end"]), network)


def test_orders_that_cannot_be_used(tmp_path):
    state = renamed(mlp(), OPEN["words"])
    for order in (["embed", "second", "next"], [*OPEN["words"], "more"], ["embed", "embed", "second", "next", "top"]):
        with pytest.raises(InputError, match="order: found"):
            bring(tmp_path, state, order=order)
    with pytest.raises(InputError, match="accepted"):  # it does not fit the shapes
        bring(tmp_path, state, order=["second", "embed", "next", "top"])


def test_a_state_dict_keeps_its_order_unless_its_numbers_say_otherwise(tmp_path):
    network = mlp()
    folder = bring(tmp_path, renamed(network, OPEN["words"]), "net.pt")
    assert_is(folder, network)
    assert "registered" in imported(folder)["order"]
    numbered = renamed(network, FIXED["numbers that text would sort otherwise"])
    places = {"fc8": 0, "fc10": 1, "fc9": 2, "fc11": 3}
    middle = dict(sorted(numbered.items(), key=lambda item: places[item[0].partition(".")[0]]))
    with pytest.raises(InputError, match="against the numbers"):
        bring(tmp_path, middle, "other.pt")


def test_from_the_command_line(tmp_path, capsys):
    network = mlp()
    bring_to = recipe(tmp_path, Mlp(), SHAPE).data.path
    file = tmp_path / "net.safetensors"
    safetensors.torch.save_file(renamed(network, OPEN["words"]), file)
    words = ["import-checkpoint", str(file), "--architecture", "mlp", "--model.hidden", "[16, 16, 16]", "--data",
             "Arrays", "--data.path", str(bring_to), "--epsilon", "0.1", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 2
    assert "--order" in capsys.readouterr().err
    assert main([*words, "--order", "embed,second,next,top"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "order of layers: given" in said and "in this order" in said


def prune_all(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)


def pruned_direction(layer):
    torch.nn.utils.weight_norm(layer)
    prune.l1_unstructured(layer, "weight_v", 0.3)


def both(layer):
    parametrizations.weight_norm(layer)
    parametrizations.spectral_norm(layer)


KINDS = {
    "pruned": prune_all,
    "weight_norm": torch.nn.utils.weight_norm,
    "weight_norm of all": lambda layer: torch.nn.utils.weight_norm(layer, dim=None),
    "weight_norm along columns": lambda layer: torch.nn.utils.weight_norm(layer, dim=1),
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruned weight_norm": pruned_direction,
    "parametrised weight_norm": parametrizations.weight_norm,
    "parametrised spectral_norm": parametrizations.spectral_norm,
    "both": both,
}
WRAPPERS = {
    "bare": lambda network: network,
    "DataParallel": nn.DataParallel,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "compiled in DataParallel": lambda network: nn.DataParallel(torch.compile(network, backend="eager")),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_parts(tmp_path, kind, wrapper):
    if "pruned" in kind and wrapper == "averaged":
        pytest.skip("torch cannot copy a pruned module that is averaged")
    network = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the old ones deprecated
        with torch.no_grad():
            for place in (1, 5, 7):
                KINDS[kind](network[place])
    with torch.no_grad():
        if "weight_norm" in kind or "both" in kind:
            for parameter in network.parameters():
                parameter.mul_(1.3)
        network.eval()(torch.rand(2, *SHAPE))
        network(torch.rand(2, *SHAPE))
    with torch.no_grad():
        wrapped = WRAPPERS[wrapper](network)
        folder = bring(tmp_path, wrapped.state_dict(), "net.pt")
    with torch.no_grad():
        assert_is(folder, network)
    note = imported(folder)
    assert len(note["computed"]) == (6 if kind == "pruned" else 3) and note["parity"]["largest_difference"] < 1e-6


def test_unknown_parametrisations_are_refused_by_name(tmp_path):
    network = mlp()
    parametrizations.orthogonal(network[3])
    with pytest.raises(InputError, match="parametrizations"):
        bring(tmp_path, network.state_dict(), "net.pt")

    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).T

    for norm_later in (False, True):
        network = mlp()
        nn.utils.parametrize.register_parametrization(network[3], "weight", Symmetric())
        if norm_later:
            parametrizations.spectral_norm(network[3])
        with pytest.raises(InputError, match="parametrizations"):
            bring(tmp_path, network.state_dict(), "net.pt")


def test_a_direction_of_zero_is_refused(tmp_path):
    network = mlp()
    parametrizations.weight_norm(network[3])
    state = network.state_dict()
    state["3.parametrizations.weight.original1"][2] = 0
    with pytest.raises(InputError, match="finite"):
        bring(tmp_path, state, "net.pt")
