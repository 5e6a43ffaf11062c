"""Soundness of interval bounds as a property, and the plain pass that hands its statistics to them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import (
    Apply,
    Elementwise,
    margins,
    networks,
    points_inside,
    randomise_norms,
    rounding,
    small_cnn,
    specification,
)  # fmt: skip
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import (
    BatchStatistics,
    Interval,
    L2Ball,
    LinfBall,
    UnsupportedOperation,
    compute_bounds,
    compute_margins,
    compute_rows,
    forward,
    trace,
)  # fmt: skip
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import BatchNorm, Rearrangement

EPSILONS = st.sampled_from([0.0, 1e-4, 0.05, 0.5])
SEEDS = st.integers(0, 1000)
properties = settings(
    deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def make_images(count=2, seed=0, shape=(2, 6, 6)) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_labels(count: int, classes: int) -> Tensor:
    return torch.arange(count) % classes


class TestProperties:
    @given(networks(), EPSILONS, SEEDS)
    @properties
    def test_no_point_of_the_box_leaves_the_bounds(self, model, epsilon, seed):
        box = Interval.box(make_images(4, seed), epsilon)
        bounds, slack = compute_bounds(model, box), rounding(model, box)
        assert (bounds.radius >= 0).all()
        for point in points_inside(model, box):
            assert bounds.contains(model(point), slack).all()

    @given(networks(), st.sampled_from([1e-3, 0.1]), SEEDS)
    @properties
    def test_float32_up_to_its_rounding(self, model, epsilon, seed):
        """Bounds in float32 against the same network's outputs in float64."""
        single = copy.deepcopy(model).float()
        wide = copy.deepcopy(single).double()
        box = Interval.box(make_images(4, seed).float(), epsilon)
        bounds, slack = compute_bounds(single, box), rounding(single, box, torch.float32)
        for point in points_inside(wide, Interval(box.center.double(), box.radius.double()), count=2):
            assert Interval(bounds.center.double(), bounds.radius.double()).contains(wide(point), slack).all()

    @given(networks(), SEEDS)
    @properties
    def test_a_point_gives_the_output(self, model, seed):
        images = make_images(4, seed)
        bounds, slack = compute_bounds(model, Interval.point(images)), rounding(model, Interval.point(images))
        assert ((bounds.center - model(images)).abs() <= slack).all() and (bounds.radius <= slack).all()

    @given(networks(), st.sampled_from([0.01, 0.2]), SEEDS)
    @properties
    def test_a_smaller_box_gives_smaller_bounds(self, model, epsilon, seed):
        outer = Interval.box(make_images(4, seed), epsilon)
        torch.manual_seed(seed)
        ends = outer.lower + 2 * outer.radius * torch.rand(2, *outer.radius.shape, dtype=torch.float64)
        inner = Interval.from_bounds(ends.amin(0), ends.amax(0))
        small, large, slack = compute_bounds(model, inner), compute_bounds(model, outer), rounding(model, outer)
        assert (small.lower >= large.lower - slack).all() and (small.upper <= large.upper + slack).all()

    @given(networks(), EPSILONS, SEEDS)
    @properties
    def test_margins_and_rows(self, model, epsilon, seed):
        """Sound, at least as tight as the logits' own bounds, and the same by either call."""
        box = Interval.box(make_images(4, seed), epsilon)
        logits, slack = compute_bounds(model, box), rounding(model, box).sum(1, keepdim=True)
        classes = logits.center.shape[1]
        labels = make_labels(4, classes)
        found, nothing = compute_margins(model, box, labels)
        assert found.shape == (4, classes - 1) and nothing.first is None and not nothing.preactivations
        kept, activity = compute_margins(model, box, labels, keep=True)
        assert ((kept - found).abs() <= slack).all()
        assert all((interval.radius >= 0).all() for interval in activity.preactivations.values())
        rows = specification(labels, classes)
        assert ((compute_rows(model, box, rows) - found).abs() <= 2 * slack).all()
        apart = (rows @ logits.center.unsqueeze(-1) - rows.abs() @ logits.radius.unsqueeze(-1)).squeeze(-1)
        assert (found >= apart - 2 * slack).all()
        for point in points_inside(model, box, count=2):
            assert (found <= margins(model(point), labels) + 2 * slack).all()

    @given(networks(), st.sampled_from([0.05, 0.5, 2.0]), SEEDS)
    @properties
    def test_l2_regions(self, model, epsilon, seed):
        """Sound on the ball, and inside the bounds of its hull."""
        images, ball = make_images(4, seed), L2Ball(epsilon)
        try:
            bounds = compute_bounds(model, ball.region(images))
        except UnsupportedOperation as refusal:
            assert "L2Ball" in str(refusal) and "accepted" in str(refusal)
            return
        hull, slack = compute_bounds(model, ball.hull(images)), rounding(model, ball.hull(images)) + 1e-9
        assert (bounds.lower >= hull.lower - slack).all() and (bounds.upper <= hull.upper + slack).all()
        labels = make_labels(4, bounds.center.shape[1])
        found, _ = compute_margins(model, ball.region(images), labels)
        for point in points_inside(model, ball.hull(images), count=2):
            logits = model(ball.project(images, point))
            assert bounds.contains(logits, slack).all()
            assert (found <= margins(logits, labels) + slack.sum(1, keepdim=True)).all()

    @given(networks(), EPSILONS, SEEDS)
    @properties
    def test_linf_regions_are_boxes(self, model, epsilon, seed):
        images = make_images(4, seed)
        found = compute_bounds(model, LinfBall(epsilon).region(images))
        expected = compute_bounds(model, Interval.box(images, epsilon))
        assert torch.equal(found.center, expected.center) and torch.equal(found.radius, expected.radius)

    @given(networks(), SEEDS)
    @properties
    def test_the_plain_pass_is_the_model(self, model, seed):
        images = make_images(4, seed)
        found = forward(model, images)
        assert ((found.logits - model(images)).abs() <= rounding(model, Interval.point(images))).all()
        assert found.statistics == {}

    @given(networks(), SEEDS)
    @properties
    def test_the_plain_pass_in_training(self, model, seed):
        """Dropout off: it draws anew in every pass."""
        for module in model.modules():
            module.training = not isinstance(module, nn.Dropout)
        twin, images = copy.deepcopy(model), make_images(count=5, seed=seed)
        try:
            expected = twin(images)
        except ValueError:  # a batch norm of one value per channel
            return
        found = forward(model, images)
        torch.testing.assert_close(found.logits, expected, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(model.buffers(), twin.buffers()):
            torch.testing.assert_close(ours, theirs, **EXACT)


class TestExactness:
    """One affine map and a monotone activation: a corner attains each bound."""

    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.Tanh(), nn.Identity()])
    def test_one_layer(self, activation):
        torch.manual_seed(0)
        norm = randomise_norms(nn.BatchNorm1d(5))
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), norm, activation).double().eval()
        box = Interval.box(make_images(1), 0.1)
        bounds = compute_bounds(model, box)
        weight = model[1].weight * norm.weight[:, None]
        for output in range(5):
            signs = weight[output].sign().reshape(box.radius.shape)
            torch.testing.assert_close(model(box.center + signs * box.radius)[:, output], bounds.upper[:, output])
            torch.testing.assert_close(model(box.center - signs * box.radius)[:, output], bounds.lower[:, output])

    @pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2)])
    def test_pools(self, pool):
        box = Interval.box(make_images(), 0.1)
        bounds = compute_bounds(nn.Sequential(pool), box)
        torch.testing.assert_close(bounds.lower, pool(box.lower))
        torch.testing.assert_close(bounds.upper, pool(box.upper))

    @pytest.mark.parametrize("pool", [nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(4, 3, 2), nn.AdaptiveAvgPool1d(5),
                                      nn.AdaptiveMaxPool1d(7)])  # fmt: skip
    def test_pools_of_sequences(self, pool):
        box = Interval.box(make_images(shape=(2, 20)), 0.1)
        bounds = compute_bounds(nn.Sequential(pool), box)
        torch.testing.assert_close(bounds.lower, pool(box.lower))
        torch.testing.assert_close(bounds.upper, pool(box.upper))

    @pytest.mark.parametrize("layer", [
        nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv1d(4, 4, 4, padding="same", dilation=3, groups=4), nn.Conv1d(4, 3, 3, padding="valid"),
        *(nn.Conv1d(4, 3, 3, 2, 2, padding_mode=mode) for mode in ("reflect", "circular")),
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of the model itself
    def test_convolutions_of_sequences(self, layer, norm):
        """Each output's largest value is at the corner that its weights' signs say."""
        layers = [copy.deepcopy(layer), *([nn.BatchNorm1d(layer.out_channels)] if norm else [])]
        model = randomise_norms(nn.Sequential(*layers)).double().eval()
        assert len(trace(model).steps) == 1 + isinstance(trace(model).operations[1], Rearrangement)  # the padding
        box = Interval.box(make_images(1, shape=(4, 13)), 0.1)
        bounds = compute_bounds(model, box)
        jacobian = torch.func.jacrev(lambda x: model(x)[0])(box.center).squeeze(2)
        for channel, place in itertools.product(range(bounds.center.shape[1]), (0, 1, -1)):
            direction = jacobian[channel, place].sign() * box.radius
            for end, sign in ((bounds.lower, -1), (bounds.upper, 1)):
                found = model(box.center + sign * direction)[0, channel, place]
                torch.testing.assert_close(end[0, channel, place], found, **EXACT)

    def test_a_norm_first(self):
        model = randomise_norms(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten())).double().eval()
        box = Interval.box(make_images(), 0.1)
        ends = torch.stack([model(box.lower), model(box.upper)])
        bounds = compute_bounds(model, box)
        torch.testing.assert_close(bounds.lower, ends.amin(0))
        torch.testing.assert_close(bounds.upper, ends.amax(0))

    def test_margins_of_a_linear_network_are_attained(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).double()
        box, labels = Interval.box(make_images(3), 0.1), make_labels(3, 4)
        found, _ = compute_margins(model, box, labels)
        weight = specification(labels, 4) @ model[1].weight
        for column in range(3):
            corner = box.center - weight[:, column].sign().reshape(box.radius.shape) * box.radius
            torch.testing.assert_close(found[:, column], margins(model(corner), labels)[:, column], **EXACT)


ENDINGS = {
    "linear": [nn.Linear(8, 4)],
    "linear without bias": [nn.Linear(8, 4, bias=False)],
    "norm": [nn.Linear(8, 4), nn.BatchNorm1d(4)],
    "relu": [nn.Linear(8, 4), nn.ReLU()],
    "sigmoid": [nn.Linear(8, 4), nn.Sigmoid()],
    "dropout": [nn.Linear(8, 4), nn.Dropout()],
    "identity": [nn.Linear(8, 4), nn.Identity()],
    "flatten": [nn.Linear(8, 4), nn.Flatten()],
    "temperature": [nn.Linear(8, 4), Apply(lambda m, x: x / -2)],
    "residual": [nn.Linear(8, 4), Apply(lambda m, x: x - m.fc(x), fc=nn.Linear(4, 4))],
}


@walk("ending", ENDINGS)
@walk("ball", [LinfBall(0.1), L2Ball(0.1)], ids=["linf", "l2"])
@walk("deep", [True, False], ids=["deep", "shallow"])
def test_networks_that_end_otherwise(ending, ball, deep):
    torch.manual_seed(0)
    start = [nn.Flatten(), nn.Linear(72, 8), *([nn.ReLU()] if deep else [])]
    model = randomise_norms(nn.Sequential(*start, *copy.deepcopy(ENDINGS[ending]))).double().eval()
    images = make_images(3)
    region, labels = ball.region(images), make_labels(3, 4)
    found, _ = compute_margins(model, region, labels)
    kept, activity = compute_margins(model, region, labels, keep=True)
    torch.testing.assert_close(kept, found, **EXACT)
    torch.testing.assert_close(compute_rows(model, region, specification(labels, 4)), found, **EXACT)
    logits = compute_bounds(model, region)
    rows = specification(labels, 4)
    apart = (rows @ logits.center.unsqueeze(-1) - rows.abs() @ logits.radius.unsqueeze(-1)).squeeze(-1)
    assert (found >= apart - 1e-11).all()
    for point in points_inside(model, region.hull):
        assert (found <= margins(model(ball.project(images, point)), labels) + 1e-9).all()
    assert activity.first is not None


def test_keep_names_each_relu_and_the_first_layers_input():
    model, images = small_cnn().eval(), make_images()
    region = LinfBall(0.1).region(images)
    _, activity = compute_margins(model, region, make_labels(2, 4), keep=True)
    network = trace(model)
    assert [network.affine_before(i).path for i in activity.preactivations] == ["0", "4"]
    assert torch.equal(activity.first.center, region.hull.center)
    first = next(iter(activity.preactivations.values()))
    expected = compute_bounds(model[:2], region)
    torch.testing.assert_close(first.lower, expected.lower, **EXACT)
    torch.testing.assert_close(first.upper, expected.upper, **EXACT)


def test_keep_with_a_single_layer_has_its_input():
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)).double()
    _, activity = compute_margins(model, Interval.box(make_images(), 0.1), make_labels(2, 4), keep=True)
    assert activity.first is not None and not activity.preactivations


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.1)], ids=["linf", "l2"])
def test_an_empty_batch(ball):
    model, images = small_cnn().eval(), make_images(0)
    region, labels = ball.region(images), torch.zeros(0, dtype=torch.int64)
    assert compute_bounds(model, region).center.shape == (0, 4)
    assert compute_margins(model, region, labels)[0].shape == (0, 3)
    assert compute_rows(model, region, torch.zeros(0, 5, 4, dtype=torch.float64)).shape == (0, 5)
    assert forward(model, images).logits.shape == (0, 4)


