"""Boxes that do not exist are refused, and never bounded; radii of one for each image; radii that cannot be meant."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from walking import walk

import certtrain
from certtrain import Box, Interval, L1Ball, L2Ball, LinfBall, compute_bounds
from certtrain.attacks import Attack, Pgd
from certtrain.bounds import compute_margins
from certtrain.bounds.region import Around
from certtrain.command_line import main
from certtrain.config import structure
from certtrain.errors import FieldError, InputError
from certtrain.models import Architecture
from certtrain.noise import Noise
from certtrain.recipe import Config
from certtrain.step import Batch, Step
from certtrain.verifiers.settings import Certify

BALLS = (LinfBall, L2Ball, L1Ball)


def make_net(last=nn.Identity):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 25, 6), nn.Tanh(), nn.Linear(6, 3), last()
    ).eval()  # fmt: skip


def make_images(count=4):
    torch.manual_seed(1)
    return torch.rand(count, 1, 4, 4)


def pixel(value):
    images = make_images()
    images[1, 0, 2, 3] = value
    return images


OUTSIDE = {
    "normalised": lambda: (make_images() - 0.5) / 0.2, "bytes": lambda: make_images() * 255,
    "NaN": lambda: pixel(math.nan), "infinite": lambda: pixel(math.inf),
    "just above": lambda: pixel(1 + 2**-23), "just below": lambda: pixel(-1e-45),
}  # fmt: skip
every_outside = pytest.mark.parametrize("images", [pytest.param(make(), id=name) for name, make in OUTSIDE.items()])


class TestBoxes:
    @every_outside
    @walk(
        "ask",
        [
            lambda x: Interval.box(x, 0.1),
            lambda x: Interval.box(x, torch.tensor(0.1)),
            lambda x: certtrain.certify(make_net(), x, [0] * len(x), 0.1),
            *(lambda x, kind=kind: kind(0.1).region(x) for kind in BALLS),
            *(lambda x, kind=kind: compute_bounds(make_net(), Around(kind(0.1), x)) for kind in BALLS),
            lambda x: Step.evaluation(LinfBall(0.1), Noise(0, torch.arange(4))) and attacked(x),
        ],
    )
    def test_pixels_outside_are_refused(self, ask, images):
        with pytest.raises(InputError, match=r"in \[0, 1\]"):
            ask(images)

    @every_outside
    def test_the_way_for_other_units_is_named(self, images):
        with pytest.raises(InputError, match=r"Interval\.from_bounds.*Box"):
            Interval.box(images, 0.1)

    @pytest.mark.parametrize(
        "epsilon", [-0.1, -1e-30, math.nan, torch.tensor(-1.0), torch.tensor([0.1, math.nan, 0, 0])]
    )
    def test_radii_are_refused(self, epsilon):
        shaped = epsilon.reshape(-1, 1, 1, 1) if isinstance(epsilon, torch.Tensor) and epsilon.ndim else epsilon
        with pytest.raises(InputError, match="epsilon: found"):
            Interval.box(make_images(), shaped)

    @pytest.mark.parametrize("scale", [1.0, 255.0])
    def test_other_units_are_bounded_without_a_cut(self, scale):
        images = scale * 4 * (make_images() - 0.5)
        for box in (Interval.from_bounds(images - 0.1, images + 0.1), Box(images - 0.1, images + 0.1)):
            found = compute_bounds(make_net(), box)
            for share in torch.linspace(-1, 1, 9):
                assert found.contains(make_net()(images + 0.1 * share), 1e-4 * scale).all()

    @pytest.mark.parametrize(
        ("lower", "upper"), [(0.3, 0.2), (math.nan, 0.5), (0.5, math.nan), (-math.inf, 0.5), (0.5, math.inf)]
    )
    def test_ends_that_make_no_box(self, lower, upper):
        ends = torch.full((2, 1, 4, 4), lower), torch.full((2, 1, 4, 4), upper)
        with pytest.raises(InputError, match="box: found"):
            Box(*ends)
        with pytest.raises(InputError, match="box: found"):
            compute_bounds(make_net(), Interval.from_bounds(*ends))

    @pytest.mark.parametrize("upper", [torch.ones(3), torch.ones(2, dtype=torch.int64), torch.ones(2).double()])
    def test_ends_of_two_kinds(self, upper):
        with pytest.raises(InputError, match="box: found ends of"):
            Box(torch.zeros(2), upper)

    @pytest.mark.parametrize("radius", [-1e-3, math.nan, math.inf])
    def test_intervals_with_no_radius(self, radius):
        images = make_images()
        box = Interval(images, torch.full_like(images, radius))
        with pytest.raises(InputError, match="box: found"):
            compute_bounds(make_net(), box)
        if radius != math.inf:
            margins, _ = compute_margins(make_net(), box, torch.zeros(4, dtype=torch.int64))
            assert margins.isnan().all()


def attacked(images):
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)))
    return structure(Attack, {"type": "Pgd", "steps": 1})(
        make_net(), batch, LinfBall(0.1), Step.evaluation(LinfBall(0.1), Noise(0, batch.index))
    )


LAYERS = {
    "relu": nn.ReLU(), "leaky relu": nn.LeakyReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "max pool": nn.MaxPool2d(2), "average pool": nn.AvgPool2d(2),
    "convolution": nn.Conv2d(2, 2, 3), "batch norm": nn.BatchNorm2d(2), "flatten": nn.Flatten(),
    "dropout": nn.Dropout(),
}  # fmt: skip


class TestNothingLosesNan:
    """What is NaN on its way stays NaN: on a device, where values are not looked at, no bound may come of it."""

    @walk("layer", LAYERS.values(), ids=LAYERS)
    @walk("dtype", [torch.float32, torch.float64], ids=str)
    @walk("part", ["center", "radius"])
    def test_layer(self, layer, dtype, part):
        values = {"center": torch.rand(2, 2, 6, 6, dtype=dtype), "radius": torch.rand(2, 2, 6, 6, dtype=dtype)}
        values[part] = torch.full_like(values[part], math.nan)
        net = nn.Sequential(nn.Identity(), layer, nn.Flatten(), nn.Identity()).to(dtype).eval()
        rest = net(values["radius"]).shape[1]
        net.append(nn.Linear(rest, 2).to(dtype))
        margins, _ = compute_margins(net, Interval(**values), torch.zeros(2, dtype=torch.int64))
        assert margins.isnan().all()

    @pytest.mark.parametrize("kind", BALLS)
    def test_hulls_of_what_is_no_image(self, kind):
        for make in OUTSIDE.values():
            images = make()
            hull = kind(0.1).hull(images)
            wrong = ~((images >= 0) & (images <= 1))
            assert hull.radius[wrong].isnan().all()
            assert (hull.lower <= hull.upper)[~wrong].all()

    def test_intersecting_and_largest(self):
        bad, good = (Interval(torch.tensor([center]), torch.tensor([0.1])) for center in (math.nan, 0.5))
        assert bad.bounds().intersect(good.bounds()).lower.isnan() and good.tightened_to_maximum(bad).center.isnan()


SMALL, LARGE = 1e-4, 0.9
"""Radii at which the network's choice is sure to stay, and to change."""


