"""FLC pooling: down-sampling that cannot alias (FrequencyLowCut, arXiv 2204.00491)."""

import torch
from torch import Tensor, fx, nn

from ..errors import InputError


@fx.wrap  # one step for torch.fx, so that the error of a net that cannot be bounded names it
def frequency_low_cut(x: Tensor) -> Tensor:
    """(…, H, W) → (…, H/2, W/2): the lower half of the frequencies in both directions. Linear.

    Keeps means exactly; a signal below a quarter of the sampling rate is sub-sampled exactly, and a quarter and above
    becomes 0, but for the real part of the frequency -1/4, which stays because the kept half [1/4, 3/4) of the shifted
    spectrum holds it and not +1/4. Half-precision images are transformed in float32.

    Raises:
        InputError: H or W is not a multiple of 4.
    """
    height, width = x.shape[-2:]
    if height % 4 or width % 4:
        raise InputError(f"FrequencyLowCut: found images of {height}×{width}; accepted: sides that are multiples of 4")
    sides = (-2, -1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    spectrum = torch.fft.fftshift(torch.fft.fft2(wide, norm="forward"), sides)
    low = spectrum[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
    return torch.fft.ifft2(torch.fft.ifftshift(low, sides), norm="forward").real.to(x.dtype)


class FrequencyLowCut(nn.Module):
    """``frequency_low_cut`` as a layer. Bounds do not know it: a net with it trains and is attacked, not certified."""

    def forward(self, x: Tensor) -> Tensor:
        return frequency_low_cut(x)
