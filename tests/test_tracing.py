"""Tracing: what becomes which operation, and that everything without a rule is refused by name."""

import copy
import io
import operator
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from networks import Apply, Residual, small_cnn
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import Interval, Network, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import Input


def kinds(model: nn.Module) -> list[str]:
    """The operations of each step that kernels compute at once."""
    return [" ".join(type(trace(model).operations[i]).__name__ for i in step) for step in ((0,), *trace(model).steps)]


def images(*shape, count=3):
    torch.manual_seed(0)
    return torch.rand(count, *shape, dtype=torch.float64)


def assert_bounds_follow(model: nn.Module, x: Tensor):
    """At a point the bounds are the model's own outputs, for whatever the model is by now."""
    model = model.double().eval()
    found = compute_bounds(model, Interval.point(x))
    if not len(x):  # torch itself takes no x.view(0, -1)
        assert found.center.shape == found.radius.shape and len(found.center) == 0
        return
    torch.testing.assert_close(found.center, model(x.clone()), rtol=1e-12, atol=1e-12)
    assert (found.radius <= 1e-12).all()


def head(function, **attributes):
    """fc → function → out: ``function(module, y)`` sees the first layer's output."""
    torch.manual_seed(0)
    layers = {"fc": nn.Linear(4, 4), "out": nn.Linear(4, 3)}
    return Apply(lambda m, x: m.out(function(m, m.fc(x))), **layers, **attributes)


class TestFusing:
    def test_layer_norm_and_relu_are_one_step(self):
        model = small_cnn()
        operations = trace(model).operations
        assert kinds(model) == [
            "Input", "Convolution BatchNorm Relu", "Rearrangement", "Dense BatchNorm Relu", "Dense"
        ]  # fmt: skip
        assert [operation.path for operation in operations[1:]] == [str(number) for number in range(8)]
        assert operations[1].layer is model[0] and operations[2].norm is model[1]

    def test_what_others_read_is_not_merged(self):
        """conv's output is read by the norm and by the sum: it must stay visible."""
        model = Apply(
            lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), conv=nn.Conv2d(2, 2, 1), norm=nn.BatchNorm2d(2)
        )
        assert kinds(model) == ["Input", "Convolution", "BatchNorm", "Sum"]
        assert_bounds_follow(model, images(2, 3, 3))

    def test_an_output_that_others_read_is_not_merged(self):
        model = Apply(lambda m, x: (m.fc(x), m.fc(x).relu())[0], fc=nn.Linear(4, 3))
        assert_bounds_follow(model, images(4))

    def test_the_output_comes_last(self):
        """Steps after the output that nobody reads change nothing."""

        def function(m, x):
            y = m.fc(x)
            m.other(y.relu())
            return y

        model = Apply(function, fc=nn.Linear(4, 3), other=nn.Linear(3, 2))
        assert_bounds_follow(model, images(4))

    def test_a_step_starts_at_an_affine_layer(self):
        assert kinds(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())) == ["Input", "BatchNorm", "Relu"]

    def test_one_relu_and_one_norm_each(self):
        layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.ReLU(), nn.Tanh()]
        assert kinds(nn.Sequential(*layers)) == ["Input", "Dense BatchNorm", "BatchNorm", "Relu", "Tanh"]

    def test_dropout_stays_between(self):
        layers = [nn.Linear(4, 4), nn.Dropout(), nn.ReLU()]
        assert kinds(nn.Sequential(*layers)) == ["Input", "Dense", "Dropout", "Relu"]

    def test_identity_and_nesting_leave_no_trace(self):
        inner = nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Sequential(nn.Identity(), nn.ReLU()))
        model = nn.Sequential(nn.Sequential(nn.Sequential(inner)), nn.Linear(4, 2))
        assert kinds(model) == ["Input", "Dense Relu", "Dense"]
        assert trace(model).operations[1].path == "0.0.0.1"

    def test_every_input_comes_first(self):
        model = nn.Sequential(Residual(Residual(nn.Linear(4, 4), -1)), nn.Linear(4, 2))
        for position, operation in enumerate(trace(model).operations):
            assert all(read < position for read in operation.inputs)


