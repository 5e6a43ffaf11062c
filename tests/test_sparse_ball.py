"""The l0 set: what it promises beyond the contract, by enumeration where that is possible."""

import itertools

import pytest
import torch
from torch import nn

from certtrain.bounds import Interval, SparseBall, compute_bounds
from certtrain.bounds.crown import crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.sparse_part import SparsePart
from certtrain.errors import FieldError, InputError
from certtrain.noise import Noise
from certtrain.verifiers import Certify, certify

SHAPE = (2, 4, 4)
BALLS = {
    "pixel": SparseBall(3), "feature": SparseBall(4, unit="feature"), "row": SparseBall(2, unit="row"),
    "column": SparseBall(1, unit="column"), "patch": SparseBall(2, unit="patch", side=2),
}  # fmt: skip
MEMBERS = {"pixel": 2, "feature": 1, "row": 8, "column": 8, "patch": 8}
every_ball = pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)


def make_images(count=6, dtype=torch.float64, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, *shape, generator=generator, dtype=dtype) * 1.6 - 0.3).clamp(0, 1)


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def members_of(ball, shape=SHAPE):
    """(N, *shape) bool: the numbers that each unit holds, by their coordinates."""
    units = []
    channels, height, width = shape
    place = torch.zeros(shape, dtype=torch.bool)
    tiles = itertools.product(range(0, height, ball.side), range(0, width, ball.side))
    slices = {
        "pixel": [(slice(None), i, j) for i in range(height) for j in range(width)],
        "feature": list(itertools.product(range(channels), range(height), range(width))),
        "row": [(slice(None), i) for i in range(height)],
        "column": [(slice(None), slice(None), j) for j in range(width)],
        "patch": [(slice(None), slice(i, i + ball.side), slice(j, j + ball.side)) for i, j in tiles],
    }[ball.unit]
    for part in slices:
        unit = place.clone()
        unit[part] = True
        units.append(unit)
    return torch.stack(units)