def test_bounds_in_training_mode_enclose_the_evaluation_network():
    model = small_cnn()
    box = Interval.box(make_images(), 0.1)
    expected, found = compute_bounds(model.eval(), box), compute_bounds(model.train(), box)
    assert torch.equal(found.lower, expected.lower) and model.training


class TestStatistics:
    def test_those_given_are_those_used(self):
        """Bounds with a batch's statistics enclose the network that has them as its running ones."""
        model, images = small_cnn().train(), make_images(6)
        statistics = forward(model, images).statistics
        fixed = copy.deepcopy(model).eval()
        for norm, given_ones in zip((fixed[1], fixed[5]), statistics.values()):
            norm.running_mean.copy_(given_ones.mean.detach())
            norm.running_var.copy_(given_ones.variance.detach())
        for region in (LinfBall(0.1).region(images), L2Ball(0.3).region(images)):
            found, expected = compute_bounds(model, region, statistics), compute_bounds(fixed, region)
            torch.testing.assert_close(found.lower, expected.lower, **EXACT)
            torch.testing.assert_close(found.upper, expected.upper, **EXACT)
            labels = make_labels(6, 4)
            margins_found, _ = compute_margins(model, region, labels, statistics)
            torch.testing.assert_close(margins_found, compute_margins(fixed, region, labels)[0], **EXACT)
        torch.testing.assert_close(forward(model, images, statistics).logits, fixed(images), **EXACT)

    def test_no_statistics_means_the_running_ones(self):
        model, box = small_cnn(), Interval.box(make_images(), 0.1)
        running = {
            position: BatchStatistics(operation.norm.running_mean, operation.norm.running_var)
            for position, operation in enumerate(trace(model).operations) if isinstance(operation, BatchNorm)
        }  # fmt: skip
        assert len(running) == 2
        found, expected = compute_bounds(model, box, running), compute_bounds(model, box)
        assert torch.equal(found.lower, expected.lower) and torch.equal(found.upper, expected.upper)

    def test_gradients_flow_to_weights_and_statistics(self):
        """Against finite differences, through the whole bound."""
        model, images = small_cnn().train(), make_images(3)
        statistics = forward(model, images).statistics
        positions = list(statistics)
        leaves = [part.detach().clone().requires_grad_() for s in statistics.values() for part in (s.mean, s.variance)]
        labels = make_labels(3, 4)

        for region in (LinfBall(0.1).region(images), L2Ball(0.3).region(images)):

            def bound(*parts, region=region):
                given_ones = {p: BatchStatistics(*parts[2 * i : 2 * i + 2]) for i, p in enumerate(positions)}
                return compute_margins(model, region, labels, given_ones)[0]

            assert torch.autograd.gradcheck(bound, leaves)

            def by_weight(*parameters, region=region):
                names = [name for name, _ in model.named_parameters()]
                given_ones = {p: BatchStatistics(*leaves[2 * i : 2 * i + 2]) for i, p in enumerate(positions)}
                state = {name: parameter for name, parameter in zip(names, parameters)}
                wrapped = Apply(lambda m, x: compute_margins(m.model, region, labels, given_ones)[0], model=model)
                return torch.func.functional_call(wrapped, {f"model.{k}": v for k, v in state.items()}, (images,))

            parameters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
            assert torch.autograd.gradcheck(by_weight, parameters, fast_mode=True)