FORMS = {
    "F.relu": lambda m, x: F.relu(x),
    "torch.relu": lambda m, x: torch.relu(x),
    "x.relu()": lambda m, x: x.relu(),
    "F.relu in place, read once": lambda m, x: F.relu(x, inplace=True),
    "relu_, read once": lambda m, x: x.relu_(),
    "F.leaky_relu": lambda m, x: F.leaky_relu(x, 0.3),
    "F.leaky_relu by name": lambda m, x: F.leaky_relu(x, negative_slope=0.3),
    "F.leaky_relu default": lambda m, x: F.leaky_relu(x),
    "F.gelu": lambda m, x: F.gelu(x),
    "F.gelu by tanh": lambda m, x: F.gelu(x, approximate="tanh"),
    "F.silu": lambda m, x: F.silu(x),
    "F.silu in place, read once": lambda m, x: F.silu(x, inplace=True),
    "torch.sigmoid": lambda m, x: torch.sigmoid(x),
    "F.tanh": lambda m, x: F.tanh(x),
    "x + 2": lambda m, x: x + 2,
    "2 + x": lambda m, x: 2 + x,
    "x - 2": lambda m, x: x - 2,
    "1 - x": lambda m, x: 1 - x,
    "x * 3": lambda m, x: x * 3,
    "x * -3": lambda m, x: x * -3.0,
    "-3 * x": lambda m, x: -3.0 * x,
    "x * 0": lambda m, x: x * 0,
    "x / -4": lambda m, x: x / -4,
    "buffer": lambda m, x: (x - m.buffer) / m.buffer,
    "buffer - x": lambda m, x: m.buffer - x,
    "parameter": lambda m, x: x * m.parameter + m.parameter,
    "torch.sub": lambda m, x: torch.sub(x, m.buffer),
    "x.mul": lambda m, x: x.mul(m.parameter).div(2.5),
    "x + x": lambda m, x: x + x,
    "x - relu(x)": lambda m, x: x - F.relu(x),
    "torch.add": lambda m, x: torch.add(F.relu(x), x),
    "x += 1, read once": lambda m, x: operator.iadd(x, 1),
    "view -1": lambda m, x: x.view(x.size(0), -1),
    "view shape": lambda m, x: x.view(x.shape[0], -1),
    "view size()": lambda m, x: x.view(x.size()[0], 4),
    "view list": lambda m, x: x.view([x.shape[0], 2, 2]).flatten(1),
    "view -1 first": lambda m, x: x.view(-1, 4),
    "reshape": lambda m, x: x.reshape(x.size(0), 2, -1).reshape(-1, 4),
    "torch.reshape": lambda m, x: torch.reshape(x, (x.size(0), 4)),
    "torch.flatten": lambda m, x: torch.flatten(x.view(-1, 2, 2), 1),
    "flatten by name": lambda m, x: torch.flatten(input=x.view(-1, 2, 1, 2), start_dim=2, end_dim=-1).flatten(1),
    "contiguous": lambda m, x: x.contiguous(),
    "F.dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "a layer with a forward of its own": lambda m, x: m.negated(x),
}


@walk("form", FORMS)
@walk("count", [0, 1, 4], ids=lambda count: f"batch {count}")
def test_functional_forms(form, count):
    torch.manual_seed(0)
    model = head(
        FORMS[form], negated=NegatedLinear(4, 4), buffer=torch.randn(4), parameter=nn.Parameter(torch.randn(4))
    )
    assert_bounds_follow(model, images(4, count=count))


@pytest.mark.parametrize(
    "pool",
    [
        lambda m, x: F.max_pool2d(x, 2),
        lambda m, x: F.max_pool2d(x, kernel_size=3, stride=1, padding=1),
        lambda m, x: F.avg_pool2d(x, 2, 1),
        lambda m, x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False),
        lambda m, x: F.adaptive_avg_pool2d(x, 1),
        lambda m, x: F.adaptive_max_pool2d(x, (2, 3)),
        lambda m, x: torch.max_pool2d(x, 2),
        lambda m, x: F.max_pool1d(x.flatten(2), 3, stride=2, padding=1),
        lambda m, x: F.adaptive_max_pool1d(x.flatten(2), 5),
        lambda m, x: F.avg_pool1d(x.flatten(2), 3, ceil_mode=True),
        lambda m, x: F.adaptive_avg_pool1d(x.flatten(2), 3),
    ],
)
def test_functional_pools(pool):
    assert_bounds_follow(Apply(lambda m, x: torch.flatten(pool(m, x), 1)), images(2, 4, 4))


