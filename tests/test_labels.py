"""Labels as they come in: whole numbers of any kind are int64 from then on, the rest is an InputError, everywhere."""

import copy

import numpy as np
import pytest
import torch
from attack_cases import ATTACKS, quick
from problems import random_images, random_model
from torch import nn
from walking import walk

from certtrain import certify
from certtrain.attacks import Pgd
from certtrain.bounds import Interval, LinfBall, NormBall, SparseBall, compute_margins
from certtrain.data import Arrays
from certtrain.data.dataset import Split
from certtrain.diagnostics import gradient_alignment, hessian_spectrum
from certtrain.errors import InputError
from certtrain.labels import as_labels, check_labels
from certtrain.losses import CcIbp, Loss, Mart, PgdAt
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.verifiers import Certify, Specification
from certtrain.verifiers.vnnlib import write_property

WHOLE = [0, 3, 1, 2]
Y = torch.tensor(WHOLE)
GOOD = {
    **{str(dtype): Y.to(dtype) for dtype in (
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )},
    "list": WHOLE, "tuple": tuple(WHOLE), "range": range(4), "floats": [0.0, 3.0, 1.0, 2.0],
    "float8": Y.float().to(torch.float8_e4m3fn), "masked nowhere": np.ma.array(WHOLE), "of tensors": list(Y),
    "of numpy": list(np.array(WHOLE, np.int16)), "strided": torch.tensor([0, 9, 3, 9, 1, 9, 2, 9])[::2],
    **{f"numpy {kind}": np.array(WHOLE, kind) for kind in ("i1", "<i4", ">i4", "<i8", "u1", "u8", "f2", "<f4", ">f8")},
    "read-only": np.broadcast_to(np.int32(2), (4,)), "grad": Y.double().requires_grad_(),
}  # fmt: skip
BAD = {
    "a fraction": (torch.tensor([0, 1, 0.5, 1]), "found 0.5 at image 2"),
    "NaN": (torch.tensor([0, float("nan"), 1, 1]), "found nan at image 1"),
    "infinite": (np.array([0, 1, 1, -np.inf]), "found -inf at image 3"),
    "no float64 counts so far": (torch.tensor([0, 1e300, 1, 1], dtype=torch.float64), r"found 1e\+300 at image 1"),
    "beyond int64": (np.array([0, 1, 1, 2**63], np.uint64), "found 9223372036854775808 at image 3"),
    "a list beyond int64": ([0, 1, 1, 2**70], "found object"),
    "booleans": (torch.tensor([True, False, True, True]), r"found torch\.bool"),
    "a list of booleans": ([True, False, True, True], "found bool"),
    "numpy booleans": (np.array([True, False, True, True]), "found bool"),
    "complex": (torch.tensor([0, 1, 1j, 1]), r"found torch\.complex64"),
    "booleans among numbers": ([True, 0, 1, 1], "found bool"),
    "masked": (np.ma.array(WHOLE, mask=[0, 1, 0, 0]), "found masked entries"),
    "sparse": (Y.to_sparse(), "found a tensor that is nested or sparse"),
    "words": (["cat", "dog", "cat", "cat"], "found <U3"),
    "none": (None, "found object"),
    "holes": ([0, None, 1, 1], "found object"),
    "ragged": ([[0], [1, 2], [1], [1]], "found list"),
    "one number": (torch.tensor(3), r"found shape \(\)"),
    "a Python number": (3, r"found shape \(\)"),
    "a column": (torch.zeros(4, 1, dtype=torch.int64), r"found shape \(4, 1\)"),
    "one-hot": (torch.eye(4, dtype=torch.int64), r"found shape \(4, 4\)"),
    "a list of lists": ([[0, 1], [1, 0], [0, 1], [1, 0]], r"found shape \(4, 2\)"),
    "too few": ([0, 1, 2], r"found shape \(3,\); accepted: \(4,\)"),
    "too many": (torch.arange(5), r"found shape \(5,\); accepted: \(4,\)"),
    "none at all": ([], r"found shape \(0,\); accepted: \(4,\)"),
}  # fmt: skip
OUTSIDE = [[0, 4, 0, 0], [0, -1, 0, 0], [0, 0, 0, -100], [2**40, 0, 0, 0], [0, 0, 0, -(2**62)]]
MODEL, IMAGES, INDEX = random_model(), random_images(4), torch.arange(4)
FAST = Certify(stages=("ibp", "attack"), attack=Pgd(steps=2, objective="margin"))