class TestL2:
    @pytest.mark.parametrize(
        "first",
        [
            nn.Conv2d(2, 3, 3),
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=2),
            nn.Conv2d(2, 3, 3, padding=1, bias=False),
        ],
        ids=["plain", "strided", "dilated", "no bias"],
    )
    @pytest.mark.parametrize("normalised", [True, False])
    @pytest.mark.parametrize("norm", [True, False])
    def test_the_first_convolution_is_exact(self, first, normalised, norm):
        """Each output is a linear form of the image: its minimum over the ball, one by one."""
        torch.manual_seed(0)
        before = [Elementwise(torch.tensor([-2.0, 4.0]).reshape(2, 1, 1), torch.randn(2, 1, 1))] if normalised else []
        after = [nn.BatchNorm2d(3)] if norm else []
        model = randomise_norms(nn.Sequential(*before, copy.deepcopy(first), *after, nn.Flatten())).double().eval()
        images, ball = make_images(), L2Ball(0.7)
        bounds = compute_bounds(model, ball.region(images))
        zero = images[:1] * 0
        forms = torch.func.jacrev(lambda x: model(x)[0])(zero).reshape(1, -1, *images.shape[1:])
        forms = forms.expand(2, *forms.shape[1:])
        lower = ball.concretise(forms, images) + model(zero)
        upper = model(zero) - ball.concretise(-forms, images)
        torch.testing.assert_close(bounds.lower, lower, rtol=0, atol=1e-8)
        torch.testing.assert_close(bounds.upper, upper, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("first", [nn.Conv1d(2, 3, 4, 3, 2, 2), nn.Conv1d(2, 3, 5, bias=False)], ids=str)
    def test_the_first_convolution_of_sequences_is_exact(self, first):
        torch.manual_seed(0)
        before = Elementwise(torch.tensor([-2.0, 4.0]).reshape(2, 1), torch.randn(2, 1))
        model = randomise_norms(nn.Sequential(before, first, nn.BatchNorm1d(3))).double().eval()
        images, ball = make_images(shape=(2, 11)), L2Ball(0.7)
        bounds, zero = compute_bounds(model, ball.region(images)), images[:1] * 0
        forms = torch.func.jacrev(lambda x: model(x)[0].flatten())(zero).reshape(1, -1, 2, 11).expand(2, -1, -1, -1)
        lower, upper = ball.concretise(forms, images), -ball.concretise(-forms, images)
        torch.testing.assert_close(bounds.lower, lower.reshape_as(bounds.lower) + model(zero), rtol=0, atol=1e-8)
        torch.testing.assert_close(bounds.upper, upper.reshape_as(bounds.upper) + model(zero), rtol=0, atol=1e-8)
        with pytest.raises(UnsupportedOperation, match=r"Conv1d at '1'.*L2Ball.*accepted"):
            compute_bounds(nn.Sequential(before, nn.Conv1d(2, 2, 1, groups=2)).double(), ball.region(images))

    @pytest.mark.parametrize("start", [[], [nn.BatchNorm2d(2)], [nn.ReLU()], [nn.MaxPool2d(1)], [nn.Dropout()]])
    def test_tighter_than_the_hull_or_equal(self, start):
        torch.manual_seed(0)
        layers = [*start, nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)]
        model = randomise_norms(nn.Sequential(*layers)).double().eval()
        images, ball = make_images(), L2Ball(0.2)
        bounds, hull = compute_bounds(model, ball.region(images)), compute_bounds(model, ball.hull(images))
        assert (bounds.radius < hull.radius).all() if not start else (bounds.radius <= hull.radius + 1e-12).all()

    def test_two_first_layers(self):
        """Both branches read the image."""
        model = Apply(
            lambda m, x: m.out(torch.flatten(F.relu(m.a(x)) - m.b(x), 1)),
            a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(2, 3, 1), out=nn.Linear(108, 4),
        ).double()  # fmt: skip
        images, ball = make_images(), L2Ball(0.3)
        bounds, hull = compute_bounds(model, ball.region(images)), compute_bounds(model, ball.hull(images))
        assert (bounds.radius < hull.radius).all()
        for point in points_inside(model, ball.hull(images)):
            assert bounds.contains(model(ball.project(images, point)), 1e-9).all()

    @pytest.mark.parametrize(
        "first", [nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
                  nn.Conv2d(2, 2, 3, padding="same")],
        ids=["groups", "reflect", "same"],
    )  # fmt: skip
    def test_other_first_convolutions_are_refused_by_name(self, first):
        model = nn.Sequential(nn.Identity(), first, nn.Flatten()).double()
        with pytest.raises(UnsupportedOperation, match=r"Conv2d at '1'.*L2Ball.*accepted"):
            compute_bounds(model, L2Ball(0.1).region(make_images()))
        compute_bounds(model, LinfBall(0.1).region(make_images()))

    @pytest.mark.parametrize(
        "start",
        [lambda m, x: x.view(x.size(0), 8, 3, 3), lambda m, x: x.view(x.size(0), 2, 6, 6)],
        ids=["other channels", "same"],
    )
    def test_a_rearranged_image(self, start):
        """Bounded right or refused by name, as any other model."""
        channels = start(None, make_images()).shape[1]
        model = nn.Sequential(Apply(start), nn.Conv2d(channels, 2, 3), nn.Flatten()).double()
        images, ball = make_images(), L2Ball(0.2)
        try:
            bounds = compute_bounds(model, ball.region(images))
        except UnsupportedOperation:
            return
        for point in points_inside(model, ball.hull(images)):
            assert bounds.contains(model(ball.project(images, point)), 1e-9).all()

    def test_a_gray_image_in_three_colours(self):
        """The normalisation has more channels than the image: bounded right or refused by name."""
        model = nn.Sequential(
            Elementwise(torch.ones(3, 1, 1), torch.randn(3, 1, 1)), nn.Conv2d(3, 2, 3), nn.Flatten()
        ).double()
        images, ball = make_images(shape=(1, 5, 5)), L2Ball(0.2)
        try:
            bounds = compute_bounds(model, ball.region(images))
        except UnsupportedOperation:
            return
        for point in points_inside(model, ball.hull(images)):
            assert bounds.contains(model(ball.project(images, point)), 1e-9).all()


