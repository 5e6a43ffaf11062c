"""The sources whose publishers give md5s: miniature files in the real layouts, their md5s put in the table."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets

from certtrain.data import Cifar10, Cifar100, FashionMnist, Mnist, Svhn, idx_files, torchvision_files
from certtrain.data.idx_files import read_idx
from certtrain.errors import InputError

RANDOM = np.random.default_rng(0)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def put(path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5(content)


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def make_idx(root, monkeypatch, name):
    """Miniature MNIST or FashionMNIST with images of 4×5: (images, labels) of both splits."""
    known, published, unpacked = [], [], {}
    for prefix, count in (("train", 7), ("t10k", 3)):
        images = RANDOM.integers(0, 256, (count, 4, 5)).astype(np.uint8)
        labels = (np.arange(count) * 3 % 10).astype(np.uint8)
        known.append((images[:, None], labels))
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            file = f"{prefix}-{kind}-ubyte"
            published.append((f"{file}.gz", put(root / name / "raw" / f"{file}.gz", gzip.compress(idx(array)))))
            unpacked[f"{name}/raw/{file}"] = put(root / name / "raw" / file, idx(array))
    monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", published)
    return known, unpacked


def make_mnist(root, monkeypatch):
    known, unpacked = make_idx(root, monkeypatch, "MNIST")
    monkeypatch.setattr(Mnist, "files", lambda self: unpacked)
    return known


def make_fashion(root, monkeypatch):
    return make_idx(root, monkeypatch, "FashionMNIST")[0]


def make_cifar(root, monkeypatch, source, folder, files, key, classes):
    known, lists = [], []
    for names in files:
        batches = []
        for name in names:
            images = RANDOM.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
            labels = RANDOM.integers(0, classes, 4)
            batches.append((images, labels))
            content = pickle.dumps({"data": images.reshape(4, -1), key: labels.tolist()}, protocol=2)
            lists.append((name, put(root / folder / name, content)))
        known.append(tuple(map(np.concatenate, zip(*batches, strict=True))))
    meta = dict(source.meta)
    meta["md5"] = put(root / folder / meta["filename"], pickle.dumps({meta["key"]: ["a", "b"]}, protocol=2))
    split = len(files[0])
    monkeypatch.setattr(source, "train_list", [list(one) for one in lists[:split]])
    monkeypatch.setattr(source, "test_list", [list(one) for one in lists[split:]])
    monkeypatch.setattr(source, "meta", meta)
    return known


def make_cifar10(root, monkeypatch):
    files = [[f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]]
    return make_cifar(root, monkeypatch, torchvision.datasets.CIFAR10, "cifar-10-batches-py", files, "labels", 10)


def make_cifar100(root, monkeypatch):
    files = [["train"], ["test"]]
    return make_cifar(root, monkeypatch, torchvision.datasets.CIFAR100, "cifar-100-python", files, "fine_labels", 100)


def make_svhn(root, monkeypatch):
    known, table = [], dict(torchvision.datasets.SVHN.split_list)
    for name, count in (("train", 11), ("test", 4)):
        images = RANDOM.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
        labels = np.arange(count) % 10
        path = root / f"{name}_32x32.mat"
        root.mkdir(parents=True, exist_ok=True)
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)  # the digit 0 is called 10 there
        scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": stored[:, None]})
        known.append((images, labels))
        table[name] = [table[name][0], path.name, md5(path.read_bytes())]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", table)
    return known


SOURCES = {
    Mnist: (make_mnist, 10),
    FashionMnist: (make_fashion, 10),
    Cifar10: (make_cifar10, 10),
    Cifar100: (make_cifar100, 100),
    Svhn: (make_svhn, 10),
}

every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)


@every_source
def test_reads_both_splits_as_they_were_written(source, tmp_path, monkeypatch):
    make, classes = SOURCES[source]
    known = make(tmp_path / "root", monkeypatch)
    dataset = source(root=tmp_path / "root").load()
    assert dataset.classes == classes and len(dataset.validation) == 0
    for split, (images, labels) in zip((dataset.train, dataset.test), known, strict=True):
        assert split.images.dtype == torch.uint8 and split.images.is_contiguous() and split.full_scale == 255
        assert np.array_equal(split.images.numpy(), images)
        assert split.labels.dtype == torch.int64 and split.labels.tolist() == labels.tolist()


@every_source
def test_every_file_is_checked(source, tmp_path, monkeypatch):
    """One bit of any file is enough, and a missing file is named; nothing is opened before."""
    SOURCES[source][0](tmp_path, monkeypatch)
    for name in source(root=tmp_path).files():
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with monkeypatch.context() as patch:
            patch.setattr(source, "open", lambda self, train: pytest.fail("opened"))
            with pytest.raises(InputError) as caught:
                source(root=tmp_path).load()
            message = str(caught.value)
            assert message.startswith(f"{path}: found md5 {md5(path.read_bytes())}; accepted: {md5(whole)}")
            path.unlink()
            with pytest.raises(InputError) as caught:
                source(root=tmp_path).load()
            message = str(caught.value)
            assert message.startswith(f"{path}: no such file; accepted: ") and "--data.download true" in message
        path.write_bytes(whole)
    source(root=tmp_path).load()


@every_source
def test_the_checksums_are_torchvisions(source):
    """The real table: what is checked is what torchvision publishes (of MNIST it knows the packed files alone)."""
    files = source().files()
    assert all(len(value) == 32 and int(value, 16) >= 0 for value in files.values())
    expected = {
        Mnist: (4, "MNIST/raw/train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
        FashionMnist: (4, "FashionMNIST/raw/train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        Cifar10: (7, "cifar-10-batches-py/data_batch_1", "c99cafc152244af753f735de768cd75f"),
        Cifar100: (3, "cifar-100-python/train", "16019d7e3df5f24257cddd939b257f8d"),
        Svhn: (2, "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    }
    count, first, value = expected[source]
    assert len(files) == count and files[first] == value


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("source", [Cifar10, Cifar100])
@pytest.mark.parametrize("download", [False, True])
def test_a_malicious_pickle_does_not_run(source, download, tmp_path, monkeypatch):
    for name in source().files():
        put(tmp_path / name, pickle.dumps(Malicious(tmp_path / "ran")))

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(InputError, match="no network" if download else "found md5"):
        source(root=tmp_path, download=download).load()
    assert not (tmp_path / "ran").exists()


def test_torchvisions_old_processed_files_are_not_looked_at(tmp_path, monkeypatch):
    """torchvision prefers ``MNIST/processed/*.pt`` to the raw files, and knows no checksum of them."""
    known = make_mnist(tmp_path, monkeypatch)
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2)), tmp_path / "MNIST/processed" / name)
    assert np.array_equal(Mnist(root=tmp_path).load().train.images.numpy(), known[0][0])


def test_fashion_reads_the_packed_files_alone(tmp_path, monkeypatch):
    known = make_fashion(tmp_path, monkeypatch)
    for path in (tmp_path / "FashionMNIST" / "raw").glob("*-ubyte"):
        path.write_bytes(b"made up")
    assert np.array_equal(FashionMnist(root=tmp_path).load().test.images.numpy(), known[1][0])


def test_svhn_labels_the_digit_zero_zero(tmp_path, monkeypatch):
    make_svhn(tmp_path, monkeypatch)
    dataset = Svhn(root=tmp_path).load()
    assert dataset.train.labels.tolist() == [*range(10), 0] and dataset.shape == (3, 32, 32)


class Served:
    """Stands in for ``fetch``: what is asked for, and the files that it gives."""

    def __init__(self, monkeypatch, files):
        self.files, self.asked = files, []
        for module in (idx_files, torchvision_files):
            monkeypatch.setattr(module, "fetch", self)

    def __call__(self, urls, path, expected):
        if path.exists() and md5(path.read_bytes()) == expected:
            return
        self.asked.append((list(urls), path.name))
        if path.name not in self.files:
            raise InputError(f"{path}: could not be downloaded; accepted: a network")
        put(path, self.files[path.name])


@pytest.mark.parametrize("source", [Mnist, FashionMnist, Svhn])
def test_download_fetches_what_is_missing_or_broken(source, tmp_path, monkeypatch):
    known = SOURCES[source][0](tmp_path, monkeypatch)
    served = Served(monkeypatch, {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".gz", ".mat")})

    def load():
        dataset = source(root=tmp_path, download=True).load()
        assert np.array_equal(dataset.train.images.numpy(), known[0][0])

    load()
    assert not served.asked
    for name in source().files():
        (tmp_path / name).write_bytes(b"half of the fi")  # as an interrupted unpacking leaves it
        if source is not Mnist:
            load()
            assert [file for _, file in served.asked] == [name.rpartition("/")[2]]
            assert all(url.endswith(served.asked[0][1]) and url.startswith("http") for url in served.asked[0][0])
        else:  # unpacked again from the .gz beside it
            load()
            assert not served.asked
        served.asked.clear()
    for path in list(tmp_path.rglob("*")):
        if path.is_file():
            path.unlink()
    load()
    assert len(served.asked) == len(source().files())
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("source", [Mnist, FashionMnist, Svhn])
def test_a_download_that_fails_is_one_line(source, tmp_path, monkeypatch):
    Served(monkeypatch, {})
    with pytest.raises(InputError) as caught:
        source(root=tmp_path / "new", download=True).load()
    assert "could not be downloaded" in str(caught.value) and "accepted: " in str(caught.value)
    assert "\n" not in str(caught.value) and not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("shape", [(0, 3, 2), (1,), (2, 3, 4), ()])
def test_read_idx(shape):
    array = RANDOM.integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(read_idx(idx(np.asarray(array))).numpy(), array)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\0", idx(np.zeros((2, 3)))[:-1],
                                     idx(np.zeros((2, 3))) + b"\0", b"\0\0\x08\x03\0\0"])  # fmt: skip
def test_read_idx_refuses(content):
    with pytest.raises((ValueError, struct.error)):
        read_idx(content)
