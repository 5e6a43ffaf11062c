from dataclasses import dataclass

import torch

from .dataset import Source, Split, split_by_class

TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's bundled handwritten digits: 1797 real 8×8 images with 17 grey levels, no download.

    There is no published split: a fifth of each class is held out for testing, by a fixed key.
    """

    def read(self) -> tuple[Split, Split, int]:
        from sklearn.datasets import load_digits  # half a second that other sources need not pay

        pixels, labels = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels).to(torch.uint8).reshape(-1, 1, 8, 8)
        everything = Split(images, torch.as_tensor(labels).long(), full_scale=16)
        train, test = split_by_class(everything.labels, TEST_SHARE)
        return everything.subset(train), everything.subset(test), 10
