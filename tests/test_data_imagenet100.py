"""ImageNet-100 on miniature folders: JPEGs of any shape and colour space, and splits that show the middle."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize

from certtrain.config import structure
from certtrain.data import Augment, ImageNet100, Loader, Source, Split, in_order
from certtrain.data.dataset import Dataset
from certtrain.data.mapped import MappedImages
from certtrain.data.resized_crop import resize
from certtrain.errors import InputError

RANDOM = np.random.default_rng(0)
WNIDS = ["n03", "n01", "n02"]
SIZES = [(300, 200), (31, 77), (64, 64), (41, 40), (20, 25), (333, 90)]  # width, height; smaller and larger than kept
SMALL = {"stored": 40, "shown": 32}


def jpeg(path: Path, mode: str = "RGB", size: tuple[int, int] = (50, 60), kind: str = "JPEG") -> None:
    width, height = size
    channels = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
    pixels = RANDOM.integers(0, 256, (height // 8 + 2, width // 8 + 2, *channels)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).resize(size).save(path, kind)


def make(root: Path) -> Path:
    """3 classes of 6 training images, and of 2, 3 and 2 test images."""
    for wnid in WNIDS:
        for number, size in enumerate(SIZES):
            jpeg(root / "train" / wnid / f"{wnid}_{number}.JPEG", ["RGB", "L", "CMYK"][number % 3], size)
        for number in range(3 if wnid == "n02" else 2):
            jpeg(root / "val" / wnid / f"val_{WNIDS.index(wnid)}{number}.JPEG", size=SIZES[number])
    (root / "train" / "LOC_synset_mapping.txt").write_text("n01 thing\n")
    (root.parent / "list.txt").write_text("n02\nn03\nn01\n")
    return root


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("pristine") / "imagenet100").parent


@pytest.fixture
def root(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "here")) / "imagenet100"


def source(root: Path, **fields) -> ImageNet100:
    return ImageNet100(**{"root": root, "class_list": root.parent / "list.txt", **SMALL, **fields})


def everything(split, how="pixels") -> np.ndarray:
    return (255 * getattr(split, how)(torch.arange(len(split)))).round().byte().numpy()


def by_torchvision(root: Path, stored: int, shown: int) -> tuple[np.ndarray, list[int]]:
    folder = ImageFolder(str(root), Compose([Resize(stored), CenterCrop(shown), np.asarray]))
    return np.stack([image for image, _ in folder]).transpose(0, 3, 1, 2), folder.targets


@pytest.mark.parametrize(("stored", "shown"), [(40, 32), (41, 33), (37, 37), (90, 2)])
def test_training_images_are_those_of_the_customary_test_protocol(root, stored, shown):
    """Against torchvision's ImageFolder, Resize and CenterCrop: every byte, non-square, grey and CMYK images too."""
    dataset = source(root, stored=stored, shown=shown).load()
    assert dataset.shape == (3, shown, shown) and dataset.classes == 3
    images, labels = by_torchvision(root / "train", stored, shown)
    assert dataset.train.labels.tolist() == labels and np.array_equal(everything(dataset.train), images)
    assert np.array_equal(everything(dataset.train, "stored_pixels"), by_torchvision(root / "train", stored, stored)[0])
    assert images.std() > 10 and len(images) == 18


def test_the_published_sizes_are_the_defaults(root):
    dataset = ImageNet100(root=root, class_list=root.parent / "list.txt").load()
    assert dataset.shape == (3, 224, 224) and dataset.train.images.shape == (18, 3, 256, 256)
    images, _ = by_torchvision(root / "train", 256, 224)
    assert np.array_equal(everything(dataset.train), images)