JOINS = {  # (B, 2, 4, 4) → anything
    "channels": lambda m, x: torch.cat([x, F.relu(x)], 1),
    "by name": lambda m, x: torch.cat(tensors=(x, x), dim=1),
    "concat": lambda m, x: torch.concat([x, x, F.tanh(x)], dim=2),
    "concatenate": lambda m, x: torch.concatenate((x, 1 - x), -1),
    "from the end": lambda m, x: torch.cat([x, F.relu(x)], -3),
    "different sizes": lambda m, x: torch.cat([x.flatten(1), F.max_pool2d(x, 3).flatten(1)], 1),
    "one": lambda m, x: torch.cat([x], 1),
    "a norm of each": lambda m, x: m.norm(torch.cat([x, F.relu(x)], 1)),
    "changed in place": lambda m, x: torch.relu_(torch.cat([x - 0.5, x], 1)),
}


@walk("join", JOINS)
@walk("count", [0, 1, 3], ids=lambda count: f"batch {count}")
def test_concatenation(join, count):
    torch.manual_seed(0)
    model = Apply(JOINS[join], norm=nn.BatchNorm2d(4)).double().eval()
    assert "Concat" in kinds(model)
    x = images(2, 4, 4, count=count)
    found = compute_bounds(model, Interval.box(x, 0.1))
    torch.testing.assert_close(
        compute_bounds(model, Interval.point(x)).center, model(x.clone()), rtol=1e-12, atol=1e-12
    )
    for corner in (x, (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)):
        assert found.contains(model(corner.clone()), 1e-12).all()
    torch.testing.assert_close(fold(model, x.shape[1:])(x), model(x.clone()), rtol=1e-12, atol=1e-12)


def test_a_part_that_is_changed_in_place_elsewhere_is_refused():
    """torch.cat would see the change: x is both a part and, later, another."""
    model = Apply(lambda m, x: (lambda y: torch.cat([y, y.relu_()], 1))(m.fc(x)), fc=nn.Linear(4, 4))
    with pytest.raises(UnsupportedOperation, match="in place"):
        trace(model)