class TestOneRadiusForEachImage:
    @pytest.mark.parametrize("kind", BALLS)
    def test_sets_are_those_of_each_image_alone(self, kind):
        images = make_images().double()
        radii = torch.tensor([0.0, 0.05, 0.3, 1.0])
        both = kind(radii)
        forms, points = torch.randn(4, 5, 1, 4, 4).double(), images + torch.randn(4, 1, 4, 4).double()
        noise = Noise(3, torch.arange(4))
        sampled = both.sample(images, noise, "a")
        for number, radius in enumerate(radii.double().tolist()):
            one, row = kind(radius), slice(number, number + 1)
            torch.testing.assert_close(both.hull(images).radius[row], one.hull(images[row]).radius)
            torch.testing.assert_close(both.project(images, points)[row], one.project(images[row], points[row]))
            torch.testing.assert_close(both.concretise(forms, images)[row], one.concretise(forms[row], images[row]))
            own = Noise(3, torch.tensor([number]))
            torch.testing.assert_close(sampled[row], one.sample(images[row], own, "a"))
            assert both.contains(images, points)[row] == one.contains(images[row], points[row])
        assert torch.equal(both.take(torch.tensor([2, 0])).epsilon, radii[[2, 0]])
        assert both.hull(images.float()).center.dtype == torch.float32

    @pytest.mark.parametrize("kind", BALLS)
    @pytest.mark.parametrize(
        "stages",
        [("ibp",), ("crown_ibp",), ("crown",), ("alpha",), ("attack",), ("attack", "crown", "bab"), ("input_split",)],
    )
    def test_verdicts_are_those_of_each_image_alone(self, kind, stages):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        images = torch.rand(5, 1, 2, 3)
        labels = net(images).argmax(1)
        radii = torch.tensor([0.3, SMALL, LARGE, SMALL, 0.05])
        settings = Certify(stages=stages, attack=Pgd(steps=5, objective="margin"))
        batches = [
            certtrain.certify(net, images, labels, kind(radii), replace(settings, batch_size=size))
            for size in (1, 3, 256)
        ]
        for number, radius in enumerate(radii.tolist()):
            row = slice(number, number + 1)
            (alone,) = certtrain.certify(net, images[row], labels[row], kind(radius), settings)
            for together in batches:
                assert alone.status == together[number].status and alone.stage == together[number].stage
                if alone.lower_bound is not None:
                    assert together[number].lower_bound == pytest.approx(alone.lower_bound, abs=1e-4)
        proves = stages != ("attack",) and (kind is LinfBall or stages != ("input_split",))
        assert (together[1].status == "verified") == proves

    def test_a_tensor_is_the_linf_ball(self):
        net, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), make_images(2)
        labels = net(images).argmax(1)
        first, second = certtrain.certify(net, images, labels, torch.tensor([SMALL, 1.0]))
        assert first.status == "verified" and second.status == "falsified"
        assert (second.counterexample - images[1]).abs().max() > SMALL

    @pytest.mark.parametrize(
        "radii",
        [torch.tensor([0.1, 0.1, 0.1]), torch.tensor([[0.1, 0.1]]), torch.full((2, 1, 1, 1), 0.1), torch.tensor([0.1]),
         torch.tensor([0.1, -0.1]), torch.tensor([0.1, math.nan]), torch.tensor([0.1, math.inf]), torch.tensor([0, 1]),
         torch.tensor([True, False]), torch.tensor([0.1, 8.0]), torch.tensor(-0.1), torch.tensor(math.nan), [0.1, 0.2],
         "0.1", True, None],
        ids=str,
    )  # fmt: skip
    def test_other_shapes_and_signs_are_refused(self, radii):
        with pytest.raises(InputError, match="epsilon: found"):
            certtrain.certify(make_net(), make_images(2), [0, 0], radii)

    @pytest.mark.parametrize("radius", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), 0.25])
    def test_numbers_of_any_kind(self, radius):
        images = make_images()
        assert torch.equal(LinfBall(radius).hull(images).radius, LinfBall(0.25).hull(images).radius)


