"""One contract that every perturbation set passes; then what each set promises beyond it.

A new set joins by a line in ``SETS``.
"""

import itertools

import pytest
import torch
from scipy.optimize import minimize
from walking import walk

from certtrain.bounds import Interval, L1Ball, L2Ball, LinfBall, PerturbationSet
from certtrain.errors import FieldError

SETS = {"LinfBall": LinfBall, "L2Ball": L2Ball, "L1Ball": L1Ball}
EPSILONS = [0.0, 1e-3, 0.1, 0.7, 5.0]  # of which a radius above 1 in l-infinity is cut to 1
SHAPE = (2, 3, 3)


@pytest.fixture(params=SETS)
def kind(request) -> type[PerturbationSet]:
    return SETS[request.param]


def ball_of(kind, epsilon):
    return kind(min(epsilon, kind.largest_radius))


def make_images(count=8, dtype=torch.float64):
    """Images with saturated pixels, so that [0, 1] cuts the sets."""
    torch.manual_seed(0)
    return (torch.rand(count, *SHAPE, dtype=dtype) * 1.6 - 0.3).clamp(0, 1)


def candidates_around(images, epsilon):
    """Points near, on and far outside the set."""
    torch.manual_seed(1)
    noise = torch.randn_like(images)
    sparse = torch.where(torch.rand_like(images) < 0.1, noise, 0)
    sizes = (0, 1e-9, 0.3 * epsilon, epsilon, 3 * epsilon, 10)
    return [images + size * direction for size in sizes for direction in (noise.sign(), noise / 4, sparse)]


def points_of(ball, images, count=30):
    """Points of the set: the image, projections of far points (its surface), and points between."""
    torch.manual_seed(2)
    points = [images]
    for _ in range(count):
        surface = ball.project(images, images + 3 * torch.randn_like(images))
        points += [surface, images + torch.rand(len(images), 1, 1, 1, dtype=images.dtype) * (surface - images)]
    return points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", EPSILONS)
