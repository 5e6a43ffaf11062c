"""GTSRB on a miniature folder in the published layout, and its download from zips made of that."""

import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import Compose, Resize

from certtrain.config import structure
from certtrain.data import Gtsrb, Source, gtsrb
from certtrain.errors import InputError
from certtrain.noise import permutation

COLUMNS = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
RANDOM = np.random.default_rng(0)
ANSWERS = [7, 42, 0, 7, 16]


def ppm(path: Path) -> str:
    """A sign of an odd size; the middle of its row in the list."""
    width, height = RANDOM.integers(15, 90, 2).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    Image.fromarray(pixels, "RGB").resize((width, height)).save(path, "PPM")
    return f"{width};{height};5;5;{width - 5};{height - 5}"


def make(root: Path) -> Path:
    for folder, count in (("Training", 1), ("Final_Training/Images", 2)):
        for label in range(43):
            names = [f"0000{track}_00029.ppm" for track in range(count)]
            rows = [f"{name};{ppm(root / 'GTSRB' / folder / f'{label:05d}' / name)};{label}" for name in names]
            text = "\r\n".join([COLUMNS, *rows, ""])
            (root / "GTSRB" / folder / f"{label:05d}" / f"GT-{label:05d}.csv").write_text(text)
    images = root / "GTSRB/Final_Test/Images"
    rows = [f"{number:05d}.ppm;{ppm(images / f'{number:05d}.ppm')};{label}" for number, label in enumerate(ANSWERS)]
    (root / "GT-final_test.csv").write_text("\r\n".join([COLUMNS, *rows, ""]))
    (images / "GT-final_test.test.csv").write_text(COLUMNS.removesuffix(";ClassId"))
    (root / "GTSRB" / "Readme-Images.txt").write_text("published with it")
    return root


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("pristine") / "gtsrb")


@pytest.fixture
def root(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "gtsrb"))


def refused(source: Gtsrb, *mentions: str) -> None:
    with pytest.raises(InputError) as caught:
        source.load()
    message = str(caught.value)
    assert all(mention in message for mention in mentions), message
    assert "accepted: " in message and "\n" not in message
    assert not source.prepared.exists() and not list(source.prepared.parent.glob(".*.tmp"))


def everything(split) -> np.ndarray:
    return (255 * split.pixels(torch.arange(len(split)))).round().byte().numpy()


@pytest.mark.parametrize("size", [32, 7])
def test_is_what_torchvision_loads(root, size):
    """Images, labels and order, for the training folder that torchvision knows; the oracle resizes by itself."""
    dataset = Gtsrb(root=root, training="online", size=size).load()
    assert dataset.classes == 43 and dataset.shape == (3, size, size)
    transform = Compose([Resize((size, size)), np.asarray])
    for split, name in ((dataset.train, "train"), (dataset.test, "test")):
        images, labels = zip(*torchvision.datasets.GTSRB(root.parent, split=name, transform=transform), strict=True)
        assert split.labels.tolist() == list(labels)
        assert np.array_equal(everything(split), np.stack(images).transpose(0, 3, 1, 2))
    assert dataset.test.labels.tolist() == ANSWERS and everything(dataset.test).std() > 10


def test_the_benchmarks_own_training_images_are_the_default(root):
    source = structure(Source, {"type": "Gtsrb", "root": str(root)})
    dataset = source.load()
    assert dataset.train.labels.tolist() == [label for label in range(43) for _ in range(2)]
    path = root / "GTSRB/Final_Training/Images/00003/00001_00029.ppm"
    expected = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(everything(dataset.train)[7], expected)
    assert source.prepared == root.parent / "gtsrb.final.official.32.safetensors" and source.prepared.is_file()


def test_held_out_is_a_keyed_part_of_the_training_images(root, monkeypatch):
    monkeypatch.setattr(gtsrb, "HELD_OUT", 20)
    whole = Gtsrb(root=root).load()
    shutil.rmtree(root / "GTSRB/Final_Test")
    (root / "GT-final_test.csv").unlink()  # the official test images are not needed for it
    split = Gtsrb(root=root, test="held_out").load()
    order = permutation(86, "gtsrb", "held out")
    for part, numbers in ((split.test, order[:20]), (split.train, order[20:].sort().values)):
        assert part.labels.tolist() == whole.train.labels[numbers].tolist()
        assert np.array_equal(everything(part), everything(whole.train)[numbers.numpy()])
    assert len(split.test) == 20 and len(split.train) == 66 and split.checksum != whole.checksum
    assert split.test.labels.tolist() != sorted(split.test.labels.tolist())  # the first images are a mixture


