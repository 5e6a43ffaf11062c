"""Which looks at tensors are free."""

from torch import Tensor


def waits(values: Tensor) -> bool:
    """Whether a look at their values has to wait for their device, as on a GPU: no step of a training may do so."""
    return values.device.type != "cpu"
