"""Random resized crops: torch's own antialiased interpolation as oracle, keyed draws, and who may not use them."""

import math

import pytest
import torch
import torch.nn.functional as F

from certtrain.attacks.transferred import Transferred
from certtrain.config import structure, unstructure
from certtrain.data import Augment
from certtrain.data.resized_crop import ResizedCrop, draw, resize
from certtrain.errors import InputError
from certtrain.noise import Noise
from certtrain.step import StateSpec


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def drawn(count: int, height=256, width=256, flip=True, key=0) -> ResizedCrop:
    return draw(height, width, flip, Noise(key, torch.arange(count)))


def interpolated(image: torch.Tensor, crop: ResizedCrop, number: int, size: int) -> torch.Tensor:
    """By torch, of the crop alone."""
    top, left = int(crop.top[number]), int(crop.left[number])
    part = image[:, top : top + int(crop.height[number]), left : left + int(crop.width[number])]
    found = F.interpolate(part[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return found.flip(2) if crop.flip[number] else found


SIZES = [(32, 32, 28), (32, 32, 5), (17, 40, 13), (9, 6, 50), (3, 3, 1), (1, 1, 4), (256, 256, 224)]


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_is_torchs_antialiased_resize_of_the_crop(height, width, size):
    """Smaller and larger, down to a pixel. In float64: the same formula in another order."""
    count = 40 if height < 256 else 6
    images = torch.rand(count, 2, height, width, dtype=torch.float64)
    crop = drawn(count, height, width)
    found = resize(images, crop, size)
    expected = torch.stack([interpolated(image, crop, number, size) for number, image in enumerate(images)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.is_contiguous() and found.dtype == images.dtype


def test_the_whole_image_at_its_own_size_is_itself():
    images = torch.rand(3, 3, 11, 11)
    crop = ResizedCrop(*[torch.zeros(3, dtype=torch.int64)] * 2, torch.tensor([False, True, False]),
                       height=numbers(11, 11, 11), width=numbers(11, 11, 11))  # fmt: skip
    found = resize(images, crop, 11)
    assert torch.equal(found[0], images[0]) and torch.equal(found[1], images[1].flip(2))


def test_half_the_size_by_hand():
    """A ramp 0 … 7 to four pixels: each the mean of a triangle of two pixels to each side, cut off at the ends."""
    ramp = torch.arange(8.0).div(8).expand(1, 1, 8, 8)
    crop = ResizedCrop(*[numbers(0)] * 2, torch.tensor([False]), height=numbers(8), width=numbers(8))
    inner = [(1 * a + 3 * b + 3 * c + 1 * d) / 64 for a, b, c, d in ((1, 2, 3, 4), (3, 4, 5, 6))]
    ends = [(3 * 0 + 3 * 1 + 1 * 2) / 56, (1 * 5 + 3 * 6 + 3 * 7) / 56]
    torch.testing.assert_close(resize(ramp, crop, 4)[0, 0, 2], torch.tensor([ends[0], *inner, ends[1]]))


def test_pixels_outside_of_the_crop_do_not_matter():
    images, crop = torch.rand(30, 1, 20, 20), drawn(30, 20, 20)
    other = torch.full_like(images, 0.5)
    for number in range(30):
        rows, columns = (
            slice(int(start[number]), int(start[number] + length[number]))
            for start, length in ((crop.top, crop.height), (crop.left, crop.width))
        )
        other[number, :, rows, columns] = images[number, :, rows, columns]
    assert torch.equal(resize(other, crop, 9), resize(images, crop, 9)) and not torch.equal(other, images)


def test_stays_in_the_box():
    """Rounded weights of white pixels sum to 1 + 2.4e-7 in some of these."""
    for value in (0.0, 1.0):
        images = torch.full((200, 1, 64, 64), value)
        found = resize(images, drawn(200, 64, 64), 30)
        assert 0 <= float(found.min()) and float(found.max()) <= 1
        torch.testing.assert_close(found, torch.full_like(found, value))


def test_draws_are_those_of_the_published_rule():
    """Area uniform in 8 to 100 %, ratio log-uniform in 3/4 to 4/3, of ten attempts the first that fits."""
    crop = drawn(20_000)
    area, ratio = crop.height * crop.width / 256**2, crop.width / crop.height
    assert float(area.min()) > 0.079 and float(area.max()) <= 1
    assert float(ratio.min()) > 0.74 and float(ratio.max()) < 1.35
    assert (crop.top >= 0).all() and (crop.top + crop.height <= 256).all()
    assert (crop.left >= 0).all() and (crop.left + crop.width <= 256).all()
    # up to three quarters of the area every ratio fits: uniform and log-uniform there
    small = area < 0.74
    assert float(area[small].mean()) == pytest.approx((0.08 + 0.74) / 2, abs=5 * 0.19 / len(area) ** 0.5)
    logs = ratio[small].log()
    assert float(logs.mean()) == pytest.approx(0, abs=5 * 0.166 / len(area) ** 0.5)
    assert float(logs.std()) == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.03)
    assert float(torch.corrcoef(torch.stack([area[small], logs]))[0, 1]) == pytest.approx(0, abs=0.04)
    # an offset is uniform in what is left
    share = (crop.top.double() + 0.5) / (257 - crop.height)
    assert float(share.mean()) == pytest.approx(0.5, abs=5 * 0.29 / 20_000**0.5)
    assert float(share.std()) == pytest.approx(1 / math.sqrt(12), rel=0.03)
    assert float(crop.flip.double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 20_000**0.5)
    places = torch.stack([share, (crop.left.double() + 0.5) / (257 - crop.width), crop.flip.double()])
    assert float((torch.corrcoef(places) - torch.eye(3)).abs().max()) < 5 / 20_000**0.5
    assert not drawn(50, flip=False).flip.any()


def test_an_image_that_no_crop_fits_shows_its_middle():
    """Very wide or high: the largest rectangle of an allowed ratio, as torchvision falls back."""
    wide, high = drawn(60, 10, 1000), drawn(60, 1000, 10)
    assert (wide.height == 10).all() and (wide.width == 13).all()
    assert (wide.left == (1000 - 13) // 2).all() and (wide.top == 0).all()
    assert (high.width == 10).all() and (high.height == 13).all() and (high.top == (1000 - 13) // 2).all()


def test_keyed_by_sample_whatever_the_batch():
    """In the last bit."""
    images, index = torch.rand(20, 3, 24, 24), 7 * torch.arange(20)
    augment = Augment(resized_crop=21, flip=True)
    whole, crop = augment(images, Noise(3, index))
    assert isinstance(crop, ResizedCrop) and whole.shape == (20, 3, 21, 21)
    order = torch.randperm(20)
    assert torch.equal(augment(images[order], Noise(3, index[order]))[0], whole[order])
    assert torch.equal(augment(images[4:5], Noise(3, index[4:5]))[0], whole[4:5])
    assert not torch.equal(augment(images, Noise(4, index))[0], whole)
    mirrored = Augment(resized_crop=21)(images, Noise(3, index))[0]
    assert torch.equal(torch.where(crop.flip[:, None, None, None], mirrored.flip(3), mirrored), whole)


def test_an_empty_batch():
    found, crop = Augment(resized_crop=4)(torch.rand(0, 3, 9, 9), Noise(0, torch.arange(0)))
    assert found.shape == (0, 3, 4, 4) and len(crop.height) == 0


def test_the_field():
    augment = structure(Augment, {"resized_crop": 224, "flip": True})
    assert augment == Augment(0, True, "edge", 224) == structure(Augment, unstructure(augment))
    assert Augment().resized_crop is None
    for fields, field in (({"resized_crop": 0}, "resized_crop"), ({"resized_crop": 8, "pad": 1}, "pad")):
        with pytest.raises(InputError, match=f"^{field}: found .*; accepted"):
            Augment(**fields)


def test_kept_perturbations_are_refused():
    """Of methods that keep them, by what they declare; and by the crop itself, where one is asked for its pixels."""
    kept, augment = Transferred().declare_state((3, 8, 8), 10), Augment(resized_crop=8)
    with pytest.raises(
        InputError, match=r"^training\.augment\.resized_crop: found 8, .*\(transferred\); accepted: null"
    ):
        augment.check_state(kept)
    Augment(pad=2).check_state(kept)
    augment.check_state({"t": StateSpec("sample", (10,))})
    with pytest.raises(InputError, match=r"^training\.augment\.resized_crop: found .*accepted: null"):
        drawn(3).rows_and_columns(8, 8)
    for shape in ((3, 9, 9), (3, 8, 9)):
        with pytest.raises(InputError, match=r"resized_crop: found 8 for images of"):
            augment.check_shape(shape)
    augment.check_shape((1, 8, 8))
    Augment(pad=1).check_shape((1, 8, 9))
