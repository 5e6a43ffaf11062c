"""TinyImageNet and ImageNet64 on miniature folders in the real layouts, and splits whose images stay in their file."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.numpy import load_file
from torchvision.datasets.folder import pil_loader
from walking import walk

from certtrain.command_line import main
from certtrain.data import (
    Augment,
    ImageNet64,
    Loader,
    Split,
    TinyImageNet,
    imagenet64,
    in_order,
    prepared,
    tiny_imagenet,
)
from certtrain.data.mapped import MappedImages
from certtrain.errors import InputError
from certtrain.locking import exclusive, lock_of

WNIDS = ["n03", "n01", "n02"]  # as in the published list, unsorted
PER_CLASS = 5
RANDOM = np.random.default_rng(0)


def jpeg(path: Path, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> None:
    from PIL import Image

    width, height = size
    channels = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
    pixels = RANDOM.integers(0, 256, (height // 8 + 1, width // 8 + 1, *channels)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).resize(size).save(path, "JPEG", quality=90)


def make_tiny(root: Path) -> Path:
    """3 classes of 5 training images and 4 test images; some are grey."""
    for wnid in WNIDS:
        names = [f"{wnid}_{number}.JPEG" for number in range(PER_CLASS)]
        for number, name in enumerate(names):
            jpeg(root / "train" / wnid / "images" / name, "L" if number == 1 else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(f"{name}\t0\t0\t63\t63\n" for name in names))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    lines = []
    for number, wnid in enumerate(["n02", "n03", "n02", "n01"]):
        jpeg(root / "val" / "images" / f"val_{number}.JPEG", "L" if number == 3 else "RGB")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images").mkdir(parents=True)
    (root / "words.txt").write_text("n01\tthing\n")
    return root


def make_imagenet64(root: Path, count: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    root.mkdir(parents=True)
    known = {}
    for number, name in enumerate(imagenet64.TRAIN + imagenet64.TEST):
        data = RANDOM.integers(0, 256, (count, 12288)).astype(np.uint8)
        labels = (np.arange(count) * 211 + number) % 1000 + 1
        save = np.savez_compressed if number % 2 else np.savez
        save(root / name, data=data, labels=labels, mean=np.zeros(12288))
        known[name] = data, labels
    return known


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    make_tiny(folder / "tiny")
    make_imagenet64(folder / "imagenet64")
    return folder


@pytest.fixture
def tiny(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine / "tiny", tmp_path / "tiny"))


@pytest.fixture
def big(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine / "imagenet64", tmp_path / "imagenet64"))


def refused(source, *mentions: str) -> None:
    with pytest.raises(InputError) as caught:
        source.load()
    message = str(caught.value)
    assert all(mention in message for mention in mentions), message
    assert "accepted: " in message and "\n" not in message
    assert not source.prepared.exists() and not list(source.prepared.parent.glob(".*.tmp"))


class Preparations:
    """Counts how often a source's folder is read."""

    def __init__(self, monkeypatch, source):
        self.count, contents = 0, source.contents

        def counted(this):
            self.count += 1
            return contents(this)

        monkeypatch.setattr(source, "contents", counted)


