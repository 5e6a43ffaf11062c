"""Cost of reading tensor values."""

from torch import Tensor


def reading_waits(values: Tensor) -> bool:
    """Whether reading the values waits for their device, as on a GPU. Training steps must not wait."""
    return values.device.type != "cpu"
