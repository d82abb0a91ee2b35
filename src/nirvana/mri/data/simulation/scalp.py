"""A bright rim around the object, as fat and skin around the skull."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.data.simulation.fields import chosen, smooth_field, uniform

FURTHEST = 18  # pixels from the object to the outside of its rim
EDGE = 0.08  # brightness of the object's edge, relative to its maximum


def add_scalp(images: Tensor, generator: Generator, settings: Simulation, draws: int) -> Tensor:
    """Images with a rim in `settings.scalp` of them.

    Its bright edges are what undersampling folds into the brain. It starts 2 to 8 pixels from the
    object (the skull gives no signal), is 2 to 10 pixels wide, and 0.3 to 1.3 times as bright as
    the image's maximum, changing along the rim.

    Args:
        images: magnitudes `[B, H, W]`.
        generator: on the CPU.
        settings: see `Simulation`.
        draws: B, or 1 for slices of one volume.
    """
    device, shape = images.device, (draws, 1, 1)
    inner = uniform((2.0, 8.0), shape, generator)
    width = uniform((2.0, 10.0), shape, generator)
    brightness = uniform((0.3, 1.3), shape, generator) * chosen(settings.scalp, draws, generator)
    change = smooth_field((draws,), images.shape[-2:], 8, generator, device)
    peak = images.amax((-2, -1), keepdim=True)
    distance = _distance(images > EDGE * peak)
    inner, outer = inner.to(device), (inner + width).clamp(max=FURTHEST - 1).to(device)
    rim = torch.sigmoid(2 * (distance - inner)) * torch.sigmoid(2 * (outer - distance))
    return images + peak * brightness.to(device) * (1 + 0.3 * change).clamp(min=0) * rim


def _distance(inside: Tensor) -> Tensor:
    """Steps from a region to every pixel, `[B, H, W]`, at most `FURTHEST`: alternately along the
    axes and along the diagonals too, which makes octagons."""
    reached = inside.float()[:, None]
    distance = torch.zeros_like(reached)
    for step in range(FURTHEST):
        distance = distance + (1 - reached)
        if step % 2:
            reached = F.max_pool2d(reached, 3, stride=1, padding=1)
        else:
            across = F.max_pool2d(reached, (1, 3), stride=1, padding=(0, 1))
            along = F.max_pool2d(reached, (3, 1), stride=1, padding=(1, 0))
            reached = torch.maximum(across, along)
    return distance[:, 0]
