"""Layouts of images and tokens: complex and two channels, padding to patches, maps of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 16  # side of a token's patch, pixels


def token_map(hidden: Tensor, height: int) -> Tensor:
    """Hidden states `[B, N, D]` of an image of `height` pixels as a map `[B, D, H/16, W/16]`."""
    return hidden.mT.unflatten(2, (height // PATCH, -1))


def to_channels(x: Tensor) -> Tensor:
    """Complex `[B, H, W]` to real `[B, 2, H, W]`."""
    return torch.stack([x.real, x.imag], dim=1)


def to_complex(x: Tensor) -> Tensor:
    """Real `[B, 2, H, W]` to complex `[B, H, W]`."""
    return torch.complex(x[:, 0].contiguous(), x[:, 1].contiguous())


def pad_to_patches(image: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Zero-pads an image evenly to sides that are multiples of 16 and at least 32: instance
    normalisation at the deepest level of a U-Net needs two pixels.

    Args:
        image: `[..., H, W]`.

    Returns:
        The padded image, and the padding for `crop`: left, right, top, bottom.
    """
    rows, columns = (max(-n % PATCH, 2 * PATCH - n) for n in image.shape[-2:])
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(image, padding), padding


def crop(image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Undoes `pad_to_patches`."""
    left, right, top, bottom = padding
    H, W = image.shape[-2:]
    return image[..., top : H - bottom, left : W - right]