class TestModules:
    def test_a_shared_layer_is_two_operations(self):
        fc = nn.Linear(4, 4)
        model = nn.Sequential(fc, nn.ReLU(), fc)
        assert kinds(model) == ["Input", "Dense Relu", "Dense"]
        assert_bounds_follow(model, images(4))

    def test_a_shared_activation(self):
        relu = nn.ReLU()
        assert_bounds_follow(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu), images(4))

    @pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(4), nn.Identity()])
    def test_a_single_layer_is_a_model(self, layer):
        assert_bounds_follow(layer, images(4))
        replaced = nn.Sequential(layer)
        assert_bounds_follow(replaced, images(4))

    def test_a_model_that_does_nothing(self):
        assert_bounds_follow(Apply(lambda m, x: x), images(4))

    def test_a_subclass_with_the_same_forward_or_none_at_all(self):
        """Followed or refused, never guessed."""

        class Same(nn.ReLU):
            pass

        assert_bounds_follow(nn.Sequential(nn.Linear(4, 3), Same()), images(4))

    def test_weights_are_followed(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
        trace(model)
        nn.init.normal_(model[0].weight)
        model[2].weight = nn.Parameter(torch.randn(3, 4))
        assert_bounds_follow(model, images(4))

    def test_a_weight_that_is_computed(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
        trace(model)
        nn.init.normal_(model[0].parametrizations.weight.original0)
        assert_bounds_follow(model, images(4))

    def test_tracing_leaves_the_model_as_it_was(self):
        model = small_cnn().train()
        model[1].eval()
        before, names = [m.training for m in model.modules()], set(model.state_dict())
        trace(model)
        assert [m.training for m in model.modules()] == before and set(model.state_dict()) == names
        broken = nn.Sequential(nn.Linear(4, 4), nn.LogSigmoid()).train()
        with pytest.raises(UnsupportedOperation):
            trace(broken)
        assert all(m.training for m in broken.modules())

    def test_traced_once(self):
        model = small_cnn()
        assert trace(model) is trace(model)


class TestChangedModels:
    """A program describes the model as it is now: a stale one would bound another network."""

    def model(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
        trace(model)
        return model

    def test_a_replaced_layer(self):
        model = self.model()
        model[1] = nn.Tanh()
        assert_bounds_follow(model, images(4))

    def test_a_layer_replaced_deep_inside(self):
        model = nn.Sequential(self.model(), nn.Linear(4, 2))
        trace(model)
        model[0][1] = nn.Sigmoid()
        assert_bounds_follow(model, images(4))

    def test_a_removed_layer(self):
        model = self.model()
        del model[2]
        assert_bounds_follow(model, images(4))

    def test_an_added_layer(self):
        model = self.model()
        model.append(nn.Tanh())
        assert_bounds_follow(model, images(4))

    def test_an_added_layer_without_weights_deep_inside(self):
        model = nn.Sequential(self.model(), nn.Linear(4, 2))
        trace(model)
        model[0].append(nn.ReLU())
        assert_bounds_follow(model, images(4))

    def test_a_replaced_module_that_torch_fx_looks_into(self):
        model = nn.Sequential(nn.Linear(4, 4), Apply(lambda m, x: F.relu(x)))
        trace(model)
        model[1] = Apply(lambda m, x: torch.tanh(x))
        assert_bounds_follow(model, images(4))

    def test_a_replaced_normalisation(self):
        def normalise(mean):
            return Apply(lambda m, x: (x - m.mean) / 2, mean=torch.full((4,), mean))

        model = nn.Sequential(normalise(0.1), nn.Linear(4, 4))
        trace(model)
        model[0] = normalise(0.9)
        assert_bounds_follow(model, images(4))

    def test_swapped_layers(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
        trace(model)
        model[1], model[3] = model[3], model[1]
        assert_bounds_follow(model, images(4))

    def test_a_changed_slope(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1))
        trace(model)
        model[1].negative_slope = 0.9
        assert_bounds_follow(model, images(4))

    @pytest.mark.parametrize("where", ["layer", "model"])
    def test_a_hook_that_came_later(self, where):
        model = self.model()
        (model[0] if where == "layer" else model).register_forward_hook(lambda module, inputs, output: -output)
        with pytest.raises(UnsupportedOperation, match="hook"):
            compute_bounds(model, Interval.point(images(4)))

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: x - m.mean,
            lambda m, x: x - m.mean.view(1, -1),
            lambda m, x: x * m.mean.exp(),
            lambda m, x: x / float(m.mean[0]),
        ],
        ids=["as it is", "reshaped", "computed", "as a number"],
    )
    @pytest.mark.parametrize("change", ["loaded", "replaced"])
    def test_a_buffer_with_new_values(self, function, change):
        """Refused or followed; the values of the moment of tracing are another network's."""
        model = head(function, mean=torch.full((4,), 0.1)).double()
        x = images(4)
        try:
            assert_bounds_follow(model, x)
        except UnsupportedOperation:
            return
        if change == "loaded":
            model.load_state_dict({**model.state_dict(), "mean": torch.full((4,), 0.9)})
        else:
            model.mean = torch.full((4,), 0.9, dtype=torch.float64)
        assert_bounds_follow(model, x)

    def test_dtype_and_back(self):
        model = head(lambda m, x: (x - m.mean) / m.mean, mean=torch.rand(4)).float()
        trace(model)
        model.double()
        found = compute_bounds(model, Interval.point(images(4)))
        assert found.center.dtype == torch.float64

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_are_models_of_their_own(self, copier):
        model = small_cnn()
        x = images(2, 6, 6)
        before = compute_bounds(model, Interval.box(x, 0.1))
        copied = copier(model)
        with torch.no_grad():
            model[0].weight.mul_(2)
        found = compute_bounds(copied, Interval.box(x, 0.1))
        assert torch.equal(found.center, before.center) and torch.equal(found.radius, before.radius)
        assert trace(copied).operations[1].layer is copied[0]

    def test_torch_save(self):
        model, file = small_cnn(), io.BytesIO()
        trace(model)
        torch.save(model, file)
        file.seek(0)
        assert_bounds_follow(torch.load(file, weights_only=False), images(2, 6, 6))


class NegatedLinear(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def branches(m, x):
    return x if x.sum() > 0 else -x


def two_inputs():
    class TwoInputs(nn.Module):
        def forward(self, x, y):
            return x + y

    return TwoInputs()


def _other():
    gelu = nn.GELU()
    gelu.approximate = "cubic"
    return gelu


REFUSED = {  # model, what the message names
    "unknown layer": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LogSigmoid())),
                      ["LogSigmoid", "'1.0'", "Conv1d"]),
    "softmax layer": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=0)), ["1", "dim=0", "behind the batch"]),
    "softmax of no dimension": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax()), ["1", "dim=None"]),
    "F.softmax": (lambda: head(lambda m, x: F.softmax(x, -2)), ["softmax", "dim=-2 of 2", "behind the batch"]),
    "softmax in float64": (lambda: head(lambda m, x: F.softmax(x, 1, dtype=torch.float64)), ["softmax", "dtype"]),
    "random pooling": (lambda: Apply(lambda m, x: F.fractional_max_pool2d(x, 2, 1)), ["fractional_max_pool2d"]),
    "pooling of volumes": (lambda: Apply(lambda m, x: F.max_pool3d(x, 2)), ["max_pool3d", "MaxPool1d"]),
    "adaptive max pooling with indices": (lambda: nn.AdaptiveMaxPool2d(2, return_indices=True), ["AdaptiveMaxPool2d"]),
    "another GELU": (lambda: nn.Sequential(nn.GELU("tanh"), _other()), ["GELU at '1'", "'cubic'", "none, tanh"]),
    "cat of batches": (lambda: head(lambda m, x: torch.cat([x, x])), ["cat", "dim=0", "accepted"]),
    "cat of batches, from the end": (lambda: head(lambda m, x: torch.cat([x, x], -2)), ["dim=-2 of 2", "accepted"]),
    "cat of constants": (lambda: head(lambda m, x: torch.cat([x, m.b], 1), b=torch.ones(3, 4)), ["cat", "computed"]),
    "cat of nothing": (lambda: head(lambda m, x: torch.cat([], 1) + x), ["cat|traced", "accepted"]),
    "cat into": (lambda: head(lambda m, x: torch.cat([x, x], 1, out=x)), ["cat", "out", "accepted"]),
    "sequence without batch": (lambda: nn.Conv1d(3, 4, 1), ["Conv1d", "2 dimensions", "accepted"]),
    "max pooling with indices": (lambda: nn.MaxPool2d(2, return_indices=True), ["MaxPool2d"]),
    "sum": (lambda: head(lambda m, x: x.sum(0)), ["sum", r"dimensions \[0\]", "behind the batch"]),
    "sum of all": (lambda: head(lambda m, x: x.sum()), ["sum", "all dimensions", "behind the batch"]),
    "median": (lambda: head(lambda m, x: x.median(1)[0]), ["median|getitem", "Conv1d|accepted"]),
    "transpose": (lambda: head(lambda m, x: x.T), ["accepted|supported"]),
    "rounded quotient": (
        lambda: head(lambda m, x: torch.div(x, F.relu(x) + 1, rounding_mode="floor")), ["div", "accepted"],
    ),
    "matrix product of a constant in front": (
        lambda: head(lambda m, x: torch.matmul(m.b, x), b=torch.ones(4, 4)), ["matmul", "computed from the images"],
    ),
    "product of constant matrices": (
        lambda: head(lambda m, x: torch.matmul(x, m.b), b=torch.ones(2, 4, 4)), ["matmul", "accepted: a matrix"],
    ),
    "scaled sum": (lambda: head(lambda m, x: torch.add(x, x, alpha=2)), ["add", "accepted"]),
    "sum into": (lambda: head(lambda m, x: torch.add(x, 1, out=x)), ["add", "accepted"]),
    "random dropout": (lambda: head(lambda m, x: F.dropout(x, 0.5)), ["dropout", "nn.Dropout"]),
    "floor": (lambda: head(lambda m, x: torch.div(x, 2, rounding_mode="floor")), ["div", "accepted"]),
    "branch": (lambda: Apply(branches), ["Apply", "accepted"]),
    "flatten everything": (lambda: Apply(lambda m, x: torch.flatten(x)), ["flatten", "start_dim", "accepted"]),
    "flatten from 0": (lambda: nn.Flatten(0), ["Flatten", "supported|accepted"]),
    "literal batch size": (lambda: Apply(lambda m, x: x.view(3, 4)), ["view", "accepted"]),
    "batch size in the middle": (lambda: Apply(lambda m, x: x.view(2, x.size(0), 2)), ["view", "accepted"]),
    "another size as batch size": (lambda: Apply(lambda m, x: x.view(x.size(1), -1)), ["view", "accepted"]),
    "two unknown sizes": (lambda: Apply(lambda m, x: x.view(-1, -1)), ["view", "accepted"]),
    "two inputs": (two_inputs, ["y", "one input"]),
    "two outputs": (lambda: head(lambda m, x: x) and Apply(lambda m, x: (x, x)), ["output", "one tensor"]),
    "constant output": (lambda: Apply(lambda m, x: m.value, value=nn.Parameter(torch.ones(3))), ["output"]),
    "falling slope": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(-0.1)), ["LeakyReLU", "'1'", "-0.1"]),
    "steep slope": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(1.5)), ["LeakyReLU", "'1'", "1.5"]),
    "falling functional slope": (lambda: head(lambda m, x: F.leaky_relu(x, -0.1)), ["LeakyReLU", "-0.1"]),
    "no running statistics": (
        lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), ["batch norm", "accepted"],
    ),
}  # fmt: skip