def step(ball=None) -> Step:
    return Step.evaluation(ball or LinfBall(0.05), Noise(0, INDEX))


ENTRIES = {
    "certify": lambda y: [
        (v.status, v.label, v.lower_bound) for v in certify(MODEL, IMAGES, y, 0.01, FAST)
    ],
    "a batch": lambda y: Batch(IMAGES, y, INDEX).labels,
    "a split": lambda y: Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), y).labels,
    "margins": lambda y: compute_margins(MODEL, Interval.box(IMAGES, 0.01), y)[0],
    "margins without a last layer": lambda y: compute_margins(
        nn.Sequential(MODEL, nn.ReLU()), Interval.box(IMAGES, 0.01), y
    )[0],
    "a specification": lambda y: Specification.robust(y, 4).rows,
    "an attack": lambda y: Pgd(steps=3)(MODEL, Batch(IMAGES, y, INDEX), LinfBall(0.05), step()).images,
    "a certified loss": lambda y: CcIbp()(MODEL, Batch(IMAGES, y, INDEX), step()).total,
    "an adversarial loss": lambda y: PgdAt()(copy.deepcopy(MODEL), Batch(IMAGES, y, INDEX), step()).total,
    "a diagnostic": lambda y: gradient_alignment(
        MODEL, Batch(IMAGES, y, INDEX), LinfBall(0.05), Noise(0, INDEX)
    ),
    "a Hessian": lambda y: hessian_spectrum(MODEL, Batch(IMAGES, y, INDEX), 1).values,
}  # fmt: skip
COUNTS = [name for name in ENTRIES if name not in ("a split", "a specification")]
"""Entries that know how many images there are."""
CLASSES = [name for name in ENTRIES if name not in ("a batch", "a split")]
"""Entries that know how many classes there are."""


def same(found, wanted) -> bool:
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    return found == wanted


@walk("kind", GOOD)
def test_whole_numbers_are_int64(kind):
    found = as_labels(GOOD[kind], 4)
    wanted = {"range": [0, 1, 2, 3], "read-only": [2] * 4}.get(kind, WHOLE)
    assert found.dtype == torch.int64 and found.tolist() == wanted and not found.requires_grad


@pytest.mark.parametrize("entry", ENTRIES)
@walk("kind", ["torch.int32", "torch.uint8", "torch.float32", "list", "numpy >i4", "numpy u8"])
def test_every_entry_takes_them(entry, kind):
    assert same(ENTRIES[entry](GOOD[kind]), ENTRIES[entry](Y))


@walk("kind", BAD)
def test_the_rest_is_refused(kind):
    labels, message = BAD[kind]
    with pytest.raises(InputError, match=rf"^y: {message}.*whole numbers"):
        as_labels(labels, 4, where="y")


@walk("kind", BAD)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_the_rest(entry, kind):
    if kind in ("too few", "too many", "none at all") and entry not in COUNTS:
        return
    with pytest.raises(InputError, match="whole numbers"):
        ENTRIES[entry](BAD[kind][0])


