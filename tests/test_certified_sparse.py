"""Certificates over l0 sets: bounds against every choice of units, the search over locations against enumeration."""

import itertools

import pytest
import torch
from problems import alone, problem_of
from test_sparse_ball import BALLS, SHAPE, make_images, members_of
from torch import nn
from walking import pairs, walk

from certtrain.attacks import SparsePgd
from certtrain.bounds import SparseBall, compute_bounds
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.losses import CcIbp, CrownIbp, ExpIbp, Ibp, MtlIbp
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.verifiers import BabStage, Certify, LocationStage, certify

SMALL = (1, 3, 3)


def mlp(seed, shape=SMALL, hidden=8, classes=3, activation=nn.ReLU):
    torch.manual_seed(seed)
    inputs = torch.Size(shape).numel()
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation(),
        nn.Linear(hidden, classes),
    )  # fmt: skip
    return layers.eval()


def cnn(seed, channels=2):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3),
    ).eval()  # fmt: skip


def strewn(ball, image, count=40, seed=0):
    """Points of the set, for every choice of units: all at 0, all at 1, corners, interior points."""
    generator = torch.Generator().manual_seed(seed)
    points = []
    for chosen in itertools.combinations(members_of(ball, image.shape), int(ball.k)):
        values = torch.rand(count, *image.shape, generator=generator, dtype=image.dtype)
        values[: count // 2] = values[: count // 2].round()
        values[0], values[1] = 0, 1
        points.append(torch.where(torch.stack(chosen).any(0), values, image))
    return torch.cat(points)


def grid(ball, image, steps):
    """The same with a grid over the numbers of the chosen units."""
    axis = torch.linspace(0, 1, steps, dtype=image.dtype)
    for chosen in itertools.combinations(members_of(ball, image.shape), ball.k):
        places = torch.stack(chosen).any(0).nonzero()
        values = torch.cartesian_prod(*[axis] * len(places)).reshape(-1, len(places))
        points = image.repeat(len(values), 1, 1, 1)
        points[:, places[:, 0], places[:, 1], places[:, 2]] = values
        yield points


def refuted(model, points, label):
    logits = model(points)
    others = logits.clone()
    others[:, label] = -torch.inf
    return logits[:, label] <= others.amax(1)


class TestBounds:
    @walk("name, first, dtype", pairs(BALLS, ["dense", "convolution"], [torch.float32, torch.float64]))
    def test_every_bound_is_below_every_point(self, name, first, dtype):
        """IBP, CROWN-IBP and CROWN of margins, and of every neuron, over points of every choice of units."""
        ball = BALLS[name].with_epsilon(2 if name in ("pixel", "feature") else 1)
        model = (mlp(1, SHAPE) if first == "dense" else cnn(2)).to(dtype)
        images = make_images(3, dtype)
        region, network = ball.region(images), fold(model, torch.Size(SHAPE), dtype=dtype)
        inner = [crown_bounds(network, region), interval_bounds(network, region)]
        forms = torch.eye(3, dtype=dtype).expand(3, 3, 3)
        rows = [bound_forms(network, region, forms, bounds) for bounds in inner]
        rows.append(compute_bounds(model, region).lower)
        slack = 1e-4 if dtype == torch.float32 else 1e-9
        for number, image in enumerate(images):
            points = strewn(ball, image, 10)
            values, logits = network.values(points), model(points)
            for row in rows:
                assert (logits >= row[number] - slack).all()
            for bounds in inner:
                for place, found in bounds.items():
                    value = values[network.operations[place].inputs[0]]
                    assert (value >= found.lower[number] - slack).all() and (value <= found.upper[number] + slack).all()

    def test_linear_bounds_are_reached_by_an_affine_network(self):
        """So that a bound of minus infinity does not pass."""
        ball, images = SparseBall(2), make_images(4)
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
        network, region = fold(model, torch.Size(SHAPE), dtype=torch.float64), ball.region(images)
        found = bound_forms(network, region, torch.eye(3).double().expand(4, 3, 3), crown_bounds(network, region))
        for number, image in enumerate(images):
            chosen = itertools.combinations(members_of(ball), 2)
            weight = model[1].weight.reshape(3, *SHAPE)
            least = torch.stack([
                (weight * torch.where(torch.stack(units).any(0), (weight < 0).double(), image)).flatten(1).sum(1)
                for units in chosen
            ]).amin(0)  # fmt: skip
            torch.testing.assert_close(found[number], (least + model[1].bias).detach(), rtol=0, atol=1e-12)

    def test_with_one_k_for_each_image(self):
        images, model = make_images(4), mlp(3, SHAPE).double()
        own = compute_bounds(model, SparseBall(torch.tensor([0, 1, 2, 40])).region(images))
        network, forms = fold(model, torch.Size(SHAPE), dtype=torch.float64), torch.eye(3).double().expand(4, 3, 3)
        region = SparseBall(torch.tensor([0, 1, 2, 40])).region(images)
        rows = bound_forms(network, region, forms, crown_bounds(network, region))
        for number, k in enumerate((0, 1, 2, 40)):
            one = SparseBall(k).region(images[number : number + 1])
            torch.testing.assert_close(own.lower[number], compute_bounds(model, one).lower[0])
            single = bound_forms(network, one, forms[:1], crown_bounds(network, one))[0]
            torch.testing.assert_close(rows[number], single, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.lower[0], model(images[:1])[0], rtol=0, atol=1e-9)


def hat(at):
    """Class 0 wins but where the first pixel is near 0.4 and, for two pixels, the fifth near 0.6 as well."""
    first, last = nn.Linear(9, 3 * at), nn.Linear(3 * at, 2)
    with torch.no_grad():
        first.weight.zero_(), last.weight.zero_(), last.bias.zero_()
        for number, (place, middle) in enumerate(((0, 0.4), (4, 0.6))[:at]):
            for corner in range(3):
                first.weight[3 * number + corner, place] = 1
                first.bias[3 * number + corner] = -middle + 0.1 * (1 - corner)
                last.weight[1, 3 * number + corner] = (10.0, -20.0, 10.0)[corner]  # a hat of height 1, 0.2 wide
        last.bias[0] = at - 0.5
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()


class TestSearch:
    @pytest.mark.parametrize("stages", [("location",), ("ibp", "crown", "alpha", "bab")], ids=["alone", "cascade"])
    @pytest.mark.parametrize("k", [1, 2])
    def test_verdicts_equal_enumeration(self, k, stages):
        seen = set()
        for seed in range(4):
            model, images = mlp(seed), make_images(8, torch.float32, SMALL)
            labels, ball = model(images).argmax(1), SparseBall(k)
            for verdict, image, label in zip(
                certify(model, images, labels, ball, Certify(stages=stages)), images, labels
            ):
                wrong = any(refuted(model, points, label).any() for points in grid(ball, image, 200 if k == 1 else 21))
                seen.add(verdict.status)
                if verdict.status == "falsified":
                    point = verdict.counterexample
                    assert ball.contains(image[None], point[None]).all() and refuted(model, point[None], label).all()
                else:
                    assert verdict.status == "verified" and not wrong and verdict.lower_bound > 0
        assert seen == {"verified", "falsified"}

    @pytest.mark.parametrize("name", BALLS)
    def test_every_unit_and_a_convolution(self, name):
        ball, model = BALLS[name].with_epsilon(1), cnn(4)
        images = make_images(8, torch.float32)
        labels = model(images).argmax(1)
        verdicts = certify(model, images, labels, ball, Certify(stages=("location",), timeout=20))
        for verdict, image, label in zip(verdicts, images, labels):
            wrong = refuted(model, strewn(ball, image), label).any()
            assert (verdict.status == "verified" and not wrong) or verdict.status == "falsified"
            if verdict.status == "falsified":
                point = verdict.counterexample[None]
                assert ball.contains(image[None], point).all() and refuted(model, point, label).all()

    def test_leaves_of_many_inputs_are_split_at_neurons(self):
        """A row of three channels has 24 numbers."""
        ball, model, images = SparseBall(1, unit="row"), mlp(9, (3, 8, 8)), make_images(12, torch.float32, (3, 8, 8))
        with torch.no_grad():
            model[1].weight *= 2
        labels = model(images).argmax(1)
        verdicts = certify(model, images, labels, ball, Certify(stages=("location",), timeout=20))
        assert {verdict.status for verdict in verdicts} == {"verified", "falsified"}
        for verdict, image, label in zip(verdicts, images, labels):
            assert verdict.status == "falsified" or not refuted(model, strewn(ball, image), label).any()

    def test_smooth_activations_are_decided_too(self):
        model, images, ball = mlp(5, activation=nn.Tanh), make_images(8, torch.float32, SMALL), SparseBall(1)
        labels = model(images).argmax(1)
        for verdict, image, label in zip(certify(model, images, labels, ball), images, labels):
            wrong = any(refuted(model, points, label).any() for points in grid(ball, image, 100))
            assert verdict.status == ("falsified" if wrong else "verified")

    @pytest.mark.parametrize("pixels", [1, 2])
    def test_a_counterexample_in_the_inside_of_the_set(self, pixels):
        """No corner is wrong: what looks at corners alone would prove it."""
        model, image = hat(pixels), torch.zeros(1, *SMALL)
        label = torch.zeros(1, dtype=torch.int64)
        assert not refuted(model, torch.cat(list(grid(SparseBall(pixels), image[0], 2))), 0).any()
        (verdict,) = certify(model, image, label, SparseBall(pixels), Certify(stages=("ibp", "crown", "alpha", "bab")))
        assert verdict.status == "falsified"
        if pixels == 2:
            (verdict,) = certify(model, image, label, SparseBall(1), Certify(stages=("location",)))
            assert verdict.status == "verified"

    def test_more_than_linear_bounds_prove(self):
        """On networks of which CROWN leaves some images open."""
        model, images = mlp(7, SMALL, hidden=20), make_images(30, torch.float32, SMALL)
        labels = model(images).argmax(1)
        counts = [
            sum(v.status == "verified" for v in certify(model, images, labels, SparseBall(1), Certify(stages=stages)))
            for stages in (("crown",), ("location",))
        ]
        assert counts[0] < counts[1]

    def test_does_not_depend_on_the_batch(self):
        model, images, ball = mlp(6), make_images(6, torch.float32, SMALL), SparseBall(torch.tensor([0, 1, 2, 1, 9, 3]))
        labels, settings = model(images).argmax(1), Certify(stages=("location",))
        together = certify(model, images, labels, ball, settings)
        assert together[0].status == "verified"
        for number, verdict in enumerate(together):
            row = slice(number, number + 1)
            (single,) = certify(model, images[row], labels[row], SparseBall(int(ball.k[number])), settings)
            assert single.status == verdict.status

    def test_a_time_limit_leaves_images_undecided_and_proves_nothing(self):
        model, images = mlp(7, SMALL, hidden=40), make_images(20, torch.float32, SMALL)
        labels = model(images).argmax(1)
        verdicts = certify(model, images, labels, SparseBall(3), Certify(stages=("location",), timeout=1e-6))
        assert {v.status for v in verdicts} & {"timeout"} and all(v.reason for v in verdicts if v.status == "timeout")
        assert all((v.lower_bound or -1) <= 0 for v in verdicts if v.status == "timeout")

    def test_takes_sparse_sets_alone_and_other_stages_refuse_them(self):
        model, images = mlp(1), make_images(3, torch.float32, SMALL)
        labels = model(images).argmax(1)
        for verdict in certify(model, images, labels, 0.3, Certify(stages=("location",))):
            assert verdict.status == "unknown" and "sparse sets" in (verdict.reason or "")
        problem = problem_of(model, images, labels, SparseBall(1), 3)
        assert alone(BabStage(), problem).statuses == [None] * 3  # by itself it takes boxes
        assert alone(LocationStage(), problem).statuses.count(None) == 0
        for arithmetic in ("real", "float32"):
            with pytest.raises(InputError, match="accepted: a box"):
                certify(model, images, labels, SparseBall(1), Certify(arithmetic=arithmetic))

    def test_no_images_and_one_class(self):
        model = mlp(1)
        assert certify(model, torch.zeros(0, *SMALL), torch.zeros(0).long(), SparseBall(1)) == []
        one, image = mlp(1, classes=1), torch.zeros(1, *SMALL)
        with pytest.raises(InputError, match="BinaryScore"):
            certify(one, image, torch.zeros(1).long(), SparseBall(1), Certify(stages=("location",)))


LOSSES = {
    "Ibp": Ibp(), "CrownIbp": CrownIbp(beta=1.0), "MtlIbp": MtlIbp(alpha=0.5, attack=SparsePgd(2)),
    "CcIbp": CcIbp(alpha=0.5, attack=SparsePgd(2)), "ExpIbp": ExpIbp(alpha=0.5, attack=SparsePgd(2)),
}  # fmt: skip


class TestTraining:
    @pytest.mark.parametrize("first", ["dense", "convolution"])
    @pytest.mark.parametrize("name", LOSSES)
    def test_losses_are_finite_along_the_ramp_and_never_below_the_attack(self, name, first):
        """With k still 0, a share of a pixel, and in full; the regularisers are on."""
        loss, model = LOSSES[name], mlp(1, SHAPE) if first == "dense" else cnn(1)
        images = make_images(8, torch.float32)
        batch = Batch(images, torch.arange(8) % 3, torch.arange(8))
        for epsilon in (0.0, 0.4, 2.0):
            radius = torch.tensor(epsilon)
            step = Step(
                SparseBall(2).with_epsilon(radius), radius, torch.tensor(2.0), epsilon / 2, Noise(0, torch.arange(8)),
                ramp=epsilon / 2, reached=epsilon / 2, clean=epsilon == 0,
            )  # fmt: skip
            model.zero_grad()
            terms = loss(model.train(), batch, step)
            terms.total.backward()
            assert terms.total.isfinite()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            if "adversarial_loss" in terms.parts:
                assert terms.parts["verified_loss"] >= terms.parts["adversarial_loss"] - 1e-5

    @pytest.mark.parametrize("first", ["dense", "convolution"])
    def test_certificates_can_be_trained(self, first):
        """Eight images whose class stands in all of their pixels."""
        torch.manual_seed(1)
        head = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        model = mlp(1, SHAPE, hidden=20) if first == "dense" else nn.Sequential(*head)
        labels = torch.arange(8) % 2
        images = (0.15 + 0.7 * labels.float()).reshape(8, 1, 1, 1).expand(8, *SHAPE).contiguous()
        batch, ball = Batch(images, labels, torch.arange(8)), SparseBall(2)
        step = Step.evaluation(ball, Noise(0, torch.arange(8)))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(80):
            optimizer.zero_grad()
            CrownIbp(beta=1.0, regularisation=0.0)(model.train(), batch, step).total.backward()
            optimizer.step()
        verdicts = certify(model, images, labels, ball, Certify(stages=("ibp", "crown")))
        assert all(verdict.status == "verified" for verdict in verdicts)