@walk("case", REFUSED)
def test_refused_by_name(case):
    make, names = REFUSED[case]
    model = make().double().eval()
    with pytest.raises(UnsupportedOperation) as raised:
        compute_bounds(model, Interval.point(images(2, 2, 2) if "pool" in case else images(4)))
    for name in names:
        raised.match(name)


def hooked(register, root=False):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    getattr(model if root else model[0], register)(
        (lambda m, i: (-i[0],)) if "pre" in register else (lambda m, i, o: -o)
    )
    return model


def override(root):
    model = nn.Sequential(nn.Linear(4, 4))
    (model if root else model[0]).forward = lambda x: -x
    return model


def in_place(change, reads=lambda m, x, y: x + y):
    """``change(m, y)`` alters y in place; ``reads`` looks at the altered one's other names."""
    layers = {"relu": nn.ReLU(inplace=True), "leaky": nn.LeakyReLU(0.1, inplace=True)}
    views = {"flat": nn.Flatten(), "same": nn.Identity(), "drop": nn.Dropout()}
    return head(lambda m, y: reads(m, y, change(m, y)), **layers, **views)


def augmented(operation):
    def change(m, y):
        namespace = {"y": y, "z": y}
        exec(f"z {operation} 2", namespace)
        return namespace["z"]

    return change