def test_test_images_are_numbered_in_turns(root):
    """A prefix is a mixture of classes, whatever their numbers of images."""
    dataset = source(root).load()
    assert dataset.test.labels.tolist() == [0, 1, 2, 0, 1, 2, 1]
    images, labels = by_torchvision(root / "val", 40, 32)
    place = {label: [number for number, found in enumerate(labels) if found == label] for label in range(3)}
    order = [place[0][0], place[1][0], place[2][0], place[0][1], place[1][1], place[2][1], place[1][2]]
    assert np.array_equal(everything(dataset.test), images[order])


def test_a_hundred_folders_need_no_list(tmp_path):
    root = tmp_path / "imagenet100"
    names = [f"n{number * 7919 % 100:08d}" for number in range(100)]
    for name in names:
        for split in ("train", "val"):
            jpeg(root / split / name / "a.jpg", size=(4, 5))
    (root / "train" / ".cache").mkdir()
    built = structure(Source, {"type": "ImageNet100", "root": str(root), "stored": 4, "shown": 2})
    assert built.load().classes == 100
    shutil.rmtree(root / "train" / names[3])
    with pytest.raises(InputError, match=r"train: found 99 classes; accepted: 100, or a list of .*--data\.class_list"):
        built.load()


def test_a_list_takes_some_classes_and_numbers_them_by_name(root):
    (root.parent / "list.txt").write_text("n03\nn01")
    some = source(root).load()
    assert some.classes == 2 and some.test.labels.tolist() == [0, 1, 0, 1]
    (root.parent / "list.txt").write_text("n01\nn03\n")
    assert source(root).load().checksum == some.checksum
    (root.parent / "list.txt").write_text("n01\nn02\n")
    assert source(root).load().checksum != some.checksum  # prepared again


def test_is_prepared_once_for_each_stored_size(root, monkeypatch):
    first = source(root).load()
    assert (root.parent / "imagenet100.40.safetensors").is_file()
    other = source(root, stored=36).load()
    assert other.checksum != first.checksum
    monkeypatch.setattr(ImageNet100, "contents", lambda self: pytest.fail("prepared again"))
    assert source(root).load().checksum == first.checksum and source(root, stored=36).load().checksum == other.checksum
    whole = source(root, shown=40).load()  # of the same file
    assert whole.shape == (3, 40, 40) and whole.checksum != first.checksum


def test_a_png_by_the_name_of_a_jpeg_is_read(root):
    """As one of ImageNet's is."""
    jpeg(root / "train" / "n01" / "n01_0.JPEG", kind="PNG")
    assert np.array_equal(everything(source(root).load().train), by_torchvision(root / "train", 40, 32)[0])


def refused(built: ImageNet100, *mentions: str) -> None:
    with pytest.raises(InputError) as caught:
        built.load()
    message = str(caught.value)
    assert all(mention in message for mention in mentions), message
    assert "accepted: " in message and "\n" not in message
    assert not built.prepared.exists() and not list(built.prepared.parent.glob(".*.tmp"))


def listed(content: bytes):
    return lambda root: (root.parent / "list.txt").write_bytes(content)


def gif() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 20)).save(content, "GIF")
    return content.getvalue()


IMAGE = "train/n02/n02_3.JPEG"
DAMAGES = {
    "no folder": (lambda p: shutil.rmtree(p), ["n01: no such file", "train/WNID"]),
    "no val": (lambda p: shutil.rmtree(p / "val"), ["val/n01: no such file"]),
    "no class in val": (lambda p: shutil.rmtree(p / "val/n02"), ["val/n02: no such file"]),
    "an empty class": (lambda p: [f.unlink() for f in (p / "train/n02").iterdir()], ["train/n02: found no images"]),
    "an empty list": (listed(b""), ["list.txt: found no classes"]),
    "no list": (lambda p: (p.parent / "list.txt").unlink(), ["list.txt: no such file"]),
    "a class twice": (listed(b"n01\nn02\nn01\n"), ["list.txt, line 3: found 'n01'"]),
    "a path": (listed(b"../train/n01\n"), ["list.txt, line 1: found '../train/n01'"]),
    "the folder itself": (listed(b".\n"), ["line 1: found '.'"]),
    "an empty line": (listed(b"n01\n\nn02\n"), ["line 2: found ''"]),
    "no text": (listed(b"\xff\xfe"), ["list.txt: cannot be read"]),
    "an unknown class": (listed(b"n01\nn99\n"), ["train/n99: no such file"]),
    "half an image": (lambda p: (p / IMAGE).write_bytes((p / IMAGE).read_bytes()[:300]), [IMAGE, "cannot be read"]),
    "an empty image": (lambda p: (p / IMAGE).write_bytes(b""), [IMAGE, "JPEG or PNG"]),
    "another format": (lambda p: (p / IMAGE).write_bytes(gif()), [IMAGE, "cannot be read"]),
    "a folder for an image": (lambda p: (p / "train/n02/z.JPEG").mkdir(), ["z.JPEG: cannot be read"]),
}


