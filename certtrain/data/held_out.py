from dataclasses import dataclass

from ..errors import check
from .dataset import Source, Split, split_by_class
from .digits import Digits


@dataclass(frozen=True)
class HeldOut(Source):
    """Held-out training images of another source in place of its test images, which are not read into either split:
    with it whatever evaluates or certifies test images can be used for tuning.

    Args:
        source: the other source, whose own ``validation`` is 0.
        share: share of its training images that is held out, class by class: those that ``validation`` holds out.
    """

    source: Source = Digits()
    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.share < 1, "share", self.share, "a share in (0, 1)")
        check(self.source.validation == 0, "source.validation", self.source.validation, "0, and validation beside it")

    @property
    def place(self) -> str:
        return self.source.place

    def read(self) -> tuple[Split, Split, int]:
        train, _, classes = self.source.read()
        kept, held_out = split_by_class(train.labels, self.share)
        check(len(kept) and len(held_out), "data.share", self.share, "a share that leaves images in both splits")
        return train.subset(kept), train.subset(held_out), classes