FOLLOWED_OR_REFUSED = {
    "forward hook": lambda: hooked("register_forward_hook"),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook"),
    "forward hook on the model": lambda: hooked("register_forward_hook", root=True),
    "forward pre-hook on the model": lambda: hooked("register_forward_pre_hook", root=True),
    "a layer's own forward": lambda: override(root=False),
    "the model's own forward": lambda: override(root=True),
    "x += 2": lambda: in_place(augmented("+=")),
    "x -= 2": lambda: in_place(augmented("-=")),
    "x *= 2": lambda: in_place(augmented("*=")),
    "x /= 2": lambda: in_place(augmented("/=")),
    "x += 2 through a view": lambda: in_place(lambda m, y: augmented("+=")(m, y.view(y.size(0), -1))),
    "operator.iadd": lambda: in_place(lambda m, y: operator.iadd(y, 2)),
    "add_": lambda: in_place(lambda m, y: y.add_(2)),
    "mul_ through a view": lambda: in_place(lambda m, y: y.view(y.size(0), -1).mul_(2)),
    "ReLU(inplace=True)": lambda: in_place(lambda m, y: m.relu(y)),
    "F.relu(inplace=True)": lambda: in_place(lambda m, y: F.relu(y, inplace=True)),
    "F.relu(inplace) by position": lambda: in_place(lambda m, y: F.relu(y, True)),
    "relu_": lambda: in_place(lambda m, y: y.relu_()),
    "torch.relu_": lambda: in_place(lambda m, y: torch.relu_(y)),
    "F.leaky_relu(inplace=True)": lambda: in_place(lambda m, y: F.leaky_relu(y, 0.1, True)),
    "nn.LeakyReLU(inplace=True)": lambda: in_place(lambda m, y: m.leaky(y)),
    "through nn.Flatten": lambda: in_place(lambda m, y: m.relu(m.flat(y))),
    "through nn.Identity": lambda: in_place(lambda m, y: m.relu(m.same(y))),
    "through flatten": lambda: in_place(lambda m, y: m.relu(torch.flatten(y, 1))),
    "through flatten by name": lambda: in_place(lambda m, y: m.relu(torch.flatten(input=y, start_dim=1))),
    "through reshape": lambda: in_place(lambda m, y: y.reshape(y.size(0), 4).relu_()),
    "through contiguous": lambda: in_place(lambda m, y: m.relu(y.contiguous())),
    "through dropout": lambda: in_place(lambda m, y: m.relu(m.drop(y))),
    "through two of them": lambda: in_place(lambda m, y: m.relu(m.flat(m.same(y.view(-1, 2, 2))))),
    "result unused": lambda: in_place(lambda m, y: y.relu_(), lambda m, x, y: x),
    "result of += unused": lambda: in_place(augmented("+="), lambda m, x, y: x),
    "a view taken before": lambda: head(lambda m, y: (lambda v: y.relu_() + v)(y.view(y.size(0), -1))),
    "the images": lambda: Apply(lambda m, x: F.relu(m.shift(x)) + x, shift=Apply(lambda m, x: x.sub_(0.5))),
    "a residual's branch": lambda: nn.Sequential(
        nn.Linear(4, 4), Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
    ),
    "a subclass with a forward": lambda: nn.Sequential(NegatedLinear(4, 3)),
    "+= of fresh values": lambda: Residual(nn.Sequential(nn.Linear(4, 4), Apply(augmented("+=")))),
}  # fmt: skip