def test_more_than_the_held_out_images_are_needed(root):
    refused(Gtsrb(root=root, test="held_out"), "Final_Training/Images: found 86 images", "more than the 1000")


def test_forms_are_prepared_beside_each_other(root, monkeypatch):
    sources = [Gtsrb(root=root), Gtsrb(root=root, training="online"), Gtsrb(root=root, size=5)]
    checksums = [source.load().checksum for source in sources]
    assert len(set(checksums)) == 3
    monkeypatch.setattr(Gtsrb, "contents", lambda self: pytest.fail("prepared again"))
    assert [source.load().checksum for source in sources] == checksums


def test_a_new_image_is_seen(root):
    Gtsrb(root=root).load()
    folder = root / "GTSRB/Final_Training/Images/00042"
    ppm(folder / "00009_00000.ppm")
    with pytest.raises(InputError, match=r"00042: found 00009_00000\.ppm; accepted: the images that GT-00042\.csv"):
        Gtsrb(root=root).load()


def edit(path: str, old: str, new: str):
    def damage(root: Path) -> None:
        text = (root / path).read_bytes().decode()
        assert old in text
        (root / path).write_bytes(text.replace(old, new, 1).encode("latin-1"))

    return damage


def write(path: str, content: bytes):
    return lambda root: (root / path).write_bytes(content)


def of_format(kind: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 20)).save(content, kind)
    return content.getvalue()


