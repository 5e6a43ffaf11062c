"""Boxes as regions: in any units, outward where they are rounded, and the same as balls where these are boxes."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import small_cnn

from certtrain.bounds import Box, LinfBall, compute_bounds, compute_rows
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold

properties = settings(deadline=None, max_examples=100, derandomize=True, database=None)
ENDS = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True)


def box_of(pairs, dtype=torch.float32) -> Box:
    ends = torch.tensor([sorted(pair) for pair in pairs], dtype=dtype)
    return Box(ends[None, :, 0], ends[None, :, 1])


def random_box(count: int = 3, shape=(2, 2), dtype=torch.float64) -> Box:
    draw = torch.Generator().manual_seed(0)
    lower = 5 * torch.randn(count, *shape, generator=draw, dtype=dtype)
    return Box(lower, lower + torch.rand(count, *shape, generator=draw, dtype=dtype))


class TestBox:
    @given(st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=6))
    @properties
    def test_the_hull_is_outward_by_an_ulp_at_most(self, pairs):
        """In exact arithmetic, too."""
        box = box_of(pairs)
        hull = box.hull
        assert (hull.lower <= box.lower).all() and (box.upper <= hull.upper).all()
        for (low, high), center, radius in zip(
            zip(box.lower[0].tolist(), box.upper[0].tolist()), hull.center[0].tolist(), hull.radius[0].tolist()
        ):
            assert Fraction(center) - Fraction(radius) <= Fraction(low)
            assert Fraction(high) <= Fraction(center) + Fraction(radius)
            assert (radius == 0) == (low == high)
            step = Fraction(2) ** -149 + Fraction(2) ** -22 * max(abs(Fraction(low)), abs(Fraction(high)))
            assert 2 * Fraction(radius) <= Fraction(high) - Fraction(low) + step

    @given(st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4), st.lists(st.floats(), min_size=4, max_size=4))
    @properties
    def test_nearest_points_lie_inside_and_points_inside_stay(self, pairs, numbers):
        box = box_of(pairs)
        found = box.nearest(torch.tensor([numbers[: len(pairs)]], dtype=torch.float64).nan_to_num())
        assert found.dtype == torch.float32 and box.contains(found).all()
        assert torch.equal(box.nearest(found), found)
        assert box.contains(box.images).all() and box.contains(box.lower).all() and box.contains(box.upper).all()

    def test_nothing_beyond_an_end_is_contained(self):
        box = random_box(dtype=torch.float32)
        for way, end in ((-torch.inf, box.lower), (torch.inf, box.upper)):
            beyond = torch.nextafter(end, torch.full_like(end, way))
            for place in itertools.product(range(2), range(2)):
                points = box.images.clone()
                points[:, *place] = beyond[:, *place]
                assert not box.contains(points).any()
                assert box.contains(box.nearest(points)).all()
        points = box.images.clone()
        points[1, 0, 0] = torch.nan
        assert box.contains(points).tolist() == [True, False, True]

    def test_of_double_precision_points_the_given_number_counts(self):
        box = box_of([(0.0, 0.1)])
        end = float(box.upper[0, 0])
        assert box.contains(torch.tensor([[end]], dtype=torch.float64)).all()
        assert not box.contains(torch.tensor([[end * (1 + 1e-15)]], dtype=torch.float64)).any()

    def test_rows_are_taken(self):
        box = random_box()
        assert len(box) == 3 and box.is_box and box.kind == "Box"
        for index in (torch.tensor([2, 0, 2]), torch.tensor([True, False, True]), torch.tensor([], dtype=torch.long)):
            found = box.take(index)
            assert isinstance(found, Box) and len(found) == len(box.lower[index])
            for name in ("lower", "upper", "images"):
                assert torch.equal(getattr(found, name), getattr(box, name)[index])

    def test_conversions_keep_the_ends(self):
        box = random_box(dtype=torch.float32)
        wide, flat = box.to(torch.float64), box.map(lambda x: x.flatten(1))
        assert torch.equal(wide.lower, box.lower.double()) and torch.equal(wide.upper, box.upper.double())
        assert wide.images.dtype == torch.float64 and flat.images.shape == (3, 4)
        assert torch.equal(flat.hull.lower, box.hull.lower.flatten(1))

    def test_minima_of_forms_are_those_of_corners(self):
        box = random_box()
        forms = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        corners = []
        for signs in itertools.product([False, True], repeat=4):
            corner = torch.where(torch.tensor(signs).reshape(2, 2), box.upper, box.lower)
            corners.append((forms * corner.unsqueeze(1)).flatten(2).sum(-1))
        found, least = box.concretise(forms), torch.stack(corners).amin(0)
        torch.testing.assert_close(found, least, rtol=1e-13, atol=1e-13)
        assert not box.concretise(torch.zeros_like(forms)).any()


class TestBoxesAndBalls:
    """LinfBall's region and the box of its ends are the same set: every number that is made of them is the same."""

    @pytest.fixture
    def both(self):
        images = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        images[0, 0, :3], images[1, 1, :3] = 0.0, 1.0  # where balls are cut
        ball = LinfBall(0.07)
        return ball.region(images), Box(*ball.ends(images))

    def test_sets(self, both):
        around, box = both
        assert around.is_box and box.is_box
        assert torch.equal(around.hull.center, box.hull.center) and torch.equal(around.hull.radius, box.hull.radius)
        draw = torch.Generator().manual_seed(1)
        points = torch.rand(3, 2, 6, 6, generator=draw, dtype=torch.float64)
        assert torch.equal(around.nearest(points), box.nearest(points))
        forms = torch.randn(3, 4, 2, 6, 6, generator=draw, dtype=torch.float64)
        assert torch.equal(around.concretise(forms), box.concretise(forms))
        assert around.take(torch.tensor([1])).contains(box.take(torch.tensor([1])).upper).all()

    def test_bounds(self, both):
        around, box = both
        model = small_cnn().eval()
        network = fold(model, torch.Size((2, 6, 6)))
        for bounding in (crown_bounds, interval_bounds):
            one, two = (bounding(network, region) for region in both)
            for place, found in one.items():
                assert torch.equal(found.lower, two[place].lower) and torch.equal(found.upper, two[place].upper)
        forms = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        known = crown_bounds(network, box)
        assert torch.equal(bound_forms(network, around, forms, known), bound_forms(network, box, forms, known))
        assert torch.equal(compute_rows(model, around, forms), compute_rows(model, box, forms))
        one, two = (compute_bounds(model, region) for region in both)
        assert torch.equal(one.lower, two.lower) and torch.equal(one.upper, two.upper)

    def test_boxes_far_from_pixels(self):
        """Nothing is cut to [0, 1]."""
        model = small_cnn().eval()
        box = random_box(2, (2, 6, 6))

        ours = compute_bounds(model, box)
        for share in (0.0, 0.3, 1.0):
            logits = model(box.lower + share * (box.upper - box.lower))
            assert (ours.lower <= logits).all() and (logits <= ours.upper).all()
        assert not ((box.lower >= 0) & (box.upper <= 1)).all()
        cut = compute_bounds(model, box.map(lambda x: x.clamp(0, 1)))
        assert ((model(box.upper) < cut.lower) | (model(box.upper) > cut.upper)).any()
