"""The forward operator of a scan as the networks use it, and the solver on it.

Where whole columns are measured, k-space is in image space along H (`fourier.to_columns`): the
transform along H commutes with the sampling and is done once, and the operator transforms along W
alone. Otherwise it transforms along both axes. Along transformed axes both spaces begin with their
middle, which saves a copy of all coils before and after every transform.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nirvana.mri.physics.fourier import to_columns

TINY = 1e-20


@dataclass(frozen=True)
class MeasuredKspace:
    """The measured k-space of a batch in the layout of the module.

    Attributes:
        y: complex `[B, coils, H, W]`, zero where not measured.
        mask: bool `[B or 1, 1, 1 or H, W]`, the measured samples.
        rows: bool `[B, H]`, those that the scan acquired, see `acquired`; centred.
        columns: bool `[B or 1, W]`, likewise.
        axes: those that remain to be transformed, (-1,) or (-2, -1).
    """

    y: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    axes: tuple[int, ...]

    @classmethod
    def of(cls, kspace: Tensor, mask: Tensor) -> "MeasuredKspace":
        """Brings k-space with its centre at `[H // 2, W // 2]` to that layout.

        Args:
            kspace: complex `[B, coils, H, W]`.
            mask: bool `[B or 1, 1, W]`, measured columns, or `[B or 1, H, W]`, measured points.
        """
        rows = acquired((kspace != 0).any(1).any(-1))
        columns = acquired(mask.any(1))
        axes = (-1,) if mask.shape[1] == 1 else (-2, -1)
        mask = torch.fft.ifftshift(mask, dim=axes)[:, None]
        y = to_columns(kspace) if axes == (-1,) else torch.fft.ifftshift(kspace, dim=axes)
        return cls(y * mask, mask, rows, columns, axes)

    def images(self, k: Tensor) -> Tensor:
        """Coil images, middle first, of k-space in the layout of the module."""
        return torch.fft.ifftn(k, dim=self.axes, norm="ortho")

    def kspace(self, images: Tensor) -> Tensor:
        """The inverse and adjoint of `images`."""
        return torch.fft.fftn(images, dim=self.axes, norm="ortho")

    def to_middle(self, x: Tensor) -> Tensor:
        """Moves the middle of the axes that are transformed to their beginning."""
        return torch.fft.ifftshift(x, dim=self.axes)

    def from_middle(self, x: Tensor) -> Tensor:
        """The inverse of `to_middle`."""
        return torch.fft.fftshift(x, dim=self.axes)

    def within_acquired(self, k: Tensor) -> Tensor:
        """K-space without what lies outside of the acquired rows and columns."""
        k = k * torch.fft.ifftshift(self.columns, dim=-1)[:, None, None]
        rows = torch.fft.ifftshift(self.rows, dim=-1)[:, None, :, None]
        if -2 in self.axes:
            return k * rows
        k = torch.fft.fft(torch.fft.ifftshift(k, dim=-2), dim=-2)
        return torch.fft.fftshift(torch.fft.ifft(k * rows, dim=-2), dim=-2)


def expand(x: Tensor, maps: Tensor) -> Tensor:
    """Coil images sum_s S_s x_s, `[B, coils, H, W]`, of images `[B, sets, H, W]` and sensitivities
    `[B, sets, coils, H, W]`."""
    images = maps[:, 0] * x[:, :1]
    for number in range(1, maps.shape[1]):
        images = torch.addcmul(images, maps[:, number], x[:, number : number + 1])
    return images


def reduce(images: Tensor, conjugate: Tensor) -> Tensor:
    """The adjoint of `expand`: images `[B, sets, H, W]` of coil images `[B, coils, H, W]` and the
    conjugate sensitivities, whose copy an iteration makes once."""
    sets = [(conjugate[:, number] * images).sum(1) for number in range(conjugate.shape[1])]
    return torch.stack(sets, dim=1)


def conjugate(maps: Tensor) -> Tensor:
    """A copy of conjugate sensitivities, not a view, which every product would copy again."""
    return maps.conj().resolve_conj()


def solve(
    measured: MeasuredKspace,
    maps: Tensor,
    weight: Tensor,
    start: Tensor,
    steps: int,
) -> Tensor:
    """argmin_x || E x - y ||^2 + weight || x - start ||^2 with E = M F S, by conjugate gradients on
    (E^H E + weight) x = E^H y + weight start, from `start` on.

    Args:
        measured: y, and E's mask and axes.
        maps: E's sensitivities, complex `[B, sets, coils, H, W]`, middle first.
        weight: real `[B, 1, 1, 1]`, above 0.
        start: complex `[B, sets, H, W]`, middle first.
        steps: of the iteration.

    Returns:
        Complex `[B, sets, H, W]`, middle first.
    """
    back = conjugate(maps)

    def modelled(x: Tensor) -> Tensor:
        return measured.mask * measured.kspace(expand(x, maps))

    x = start
    # The two terms with the weight cancel at the start.
    residual = reduce(measured.images(measured.y - modelled(x)), back)
    direction, square = residual, _square(residual)
    for step in range(steps):
        image = reduce(measured.images(modelled(direction)), back) + weight * direction
        length = square / _product(direction, image).clamp(min=TINY)
        x = x + length * direction
        if step + 1 < steps:
            residual = residual - length * image
            before, square = square, _square(residual)
            direction = residual + square / before.clamp(min=TINY) * direction
    return x


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Real inner products of the samples of a batch, `[B, 1, 1, 1]`."""
    pairs = torch.view_as_real(a) * torch.view_as_real(b)
    return pairs.sum((1, 2, 3, 4))[:, None, None, None]


def _square(x: Tensor) -> Tensor:
    return _product(x, x)


def acquired(sampled: Tensor) -> Tensor:
    """The part of an axis that a scan acquired: from its first to its last sample, and as far
    beyond them as twice the largest gap between two samples. Further out is zero-padding.

    Args:
        sampled: bool `[B, n]`.

    Returns:
        Bool `[B, n]`; nothing where there is no sample.
    """
    count = sampled.shape[1]
    index = torch.arange(count, device=sampled.device).expand_as(sampled)
    first = torch.where(sampled, index, count).amin(1, keepdim=True)
    last = torch.where(sampled, index, -1).amax(1, keepdim=True)
    latest = torch.where(sampled, index, -1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    gap = torch.where(sampled & (before >= 0), index - before, 1).amax(1, keepdim=True)
    margin = torch.where(gap > 1, 2 * gap, 0)
    return (index >= first - margin) & (index <= last + margin)