class TestContract:
    def test_project_lands_in_the_set(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(dtype=dtype)
        for candidates in candidates_around(images, epsilon):
            found = ball.project(images, candidates)
            assert found.shape == images.shape and found.dtype == dtype
            assert ball.contains(images, found).all()

    def test_project_keeps_points_of_the_set(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(dtype=dtype)
        torch.manual_seed(3)
        for share in (0, 1e-3, 0.5):  # well inside: in a ball, every change is at most epsilon / sqrt(count)
            size = share * epsilon / images[0].numel()
            points = (images + size * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
            assert torch.equal(ball.project(images, points), points)

    def test_project_is_the_identity_the_second_time(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(dtype=dtype)
        for candidates in candidates_around(images, epsilon):
            once = ball.project(images, candidates)
            assert torch.equal(ball.project(images, once), once)

    def test_hull_contains_the_set_and_no_more(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(dtype=dtype)
        hull = ball.hull(images)
        for candidates in candidates_around(images, epsilon):
            assert hull.contains(ball.project(images, candidates)).all()
        slack = 2 * torch.finfo(dtype).eps + 1e-12  # a projection may end that far inside
        for pixel in itertools.product(*map(range, SHAPE)):  # every face is reached along its axis
            for sign, end in ((-1, hull.lower), (1, hull.upper)):
                change = torch.zeros_like(images)
                change[(slice(None), *pixel)] = sign * min(epsilon, 1)
                reached = ball.project(images, (images + change).clamp(0, 1))[(slice(None), *pixel)]
                assert ((end[(slice(None), *pixel)] - reached) * sign <= slack).all()

    def test_contains_only_the_set(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(dtype=dtype)
        assert ball.contains(images, images).all()
        invalid = images.clone()
        invalid[:, 0, 0, 0] = 1.001
        assert not ball.contains(images, invalid).any()
        assert not ball.contains(images, torch.full_like(images, torch.nan)).any()
        inward = torch.where(images < 0.5, 1.0, -1.0) * (epsilon + 0.01)
        if epsilon < 0.4:
            assert not ball.contains(images, images + inward).any()
            assert ball.contains(images, images + inward, slack=0.1).all() or kind is not LinfBall

    def test_concretise_is_never_above_a_point_of_the_set(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(dtype=dtype)
        torch.manual_seed(4)
        forms = torch.randn(len(images), 5, *SHAPE, dtype=dtype)
        found = ball.concretise(forms, images)
        assert found.shape == (len(images), 5) and found.dtype == dtype
        wide = forms.double().flatten(2)
        # rounding of two sums of 18 products and of the set's own points
        slack = 64 * torch.finfo(dtype).eps * wide.abs().sum(2)
        for point in points_of(ball, images):
            value = (wide @ point.double().flatten(1).unsqueeze(-1)).squeeze(-1)
            assert (found.double() <= value + slack).all()

    def test_concretise_of_nothing(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(dtype=dtype)
        assert (ball.concretise(images.new_zeros(len(images), 2, *SHAPE), images) == 0).all()
        assert ball.concretise(images.new_zeros(0, 2, *SHAPE), images[:0]).shape == (0, 2)
        assert ball.concretise(images.new_zeros(len(images), 0, *SHAPE), images).shape == (len(images), 0)

    def test_an_empty_batch(self, kind, epsilon, dtype):
        ball, images = ball_of(kind, epsilon), make_images(count=0, dtype=dtype)
        assert ball.hull(images).center.shape == ball.project(images, images).shape == (0, *SHAPE)
        assert ball.contains(images, images).shape == (0,)

    def test_a_tensor_epsilon_is_the_number(self, kind, epsilon, dtype):
        images = make_images(dtype=dtype)
        forms, candidates = torch.ones(len(images), 1, *SHAPE, dtype=dtype), images + 0.2
        number, tensor = ball_of(kind, epsilon), kind(0.1).with_epsilon(torch.tensor(epsilon, dtype=dtype))
        assert torch.equal(tensor.hull(images).radius, number.hull(images).radius)
        torch.testing.assert_close(tensor.project(images, candidates), number.project(images, candidates))
        torch.testing.assert_close(tensor.concretise(forms, images), number.concretise(forms, images))


def test_project_lands_in_the_set_of_large_float32_images(kind):
    """Thousands of entries round at the size of a pixel, not of epsilon."""
    torch.manual_seed(8)
    images = torch.rand(20, 3, 32, 32)
    for epsilon in (1e-4, 1e-2):
        ball = kind(epsilon)
        for candidates in (torch.rand_like(images), images + 2 * epsilon * torch.randn_like(images) / 55):
            found = ball.project(images, candidates)
            assert ball.contains(images, found).all() and torch.equal(ball.project(images, found), found)


@walk("scale", [1e-20, 1e-6, 1.0, 1e6, 1e12])
@walk("epsilon", [0.0, 1e-30, 1e-10, 0.1, 10.0])
def test_concretise_at_any_scale_in_float32(kind, epsilon, scale):
    """Finite, below the value at the image, and not below that by more than |form|_1 epsilon."""
    images = make_images(dtype=torch.float32)
    torch.manual_seed(5)
    forms = scale * torch.randn(len(images), 3, *SHAPE)
    found = ball_of(kind, epsilon).concretise(forms, images).double()
    size = forms.double().abs().flatten(2).sum(2)
    value = (forms.double() * images.double().unsqueeze(1)).flatten(2).sum(2)
    slack = 64 * 2.0**-23 * size + 1e-37
    assert (found <= value + slack).all()
    assert (found >= value - size * min(epsilon, 1) - slack).all()


def test_concretise_gradients(kind):
    images = make_images(count=3)
    torch.manual_seed(6)
    forms = torch.randn(3, 2, *SHAPE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: kind(0.4).concretise(a, images), forms)


def test_concretise_grows_down_with_epsilon(kind):
    images = make_images()
    forms = torch.randn(len(images), 4, *SHAPE, dtype=torch.float64)
    values = [ball_of(kind, epsilon).concretise(forms, images) for epsilon in (0.0, 0.01, 0.1, 0.3, 1.0, 4.0)]
    assert all((larger <= smaller + 1e-12).all() for smaller, larger in itertools.pairwise(values))


@pytest.mark.parametrize("epsilon", [-0.1, -1e-30, float("nan"), float("inf"), -float("inf")])
def test_a_bad_epsilon_is_named(kind, epsilon):
    for make in (kind, kind(0.1).with_epsilon, kind(0.1).scaled if epsilon < 0 else kind):
        with pytest.raises(FieldError, match="epsilon"):
            make(epsilon)


def test_scaled_and_region(kind):
    images = make_images()
    assert kind(0.25).scaled(2) == kind(0.5)
    region = kind(0.1).region(images)
    assert region.ball == kind(0.1) and torch.equal(region.hull.radius, kind(0.1).hull(images).radius)


class TestLinf:
    def test_the_hull_is_the_box_of_the_bounds(self):
        images = make_images(dtype=torch.float32)
        found, expected = LinfBall(8 / 255).hull(images), Interval.box(images, 8 / 255)
        assert LinfBall(0.1).is_box
        assert torch.equal(found.center, expected.center) and torch.equal(found.radius, expected.radius)

    def test_project_is_the_nearest_point(self):
        images = make_images()
        for candidates in candidates_around(images, 0.1):
            low, high = (images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1)
            assert torch.equal(
                LinfBall(0.1).project(images, candidates), torch.minimum(torch.maximum(candidates, low), high)
            )

    @pytest.mark.parametrize("epsilon", EPSILONS)
    def test_concretise_is_attained_at_a_corner(self, epsilon):
        images = make_images()
        forms = torch.randn(len(images), 5, *SHAPE, dtype=torch.float64)
        low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
        corner = torch.where(forms > 0, low.unsqueeze(1), high.unsqueeze(1))
        expected = (forms * corner).flatten(2).sum(2)
        torch.testing.assert_close(ball_of(LinfBall, epsilon).concretise(forms, images), expected, rtol=0, atol=1e-13)


class TestL2:
    def test_is_no_box(self):
        assert not L2Ball(0.1).is_box

    def test_contains_is_the_euclidean_ball(self):
        images = torch.full((1, 4), 0.5, dtype=torch.float64)
        assert L2Ball(0.2).contains(images, images + 0.0999)
        assert not L2Ball(0.2).contains(images, images + 0.1001)
        assert L2Ball(0.2).contains(images, images + 0.11, slack=0.021)
        assert not L2Ball(0.2).contains(images, images + 0.11, slack=0.019)

    def test_project_is_the_nearest_point_away_from_the_walls(self):
        images = torch.full((1, 4), 0.5, dtype=torch.float64)
        change = torch.tensor([[3.0, 0.0, -4.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(L2Ball(0.1).project(images, images + change), images + 0.02 * change)

    @pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.3])
    def test_concretise_away_from_the_walls(self, epsilon):
        images = torch.full((3, 7), 0.5, dtype=torch.float64)
        torch.manual_seed(7)
        forms = torch.randn(3, 5, 7, dtype=torch.float64)
        expected = (forms * 0.5).sum(2) - epsilon * forms.norm(dim=2)
        torch.testing.assert_close(L2Ball(epsilon).concretise(forms, images), expected, rtol=0, atol=1e-9)

    @walk("seed", range(12))
    @walk("epsilon", [0.05, 0.4, 1.0, 3.0])
    def test_concretise_against_scipy(self, epsilon, seed):
        """SLSQP on the same problem; pixels at 0, at 1 and near them make the walls active."""
        torch.manual_seed(seed)
        image = (torch.rand(4, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
        form = torch.randn(4, dtype=torch.float64) * torch.tensor([1, 1, 1e-3, 1]) * (torch.rand(4) < 0.8)
        found = L2Ball(epsilon).concretise(form[None, None], image[None]).item()
        x, a = image.numpy(), form.numpy()
        ball = {"type": "ineq", "fun": lambda d: epsilon**2 - d @ d, "jac": lambda d: -2 * d}
        start = -0.1 * epsilon * a  # at 0 the constraint has no gradient
        solved = minimize(
            lambda d: a @ d, start.clip(-x, 1 - x), jac=lambda d: a, constraints=[ball], bounds=[*zip(-x, 1 - x)],
            method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        assert found == pytest.approx(a @ x + solved.fun, abs=1e-6)

    def test_concretise_of_a_ball_larger_than_the_cube(self):
        """All that is left is [0, 1]: the corner."""
        images = make_images()
        forms = torch.randn(len(images), 5, *SHAPE, dtype=torch.float64)
        expected = forms.clamp(max=0).flatten(2).sum(2)
        torch.testing.assert_close(L2Ball(5.0).concretise(forms, images), expected, rtol=0, atol=1e-9)

    def test_concretise_is_tighter_than_the_hull(self):
        images = make_images()
        forms = torch.randn(len(images), 5, *SHAPE, dtype=torch.float64)
        assert (L2Ball(0.2).concretise(forms, images) > LinfBall(0.2).concretise(forms, images)).all()