CLASS = "GTSRB/Final_Training/Images/00005"
LIST, TEST = f"{CLASS}/GT-00005.csv", "GTSRB/Final_Test/Images"
DAMAGES = {
    "no folder": (lambda p: shutil.rmtree(p), ["Final_Training/Images/00000: no such file", "--data.download true"]),
    "no class": (lambda p: shutil.rmtree(p / CLASS), ["Images/00005: no such file"]),
    "no list": (lambda p: (p / LIST).unlink(), ["GT-00005.csv: no such file"]),
    "an empty list": (write(LIST, b""), ["GT-00005.csv, line 1: found None"]),
    "another divider": (edit(LIST, COLUMNS, COLUMNS.replace(";", ",")), ["line 1: found ['Filename,Width"]),
    "no text": (write(LIST, b"\xff\xfe\x00"), ["GT-00005.csv: cannot be read"]),
    "a lost image": (lambda p: (p / CLASS / "00001_00029.ppm").unlink(), ["line 3: found '00001_00029.ppm'"]),
    "an image of another class": (edit(LIST, ";5\r\n00001", ";6\r\n00001"), ["found class 6 for 00000_00029.ppm"]),
    "listed twice": (edit(LIST, "00001_", "00000_"), ["line 3: found '00000_00029.ppm'"]),
    "a path": (edit(LIST, "00001_", "../00005/00001_"), ["line 3: found '../00005/00001_00029.ppm'"]),
    "half a row": (edit(LIST, "00001_00029.ppm;", "00001_00029.ppm\r\n;"), ["line 3: found class ''"]),
    "no test images": (lambda p: shutil.rmtree(p / TEST), ["Final_Test/Images: no such file"]),
    "an empty test folder": (lambda p: [f.unlink() for f in (p / TEST).glob("*.ppm")], ["found no images"]),
    "no answers": (lambda p: (p / "GT-final_test.csv").unlink(), ["GT-final_test.csv: no such file"]),
    "answers without classes": (lambda p: shutil.copy(p / TEST / "GT-final_test.test.csv", p / "GT-final_test.csv"),
                                ["GT-final_test.csv, line 1", "ClassId"]),
    "class 43": (edit("GT-final_test.csv", ";42", ";43"), ["line 3: found class '43'; accepted: 0 to 42"]),
    "a class below 0": (edit("GT-final_test.csv", ";42", ";-1"), ["line 3: found class '-1'"]),
    "a digit of another script": (edit("GT-final_test.csv", ";42", ";\u00b2"), ["cannot be read"]),
    "a test image too many": (lambda p: ppm(p / TEST / "00009.ppm"), ["Images: found 00009.ppm", "GT-final_test.csv"]),
    "an empty image": (write(f"{TEST}/00003.ppm", b""), ["00003.ppm: cannot be read", "PPM"]),
    "half an image": (write(f"{TEST}/00003.ppm", b"P6\n20 20\n255\n" + bytes(600)), ["00003.ppm: cannot be read"]),
    "another format": (write(f"{TEST}/00003.ppm", of_format("BMP")), ["00003.ppm: cannot be read"]),
    "a huge image": (write(f"{TEST}/00003.ppm", b"P6\n99999 99999\n255\n"), ["00003.ppm: cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "mentions"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_in_one_line(damage, mentions, root):
    damage(root)
    refused(Gtsrb(root=root, size=2), *mentions)


@pytest.mark.parametrize(
    ("field", "value"), [("size", 0), ("training", "all"), ("test", "random"), ("validation", 1.0)]
)
def test_bad_fields_are_refused(field, value):
    with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
        Gtsrb(**{field: value})


ZIPS = {
    "GTSRB_Final_Training_Images.zip": ["GTSRB/Final_Training", "GTSRB/Readme-Images.txt"],
    "GTSRB-Training_fixed.zip": ["GTSRB/Training"],
    "GTSRB_Final_Test_Images.zip": ["GTSRB/Final_Test", "GTSRB/Readme-Images.txt"],
    "GTSRB_Final_Test_GT.zip": ["GT-final_test.csv"],
}


@pytest.fixture
def served(pristine, tmp_path, monkeypatch) -> Path:
    """The four zips on a server, with their own md5s in the table."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, places in ZIPS.items():
        with zipfile.ZipFile(folder / name, "w") as file:
            for path in sorted(path for path in pristine.rglob("*")):
                inside = path.relative_to(pristine).as_posix()
                if any(inside == place or inside.startswith(f"{place}/") for place in places):
                    file.write(path, inside)
            file.writestr("../outside.ppm", "no")
            file.writestr("GTSRB/Final_Test/Images/../../../../outside.ppm", "no")
            file.writestr("GTSRB/Final_Test/Images/run.sh", "no")
    monkeypatch.setattr(gtsrb, "URL", f"{folder.as_uri()}/")
    return folder


def believed(served: Path, monkeypatch) -> None:
    table = {
        place: (name, hashlib.md5((served / name).read_bytes()).hexdigest())
        for place, (name, _) in gtsrb.ARCHIVES.items()
    }
    monkeypatch.setattr(gtsrb, "ARCHIVES", table)


def test_download(served, pristine, tmp_path, monkeypatch):
    root = tmp_path / "deep" / "gtsrb"
    source = Gtsrb(root=root, download=True)
    with pytest.raises(InputError, match=r"GTSRB_Final_Training_Images\.zip: could not be downloaded \(.*found md5"):
        source.load()  # not the published zip
    assert not [path for path in root.rglob("*") if path.is_file()]
    believed(served, monkeypatch)
    (root / "GTSRB/Final_Training/.Images.999999.tmp").mkdir(parents=True)  # a killed process unpacked here
    assert source.load().test.labels.tolist() == ANSWERS
    places = {path.name for path in root.iterdir()}
    assert places == {"GTSRB", "GT-final_test.csv", *ZIPS} - {"GTSRB-Training_fixed.zip"}
    assert {path.name for path in (root / "GTSRB").iterdir()} == {"Final_Training", "Final_Test"}
    assert {path.name for path in (root / "GTSRB/Final_Training").iterdir()} == {"Images"}
    assert not list(tmp_path.rglob("outside*")) and not list(tmp_path.rglob("run.sh"))
    for path in (root / "GTSRB").rglob("*.*"):
        assert path.read_bytes() == (pristine / path.relative_to(root)).read_bytes()
    monkeypatch.setattr(gtsrb, "fetch", lambda *a: pytest.fail("fetched"))
    assert len(source.load().train) == 86


def test_only_what_is_needed_is_downloaded(served, tmp_path, monkeypatch):
    believed(served, monkeypatch)
    monkeypatch.setattr(gtsrb, "HELD_OUT", 3)
    source = Gtsrb(root=tmp_path / "gtsrb", download=True, training="online", test="held_out")
    assert len(source.load().train) == 40
    assert {path.name for path in source.root.iterdir()} == {"GTSRB", "GTSRB-Training_fixed.zip"}


def test_a_zip_without_the_folder_is_refused(served, tmp_path, monkeypatch):
    shutil.copy(served / "GTSRB_Final_Test_GT.zip", served / "GTSRB_Final_Training_Images.zip")
    believed(served, monkeypatch)
    with pytest.raises(InputError, match=r"cannot be unpacked to .*Final_Training/Images .*accepted: a whole \.zip"):
        Gtsrb(root=tmp_path / "gtsrb", download=True).load()
    assert not (tmp_path / "gtsrb/GTSRB/Final_Training/Images").exists()


def test_the_published_checksums_are_torchvisions():
    import inspect

    known = inspect.getsource(torchvision.datasets.GTSRB)
    for place, (name, md5) in gtsrb.ARCHIVES.items():
        assert (name in known and md5 in known) == (place != "GTSRB/Final_Training/Images")
    assert gtsrb.URL in known