class TestForward:
    @pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
    def test_training_mode_is_the_model_in_training_mode(self, momentum):
        model = small_cnn().train()
        model[1].momentum = model[5].momentum = momentum
        twin = copy.deepcopy(model)
        for seed in range(3):
            images = make_images(5, seed)
            torch.testing.assert_close(forward(model, images).logits, twin(images), **EXACT)
        for (name, ours), theirs in zip(model.named_buffers(), twin.buffers()):
            torch.testing.assert_close(ours, theirs, **EXACT, msg=name)
        assert model[1].num_batches_tracked == model[5].num_batches_tracked == 3

    def test_statistics_are_the_batchs_with_their_gradients(self):
        model, images = small_cnn().train(), make_images(5)
        found = forward(model, images).statistics
        first = model[0](images)
        hidden = F.batch_norm(first, None, None, model[1].weight, model[1].bias, True, eps=model[1].eps)
        second = model[4](F.relu(hidden).flatten(1))
        inputs = {2: first.transpose(0, 1).flatten(1), 6: second.T}
        assert set(found) == set(inputs)
        weights = [p for p in model[:5].parameters()]
        for position, rows in inputs.items():
            mean = rows.mean(1)
            variance = (rows - mean[:, None]).square().mean(1)
            for ours, theirs in ((found[position].mean, mean), (found[position].variance, variance)):
                torch.testing.assert_close(ours, theirs, **EXACT)
                gradients = [
                    torch.autograd.grad(part.square().sum(), weights, retain_graph=True, materialize_grads=True)
                    for part in (ours, theirs)
                ]
                torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)

    def test_gradients_are_the_models(self):
        model, images = small_cnn().train(), make_images(5)
        twin = copy.deepcopy(model)
        forward(model, images).logits.square().sum().backward()
        twin(images).square().sum().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)

    def test_given_statistics_update_nothing(self):
        model, images = small_cnn().train(), make_images(5)
        statistics = forward(model, images).statistics
        before = copy.deepcopy(dict(model.named_buffers()))
        again = forward(model, make_images(5, seed=1), statistics)
        assert again.statistics is statistics
        assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())

    def test_given_statistics_reproduce_the_pass_that_made_them(self):
        model, images = small_cnn().train(), make_images(5)
        first = forward(model, images)
        torch.testing.assert_close(forward(model, images, first.statistics).logits, first.logits, **EXACT)

    def test_a_frozen_norm_stays_frozen(self):
        model = small_cnn().train()
        model[1].eval()
        twin, images = copy.deepcopy(model), make_images(5)
        found = forward(model, images)
        torch.testing.assert_close(found.logits, twin(images), **EXACT)
        assert set(found.statistics) == {6} and model[1].num_batches_tracked == 0

    def test_a_shared_norm_is_updated_by_each_use(self):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4)
        model = nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 4), norm).double().train()
        twin, images = copy.deepcopy(model), make_images(5, shape=(4,))
        found = forward(model, images)
        torch.testing.assert_close(found.logits, twin(images), **EXACT)
        assert len(found.statistics) == 2 and norm.num_batches_tracked == 2
        torch.testing.assert_close(norm.running_var, twin[1].running_var, **EXACT)

    def test_a_norm_without_running_statistics_trains(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).double().train()
        images = make_images(5, shape=(4,))
        torch.testing.assert_close(forward(model, images).logits, model(images), **EXACT)

    def test_dropout_draws_as_the_model_does(self):
        model, images = nn.Sequential(nn.Linear(4, 400), nn.Dropout(0.5)).double().train(), make_images(5, shape=(4,))
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        assert torch.equal(forward(model, images).logits, expected) and (expected == 0).any()
        torch.testing.assert_close(forward(model.eval(), images).logits, model(images), **EXACT)

    def test_images_stay_as_they_are(self):
        model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 4)).double()
        images = make_images() - 0.5
        before = images.clone()
        forward(model, images)
        compute_bounds(model, Interval.point(images))
        assert torch.equal(images, before)


def test_a_norm_of_another_dimension_than_the_linear_layers_stays_apart():
    """A linear layer acts on the last dimension, its batch norm on dimension 1: not one map."""
    model = randomise_norms(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten())).double().eval()
    images = make_images(shape=(3, 3))
    for network in (lambda x: forward(model, x).logits, fold(model, images.shape[1:])):
        torch.testing.assert_close(network(images), model(images), **EXACT)
    box = Interval.box(images, 0.1)
    found = compute_bounds(model, box)
    for point in points_inside(model, box):
        assert found.contains(model(point), 1e-9).all()
    statistics = forward(model.train(), images).statistics
    torch.testing.assert_close(forward(model, images, statistics).logits, model(images), **EXACT)
