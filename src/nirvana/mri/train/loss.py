"""Structural similarity as a loss, on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 7


def ssim(image: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """Mean structural similarity (Wang et al., 2004) with a uniform window of 7, K1 0.01, K2 0.03
    and sample covariances: the differentiable form of `metrics.score` for a slice.

    Args:
        image: real `[B, H, W]`, sides at least 7.
        target: likewise.
        data_range: of the target's values.

    Returns:
        A scalar, the mean over all windows inside the images.
    """
    x, t = image.float(), target.float()
    moments = torch.stack([x, t, x * x, t * t, x * t], dim=1)
    mean_x, mean_t, xx, tt, xt = F.avg_pool2d(moments, WINDOW, stride=1).unbind(1)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_t = unbiased * (xx - mean_x**2), unbiased * (tt - mean_t**2)
    covariance = unbiased * (xt - mean_x * mean_t)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_t + c1) / (mean_x**2 + mean_t**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_t + c2)).mean()
