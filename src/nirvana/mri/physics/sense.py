"""Coil sensitivities as operators: the forward model of a scan, and the combination of coils."""

import torch
from torch import Tensor

from nirvana.mri.physics.fourier import fft2c, ifft2c


class CartesianSense:
    """The multi-coil Cartesian forward operator, A x = M F (S x).

    S multiplies by the coil sensitivities, F is `fft2c`, M keeps the sampled columns. The adjoint
    is A^H y = sum_c conj(S_c) F^H (M y_c): <A x, y> = <x, A^H y>.

    Args:
        sensitivities: complex `[..., coils, H, W]`.
        mask: bool or 0/1, broadcastable to `[..., 1, 1, W]`; a plain `[W]` will do. None samples
            everything.

    Raises:
        ValueError: the sensitivities are not complex `[..., coils, H, W]`, or the mask has another
            width.
    """

    def __init__(self, sensitivities: Tensor, mask: Tensor | None = None) -> None:
        if sensitivities.ndim < 3 or not sensitivities.is_complex():
            raise ValueError(
                "sensitivities must be complex [..., coils, H, W], got "
                f"{sensitivities.dtype} {tuple(sensitivities.shape)}"
            )
        if mask is not None and mask.shape[-1] not in (1, sensitivities.shape[-1]):
            raise ValueError(
                f"mask {tuple(mask.shape)} does not fit a width of {sensitivities.shape[-1]}"
            )
        self.sensitivities = sensitivities
        self.mask = mask

    def forward(self, image: Tensor) -> Tensor:
        """Image `[..., H, W]` -> k-space `[..., coils, H, W]`, both complex."""
        return self._sample(fft2c(self.sensitivities * image.unsqueeze(-3)))

    def adjoint(self, kspace: Tensor) -> Tensor:
        """K-space `[..., coils, H, W]` -> combined image `[..., H, W]`, both complex."""
        return (self.sensitivities.conj() * ifft2c(self._sample(kspace))).sum(dim=-3)

    def _sample(self, kspace: Tensor) -> Tensor:
        return kspace if self.mask is None else kspace * self.mask


def combine_coils(coils: Tensor, sensitivities: Tensor, coil: Tensor) -> Tensor:
    """The complex image of coil images, x = e^(i a) sum_c conj(S_c) x_c.

    Sensitivities are known up to a phase in every pixel. a = arg sum_c S_c conj(p_c) chooses it
    so that a combination p of the coils, the same in all pixels and slices, has a real positive
    sensitivity: the phase of x is the one that a single coil p would have measured.

    Args:
        coils: complex `[..., coils, H, W]`.
        sensitivities: likewise, sum_c |S_c|^2 = 1 or 0 in every pixel.
        coil: p, complex `[coils]`, see `principal_coil`.

    Returns:
        Complex `[..., H, W]`; |x| is at most the root sum of squares of the coil images.
    """
    seen = (sensitivities * coil.conj()[:, None, None]).sum(-3)
    return torch.sgn(seen) * (sensitivities.conj() * coils).sum(-3)


def principal_coil(gram: Tensor) -> Tensor:
    """The first principal component of the coils.

    Args:
        gram: complex `[coils, coils]`, sum over samples of k_c conj(k_d).

    Returns:
        Complex64 `[coils]` of unit norm, on the device of `gram`; the largest of its numbers is
        real and positive, so that equal data give an equal phase on any machine.
    """
    vector = torch.linalg.eigh(gram.to("cpu", torch.complex128)).eigenvectors[:, -1]
    largest = vector[vector.abs().argmax()]
    return (vector * (largest.abs() / largest)).to(gram.device, torch.complex64)