@walk("case", FOLLOWED_OR_REFUSED)
def test_followed_or_refused(case):
    """Value semantics cannot say it, or a hook hides it: bounds of another network must never come out."""
    model = FOLLOWED_OR_REFUSED[case]().double().eval()
    x = images(4) - 0.5
    with torch.no_grad():
        expected = model(x.clone())
    try:
        found = compute_bounds(model, Interval.point(x))
    except UnsupportedOperation as refusal:
        assert "accepted" in str(refusal) or "supported" in str(refusal)
    else:
        torch.testing.assert_close(found.center, expected, rtol=1e-12, atol=1e-12)


def test_a_pool_with_a_negative_divisor():
    """It turns the ends around: a plain average of radii would be negative."""
    model = nn.Sequential(nn.AvgPool2d(2, divisor_override=-4), nn.Flatten())
    x = images(1, 4, 4)
    try:
        found = compute_bounds(model, Interval.box(x, 0.1))
    except UnsupportedOperation:
        return
    assert (found.radius >= 0).all() and found.contains(model(x), 1e-12).all()


def test_a_view_that_merges_the_batch_raises():
    """x.view(-1, n) keeps the batch only if a sample has n entries: (3, 2, 4) → (6, 4) does not."""
    model = Apply(lambda m, x: x.view(-1, 4))
    with pytest.raises((UnsupportedOperation, RuntimeError)):
        compute_bounds(model, Interval.point(images(2, 4)))