@every_ball
class TestEveryUnit:
    def test_grouping_is_a_bijection_by_units(self, ball):
        images, units = make_images(), members_of(ball)
        grouped = ball.grouped(images)
        assert grouped.shape == (6, MEMBERS[ball.unit], ball.units(SHAPE)) and len(units) == ball.units(SHAPE)
        assert torch.equal(ball.ungrouped(grouped, SHAPE), images)
        for number, unit in enumerate(units):
            assert torch.equal(grouped[:, :, number].sort(1).values, images[:, unit].sort(1).values)

    def test_changed_counts_units(self, ball):
        images, units = make_images(), members_of(ball)
        for count in (0, 1, len(units) // 2, len(units)):
            touched = images.clone()
            for unit in units[:count]:
                touched[:, unit.nonzero()[0][0], unit.nonzero()[0][1], unit.nonzero()[0][2]] += 1e-9
            assert (ball.changed(images, touched) == count).all()

    def test_projection_is_the_nearest_point(self, ball):
        """Against every choice of units."""
        images, units = make_images(), members_of(ball)
        candidates = images + 0.8 * random(*images.shape)
        found = ball.project(images, candidates)
        distance = (found - candidates).flatten(1).norm(dim=1)
        for chosen in itertools.combinations(units, ball.k):
            free = torch.stack(chosen).any(0)
            point = torch.where(free, candidates.clamp(0, 1), images)
            assert (distance <= (point - candidates).flatten(1).norm(dim=1) + 1e-12).all()

    def test_projection_lands_in_the_set_and_keeps_its_points(self, ball):
        for dtype in (torch.float32, torch.float64):
            images = make_images(dtype=dtype)
            for size in (0, 1e-30, 1e-9, 0.3, 50.0):
                once = ball.project(images, images + size * random(*images.shape, dtype=dtype))
                assert ball.contains(images, once).all() and once.dtype == dtype
                assert torch.equal(ball.project(images, once), once)
                assert ball.hull(images).contains(once).all()

    def test_concretise_by_enumeration(self, ball):
        """The least of a linear form over every choice of units and every corner of their box is the value."""
        images, units = make_images(), members_of(ball)
        forms = random(6, 5, *SHAPE)
        found, least = ball.concretise(forms, images), torch.full((6, 5), torch.inf, dtype=torch.float64)
        for chosen in itertools.combinations(units, ball.k):
            free = torch.stack(chosen).any(0)
            corner = torch.where(free, (forms < 0).double(), images.unsqueeze(1))
            least = torch.minimum(least, (forms * corner).flatten(2).sum(2))
        torch.testing.assert_close(found, least, rtol=0, atol=1e-12)

    def test_concretise_gradients(self, ball):
        images = make_images(2)
        forms = random(2, 3, *SHAPE).requires_grad_()
        assert torch.autograd.gradcheck(lambda a: ball.concretise(a, images), forms)

    def test_samples_are_points_of_the_set(self, ball):
        images = make_images(40)
        change = ball.sample(images, Noise(3, torch.arange(40)), "noise")
        assert ball.contains(images, (images + change).clamp(0, 1)).all()
        assert ((images + change).clamp(0, 1) - images - change).abs().max() < 1e-15
        assert (ball.changed(images, images + change) > 0).float().mean() > 0.9
        again = ball.sample(images[7:9], Noise(3, torch.arange(7, 9)), "noise")
        assert torch.equal(again, change[7:9])

    def test_k_of_zero_and_k_of_all(self, ball):
        images, forms = make_images(), random(6, 4, *SHAPE)
        none, all_ = ball.with_epsilon(0), ball.with_epsilon(1000)
        assert torch.equal(none.project(images, images + 1), images)
        assert torch.equal(none.hull(images).lower, images) and torch.equal(none.hull(images).upper, images)
        torch.testing.assert_close(none.concretise(forms, images), (forms * images.unsqueeze(1)).flatten(2).sum(2))
        assert torch.equal(all_.project(images, images + 1), torch.ones_like(images))
        torch.testing.assert_close(all_.concretise(forms, images), forms.clamp(max=0).flatten(2).sum(2))
        assert "means all" in all_.remark(SHAPE) and not ball.remark(SHAPE)
        assert f" {'patches' if ball.unit == 'patch' else ball.unit + 's'}: it" in all_.remark(SHAPE)


class TestItsSize:
    def test_one_k_for_each_image(self):
        images, forms = make_images(), random(6, 3, *SHAPE)
        own = SparseBall(torch.tensor([0, 1, 2, 3, 30, 5]))
        candidates = images + random(*images.shape)
        for number, k in enumerate((0, 1, 2, 3, 30, 5)):
            one, row = SparseBall(k), slice(number, number + 1)
            assert torch.equal(own.project(images, candidates)[row], one.project(images[row], candidates[row]))
            assert torch.equal(own.concretise(forms, images)[row], one.concretise(forms[row], images[row]))
            assert torch.equal(own.hull(images).upper[row], one.hull(images[row]).upper)
        assert own.take(torch.tensor([4, 1])).k.tolist() == [30, 1]
        assert own.region(images).take(torch.tensor([4, 1])).ball.k.tolist() == [30, 1]

    def test_a_schedule_rounds_and_a_person_may_not(self):
        assert SparseBall(5).with_epsilon(torch.tensor(2.6)).k.item() == 3
        assert SparseBall(5).with_epsilon(7.0) == SparseBall(7) and SparseBall(5).scaled(2.5) == SparseBall(13)
        for bad in (2.5, -1, float("nan"), float("inf")):
            with pytest.raises(FieldError, match="k"):
                SparseBall(5).with_epsilon(bad)

    @pytest.mark.parametrize(
        "bad",
        [
            {"k": -1}, {"k": 1.5}, {"k": True}, {"k": 10**30}, {"k": torch.tensor([1.5])}, {"unit": "disc"},
            {"side": 0}, {"side": 2},
        ],
    )  # fmt: skip
    def test_bad_fields_are_named(self, bad):
        with pytest.raises(FieldError, match=next(iter(bad))):
            SparseBall(**bad)

    def test_shapes_that_have_no_such_units(self):
        with pytest.raises(InputError, match="rows of inputs"):
            SparseBall(1, unit="row").region(torch.rand(2, 5))
        with pytest.raises(InputError, match="divides both"):
            SparseBall(1, unit="patch", side=3).region(make_images())

    def test_vectors_have_one_number_a_pixel(self):
        images, forms = torch.full((2, 5), 0.5, dtype=torch.float64), random(2, 3, 5)
        largest = forms.abs().topk(2).values.sum(2)
        expected = forms.sum(2) / 2 - largest / 2
        torch.testing.assert_close(SparseBall(2).concretise(forms, images), expected)


def tiny(first: str) -> nn.Module:
    torch.manual_seed(3)
    layers = {
        "dense": [nn.Flatten(), nn.Linear(32, 6)],
        "convolution": [nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 6)],
        "row": [nn.Conv2d(2, 3, (1, 3), dilation=(1, 1), padding=(0, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6)],
    }[first]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 3)).double().eval()


