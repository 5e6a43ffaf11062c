"""Sources, their checks, splits, augmentation and the loader."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from certtrain.config import structure
from certtrain.data import Arrays, Augment, Digits, Loader, Split, in_order
from certtrain.data.dataset import split_by_class
from certtrain.errors import InputError
from certtrain.noise import Noise, permutation


class TestDigits:
    def test_real_images_in_range(self, digits_dataset):
        dataset = digits_dataset
        assert dataset.shape == (1, 8, 8) and dataset.classes == 10
        assert len(dataset.train) + len(dataset.test) == 1797 and len(dataset.validation) == 0
        for split in (dataset.train, dataset.test):
            pixels = split.pixels(torch.arange(len(split)))
            assert pixels.dtype == torch.float32 and pixels.min() == 0 and pixels.max() == 1
            assert split.labels.unique().tolist() == list(range(10))

    def test_every_image_lies_in_one_split(self):
        dataset = Digits(validation=0.25).load()
        splits = (dataset.train, dataset.validation, dataset.test)
        everything = torch.cat([split.images.flatten(1) for split in splits])
        from sklearn.datasets import load_digits

        expected = torch.as_tensor(load_digits().data).to(torch.uint8)
        assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, expected.tolist()))

    def test_splits_are_stratified(self):
        dataset = Digits(validation=0.25).load()
        total = sum(torch.bincount(split.labels) for split in (dataset.train, dataset.validation, dataset.test))
        assert torch.equal(torch.bincount(dataset.test.labels), (total * 0.2).round().long())
        left = total - torch.bincount(dataset.test.labels)
        assert (torch.bincount(dataset.validation.labels) - left * 0.25).abs().max() <= 0.5

    def test_the_test_split_never_moves(self, digits_dataset):
        for share in (0.0, 0.1, 0.5):
            again = Digits(validation=share).load()
            assert torch.equal(again.test.images, digits_dataset.test.images)
            assert torch.equal(again.test.labels, digits_dataset.test.labels)
            assert again.checksum == digits_dataset.checksum
        torch.manual_seed(5)
        assert torch.equal(Digits().load().train.images, digits_dataset.train.images)


def test_split_by_class_is_disjoint_and_complete():
    labels = torch.tensor([2, 0, 0, 2, 1, 0, 0, 2, 2, 1] * 5)
    kept, held_out = split_by_class(labels, 0.3)
    assert torch.cat([kept, held_out]).sort().values.tolist() == list(range(50))
    assert torch.bincount(labels[held_out]).tolist() == [6, 3, 6]
    assert kept.tolist() == sorted(kept.tolist()) and held_out.tolist() == sorted(held_out.tolist())
    assert all(torch.equal(a, b) for a, b in zip(split_by_class(labels, 0.3), (kept, held_out), strict=True))
    assert len(split_by_class(labels, 0.0)[1]) == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_split_by_class_draws_each_class_by_its_own_key(count, share):
    labels = torch.randint(-1, 12, (count,), generator=torch.Generator().manual_seed(count)) * 3
    held_out = []
    for label in sorted(set(labels.tolist())):
        members = [number for number, found in enumerate(labels.tolist()) if found == label]
        drawn = permutation(len(members), "split", label)[: round(share * len(members))]
        held_out += [members[place] for place in drawn.tolist()]
    kept = sorted(set(range(count)) - set(held_out))
    assert [part.tolist() for part in split_by_class(labels, share)] == [kept, sorted(held_out)]


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_validation_share_out_of_range_is_refused(share):
    with pytest.raises(InputError, match=r"^validation: found .*accepted"):
        Digits(validation=share)


def made_up(count=10, shape=(2, 5, 6)) -> Split:
    torch.manual_seed(0)
    return Split(torch.randint(0, 256, (count, *shape)).to(torch.uint8), torch.arange(count) % 3)


class TestAugment:
    def test_nothing_to_do(self):
        images = torch.rand(4, 1, 5, 5)
        found, drawn = Augment()(images, Noise(0, torch.arange(4)))
        assert drawn is None and torch.equal(found, images)

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("pad", [0, 1, 3])
    def test_is_the_recorded_crop_of_the_edge_padded_image(self, pad, flip):
        images = torch.rand(60, 3, 5, 7)
        found, drawn = Augment(pad=pad, flip=flip)(images, Noise(0, torch.arange(60)))
        if not pad and not flip:
            assert drawn is None
            return
        for number, image in enumerate(images.numpy()):
            padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
            top, left = int(drawn.top[number]), int(drawn.left[number])
            crop = padded[:, top : top + 5, left : left + 7]
            crop = crop[:, :, ::-1] if drawn.flip[number] else crop
            assert np.array_equal(found[number].numpy(), crop)
        assert set(drawn.top.tolist()) == set(drawn.left.tolist()) == set(range(2 * pad + 1))
        assert 0.2 < drawn.flip.double().mean() < 0.8 if flip else not drawn.flip.any()
        assert found.is_contiguous() and found.dtype == images.dtype

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(
        ("padding", "mode"), [("edge", "replicate"), ("zero", "constant"), ("grey", "grey"), ("mirror", "reflect")]
    )
    def test_padding_is_torchs(self, padding, mode, flip):
        images = 0.25 + torch.rand(40, 2, 6, 4) / 2  # no zeros of their own
        found, drawn = Augment(pad=3, flip=flip, padding=padding)(images, Noise(1, torch.arange(40)))
        for number, image in enumerate(images):
            sides = (3, 3, 3, 3)
            padded = F.pad(image[None], sides, value=0.5) if mode == "grey" else F.pad(image[None], sides, mode=mode)
            padded = padded[0]
            top, left = int(drawn.top[number]), int(drawn.left[number])
            crop = padded[:, top : top + 6, left : left + 4]
            assert torch.equal(found[number], crop.flip(2) if drawn.flip[number] else crop)
        assert bool((found == 0).any()) == (padding == "zero")

    def test_the_padding_changes_no_draw(self):
        images, noise = torch.rand(30, 1, 5, 5), Noise(2, torch.arange(30))
        edge, zero = (Augment(pad=2, flip=True, padding=padding)(images, noise) for padding in ("edge", "zero"))
        assert all(torch.equal(getattr(edge[1], name), getattr(zero[1], name)) for name in ("top", "left", "flip"))
        inside = zero[0] != 0
        assert torch.equal(edge[0][inside], zero[0][inside]) and not torch.equal(edge[0], zero[0])
        assert Augment(pad=2) == Augment(pad=2, padding="edge")

    @pytest.mark.parametrize("padding", ["reflect", "", None, 0])
    def test_another_padding_is_refused(self, padding):
        with pytest.raises(InputError, match=r"^padding: found .*; accepted: edge, zero, grey, mirror"):
            Augment(pad=1, padding=padding)
        with pytest.raises(InputError, match=r"^padding: found .*; accepted: edge, zero, grey, mirror"):
            structure(Augment, {"pad": 1, "padding": padding})

    def test_offsets_and_flips_are_unrelated(self):
        _, drawn = Augment(pad=2, flip=True)(torch.zeros(5000, 1, 2, 2), Noise(0, torch.arange(5000)))
        rows = torch.stack([drawn.top.double(), drawn.left.double(), drawn.flip.double()])
        related = torch.corrcoef(rows) - torch.eye(3)
        assert related.abs().max() < 5 / 5000**0.5
        assert float(drawn.flip.double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 5000**0.5)

    def test_keyed_by_sample_whatever_the_batch(self):
        images, index = torch.rand(20, 1, 5, 5), 7 * torch.arange(20)
        augment = Augment(pad=2, flip=True)
        whole, _ = augment(images, Noise(3, index))
        order = torch.randperm(20)
        assert torch.equal(augment(images[order], Noise(3, index[order]))[0], whole[order])
        assert torch.equal(augment(images[4:5], Noise(3, index[4:5]))[0], whole[4:5])
        assert not torch.equal(augment(images, Noise(4, index))[0], whole)

    def test_negative_padding_is_refused(self):
        with pytest.raises(InputError, match=r"^pad: found -1; accepted"):
            Augment(pad=-1)


class TestLoader:
    LOADER = Loader(made_up(25), 7, Augment(pad=1, flip=True), seed=3)

    def test_each_sample_once_an_epoch_in_another_order(self):
        orders = []
        for epoch in range(3):
            batches = list(self.LOADER.epoch(epoch))
            assert [len(batch) for batch in batches] == [7, 7, 7, 4] and len(self.LOADER) == 4
            orders.append(torch.cat([batch.index for batch in batches]))
            assert orders[-1].sort().values.tolist() == list(range(25))
        assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])

    def test_images_and_labels_belong_to_their_index(self):
        plain = Loader(self.LOADER.split, 7, Augment(), seed=3)
        for batch in plain.epoch(2):
            assert torch.equal(batch.images, self.LOADER.split.pixels(batch.index))
            assert torch.equal(batch.labels, self.LOADER.split.labels[batch.index]) and batch.augmentation is None

    @pytest.mark.parametrize("start", range(5))
    def test_starts_in_the_middle_of_the_same_sequence(self, start):
        torch.rand(3)
        whole, rest = list(self.LOADER.epoch(1))[start:], list(self.LOADER.epoch(1, start))
        assert len(whole) == len(rest) == 4 - start
        for one, other in zip(whole, rest, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
            assert torch.equal(one.augmentation.top, other.augmentation.top)

    def test_a_sample_is_augmented_the_same_whatever_the_batch_size(self):
        def by_index(size):
            images = torch.empty(25, 2, 5, 6)
            for batch in Loader(self.LOADER.split, size, self.LOADER.augment, seed=3).epoch(4):
                images[batch.index] = batch.images
            return images

        assert torch.equal(by_index(7), by_index(25))

    def test_the_seed_decides(self):
        first = torch.cat([batch.index for batch in self.LOADER.epoch(0)])
        other = torch.cat([batch.index for batch in Loader(made_up(25), 7, Augment(), seed=4).epoch(0)])
        assert not torch.equal(first, other)

    def test_in_order(self):
        split = made_up(10)
        batches = list(in_order(split, 4, start=2, stop=9))
        assert [batch.index.tolist() for batch in batches] == [[2, 3, 4, 5], [6, 7, 8]]
        assert torch.equal(batches[1].images, split.pixels(torch.tensor([6, 7, 8])))
        assert sum(len(batch) for batch in in_order(split, 3)) == 10
        assert not list(in_order(split, 4, start=10))


def good_arrays(kind="uint8") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def images(count):
        whole = random.integers(0, 256, (count, 3, 6, 5)).astype(np.uint8)
        return whole if kind == "uint8" else (whole / 255).astype(kind)

    return {"train_images": images(12), "train_labels": np.arange(12) % 4,
            "test_images": images(5), "test_labels": np.arange(5) % 3}  # fmt: skip


def written(path, arrays) -> Arrays:
    np.savez(path, **arrays)
    return Arrays(path=path)


class TestArrays:
    @pytest.mark.parametrize("kind", ["uint8", "float32", "float64", ">f4"])
    @pytest.mark.parametrize("labels", ["int64", "uint8", ">i2"])
    def test_good_files(self, kind, labels, tmp_path):
        arrays = good_arrays(kind)
        arrays |= {name: arrays[name].astype(labels) for name in ("train_labels", "test_labels")}
        dataset = written(tmp_path / "a.npz", arrays).load()
        assert dataset.classes == 4 and dataset.shape == (3, 6, 5)
        expected = arrays["test_images"].astype(np.float32) / (255 if kind == "uint8" else 1)
        assert np.allclose(dataset.test.pixels(torch.arange(5)).numpy(), expected, rtol=0, atol=1e-7)
        assert dataset.test.labels.dtype == torch.int64 and dataset.test.labels.tolist() == [0, 1, 2, 0, 1]

    def test_the_checksum_sees_every_number(self, tmp_path):
        found = {written(tmp_path / "a.npz", good_arrays()).load().checksum}
        for name in good_arrays():
            arrays = good_arrays()
            arrays[name].flat[-1] ^= 1
            found.add(written(tmp_path / "a.npz", arrays).load().checksum)
        assert len(found) == 5

    @pytest.mark.parametrize(
        ("change", "mention"),
        [
            (lambda a: {**a, "train_labels": np.arange(12) - 1}, "label -1 at image 0"),
            (lambda a: {**a, "test_labels": np.array([0, 1, -2, 0, 1])}, "label -2 at image 2"),
            (lambda a: {**a, "test_labels": np.array([0, 1, 2, 4, 1])}, "label 4 at image 3; accepted: 0 to 3"),
            (lambda a: {**a, "test_labels": np.array([0, 1, 2, 2**63, 1], dtype=np.uint64)}, "at image 3"),
            (lambda a: {**a, "train_labels": np.arange(12) / 4}, "train_labels: found 0.25 at image 1"),
            (lambda a: {**a, "train_labels": np.eye(12, dtype=int)}, "train_labels: found shape (12, 12)"),
            (lambda a: {**a, "test_labels": np.arange(4)}, "images of shape (5, 3, 6, 5) and 4 labels"),
            (lambda a: {**a, "train_images": a["train_images"][:, 0]}, "shape (12, 6, 5)"),
            (lambda a: {**a, "test_images": np.uint8(3)}, "found images of shape ()"),
            (lambda a: {**a, "test_images": a["test_images"][:, :, :, :4]}, "test images of shape (3, 6, 4)"),
            (lambda a: {**a, "train_images": a["train_images"].astype(np.int64)}, "train_images: found int64"),
            (lambda a: {**a, "train_images": a["train_images"] > 3}, "train_images: found bool"),
            (lambda a: {**a, "train_images": a["train_images"] / 2}, "found pixels from 0 to 127.5"),
            (lambda a: {**a, "test_images": a["test_images"] / 255 - 0.1}, "found pixels from -0.1"),
            (lambda a: {**a, "test_images": np.full((5, 3, 6, 5), np.inf)}, "found pixels from inf"),
            (lambda a: {**a, "train_images": a["train_images"][:0], "train_labels": np.arange(0)}, "(0, 3, 6, 5)"),
            (lambda a: {**a, "test_images": a["test_images"][:0], "test_labels": np.arange(0)}, "shape (0, 3, 6, 5)"),
            (lambda a: {**a, "train_images": np.zeros((12, 3, 0, 0), np.uint8),
                        "test_images": np.zeros((5, 3, 0, 0), np.uint8)}, "found images of shape (12, 3, 0, 0)"),
            (lambda a: {**a, "train_images": np.array([None] * 12)}, "pickle"),
            (lambda a: {n: a[n] for n in list(a)[:-1]}, "test_labels"),
            (lambda a: {}, "train_images"),
        ],
    )  # fmt: skip
    def test_bad_files_are_named_in_one_line(self, change, mention, tmp_path):
        source = written(tmp_path / "mine.npz", change(good_arrays()))
        with pytest.raises(InputError) as caught:
            source.load()
        message = str(caught.value)
        assert mention in message and "accepted: " in message and "\n" not in message
        assert "mine.npz" in message

    @pytest.mark.parametrize("where", ["train", "test"])
    def test_a_nan_pixel_is_named_by_its_image(self, where, tmp_path):
        arrays = good_arrays("float32")
        arrays[f"{where}_images"][3, 1, 2, 2] = np.nan
        with pytest.raises(InputError, match=f"{where}.*NaN pixel in image 3.*accepted"):
            written(tmp_path / "a.npz", arrays).load()

    def test_broken_files(self, tmp_path):
        class Malicious:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        np.savez(tmp_path / "good.npz", **good_arrays())
        whole = (tmp_path / "good.npz").read_bytes()
        flipped = bytearray(whole)
        flipped[len(flipped) // 3] ^= 255
        broken = {
            "truncated.npz": whole[: len(whole) // 2],
            "empty.npz": b"",
            "flipped.npz": bytes(flipped),
            "text.npz": b"not an archive at all",
            "pickle.npz": pickle.dumps(Malicious()),
        }
        for name, content in broken.items():
            (tmp_path / name).write_bytes(content)
        np.save(tmp_path / "single.npy", np.zeros(3))
        for name in [*broken, "single.npy", "missing.npz", "."]:
            with pytest.raises(InputError) as caught:
                Arrays(path=tmp_path / name).load()
            message = str(caught.value)
            assert message.startswith(str(tmp_path / name)) and "accepted: " in message and "\n" not in message
        assert not (tmp_path / "ran").exists()

    def test_objects_in_the_archive_do_not_run(self, tmp_path):
        class Malicious:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        np.savez(tmp_path / "a.npz", **{**good_arrays(), "test_labels": np.array([Malicious()], dtype=object)})
        with pytest.raises(InputError, match=r"a\.npz"):
            Arrays(path=tmp_path / "a.npz").load()
        assert not (tmp_path / "ran").exists()

    def test_a_validation_share_that_leaves_nothing_to_train_on_is_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", **good_arrays())
        with pytest.raises(InputError, match=r"validation.*accepted"):
            Arrays(path=tmp_path / "a.npz", validation=0.9).load()
