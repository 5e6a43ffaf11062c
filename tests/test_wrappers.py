"""Wrapped, pruned and reparametrised models are certified, exported and trained as what they compute."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import certtrain
from certtrain.bounds import (
    Interval,
    UnsupportedOperation,
    checked_logits,
    compute_bounds,
    compute_margins,
    forward,
    trace,
)
from certtrain.bounds.folding import fold
from certtrain.bounds.wrappers import computed
from certtrain.verifiers.settings import Certify


def plain():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    model[1].running_mean.normal_()
    return model.double().eval()


def old(function, *places):
    def make():
        model = plain()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls them deprecated
            for place in places:
                function(model[place])
        return model.double().eval()

    return make


def compiled(model):
    return torch.compile(model, backend="eager")


def pruned_direction(layer):
    torch.nn.utils.weight_norm(layer)
    prune.random_unstructured(layer, "weight_v", 0.3)


def half_and_bias(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.2)
    prune.l1_unstructured(layer, "bias", 0.5)


CASES = {
    "DataParallel": lambda: nn.DataParallel(plain()),
    "compiled": lambda: compiled(plain()),
    "compiled in DataParallel": lambda: nn.DataParallel(compiled(plain())),
    "behind a normalisation": lambda: nn.Sequential(nn.Identity(), nn.DataParallel(plain())),
    "a compiled part": lambda: nn.Sequential(compiled(plain()[:3]), plain()[3:]),
    "a graph of torch.fx": lambda: torch.fx.symbolic_trace(plain()),
    "an averaged model": lambda: torch.optim.swa_utils.AveragedModel(plain()),
    "compiled in place": lambda: (lambda model: (model.compile(backend="eager"), model)[1])(plain()),
    "pruned": old(half_and_bias, 0, 4, 6),
    "a pruned batch norm": old(lambda norm: prune.l1_unstructured(norm, "weight", 1), 1),
    "weight_norm": old(torch.nn.utils.weight_norm, 0, 4, 6),
    "spectral_norm": old(torch.nn.utils.spectral_norm, 0, 4, 6),
    "pruned weight_norm": old(pruned_direction, 0, 6),
    "parametrised weight_norm": old(parametrizations.weight_norm, 0, 6),
    "parametrised spectral_norm": old(parametrizations.spectral_norm, 0, 6),
    "pruned, in DataParallel": lambda: nn.DataParallel(old(half_and_bias, 0, 6)()),
    "weight_norm, compiled": lambda: compiled(old(torch.nn.utils.weight_norm, 4)()),
}


def images(count=3):
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", CASES)
def test_bounds_and_verdicts_are_those_of_what_runs(kind):
    model, x = CASES[kind](), images()
    wanted = model(x).detach()
    for changed in (False, True):
        if changed:  # followed, though hooks compute weights in forward alone
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        torch.testing.assert_close(compute_bounds(model, Interval.point(x)).center, model(x))
        torch.testing.assert_close(fold(model, x.shape[1:])(x), model(x))
        torch.testing.assert_close(forward(model, x).logits, model(x))
    assert not torch.allclose(model(x), wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    checked_logits(model, x)  # before the model itself has run with its new weights
    verdicts = certtrain.certify(model, x, model(x).argmax(1), 1e-6, Certify(stages=("ibp",)))
    assert {verdict.status for verdict in verdicts} == {"verified"}


@pytest.mark.parametrize("kind", CASES)
def test_gradients_reach_the_parameters_that_are_trained(kind):
    model, x = CASES[kind](), images()
    labels = torch.zeros(3, dtype=torch.int64)
    compute_margins(model, Interval.box(x, 0.01), labels)[0].sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    own = CASES[kind]()
    own(x)[:, 1:].sum().backward()
    assert {name for name, grad in found.items() if grad is not None} == {
        name for name, parameter in own.named_parameters() if parameter.grad is not None
    }
    model.zero_grad(), own.zero_grad()
    forward(model, x).logits.square().sum().backward()
    own(x).square().sum().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), own.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("kind", CASES)
def test_export(kind, tmp_path):
    model = CASES[kind]()
    model(images())  # hooks leave computed tensors behind, which the next call replaces
    with torch.no_grad():
        model.float()
        for module in model.modules():  # torch's own .float() leaves those behind
            for name in computed(module):
                setattr(module, name, getattr(module, name).float())
    written = certtrain.export_onnx(model, tmp_path / "model.onnx", images(5).float())
    assert written.folded and written.agreement == 1.0


def test_wrappers_are_put_back():
    model = CASES["behind a normalisation"]()
    inside = model[1]
    names = list(model.state_dict())
    trace(model)
    assert model[1] is inside and list(model.state_dict()) == names


def test_the_old_spectral_norm_goes_on_in_training():
    one, other = (old(torch.nn.utils.spectral_norm, 4)().train() for _ in range(2))
    x = images()
    torch.testing.assert_close(forward(one, x).logits, other(x))
    torch.testing.assert_close(one[4].weight_u, other[4].weight_u)


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("fixed", [False, True])
def test_spectral_norms_go_on_before_a_batch_norm_as_in_torch(norm, fixed):
    one, other = (old(norm, 0, 4)().train() for _ in range(2))
    for model in (one, other):
        model[1].train(not fixed)
        trace(model)
    x = images()
    torch.testing.assert_close(forward(one, x).logits, other(x))
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_hooks_beside_those_that_compute_weights_are_refused():
    for model in (CASES["pruned"](), CASES["DataParallel"]()):
        trace(model)
        (model[0] if isinstance(model, nn.Sequential) else model).register_forward_pre_hook(lambda m, inputs: None)
        with pytest.raises(UnsupportedOperation, match="hooks"):
            trace(model)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.rand(2, 4))])
def test_compiled_by_torchscript_is_refused(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them deprecated
        model = make(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(UnsupportedOperation):
        compute_bounds(model, Interval.box(torch.rand(2, 4), 0.1))
