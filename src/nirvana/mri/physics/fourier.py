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


def to_columns(kspace: Tensor) -> Tensor:
    """K-space `[..., H, W]` with its rows transformed to image space and the middle of W first.

    Whole columns are measured, so the transform along H commutes with the sampling, and an
    iteration that starts here needs only `torch.fft.fft(x, norm="ortho")` and its inverse.
    """
    rows = torch.fft.ifft(torch.fft.ifftshift(kspace, dim=(-2, -1)), dim=-2, norm="ortho")
    return torch.fft.fftshift(rows, dim=-2)


def energy(x: Tensor, dim: int) -> Tensor:
    """sum |x|^2 over one dimension of a complex tensor, which stays as one of size 1; real.

    The root of it is many times as fast on a CPU as `torch.linalg.vector_norm` of complex numbers.
    """
    return (x.real.square() + x.imag.square()).sum(dim, keepdim=True)


def rss(x: Tensor, dim: int = -3) -> Tensor:
    """Root-sum-of-squares magnitude sqrt(sum_c |x_c|^2) over the coil dimension `dim`.

    Real or complex `[..., coils, H, W]` -> real `[..., H, W]`.
    """
    return torch.linalg.vector_norm(x, dim=dim)