@pytest.mark.parametrize(("damage", "mentions"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_in_one_line(damage, mentions, root):
    damage(root)
    refused(source(root), *mentions)


def test_no_folder_at_all(tmp_path):
    refused(ImageNet100(root=tmp_path / "none"), "none/train: no such file", "train/WNID/*.JPEG")


def test_bad_sizes_are_refused():
    for fields, field in (
        ({"shown": 0}, "shown"),
        ({"stored": 222}, "stored"),
        ({"stored": 225}, "stored"),
        ({"validation": -0.1}, "validation"),
    ):
        with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
            ImageNet100(**fields)


def made_up(mapped: bool, count=10, side=12, shown: int | None = 8) -> Split:
    array = np.random.default_rng(3).integers(0, 256, (count, 3, side, side)).astype(np.uint8)
    images = MappedImages(array, "a" * 64) if mapped else torch.from_numpy(array)
    return Split(images, torch.arange(count) % 3, shown=shown)


@pytest.mark.parametrize("mapped", [False, True])
class TestShown:
    def test_parts_show_the_same_middle(self, mapped):
        split = made_up(mapped)
        whole = split.stored_pixels(torch.arange(10))
        assert whole.shape == (10, 3, 12, 12) and split.shape == (10, 3, 8, 8)
        for part, numbers in ((split.subset(torch.tensor([7, 2])), [7, 2]), (split.to(torch.device("cpu")), range(10))):
            assert torch.equal(part.pixels(torch.arange(len(part))), whole[list(numbers), :, 2:10, 2:10])
            assert part.shape[1:] == (3, 8, 8)
        assert split.pixels(torch.arange(0)).shape == (0, 3, 8, 8)

    def test_data_sets_and_loaders_show_it(self, mapped):
        split = made_up(mapped)
        assert Dataset(split, split, split, 3, "").shape == (3, 8, 8)
        (batch,) = in_order(split, 20)
        assert torch.equal(batch.images, split.pixels(torch.arange(10)))
        for batch in Loader(split, 4, Augment(flip=True), seed=0).epoch(0):
            expected = split.pixels(batch.index)
            expected[batch.augmentation.flip] = expected[batch.augmentation.flip].flip(3)
            assert torch.equal(batch.images, expected)

    def test_resized_crops_are_taken_from_all_that_is_stored(self, mapped):
        split = made_up(mapped)
        outside = False
        for batch in Loader(split, 4, Augment(resized_crop=8, flip=True), seed=0).epoch(0):
            drawn = batch.augmentation
            assert torch.equal(batch.images, resize(split.stored_pixels(batch.index), drawn, 8))
            outside |= bool((drawn.top < 2).any() or (drawn.left < 2).any())
            assert batch.images.shape[1:] == (3, 8, 8)
        assert outside

    def test_crops_of_another_size_than_the_images_are_refused(self, mapped):
        with pytest.raises(InputError, match=r"resized_crop: found 12 for images of 8×8; accepted: their side"):
            Loader(made_up(mapped), 4, Augment(resized_crop=12), seed=0)
