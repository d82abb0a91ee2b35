"""Completion of k-space of which one side was not measured.

An image of smooth phase phi has nearly conjugate-symmetric k-space once that phase is taken off.
The phase comes from the band that was measured on both sides of the origin. `complete` is what the
pipeline uses: `pocs`, weighted by how far the symmetry holds. `homodyne` is the simpler method of
one step along one axis, with which tests compare it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.mri.physics.fourier import fft2c, ifft2c
from nirvana.mri.physics.pattern import Extent

ITERATIONS = 10
RING = (0.6, 0.9)  # of the symmetric band's half width, where the symmetry is measured
NEIGHBOURHOOD = 9  # samples, over which the energy of k-space is averaged


def complete(kspace: Tensor, extent: Extent) -> Tensor:
    """The missing side of k-space by `pocs`, times the best linear weight w = g (1 - n / e).

    g is the correlation of opposite samples in the outer part of the symmetric band, below 1 where
    the image has fine phase; e the local energy of the sample opposite the missing one, n that of
    noise: the lowest that was measured, but at most the energy by which opposite samples differ.
    Without w the result of noisy scans, or of images of fine phase, is worse than zeros.

    Args:
        kspace: complex `[coils, H, W]`, complete inside the extent.
        extent: the measured part.

    Returns:
        Complex `[coils, H, W]`, equal to `kspace` inside the extent.
    """
    inside = _inside(extent, kspace.device)
    phase = _smooth_phase(kspace, extent)
    energy = _local((kspace.abs() ** 2).sum(0))
    symmetry, difference = _symmetry(kspace, extent, phase)
    noise = torch.minimum(torch.quantile(energy[inside], 0.02), difference)
    reliable = (1 - noise / _mirror(energy).clamp(min=torch.finfo(energy.dtype).tiny)).clamp(0, 1)
    weight = symmetry * reliable
    return torch.where(inside, kspace, pocs(kspace, extent) * weight)


def pocs(kspace: Tensor, extent: Extent, iterations: int = ITERATIONS) -> Tensor:
    """Projection onto convex sets (Haacke et al., J. Magn. Reson. 92:126, 1991), coil by coil:

        x <- |x| exp(i phi)          k <- F x outside of the extent, as given inside

    Args:
        kspace: complex `[..., H, W]`, complete inside the extent.
        extent: the measured part.
        iterations: number of projections.

    Returns:
        Complex `[..., H, W]`, equal to `kspace` inside the extent.
    """
    inside = _inside(extent, kspace.device)
    known = kspace * inside
    phase = _smooth_phase(kspace, extent)
    found = known
    for _ in range(iterations):
        found = torch.where(inside, known, fft2c(ifft2c(found).abs() * phase))
    return found


def homodyne(kspace: Tensor, extent: Extent) -> Tensor:
    """Homodyne detection (Noll et al., IEEE Trans. Med. Imaging 10:154, 1991) along W.

    Columns without a measured counterpart count twice, those of the symmetric band by a ramp, and
    the image is the real part after the smooth phase is taken off.

    Args:
        kspace: complex `[..., H, W]`, complete inside the extent.
        extent: the measured part, of partial Fourier sampling along W alone.

    Returns:
        Complex images `[..., H, W]`, their smooth phase put back.
    """
    first, last = _symmetric(extent.columns, extent.width)
    ramp = torch.linspace(0, 2, last - first + 2, device=kspace.device)[1:-1]
    weight = torch.zeros(extent.width, device=kspace.device)
    weight[extent.columns[0] : first] = 2
    weight[last : extent.columns[1]] = 2
    weight[first:last] = ramp if extent.columns[1] > last else ramp.flip(0)
    phase = _smooth_phase(kspace, extent)
    return (ifft2c(kspace * weight) * phase.conj()).real * phase


def _smooth_phase(kspace: Tensor, extent: Extent) -> Tensor:
    """exp(i phi) of the images of the symmetric band, tapered against ringing: `[..., H, W]`."""
    window = torch.ones(extent.height, extent.width)
    if extent.late_echo:
        window *= _taper(_symmetric(extent.rows, extent.height), extent.height)[:, None]
    if extent.partial_fourier:
        window *= _taper(_symmetric(extent.columns, extent.width), extent.width)
    images = ifft2c(kspace * window.to(kspace.device))
    return torch.polar(torch.ones_like(images.real), images.angle())


def _symmetry(kspace: Tensor, extent: Extent, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation, 0..1, of opposite samples in the outer part of the symmetric band, and the
    energy, of all coils together, by which they differ."""
    band, ring = (torch.ones(extent.height, extent.width, dtype=torch.bool) for _ in range(2))
    axes = ((-2, extent.rows, extent.late_echo), (-1, extent.columns, extent.partial_fourier))
    for axis, ends, missing in axes:
        if not missing:
            continue
        length = (extent.height, extent.width)[axis]
        first, last = _symmetric(ends, length)
        distance = (torch.arange(length) - length // 2).abs()
        reach = (last - first) // 2
        inner = distance <= reach
        outer = (distance >= RING[0] * reach) & (distance <= RING[1] * reach)
        band &= inner[:, None] if axis == -2 else inner
        ring &= outer[:, None] if axis == -2 else outer
    band, ring = band.to(kspace.device), ring.to(kspace.device)
    flat = fft2c(ifft2c(kspace * band) * phase.conj())
    both = (flat * _mirror(flat)).real[..., ring].sum()
    every = (flat.abs() ** 2)[..., ring].sum()
    symmetry = (both / every.clamp(min=torch.finfo(every.dtype).tiny)).clamp(0, 1)
    return symmetry, (1 - symmetry) * every / ring.sum()


def _mirror(x: Tensor) -> Tensor:
    """The sample at -k in place of that at k, `[..., H, W]` with the origin at H // 2, W // 2."""
    even = [1 - n % 2 for n in x.shape[-2:]]
    return x.flip((-2, -1)).roll(even, (-2, -1))


def _local(energy: Tensor) -> Tensor:
    """The mean over a neighbourhood, `[H, W]`."""
    side = NEIGHBOURHOOD
    pooled = F.avg_pool2d(energy[None, None], side, 1, side // 2, count_include_pad=False)
    return pooled[0, 0]


def _symmetric(ends: tuple[int, int], length: int) -> tuple[int, int]:
    """The part of `ends` that lies symmetrically about the middle of `length`."""
    middle = length // 2
    reach = max(min(middle - ends[0], ends[1] - 1 - middle), 0)
    return middle - reach, middle + reach + 1


def _taper(ends: tuple[int, int], length: int) -> Tensor:
    """A Hann window over `ends`, zero elsewhere: `[length]`."""
    window = torch.zeros(length)
    window[ends[0] : ends[1]] = torch.hann_window(ends[1] - ends[0] + 2, periodic=False)[1:-1]
    return window


def _inside(extent: Extent, device: torch.device) -> Tensor:
    """Bool `[H, W]`: the extent, or everything along an axis of which no side is missing."""
    inside = torch.zeros(extent.height, extent.width, dtype=torch.bool, device=device)
    rows = slice(*extent.rows) if extent.late_echo else slice(None)
    columns = slice(*extent.columns) if extent.partial_fourier else slice(None)
    inside[rows, columns] = True
    return inside