def corners(ball, image):
    """Every choice of units, all numbers in them at 0 or 1 at random, many times; and the units at all 0 and all 1."""
    for number, chosen in enumerate(itertools.combinations(members_of(ball), ball.k)):
        free = torch.stack(chosen).any(0)
        generator = torch.Generator().manual_seed(number)
        values = torch.randint(0, 2, (8, *SHAPE), generator=generator).double()
        values[0], values[1] = 0, 1
        yield torch.where(free, values, image)


@pytest.mark.parametrize("first", ["dense", "convolution", "row"])
@pytest.mark.parametrize("name", ["pixel", "feature", "row", "column"])
def test_bounds_hold_at_corners_of_the_set(first, name):
    ball, model, images = (
        BALLS[name].with_epsilon(2 if name in ("pixel", "feature") else 1),
        tiny(first),
        make_images(3),
    )
    region = ball.region(images)
    output = compute_bounds(model, region)
    network = fold(model, torch.Size(SHAPE))
    inner = [interval_bounds(network, region), crown_bounds(network, region)]
    for number, image in enumerate(images):
        points = torch.cat(list(corners(ball, image)))
        logits = model(points)
        assert (logits >= output.lower[number] - 1e-9).all() and (logits <= output.upper[number] + 1e-9).all()
        for bounds in inner:
            (position, *_), value = sorted(bounds), points
            for layer in model:
                if isinstance(layer, nn.ReLU):
                    break
                value = layer(value)
            found = bounds[position]
            assert (value >= found.lower[number].reshape(value.shape[1:]) - 1e-9).all()
            assert (value <= found.upper[number].reshape(value.shape[1:]) + 1e-9).all()


def test_the_first_dense_layer_is_exact():
    ball, images = BALLS["pixel"], make_images(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 4)).double()
    found = compute_bounds(model, ball.region(images))
    weight = model[1].weight.reshape(4, *SHAPE)
    least = torch.full((3, 4), torch.inf, dtype=torch.float64)
    for chosen in itertools.combinations(members_of(ball), ball.k):
        corner = torch.where(torch.stack(chosen).any(0), (weight < 0).double(), images.unsqueeze(1))
        least = torch.minimum(least, (weight * corner).flatten(2).sum(2) + model[1].bias)
    torch.testing.assert_close(found.lower, least.detach(), rtol=0, atol=1e-12)
    assert (found.radius < compute_bounds(model, Interval.box(images, 1.0)).radius).all()


