"""The loss's similarity is the one that is reported."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from nirvana.mri.train.loss import ssim


@pytest.mark.parametrize("size", [(7, 7), (20, 33)])
@pytest.mark.parametrize("data_range", [1.0, 3.0])
def test_equals_scikit_image(size, data_range):
    target = torch.rand(3, *size)
    image = target + 0.1 * torch.randn_like(target)
    expected = np.mean(
        [
            structural_similarity(t.numpy(), x.numpy(), win_size=7, data_range=data_range)
            for t, x in zip(target, image, strict=True)
        ]
    )
    assert ssim(image, target, data_range).item() == pytest.approx(expected, abs=1e-4)
    assert ssim(target, target).item() == pytest.approx(1)


def test_gradients():
    target = torch.rand(1, 9, 10, dtype=torch.float64)
    image = torch.rand(1, 9, 10, requires_grad=True)
    ssim(image, target).backward()
    gradient = image.grad[0, 4, 5].item()
    step = torch.zeros_like(image)
    step[0, 4, 5] = 1e-2
    with torch.no_grad():
        slope = (ssim(image + step, target) - ssim(image - step, target)).item() / 2e-2
    assert gradient == pytest.approx(slope, rel=0.05, abs=1e-5)
