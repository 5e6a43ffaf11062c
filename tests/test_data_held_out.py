"""Held-out training images in place of the test images."""

import pytest
import torch

from certtrain.config import structure
from certtrain.data import Digits, HeldOut, Source, Split
from certtrain.errors import InputError


def pixels(split: Split) -> torch.Tensor:
    """(N, C · H · W)"""
    return split.pixels(torch.arange(len(split))).flatten(1)


def test_they_are_those_that_validation_holds_out():
    found, whole = HeldOut(share=0.25).load(), Digits(validation=0.25).load()
    assert torch.equal(pixels(found.test), pixels(whole.validation))
    assert torch.equal(pixels(found.train), pixels(whole.train))
    assert torch.equal(found.test.labels, whole.validation.labels) and found.classes == whole.classes == 10
    assert len(found.validation) == 0


def test_validation_is_held_out_beside_them():
    found = HeldOut(share=0.25, validation=0.1).load()
    splits, train = [found.train, found.validation, found.test], Digits().load().train
    assert sum(map(len, splits)) == len(train) and all(map(len, splits))
    assert torch.equal(torch.cat([pixels(split) for split in splits]).unique(dim=0), pixels(train).unique(dim=0))


def test_the_checksum_is_another_for_another_share():
    sums = {source.load().checksum for source in (Digits(), HeldOut(share=0.25), HeldOut(share=0.5))}
    assert len(sums) == 3


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_shares_are_checked(share):
    with pytest.raises(InputError, match="share: found"):
        HeldOut(share=share)


def test_a_share_that_holds_out_no_image_is_refused():
    with pytest.raises(InputError, match=r"data\.share: found 1e-06; accepted: a share that leaves images in both"):
        HeldOut(share=1e-6).load()


def test_a_source_with_a_validation_split_is_refused():
    mapping = {"type": "HeldOut", "source": {"type": "Digits", "validation": 0.1}}
    with pytest.raises(InputError, match=r"source\.validation: found 0\.1; accepted: 0"):
        structure(Source, mapping)