def test_bounds_of_a_convolution_over_patches_lie_between_those_of_more_pixels_and_of_fewer():
    """Of a window no patch of the grid is left whole: as many pixels as its patches have are a set that holds it."""
    images, model = make_images(2), tiny("convolution")
    found, wide, narrow = (
        compute_bounds(model, ball.region(images))
        for ball in (SparseBall(1, unit="patch", side=2), SparseBall(4), SparseBall(1))
    )
    torch.testing.assert_close(found.lower, wide.lower, rtol=0, atol=0)
    assert (found.lower <= narrow.lower).all() and (found.radius > narrow.radius).any()
    own = compute_bounds(model, SparseBall(torch.tensor([0, 1]), unit="patch", side=2).region(images))
    torch.testing.assert_close(own.lower[0], model(images)[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(own.lower[1], wide.lower[1])


@pytest.mark.parametrize("first", ["dense", "convolution"])
def test_bounds_over_a_part_go_by_its_units_and_not_by_the_balls_k(first):
    images, model = make_images(3), tiny(first)
    members, generator = members_of(BALLS["pixel"]), torch.Generator().manual_seed(3)
    free, possible = torch.zeros(3, len(members), dtype=torch.bool), torch.zeros(3, len(members), dtype=torch.bool)
    free[:, :2], possible[:, 5:8], budget = True, True, torch.tensor([0, 1, 3])
    part = SparsePart.of(SparseBall(0), images, free, possible, budget)
    found = compute_bounds(model, part)
    for number, image in enumerate(images):
        for some in itertools.combinations(range(5, 8), int(budget[number])):
            wide = torch.stack([members[unit] for unit in (0, 1, *some)]).any(0)
            points = torch.where(wide, torch.rand(60, *SHAPE, generator=generator, dtype=images.dtype).round(), image)
            assert (model(points) >= found.lower[number] - 1e-9).all()


def test_certificates_stand_against_every_corner():
    """No image that the cascade verifies is fooled by a corner of its set, and what it falsifies is."""
    model, ball, images = tiny("dense").float(), SparseBall(1), make_images(24, dtype=torch.float32)
    labels = model(images).argmax(1)
    verdicts = certify(model, images, labels, ball)
    found = {verdict.status for verdict in verdicts}
    assert {"verified", "falsified"} <= found
    for verdict, image, label in zip(verdicts, images, labels):
        fooled = (model(torch.cat(list(corners(ball, image.double()))).float()).argmax(1) != label).any()
        assert verdict.status != "verified" or not fooled
        assert verdict.status != "falsified" or ball.contains(image[None], verdict.counterexample[None])


class TestPart:
    @pytest.mark.parametrize("name", BALLS)
    def test_by_enumeration(self, name):
        """Least value, its point, and membership, of one unit that is free and two of some others."""
        ball, images = BALLS[name], make_images(4)
        units = members_of(ball)
        count = len(units)
        free, possible = torch.zeros(4, count, dtype=torch.bool), torch.ones(4, count, dtype=torch.bool)
        free[:, 1], possible[:, 1], possible[:, 0] = True, False, False
        budget = torch.tensor([2, 1, 0, 2])
        part = SparsePart.of(ball, images, free, possible, budget)
        forms = random(4, 3, *SHAPE)
        found, least = part.concretise(forms), torch.full((4, 3), torch.inf, dtype=torch.float64)
        for number in range(4):
            for chosen in itertools.combinations(units[2:], int(budget[number])):
                wide = torch.stack((units[1], *chosen)).any(0)
                point = torch.where(wide, (forms[number] < 0).double(), images[number])
                assert part.take(torch.full((3,), number)).contains(point).all()
                least[number] = torch.minimum(least[number], (forms[number] * point).flatten(1).sum(1))
        torch.testing.assert_close(found, least, rtol=0, atol=1e-12)
        point = part.minimiser(forms[:, 0])
        torch.testing.assert_close((forms[:, 0] * point).flatten(1).sum(1), least[:, 0], rtol=0, atol=1e-12)
        assert part.contains(point).all() and part.hull.contains(point).all()
        strange = images.clone()
        strange[:, units[0]] = 0.5
        assert not part.contains(strange).any() and not part.contains(torch.full_like(images, torch.nan)).any()
        nearest = part.nearest(images + random(4, *SHAPE))
        assert part.contains(nearest).all() and part.hull.contains(nearest).all()
        assert part.to(torch.float32).concretise(forms.float()).dtype == torch.float32


def test_certify_takes_a_k_for_each_image_in_batches():
    """Image by image what a single k says, although a batch holds only some of the images."""
    model, images = tiny("dense").float(), make_images(9, dtype=torch.float32)
    labels = model(images).argmax(1)
    own = torch.tensor([0, 1, 2, 0, 1, 2, 32, 32, 0])
    settings = Certify(stages=("ibp", "crown", "attack", "location"), batch_size=4)
    found = certify(model, images, labels, SparseBall(own), settings)
    for number, k in enumerate(own.tolist()):
        row = slice(number, number + 1)
        (alone,) = certify(model, images[row], labels[row], SparseBall(k), settings)
        assert found[number].status == alone.status and found[number].index == number
    with pytest.raises(InputError, match="9 numbers for 3 images"):
        certify(model, images[:3], labels[:3], SparseBall(own))