TINY_DAMAGES = {
    "no folder": (lambda p: shutil.rmtree(p), ["tiny/wnids.txt: no such file", "--data.download true"]),
    "no val labels": (lambda p: (p / "val/val_annotations.txt").unlink(),
                      ["tiny/val/val_annotations.txt: no such file", "val/val_annotations.txt"]),
    "no val images": (lambda p: shutil.rmtree(p / "val/images"), ["tiny/val/images: no such file"]),
    "no wnids": (lambda p: (p / "wnids.txt").unlink(), ["tiny/wnids.txt: no such file"]),
    "empty wnids": (lambda p: (p / "wnids.txt").write_text(""), ["wnids.txt: found no classes"]),
    "a class twice": (lambda p: (p / "wnids.txt").write_text("n01\nn02\nn01\n"), ["wnids.txt, line 3", "'n01'"]),
    "a path for a class": (lambda p: (p / "wnids.txt").write_text("../n01\n"), ["line 1: found '../n01'"]),
    "no text": (lambda p: (p / "wnids.txt").write_bytes(b"\xff\xfe"), ["wnids.txt: cannot be read"]),
    "no class folder": (lambda p: shutil.rmtree(p / "train/n02"), ["tiny/train/n02/images: no such file"]),
    "an empty class": (lambda p: [f.unlink() for f in (p / "train/n02/images").iterdir()],
                       ["tiny/train/n02/images: found no images"]),
    "a lost image": (lambda p: (p / "train/n02/images/n02_3.JPEG").unlink(),
                     ["n02_3.JPEG: no such file", "the 5 images that n02_boxes.txt lists"]),
    "a lost val image": (lambda p: (p / "val/images/val_2.JPEG").unlink(), ["line 3: found 'val_2.JPEG'"]),
    "a val image too many": (lambda p: jpeg(p / "val/images/val_9.JPEG"), ["val/images: found val_9.JPEG"]),
    "a val image listed twice": (lambda p: append(p, "val_1.JPEG\tn01\n"), ["line 5: found 'val_1.JPEG'"]),
    "an unknown wnid": (lambda p: append(p, "val_4.JPEG\tn99\t0\n"), ["val_annotations.txt, line 5", "'n99'"]),
    "half a line": (lambda p: append(p, "val_4.JPEG"), ["val_annotations.txt, line 5: found ''"]),
    "an empty line": (lambda p: append(p, "\n"), ["val_annotations.txt, line 5: found ''"]),
    "a path for an image": (lambda p: append(p, "../images/val_1.JPEG\tn01\n"), ["line 5: found '../images"]),
    "a small image": (lambda p: jpeg(p / "train/n01/images/n01_0.JPEG", size=(64, 32)),
                      ["n01_0.JPEG: found 64×32 pixels; accepted: 64×64"]),
    "an empty image": (lambda p: (p / "train/n03/images/n03_4.JPEG").write_bytes(b""), ["n03_4.JPEG: cannot be"]),
    "half an image": (lambda p: cut(p / "train/n03/images/n03_4.JPEG"), ["n03_4.JPEG: cannot be read"]),
    "another format": (lambda p: png(p / "val/images/val_0.JPEG"), ["val_0.JPEG: cannot be read"]),
    "a folder for an image": (lambda p: folder(p / "val/images/val_0.JPEG"), ["val_0.JPEG: cannot be read"]),
}  # fmt: skip


