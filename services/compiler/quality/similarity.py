"""How alike two pictures are."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

# Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
# Transactions on Image Processing 13(4), 2004: a Gaussian window of 11 pixels with standard deviation 1.5, K1 and K2.
_SIGMA, _RADIUS = 1.5, 5
_K1, _K2 = 0.01, 0.03


def psnr(reference: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Peak signal-to-noise ratio in dB of values in 0 to 1, over all numbers at once; infinite when equal."""
    error = float(np.square(reference - found).mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(reference: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Structural similarity of two pictures [height, width, channels] in 0 to 1: mean over pixels and channels.

    1 when equal. Pixels whose window reaches beyond the picture are left out, as in the paper's own code; of pictures
    smaller than the window, none are.
    """
    first, second = (_K1) ** 2, (_K2) ** 2

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(gaussian_filter(values, (_SIGMA, _SIGMA, 0), radius=(_RADIUS, _RADIUS, 0)))

    mean_r, mean_f = blurred(reference), blurred(found)
    variance_r = blurred(reference * reference) - mean_r * mean_r
    variance_f = blurred(found * found) - mean_f * mean_f
    together = blurred(reference * found) - mean_r * mean_f
    similarity = ((2 * mean_r * mean_f + first) * (2 * together + second)) / (
        (mean_r**2 + mean_f**2 + first) * (variance_r + variance_f + second)
    )
    inner = similarity[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
    return float((inner if inner.size else similarity).mean())
