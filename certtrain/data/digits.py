from dataclasses import dataclass

import torch

from .dataset import Source, Split, split_by_class

TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's bundled handwritten digits: 1797 real 8×8 images with 17 grey levels, no download.

    They come without a published split: a fifth of each class is held out for testing, by a fixed key.
    """

    def read(self) -> tuple[Split, Split, int]:
        from sklearn.datasets import load_digits  # half a second that other sources need not pay

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
        everything = Split(images, torch.from_numpy(bunch.target).long(), full_scale=16)
        train, test = split_by_class(everything.labels, TEST_SHARE)
        return everything.subset(train), everything.subset(test), 10