class TestTinyImageNet:
    def test_images_labels_and_order(self, tiny):
        dataset = TinyImageNet(root=tiny).load()
        assert dataset.classes == 3 and dataset.shape == (3, 64, 64)
        assert dataset.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5  # sorted ids, as torchvision's ImageFolder
        assert dataset.test.labels.tolist() == [1, 2, 1, 0]  # as val_annotations.txt lists them
        train = [tiny / "train" / w / "images" / f"{w}_{n}.JPEG" for w in sorted(WNIDS) for n in range(PER_CLASS)]
        test = [tiny / "val" / "images" / f"val_{n}.JPEG" for n in range(4)]
        for split, paths in ((dataset.train, train), (dataset.test, test)):
            pixels = split.pixels(torch.arange(len(split)))
            assert pixels.dtype == torch.float32 and len(pixels) == len(paths)
            for image, path in zip(pixels, paths, strict=True):
                expected = np.asarray(pil_loader(str(path))).transpose(2, 0, 1)
                assert np.array_equal((255 * image).round().numpy(), expected) and expected.std() > 10
        grey = dataset.test.pixels(torch.tensor([3]))[0]
        assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2]) and grey.std() > 0

    def test_labels_are_those_of_torchvisions_image_folder(self, tiny):
        folder = torchvision.datasets.ImageFolder(str(tiny / "train"))
        assert TinyImageNet(root=tiny).load().train.labels.tolist() == folder.targets

    def test_a_colour_space_of_printers_is_converted(self, tiny):
        jpeg(tiny / "val" / "images" / "val_0.JPEG", "CMYK")
        assert TinyImageNet(root=tiny).load().shape == (3, 64, 64)

    def test_without_lists_of_boxes(self, tiny):
        for path in tiny.glob("train/*/*_boxes.txt"):
            path.unlink()
        (tiny / "train" / "n01" / "images" / "n01_3.JPEG").unlink()
        assert len(TinyImageNet(root=tiny).load().train) == 14

    @pytest.mark.parametrize(("damage", "mentions"), TINY_DAMAGES.values(), ids=TINY_DAMAGES)
    def test_damage_is_named_in_one_line(self, damage, mentions, tiny):
        damage(tiny)
        refused(TinyImageNet(root=tiny), *mentions)

    def test_damage_after_the_preparation_is_seen(self, tiny):
        TinyImageNet(root=tiny).load()
        (tiny / "val" / "val_annotations.txt").unlink()
        with pytest.raises(InputError, match=r"val_annotations\.txt: no such file"):
            TinyImageNet(root=tiny).load()

    def test_download(self, pristine, tmp_path, monkeypatch):
        archive = tmp_path / "served.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted((pristine / "tiny").rglob("*")):
                file.write(path, Path("tiny-imagenet-200") / path.relative_to(pristine / "tiny"))
        monkeypatch.setattr(tiny_imagenet, "URL", archive.as_uri())
        root = tmp_path / "deep" / "data" / "mine"
        source = TinyImageNet(root=root, download=True)
        refused_before = not root.parent.exists()
        with pytest.raises(InputError, match=r"tiny-imagenet-200\.zip: could not be downloaded \(.*found md5"):
            source.load()  # not the published zip
        assert refused_before and not list(root.parent.iterdir())
        monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        (root.parent / ".mine.999999.tmp").mkdir()  # a killed process unpacked here
        assert source.load().train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        names = sorted(path.name for path in root.parent.iterdir())
        assert names == ["mine", "mine.safetensors", "tiny-imagenet-200.zip"]
        archive.unlink()
        shutil.rmtree(root)
        assert len(source.load().test) == 4  # from the zip that is there

    def test_a_folder_that_is_there_is_never_downloaded_over(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny_imagenet, "fetch", lambda *a: pytest.fail("fetched"))
        assert len(TinyImageNet(root=tiny, download=True).load().train) == 15
        (tiny / "wnids.txt").unlink()
        with pytest.raises(InputError, match=r"wnids\.txt: no such file"):
            TinyImageNet(root=tiny, download=True).load()


def append(root: Path, line: str) -> None:
    with (root / "val" / "val_annotations.txt").open("a") as file:
        file.write(line)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def png(path: Path) -> None:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, "PNG")
    path.write_bytes(content.getvalue())


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DATA = np.zeros((2, 12288), np.uint8)
NPZ_DAMAGES = {
    "32x32": ({"data": np.zeros((2, 3072), np.uint8)}, ["found data of shape (2, 3072), images of 32×32",
                                                         "accepted: (N, 12288), images of 64×64"]),
    "a column less": ({"data": np.zeros((2, 12287), np.uint8)}, ["found data of shape (2, 12287);"]),
    "folded": ({"data": np.zeros((2, 3, 64, 64), np.uint8)}, ["found data of shape (2, 3, 64, 64);"]),
    "a number": ({"data": np.uint8(3)}, ["found data of shape ();"]),
    "floats": ({"data": DATA.astype(np.float32)}, ["2 images as float32", "uint8"]),
    "the other order": ({"data": np.asfortranarray(DATA)}, ["Fortran order"]),
    "no images": ({"data": DATA[:0], "labels": np.arange(0)}, ["found 0 images"]),
    "label 0": ({"labels": np.array([1, 0])}, ["found label 0 at image 1; accepted: 1 to 1000"]),
    "label 1001": ({"labels": np.array([1001, 1])}, ["found label 1001 at image 0"]),
    "a huge label": ({"labels": np.array([1, 2**63], np.uint64)}, ["at image 1"]),
    "labels as floats": ({"labels": np.array([1.0, np.nan])}, ["labels of shape (2,) as float64"]),
    "three labels": ({"labels": np.array([1, 2, 3])}, ["found labels of shape (3,)", "accepted: (2,)"]),
    "no labels": ({"labels": None}, ["cannot be read", "labels"]),
    "no data": ({"data": None}, ["cannot be read", "data"]),
    "objects": ({"labels": np.array([1, {}], dtype=object)}, ["cannot be read", "pickle"]),
    "objects as data": ({"data": np.array([[{}]], dtype=object)}, ["found data of shape (1, 1)"]),
}  # fmt: skip