class TestSlips:
    @pytest.mark.parametrize("epsilon", [8, 2.0, 255, 1.0000001])
    def test_bytes_where_pixels_were_meant(self, epsilon):
        with pytest.raises(FieldError, match=rf"did you mean {epsilon:g}/255\?"):
            LinfBall(epsilon)
        with pytest.raises(FieldError, match="did you mean"):
            LinfBall(0.1).with_epsilon(epsilon)
        with pytest.raises(InputError, match=r"perturbation\.epsilon.*did you mean"):
            structure(Config, {"perturbation": {"type": "LinfBall", "epsilon": epsilon}})
        assert L2Ball(epsilon).epsilon == L1Ball(epsilon).epsilon == epsilon

    def test_a_multiple_of_a_radius_may_exceed_it(self):
        assert LinfBall(0.5).scaled(4).epsilon == 2.0 and LinfBall(1).epsilon == 1.0
        with pytest.raises(FieldError):
            LinfBall(0.5).scaled(-1)

    @walk("fields", [{"mean": (127.5,)}, {"std": (63.75,)}, {"mean": (127.5,), "std": (0.5,)},
                                        {"mean": (0.5,), "std": (63.75,)},
                                        {"mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7)}])  # fmt: skip
    @walk("kind", Architecture.members().values())
    def test_normalisation_in_bytes(self, kind, fields):
        with pytest.raises(FieldError, match=r"did you mean .*/255"):
            kind(**fields)

    @pytest.mark.parametrize(
        "words", [["--perturbation.epsilon", "8"], ["--model.mean", "[127.5]", "--model.std", "[0.5]"]]
    )
    def test_on_the_command_line(self, words, capsys):
        assert main(["train", *words]) == 2
        assert "did you mean" in capsys.readouterr().err


def test_fractions_are_radii():
    assert LinfBall(Fraction(8, 255)).epsilon == 8 / 255


@pytest.mark.parametrize("radius", [8.0, torch.tensor(8.0), np.float32(8), Fraction(8)])
def test_certify_asks_about_a_slip_of_255(radius):
    with pytest.raises(InputError, match="did you mean 8/255"):
        certtrain.certify(make_net(), make_images(), [0, 1, 2, 0], radius)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_certify_refuses_half_precision(dtype):
    with pytest.raises(InputError, match="accepted: images, and a model"):
        certtrain.certify(make_net().to(dtype), make_images().to(dtype), [0, 1, 2, 0], 0.01)


@walk("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@walk("wrong", [math.nan, math.inf, -math.inf, -1e-3])
@walk("at", [0, 500, 999])
def test_one_wrong_number_is_found(dtype, wrong, at):
    good, bad = torch.rand(1000).to(dtype), torch.rand(1000).to(dtype)
    bad[at] = wrong
    with pytest.raises(InputError):
        Interval.box(bad, 0.1)
    with pytest.raises(InputError):
        Interval(good, bad).check()
    if wrong != -1e-3:
        with pytest.raises(InputError):
            Interval(bad, good).check()
    largest = torch.full_like(good, torch.finfo(dtype).max)
    Interval(largest, good).check()
