"""How alike two images look."""

import torch
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return the mean structural similarity of images in [0, 1], a scalar of at most 1.

    Args:
        one: float (n, 3, H, W).
        two: The same shape.

    Returns:
        The mean over images, channels and places.

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004, equation 13.
    """
    one, two = one.float(), two.float()
    line = torch.arange(WINDOW, device=one.device, dtype=one.dtype) - WINDOW // 2
    bell = torch.exp(-line.square() / (2 * SIGMA**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(one.shape[1], 1, -1, -1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, window, padding=WINDOW // 2, groups=values.shape[1])

    with torch.autocast(one.device.type, enabled=False):  # variances are small differences of large numbers
        m1, m2 = mean(one), mean(two)
        v1, v2, both = mean(one * one) - m1 * m1, mean(two * two) - m2 * m2, mean(one * two) - m1 * m2
    top = (2 * m1 * m2 + C1) * (2 * both + C2)
    return (top / ((m1 * m1 + m2 * m2 + C1) * (v1 + v2 + C2))).mean()