@walk("labels", OUTSIDE)
@pytest.mark.parametrize("entry", CLASSES)
def test_labels_that_are_no_classes(entry, labels):
    with pytest.raises(ValueError, match=r"found label|labels: found"):
        ENTRIES[entry](labels)


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.__name__)
def test_every_attack_converts_and_checks(kind):
    attack = quick(kind)
    ball = next(ball for ball in (LinfBall(0.05), SparseBall(2)) if attack.needs.matches(ball))
    assert isinstance(ball, NormBall | SparseBall)

    def found(labels):
        return attack(MODEL, Batch(IMAGES, labels, INDEX), ball, step(ball)).images

    wanted = found(Y)
    for kind in ("torch.int32", "torch.uint8", "torch.float32", "list"):
        assert torch.equal(found(GOOD[kind]), wanted)
    for labels in OUTSIDE:
        with pytest.raises(InputError, match="found label"):
            found(labels)


def test_losses_check_the_classes_of_every_step():
    """A target of -100 is what torch's cross-entropy skips without a word."""
    for loss in (CcIbp(), PgdAt(), Mart()):
        assert isinstance(loss, Loss)
        with pytest.raises(InputError, match=r"^labels: found label -100 at image 3; accepted: 0 to 3"):
            loss(MODEL, Batch(IMAGES, [0, 1, 2, -100], INDEX), step())


def test_values_of_whole_number_tensors_are_not_looked_at():
    """A step that trains on a device does not wait for it: there is nothing to be read of a meta tensor."""
    for dtype in (torch.int64, torch.int32, torch.uint8):
        images, labels = torch.empty(4, 1, 2, 2, device="meta"), torch.empty(4, dtype=dtype, device="meta")
        batch = Batch(images, labels, torch.empty(4, dtype=torch.int64, device="meta"))
        assert batch.labels.dtype == torch.int64 and batch.labels.device.type == "meta"
        assert batch.part(slice(0, 2)).labels.shape == (2,)


def test_int64_labels_are_kept_as_they_are():
    assert as_labels(Y) is Y and Batch(IMAGES, Y, INDEX).labels is Y


def test_the_first_label_outside_is_named():
    check_labels(torch.tensor([0, 1, 2]), 3)
    check_labels(torch.tensor([], dtype=torch.int64), 3)
    with pytest.raises(InputError, match=r"^y: found label 3 at image 1; accepted: 0 to 2$"):
        check_labels(torch.tensor([0, 3, -1]), 3, "y")


def arrays(tmp_path, labels) -> Arrays:
    images = np.zeros((4, 1, 2, 2), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return Arrays(path=tmp_path / "a.npz")


@pytest.mark.parametrize("kind", [kind for kind in GOOD if kind.startswith("numpy ")])
def test_files_of_arrays(tmp_path, kind):
    split = arrays(tmp_path, GOOD[kind]).load().train
    assert split.labels.dtype == torch.int64 and split.labels.tolist() == WHOLE
    assert arrays(tmp_path, GOOD[kind][:, None]).load().train.labels.tolist() == WHOLE


@pytest.mark.parametrize("kind", [kind for kind, (labels, _) in BAD.items() if type(labels) is np.ndarray])
def test_files_of_bad_arrays(tmp_path, kind):
    labels, message = BAD[kind]
    with pytest.raises(InputError, match=rf"train_labels: {message}"):
        arrays(tmp_path, labels).load()


@pytest.mark.parametrize("label", [1, np.int64(1), np.uint8(1), torch.tensor(1), torch.tensor(1, dtype=torch.int32)])
def test_the_label_of_a_property(tmp_path, label):
    write_property(tmp_path / "p.vnnlib", torch.zeros(2), torch.ones(2), label, 3)
    assert "(or (and (<= Y_1 Y_0)) (and (<= Y_1 Y_2)))" in (tmp_path / "p.vnnlib").read_text()


@pytest.mark.parametrize("label", [-1, 3, 1.5, float("nan"), None, torch.tensor(0.5)])
def test_a_label_that_no_property_has(tmp_path, label):
    with pytest.raises(InputError, match=r"^label: found .*accepted: 0 to classes - 1"):
        write_property(tmp_path / "p.vnnlib", torch.zeros(2), torch.ones(2), label, 3)
    assert not list(tmp_path.iterdir())
