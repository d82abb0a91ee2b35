"""Centred, orthonormal Fourier transforms and the coils' root sum of squares."""

import torch
from torch import Tensor


def fft2c(x: Tensor) -> Tensor:
    """Centred orthonormal Fourier transform over the last two dims, image -> k-space.

    F x = shift(FFT(unshift(x))) / sqrt(H W), so that |F x| = |x| in the 2-norm.

    Args:
        x: complex `[..., H, W]`.

    Returns:
        Complex `[..., H, W]` of the same dtype.
    """
    shifted = torch.fft.ifftshift(x, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.fft2(shifted, norm="ortho"), dim=(-2, -1))


def ifft2c(x: Tensor) -> Tensor:
    """Inverse (and adjoint) of `fft2c`, k-space -> image; complex `[..., H, W]`."""
    shifted = torch.fft.ifftshift(x, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.ifft2(shifted, norm="ortho"), dim=(-2, -1))


def to_middle(x: Tensor) -> Tensor:
    """Moves the middle of W, the origin, to index 0, so that a plain FFT needs no shift."""
    return torch.fft.ifftshift(x, dim=-1)


def from_middle(x: Tensor) -> Tensor:
    """The inverse of `to_middle`."""
    return torch.fft.fftshift(x, dim=-1)


def to_columns(kspace: Tensor) -> Tensor:
    """K-space `[..., H, W]` with its rows transformed to image space and the middle of W first.

    Whole columns are measured, so the transform along H commutes with the sampling, and an
    iteration that starts here needs only `torch.fft.fft(x, norm="ortho")` and its inverse.
    """
    rows = torch.fft.ifft(torch.fft.ifftshift(kspace, dim=(-2, -1)), dim=-2, norm="ortho")
    return torch.fft.fftshift(rows, dim=-2)


def points_first(mask: Tensor) -> Tensor:
    """A mask in the order that `keep_sampled` takes: the middle of W first and, unless whole
    columns are sampled, that of H, too.

    Args:
        mask: bool `[..., 1, W]` of whole columns, or `[..., H, W]` of points.
    """
    dims = (-1,) if mask.shape[-2] == 1 else (-2, -1)
    return torch.fft.ifftshift(mask, dim=dims)


def keep_sampled(columns: Tensor, mask: Tensor) -> Tensor:
    """The sampled part M k of k-space, both as of `to_columns`.

    Args:
        columns: complex `[..., H, W]`.
        mask: bool, see `points_first`. A mask of points does not commute with the transform along
            H, which is done and undone.
    """
    if mask.shape[-2] == 1:
        return columns * mask
    rows = torch.fft.fft(torch.fft.ifftshift(columns, dim=-2), dim=-2, norm="ortho")
    return torch.fft.fftshift(torch.fft.ifft(rows * mask, dim=-2, norm="ortho"), dim=-2)


def replace_sampled(columns: Tensor, measured: Tensor, mask: Tensor) -> Tensor:
    """K-space with its sampled part replaced, k - M (k - y); arguments as of `keep_sampled`."""
    if mask.shape[-2] == 1:
        return torch.where(mask, measured, columns)
    return columns - keep_sampled(columns - measured, mask)


def rss(x: Tensor, dim: int = -3) -> Tensor:
    """Root-sum-of-squares magnitude sqrt(sum_c |x_c|^2) over the coil dimension `dim`.

    Real or complex `[..., coils, H, W]` -> real `[..., H, W]`.
    """
    return torch.linalg.vector_norm(x, dim=dim)