def test_the_supported_layers_are_what_the_message_says():
    """Every layer that the message lists is accepted."""
    layers = {
        "Linear": nn.Linear(4, 4), "Conv1d": nn.Conv1d(2, 2, 1), "Conv2d": nn.Conv2d(2, 2, 1), "Flatten": nn.Flatten(),
        "BatchNorm1d": nn.BatchNorm1d(2), "BatchNorm2d": nn.BatchNorm2d(2), "ReLU": nn.ReLU(), "Dropout": nn.Dropout(),
        "LeakyReLU": nn.LeakyReLU(), "Sigmoid": nn.Sigmoid(), "Tanh": nn.Tanh(), "GELU": nn.GELU(), "SiLU": nn.SiLU(),
        "MaxPool1d": nn.MaxPool1d(2), "MaxPool2d": nn.MaxPool2d(2), "AvgPool1d": nn.AvgPool1d(2),
        "AvgPool2d": nn.AvgPool2d(2), "AdaptiveAvgPool1d": nn.AdaptiveAvgPool1d(1), "Identity": nn.Identity(),
        "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1), "AdaptiveMaxPool1d": nn.AdaptiveMaxPool1d(1),
        "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(1), "ChannelShuffle": nn.ChannelShuffle(2),
        "Dropout1d": nn.Dropout1d(), "Dropout2d": nn.Dropout2d(), "Unflatten": nn.Unflatten(1, (1, -1)),
        "ConvTranspose1d": nn.ConvTranspose1d(2, 2, 1), "ConvTranspose2d": nn.ConvTranspose2d(2, 2, 1),
        "PixelShuffle": nn.PixelShuffle(2), "PixelUnshuffle": nn.PixelUnshuffle(2), "Upsample": nn.Upsample(2),
        "UpsamplingNearest2d": nn.UpsamplingNearest2d(2), "UpsamplingBilinear2d": nn.UpsamplingBilinear2d(2),
        "ZeroPad1d": nn.ZeroPad1d(1), "ZeroPad2d": nn.ZeroPad2d(1), "ConstantPad1d": nn.ConstantPad1d(1, 2.0),
        "ConstantPad2d": nn.ConstantPad2d(1, 2.0), "ReflectionPad1d": nn.ReflectionPad1d(1),
        "ReflectionPad2d": nn.ReflectionPad2d(1), "ReplicationPad1d": nn.ReplicationPad1d(1),
        "ReplicationPad2d": nn.ReplicationPad2d(1), "CircularPad1d": nn.CircularPad1d(1),
        "CircularPad2d": nn.CircularPad2d(1),
        "ReLU6": nn.ReLU6(), "Hardtanh": nn.Hardtanh(),
        "Hardsigmoid": nn.Hardsigmoid(), "PReLU": nn.PReLU(), "Softplus": nn.Softplus(), "Softsign": nn.Softsign(),
        "ELU": nn.ELU(), "CELU": nn.CELU(), "SELU": nn.SELU(), "Hardswish": nn.Hardswish(), "Mish": nn.Mish(),
        "Threshold": nn.Threshold(1, 0),
        "Softmax": nn.Softmax(1),
        "LogSoftmax": nn.LogSoftmax(1), "LayerNorm": nn.LayerNorm(4), "RMSNorm": nn.RMSNorm(4, eps=1e-5),
        "GroupNorm": nn.GroupNorm(2, 4), "InstanceNorm1d": nn.InstanceNorm1d(2), "InstanceNorm2d": nn.InstanceNorm2d(2),
        "MultiheadAttention": Apply(
            lambda m, x: m.layer(x, x, x)[0], layer=nn.MultiheadAttention(4, 2, batch_first=True)
        ),
        "TransformerEncoderLayer": nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
        "TransformerEncoder": nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1, enable_nested_tensor=False
        ),
    }  # fmt: skip
    with pytest.raises(UnsupportedOperation) as raised:
        trace(nn.Sequential(nn.LogSigmoid()))
    assert set(str(raised.value).split("supported: ")[1].split("; ")[0].split(", ")) == set(layers)
    for layer in layers.values():
        assert isinstance(trace(nn.Sequential(nn.ReLU(), layer)).operations[0], Input)


class TestThreads:
    def test_other_threads_run_modules_while_one_traces(self):
        """torch.fx alone hands their calls to the tracer: NameError, or a proxy where a tensor is expected."""
        inside, go = threading.Event(), threading.Event()

        class Slow(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x):
                inside.set()
                assert go.wait(60)
                return self.layer(x)

        slow, other = Slow(), nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        traced, second = list[Network](), list[Network]()
        first = threading.Thread(target=lambda: traced.append(trace(slow)))
        first.start()
        assert inside.wait(60)
        x = torch.rand(2, 4)
        seen = [other(x), slow.layer(x)]
        assert all(type(value) is torch.Tensor for value in seen)
        later = threading.Thread(target=lambda: second.append(trace(other)))
        later.start()  # waits for its turn
        assert torch.equal(other(x), seen[0])
        go.set()
        first.join(60), later.join(60)
        assert len(traced) == len(second) == 1
        torch.testing.assert_close(second[0](x), seen[0])
        torch.testing.assert_close(other(x), seen[0])
        assert type(other(x)) is torch.Tensor  # nothing of a trace is left behind