class TestImageNet64:
    @pytest.mark.parametrize("block", [2, 3, 4096])  # of 3 images: with a rest, exactly, larger
    def test_images_labels_and_order(self, block, tmp_path, monkeypatch):
        known = make_imagenet64(tmp_path / "root")
        monkeypatch.setattr(imagenet64, "BLOCK", block)
        dataset = ImageNet64(root=tmp_path / "root").load()
        assert dataset.classes == 1000 and dataset.shape == (3, 64, 64)
        for split, names in ((dataset.train, imagenet64.TRAIN), (dataset.test, imagenet64.TEST)):
            data = np.concatenate([known[name][0] for name in names])
            labels = np.concatenate([known[name][1] for name in names])
            assert split.labels.tolist() == (labels - 1).tolist() and split.labels.dtype == torch.int64
            found = split.pixels(torch.arange(len(split)))
            assert found[1, 2, 3, 4] == np.float32(data[1, 2 * 4096 + 3 * 64 + 4]) / np.float32(255)
            assert torch.equal(found, torch.from_numpy(data).reshape(-1, 3, 64, 64).float() / 255)

    @walk("name", [*imagenet64.TRAIN, *imagenet64.TEST])
    def test_a_missing_file_is_named(self, name, big):
        (big / name).rename(big / "elsewhere")
        refused(ImageNet64(root=big), f"{big / name}: no such file", "docs/data.md")
        (big / "elsewhere").rename(big / name)

    @walk(
        "damage, name",
        [*product(NPZ_DAMAGES, ["train_data_batch_1.npz"]), ("label 0", "train_data_batch_10.npz"),
         ("no data", "train_data_batch_10.npz"), ("32x32", "val_data.npz"), ("label 1001", "val_data.npz")],
    )  # fmt: skip
    def test_damage_is_named_before_anything_is_written(self, damage, name, big, monkeypatch):
        monkeypatch.setattr(prepared, "write_atomically", lambda *a: pytest.fail("written"))
        (change, mentions), whole = NPZ_DAMAGES[damage], (big / name).read_bytes()
        arrays = {"data": DATA, "labels": np.array([1, 1000])} | change
        np.savez(big / name, **{key: value for key, value in arrays.items() if value is not None})
        refused(ImageNet64(root=big), f"{big / name}: ", *mentions)
        (big / name).write_bytes(whole)

    @pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04N.", b"PK\x03\x04"])
    def test_broken_files(self, content, big):
        (big / "train_data_batch_7.npz").write_bytes(content)
        refused(ImageNet64(root=big), "train_data_batch_7.npz: cannot be read", "12288")

    @pytest.mark.parametrize("number", [2, 3], ids=["stored", "compressed"])
    def test_a_flipped_bit_or_a_cut_file_is_seen(self, number, big):
        path = big / f"train_data_batch_{number}.npz"
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[20_000] ^= 4
        for content in (bytes(flipped), whole[: len(whole) // 2]):
            path.write_bytes(content)
            refused(ImageNet64(root=big), f"{path}: cannot be read")

    def test_one_array_that_is_no_archive(self, big):
        with (big / "val_data.npz").open("wb") as file:
            np.save(file, DATA)
        refused(ImageNet64(root=big), "val_data.npz: cannot be read (not an .npz)")


SOURCES = pytest.mark.parametrize("source", [TinyImageNet, ImageNet64], ids=lambda source: source.__name__)


def root_of(source, folder: Path) -> Path:
    return folder / ("tiny" if source is TinyImageNet else "imagenet64")


CHANGES = {
    "an image more": (TinyImageNet, lambda p: jpeg(p / "train/n01/images/n01_7.JPEG"), 16),
    "an image renamed": (TinyImageNet, lambda p: (p / "train/n01/images/n01_0.JPEG").rename(
        p / "train/n01/images/n01_00.JPEG"), None),
    "a label": (TinyImageNet, lambda p: (p / "val/val_annotations.txt").write_text("".join(
        f"val_{n}.JPEG\tn01\n" for n in range(4))), 15),
    "a class less": (TinyImageNet, lambda p: ((p / "wnids.txt").write_text("n01\nn02\nn03\n")), 15),
    "another file": (ImageNet64, lambda p: np.savez(p / "train_data_batch_4.npz", labels=np.array([5]),
                                                    data=np.ones((1, 12288), np.uint8)), 28),
    "a file touched": (ImageNet64, lambda p: os.utime(p / "val_data.npz"), 30),
}  # fmt: skip


class TestPreparedFile:
    @pytest.fixture
    def root(self, source, pristine, tmp_path) -> Path:
        return Path(shutil.copytree(root_of(source, pristine), root_of(source, tmp_path)))

    @SOURCES
    def test_is_safetensors_with_the_sums_of_its_images(self, source, root, tmp_path):
        dataset = source(root=root).load()
        file = tmp_path / f"{root.name}.safetensors"
        assert file == source(root=root).prepared and sorted(tmp_path.iterdir()) == sorted([root, file])
        tensors = load_file(file)
        for name, split in (("train", dataset.train), ("test", dataset.test)):
            images = tensors[f"{name}_images"]
            assert images.dtype == np.uint8 and images.shape == split.images.shape
            assert torch.equal(split.images[torch.arange(len(split))], torch.from_numpy(images))
            assert split.images.sha256 == hashlib.sha256(images.tobytes()).hexdigest()
            assert tensors[f"{name}_labels"].tolist() == split.labels.tolist()
        expected = hashlib.sha256()
        for name in ("train", "test"):
            expected.update(hashlib.sha256(tensors[f"{name}_images"].tobytes()).hexdigest().encode())
            expected.update(tensors[f"{name}_labels"].tobytes())
        assert dataset.checksum == expected.hexdigest()

    @SOURCES
    def test_a_second_start_reads_the_file_alone(self, source, root, monkeypatch):
        preparations = Preparations(monkeypatch, source)
        first, inode = source(root=root).load(), source(root=root).prepared.stat().st_ino
        second = source(root=root, validation=0.4).load()
        assert preparations.count == 1 and source(root=root).prepared.stat().st_ino == inode
        assert second.checksum == first.checksum and len(first.validation) == 0
        assert torch.equal(second.test.labels, first.test.labels)

    def test_the_folder_by_another_name(self, tiny, tmp_path, monkeypatch):
        """A symbolic link gives the prepared file another place, where the folder itself is read-only."""
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "link").symlink_to(tiny, target_is_directory=True)
        TinyImageNet(root=tmp_path / "work" / "link").load()
        assert (tmp_path / "work" / "link.safetensors").exists() and not (tmp_path / "tiny.safetensors").exists()
        monkeypatch.chdir(tiny)
        preparations = Preparations(monkeypatch, TinyImageNet)
        for root in (Path("."), tiny, Path("../tiny"), Path("../tiny/")):
            assert len(TinyImageNet(root=root).load().train) == 15
        assert preparations.count == 1

    @pytest.mark.parametrize(("source", "change", "count"), CHANGES.values(), ids=CHANGES)
    def test_is_made_again_when_the_folder_changes(self, source, change, count, root, monkeypatch):
        preparations = Preparations(monkeypatch, source)
        source(root=root).load()
        time.sleep(0.01)  # file systems keep time by ticks
        change(root)
        if count is None:
            with pytest.raises(InputError, match="n01_boxes"):
                source(root=root).load()
        else:
            assert len(source(root=root).load().train) == count
            source(root=root).load()
        assert preparations.count == 2

    def broken(self, file: Path):
        whole = file.read_bytes()
        header = json.loads(whole[8 : prepared.HEADER])
        yield b""
        yield whole[:100]
        yield whole[:-1]
        yield whole + b"\0"
        yield bytes(len(whole))
        yield whole[:8] + b"[" + whole[9:]
        for change in ({"format": "0"}, {"state": "0" * 64}, {"classes": "many"}):
            changed = {**header, "__metadata__": {**header["__metadata__"], **change}}
            yield whole[:8] + json.dumps(changed).encode().ljust(prepared.HEADER - 8) + whole[prepared.HEADER :]
        for key in header:
            rest = {name: value for name, value in header.items() if name != key}
            yield whole[:8] + json.dumps(rest).encode().ljust(prepared.HEADER - 8) + whole[prepared.HEADER :]

    @SOURCES
    def test_a_broken_file_is_made_again(self, source, root, monkeypatch):
        preparations = Preparations(monkeypatch, source)
        expected, file = source(root=root).load().checksum, source(root=root).prepared
        whole = file.read_bytes()
        for number, content in enumerate(self.broken(file), start=2):
            file.write_bytes(content)
            assert source(root=root).load().checksum == expected
            assert preparations.count == number and file.read_bytes() == whole

    @pytest.mark.parametrize(
        ("source", "error"),
        [(TinyImageNet, KeyboardInterrupt), (TinyImageNet, OSError(28, "No space left on device")),
         (ImageNet64, OSError(28, "No space left on device")), (ImageNet64, MemoryError)],
    )  # fmt: skip
    def test_interrupted_at_any_moment_it_leaves_nothing(self, source, error, root, tmp_path, monkeypatch):
        """Raised at the first, second, … write and at the last moment; the next start prepares."""
        expected = InputError if isinstance(error, OSError) else error
        for moment in range(100):
            calls = iter(range(1000))

            def interrupted(*arguments, moment=moment, calls=calls):
                if next(calls) == moment:
                    raise error

            with monkeypatch.context() as patch:
                patch.setattr(prepared.Progress, "advance", interrupted)
                patch.setattr(os, "fsync", interrupted)
                try:
                    source(root=root).load()
                except expected as caught:
                    assert expected is not InputError or "No space left on device" in str(caught)
                    assert list(tmp_path.iterdir()) == [root]
                else:
                    break
        assert moment >= 3
        assert sorted(tmp_path.iterdir()) == sorted([root, source(root=root).prepared])
        assert len(source(root=root).load().test) > 0

    def test_killed_it_leaves_what_the_next_one_clears(self, tiny, tmp_path):
        code = (
            "import sys, time\nfrom pathlib import Path\nfrom certtrain.data import TinyImageNet, prepared\n"
            "prepared.Progress.advance = lambda *a: (print('half', flush=True), time.sleep(600))\n"
            "TinyImageNet(root=Path(sys.argv[1])).load()\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(tiny)], stdout=subprocess.PIPE, text=True,
                                   cwd=Path(__file__).parents[1])  # fmt: skip
        assert process.stdout is not None
        while process.stdout.readline() != "half\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        (left,) = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
        assert left.name.startswith(".tiny.safetensors.") and left.name.endswith(".tmp")
        assert len(TinyImageNet(root=tiny).load().train) == 15
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.safetensors"]

    def test_of_two_that_start_at_once_one_prepares(self, tiny, monkeypatch):
        preparations, found = Preparations(monkeypatch, TinyImageNet), []

        def start():
            found.append(TinyImageNet(root=tiny).load().checksum)

        threads = [threading.Thread(target=start) for _ in range(3)]
        with exclusive(lock_of(TinyImageNet(root=tiny).prepared), "it"):
            for thread in threads:
                thread.start()
            time.sleep(0.3)
            assert preparations.count == 0
        for thread in threads:
            thread.join(60)
        assert preparations.count == 1 and len(set(found)) == 1 and len(found) == 3

    def test_where_no_locks_are_known(self, tiny, tmp_path, monkeypatch):
        """Two prepare, then; the leftovers of a third stay, because it may be at work."""
        monkeypatch.setattr("fcntl.flock", lambda *a: (_ for _ in ()).throw(OSError(37, "No locks available")))
        other = tmp_path / ".tiny.safetensors.999999.tmp"
        other.write_bytes(b"at work")
        assert len(TinyImageNet(root=tiny).load().train) == 15 and other.exists()

    def test_one_mapping_lives_on_when_the_file_is_made_again(self, tiny):
        before = TinyImageNet(root=tiny).load()
        images = before.train.pixels(torch.arange(15))
        time.sleep(0.01)
        for number in range(PER_CLASS):
            path = tiny / "train" / "n01" / "images" / f"n01_{number}.JPEG"
            path.unlink()
            jpeg(path)
        after = TinyImageNet(root=tiny).load()
        assert after.checksum != before.checksum
        assert torch.equal(before.train.pixels(torch.arange(15)), images)

    def test_a_place_that_cannot_be_written_to(self, tiny, tmp_path):
        (tmp_path / "tiny.safetensors").mkdir()
        with pytest.raises(InputError, match=r"tiny\.safetensors: cannot be written \(Is a directory\).*symbolic link"):
            TinyImageNet(root=tiny).load()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.safetensors"]


@pytest.fixture
def pair(tmp_path) -> tuple[Split, Split]:
    """The same images mapped and in memory."""
    images = RANDOM.integers(0, 256, (40, 3, 6, 5)).astype(np.uint8)
    images.tofile(tmp_path / "images")
    array = np.asarray(np.memmap(tmp_path / "images", np.uint8, "r", shape=images.shape))
    labels = torch.arange(40) % 4
    return Split(MappedImages(array, "a" * 64), labels), Split(torch.from_numpy(images), labels)


class TestMappedSplit:
    @pytest.mark.parametrize("augment", [Augment(), Augment(2, True), Augment(2, True, "zero")])
    def test_gives_the_batches_of_a_split_in_memory(self, augment, pair):
        chosen = torch.tensor([3, 3, 39, 0, 17, *range(20, 33)])
        for splits in (pair, [split.subset(chosen) for split in pair],
                       [split.subset(chosen).subset(torch.arange(1, 12)) for split in pair]):  # fmt: skip
            mapped, memory = (Loader(split, 7, augment, seed=3) for split in splits)
            assert isinstance(mapped.split.images, MappedImages) and len(mapped.split) == len(memory.split)
            for epoch, start in ((0, 0), (1, 0), (1, 1)):
                batches = list(zip(mapped.epoch(epoch, start), memory.epoch(epoch, start), strict=True))
                assert len(batches) == len(mapped) - start
                for one, other in batches:
                    assert torch.equal(one.images, other.images) and one.images.dtype == torch.float32
                    assert torch.equal(one.labels, other.labels) and torch.equal(one.index, other.index)
            for one, other in zip(in_order(splits[0], 4, 1, 9), in_order(splits[1], 4, 1, 9), strict=True):
                assert torch.equal(one.images, other.images)

    def test_a_gathered_batch_is_a_copy_that_may_be_written(self, pair):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = pair[0].images[torch.tensor([4, 5])]
            batch += 1
        assert torch.equal(pair[0].images[torch.tensor([4, 5])], pair[1].images[torch.tensor([4, 5])])
        assert len(pair[0].images[torch.arange(0)]) == 0 and pair[0].pixels(torch.arange(0)).shape == (0, 3, 6, 5)

    @pytest.mark.parametrize("index", [[True] * 20 + [False] * 20, [-1, -40], [5]])
    def test_indices_mean_what_they_mean_to_torch(self, index, pair):
        index = torch.tensor(index)
        assert torch.equal(pair[0].images[index], pair[1].images[index])
        assert torch.equal(pair[0].subset(index).labels, pair[1].subset(index).labels)
        assert torch.equal(pair[0].subset(index).images[torch.tensor([0])], pair[1].subset(index).images[:1])

    def test_an_index_outside_is_refused(self, pair):
        for split in (pair[0], pair[0].subset(torch.arange(10))):
            with pytest.raises(IndexError):
                split.images[torch.tensor([len(split)])]

    def test_nothing_is_read_but_what_is_asked_for(self, pair):
        """No copy by ``subset``, none by ``to``; the file behind it is shared."""
        mapped = pair[0].subset(torch.arange(30)).to(torch.device("cpu"))
        assert mapped.images.array is pair[0].images.array and mapped.images.shape == (30, 3, 6, 5)
        assert mapped.images.sha256 == "a" * 64 and not mapped.images.array.flags.writeable
        assert mapped.to(torch.device("meta")).labels.device.type == "meta"

    def test_loading_reads_no_image(self, tiny, monkeypatch):
        TinyImageNet(root=tiny).load()
        monkeypatch.setattr(MappedImages, "__getitem__", lambda *a: pytest.fail("read"))
        dataset = TinyImageNet(root=tiny, validation=0.4).load()
        assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [9, 6, 4]
        assert dataset.train.images.array is dataset.validation.images.array
        assert dataset.to(torch.device("cpu")).train.images is dataset.train.images

    def test_validation_is_held_out_class_by_class(self, tiny):
        whole, parts = TinyImageNet(root=tiny).load(), TinyImageNet(root=tiny, validation=0.4).load()
        assert torch.bincount(parts.validation.labels).tolist() == [2, 2, 2]
        images = torch.cat([split.pixels(torch.arange(len(split))) for split in (parts.train, parts.validation)])
        expected = whole.train.pixels(torch.arange(15))
        assert sorted(map(hash_of, images)) == sorted(map(hash_of, expected))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_batches_go_where_the_labels_are(self, pair):
        mapped, memory = (Loader(split.to(torch.device("cuda")), 7, Augment(1, True), seed=0) for split in pair)
        for one, other in zip(mapped.epoch(0), memory.epoch(0), strict=True):
            assert one.images.device.type == "cuda" and torch.equal(one.images, other.images)


def hash_of(image: torch.Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


TINY = ["--model.type", "Mlp", "--model.hidden", "[4]", "--training.epochs", "2", "--training.milestones", "[]",
        "--training.schedule.length", "1", "--training.batch_size", "8", "--certify.images", "2",
        "--certify.stages", "[ibp]", "--export.enabled", "false"]  # fmt: skip


class TestCommandLine:
    @pytest.mark.parametrize("case", ["no val labels", "32x32"])
    def test_bad_input_is_exit_code_2_and_one_line(self, case, tiny, big, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        if case == "32x32":
            np.savez(big / "val_data.npz", data=np.zeros((2, 3072), np.uint8), labels=np.array([1, 2]))
            words, mention = ["--data.type", "ImageNet64", "--data.root", "imagenet64"], "images of 32×32; accepted: "
        else:
            (tiny / "val" / "val_annotations.txt").unlink()
            words, mention = ["--data.type", "TinyImageNet", "--data.root", "tiny"], "val_annotations.txt: no such"
        assert main(["train", *words, *TINY, "--out", "new"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and mention in lines[0] and not (tmp_path / "new").exists()

    def test_a_run_from_the_mapped_file(self, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = ["--data.type", "TinyImageNet", "--data.root", "tiny", "--data.validation", "0.2"]
        words += [
            "--training.augment.pad",
            "4",
            "--training.augment.flip",
            "true",
            "--training.augment.padding",
            "zero",
        ]
        assert main(["train", *words, *TINY, "--out", "run"]) == 0
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["dataset"]["shape"] == [3, 64, 64] and run["dataset"]["classes"] == 3
        assert run["dataset"]["sha256"] == TinyImageNet(root=tiny).load().checksum
        assert run["config"]["training"]["augment"]["padding"] == "zero"
