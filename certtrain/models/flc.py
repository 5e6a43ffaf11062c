"""FLC pooling: down-sampling without aliasing (FrequencyLowCut, arXiv 2204.00491)."""

import torch
from torch import Tensor, fx, nn

from ..errors import InputError


@fx.wrap  # one step for torch.fx, so that the error of a net that cannot be bounded names it
def frequency_low_cut(x: Tensor) -> Tensor:
    """Keep the lower half of the frequencies in both directions: (…, H, W) → (…, H/2, W/2). A linear map.

    Preserves means exactly. Frequencies below a quarter of the sampling rate are sub-sampled exactly, those from a
    quarter on become 0, except the real part of frequency -1/4: the half [1/4, 3/4) of the shifted spectrum that is
    kept contains -1/4 and not +1/4. Half-precision images are transformed in float32.

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
    """``frequency_low_cut`` as a layer. It has no bounds: a network with it can be trained and attacked, not
    certified."""

    def forward(self, x: Tensor) -> Tensor:
        return frequency_low_cut(x)
