"""What is certified is what runs: models that hide something are refused, changed ones are traced anew."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from walking import pairs, walk

import certtrain
from certtrain.bounds import Interval, UnsupportedOperation, checked_logits, compute_bounds, trace
from certtrain.errors import InputError
from certtrain.verifiers.settings import Certify

STAGES = Certify(stages=("ibp", "crown"))


class Net(nn.Module):
    """A small net whose forward goes through ``function(self, z)`` before its last layer."""

    def __init__(self, function=lambda m, z: z, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.last(self.function(self, F.relu(self.first(x))))


def images(count=4):
    return torch.rand(count, 6, generator=torch.Generator().manual_seed(1))


class UnderAutocast(Net):
    """In its first layer alone, whose output a float32 tensor promotes, or as a whole."""

    def __init__(self, dtype, whole):
        super().__init__(zero=nn.Buffer(torch.zeros(16)))
        self.dtype, self.whole = dtype, whole

    def forward(self, x):
        if self.whole:
            with torch.autocast("cpu", dtype=self.dtype):
                return super().forward(x)
        with torch.autocast("cpu", dtype=self.dtype):
            z = self.first(x)
        return self.last(F.relu(z + self.zero))


class Called(Net):
    def __call__(self, x):
        return -super().__call__(x)


class Constant(Net):
    slope = 1.0

    def forward(self, x):
        return super().forward(x) * self.slope


def every_entry(model, x, tmp_path):
    yield lambda: certtrain.certify(model, x, torch.zeros(len(x), dtype=torch.int64), 0.01, STAGES)
    yield lambda: compute_bounds(model.eval(), Interval.box(x, 0.01))
    yield lambda: certtrain.export_onnx(model, tmp_path / "model.onnx", x)


def refused_everywhere(model, x, tmp_path, match):
    for entry in every_entry(model, x, tmp_path):
        with pytest.raises(InputError, match=match):
            entry()
    assert not list(tmp_path.iterdir())


@walk("dtype, whole, count", pairs([torch.bfloat16, torch.float16], [True, False], [1, 4]))
def test_autocast_inside_forward_is_refused(dtype, whole, count, tmp_path):
    refused_everywhere(UnderAutocast(dtype, whole), images(count), tmp_path, "traced|onnxruntime")


def test_autocast_around_the_call_changes_nothing():
    model, x, y = Net().eval(), images(), torch.zeros(4, dtype=torch.int64)
    wanted = [verdict.lower_bound for verdict in certtrain.certify(model, x, y, 0.01, STAGES)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [verdict.lower_bound for verdict in certtrain.certify(model, x, y, 0.01, STAGES)]
    assert found == wanted


HIDDEN = {
    "a call of its own": lambda: Called(),
    "noise": lambda: Net(lambda m, z: z if isinstance(z, torch.fx.Proxy) else z + 0.01 * torch.rand_like(z)),
    "what tracing does not see": lambda: Net(lambda m, z: z if isinstance(z, torch.fx.Proxy) else 1.001 * z),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_is_hidden_is_refused(kind):
    for train in (False, True):
        with pytest.raises(InputError):
            compute_bounds(HIDDEN[kind]().train(train), Interval.box(images(), 0.01))
    with pytest.raises(InputError):
        certtrain.certify(HIDDEN[kind](), images(), torch.zeros(4, dtype=torch.int64), 0.01, STAGES)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules_are_refused(register):
    model = Net()
    trace(model)
    handle = getattr(nn.modules.module, register)(lambda module, inputs, *output: None)
    try:
        with pytest.raises(UnsupportedOperation, match="hooks"):
            trace(model)
    finally:
        handle.remove()
    trace(model)


def apply_first(m, z):
    return m.parts[0](z)


class Settings:
    def __init__(self):
        self.scale = 1.0


def set_(name, value):
    return lambda model: setattr(model, name, value)


CHANGES = {
    "a builtin function": (lambda: Net(lambda m, z: m.act(z), act=torch.relu), set_("act", torch.sigmoid)),
    "an entry of a dict": (
        lambda: Net(lambda m, z: m.acts["hidden"](z), acts={"hidden": torch.relu}),
        lambda m: m.acts.update(hidden=torch.tanh),
    ),
    "an entry of a list": (lambda: Net(apply_first, parts=[torch.relu]), lambda m: m.parts.__setitem__(0, torch.tanh)),
    "a number": (lambda: Net(lambda m, z: z * m.scale, scale=1.0), set_("scale", -2.0)),
    "a number in a nested dict": (
        lambda: Net(lambda m, z: z * m.options["a"]["b"], options={"a": {"b": 1.0}}),
        lambda m: m.options["a"].update(b=-2.0),
    ),
    "a plain object's field": (
        lambda: Net(lambda m, z: z * m.settings.scale, settings=Settings()),
        lambda m: setattr(m.settings, "scale", -2.0),
    ),
    "a partial": (
        lambda: Net(lambda m, z: m.act(z), act=functools.partial(F.leaky_relu, negative_slope=0.1)),
        set_("act", functools.partial(F.leaky_relu, negative_slope=0.9)),
    ),
    "None": (lambda: Net(lambda m, z: z if m.act is None else m.act(z), act=None), set_("act", torch.tanh)),
    "a buffer": (
        lambda: Net(lambda m, z: z - m.mean, mean=nn.Buffer(torch.zeros(16))),
        set_("mean", nn.Buffer(torch.ones(16))),
    ),
    "a submodule": (lambda: Net(lambda m, z: m.act(z), act=nn.ReLU()), set_("act", nn.Tanh())),
    "a constant of the class": (Constant, lambda m: setattr(Constant, "slope", 3.0)),
    "the class' forward": (
        Constant,
        lambda m: setattr(Constant, "forward", lambda self, x: -1 * Net.forward(self, x)),
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_that_changed_is_traced_anew(kind, monkeypatch):
    monkeypatch.setattr(Constant, "slope", 1.0)  # and what they were is put back
    monkeypatch.setattr(Constant, "forward", Constant.forward)
    make, change = CHANGES[kind]
    model = make().double().eval()
    x = images().double()
    before = trace(model)
    assert trace(model) is before
    change(model)
    model.double()
    assert kind == "a buffer" or trace(model) is not before
    torch.testing.assert_close(compute_bounds(model, Interval.point(x)).center, model(x))
    torch.testing.assert_close(certtrain.bounds.forward(model, x).logits, model(x))


def test_a_global_that_forward_reads_is_seen_outside_training():
    box = {"scale": 1.0}
    model = Net(lambda m, z: z * box["scale"]).eval()
    x = images()
    compute_bounds(model, Interval.point(x))
    box["scale"] = -3.0
    torch.testing.assert_close(compute_bounds(model, Interval.point(x)).center, model(x))
    box["scale"] = 2.0
    torch.testing.assert_close(checked_logits(model, x), model(x))


def test_a_forward_on_the_instance_is_refused():
    model = Net()
    trace(model)
    model.forward = types.MethodType(lambda self, x: -Net.forward(self, x), model)
    with pytest.raises(UnsupportedOperation, match="forward of its own"):
        compute_bounds(model, Interval.point(images()))


OF_THE_BATCH = {
    "its mean": lambda m, z: z if isinstance(z, torch.fx.Proxy) else z - z.mean(0),
    "its size": lambda m, z: z if isinstance(z, torch.fx.Proxy) or len(z) > 1 else -z,
    "its order": lambda m, z: (
        z if isinstance(z, torch.fx.Proxy) else z * torch.arange(1, len(z) + 1, dtype=z.dtype)[:, None]
    ),
}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", OF_THE_BATCH)
def test_what_is_no_function_of_one_image_is_refused(kind, count, tmp_path):
    refused_everywhere(Net(OF_THE_BATCH[kind]), images(count), tmp_path, "image|traced")


UNTRACEABLE = {
    "its mean": lambda m, z: z.cumsum(1) - z.mean(0),
    "its size": lambda m, z: z.cumsum(1) if z.shape[0] > 1 else -z.cumsum(1),
    "its order": lambda m, z: torch.cumsum(torch.softmax(z, 1), 0),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_also_where_bounds_do_not_know_the_layers(kind, count, tmp_path):
    model, x = Net(UNTRACEABLE[kind]), images(count)
    with pytest.raises(InputError, match="image"):
        certtrain.export_onnx(model, tmp_path / "model.onnx", x)
    with pytest.raises(InputError, match="image"):
        certtrain.certify(model, x, torch.zeros(count, dtype=torch.int64), 0.01, Certify(stages=("attack",)))


class TestOrdinaryModelsPass:
    def test_wide_and_deep_in_float32(self):
        torch.manual_seed(0)
        layers = [nn.Linear(784, 2000), nn.BatchNorm1d(2000), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Linear(2000, 2000), nn.BatchNorm1d(2000), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(2000, 10))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_var.uniform_(1e-3, 2)
                module.running_mean.normal_()
        checked_logits(model, torch.rand(16, 784))

    def test_logits_small_beside_what_they_are_computed_of(self):
        """Nearly all of the float32 logits is rounding: no sign of another network."""
        model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 3))
        torch.manual_seed(0)
        with torch.no_grad():
            model[1].running_mean.copy_(model[0](torch.full((1, 100), 1e4))[0])
        checked_logits(model, 1e4 + torch.rand(8, 100))

    def test_modes_and_buffers_are_as_they_were(self):
        class Counting(Net):
            def forward(self, x):
                if not isinstance(x, torch.fx.Proxy):
                    self.calls += 1
                return super().forward(x)

        model = Counting(calls=nn.Buffer(torch.zeros(()))).train()
        model.last.eval()
        checked_logits(model, images())
        assert model.training and model.first.training and not model.last.training and model.calls == 0

    def test_dropout_in_training_mode(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
        state = torch.get_rng_state()
        compute_bounds(model, Interval.box(images(), 0.1))
        assert torch.equal(torch.get_rng_state(), state)

    def test_training_mode_compares_once(self):
        calls = {"all": 0}

        class Counting(Net):
            def forward(self, x):
                if not isinstance(x, torch.fx.Proxy):
                    calls["all"] += 1
                return super().forward(x)

        model = Counting().train()
        compute_bounds(model, Interval.box(images(), 0.1))
        before = calls["all"]
        compute_bounds(model, Interval.box(images(), 0.1))
        assert calls["all"] == before
        compute_bounds(model.eval(), Interval.box(images(), 0.1))
        assert calls["all"] > before
