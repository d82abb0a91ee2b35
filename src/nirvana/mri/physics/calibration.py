"""Coil sensitivities from calibration data in batches, on any device: a soft ESPIRiT."""

import torch
from torch import Tensor

from nirvana.mri.physics.fourier import energy, ifft2c

KERNEL = (6, 4)  # rows and columns of a patch of k-space
REGION = (24, 32)  # rows and columns of the calibration region at most
REGULARISATION = 2e-5  # of the patches' Gram matrix, relative to its trace
ITERATIONS = 6  # steps of the power iteration
FALLBACK = 1e-3  # weight of the low-resolution images where no patch lies in the region
VIRTUAL_COILS = 12  # more coils are first combined to as many
FURTHER_SETS = (0.9, 0.98)  # eigenvalues between which the weight of a further set rises to 1
EPS = 1e-12


def soft_espirit(kspace: Tensor, calibration: Tensor, num_sets: int = 1) -> tuple[Tensor, Tensor]:
    """Sensitivities by which the coil images explain each other, after ESPIRiT (Uecker et al.,
    Magnetic Resonance in Medicine 71, 2014).

    With G the Gram matrix of the patches of `KERNEL` samples of all coils in the calibration
    region, ESPIRiT projects on the singular vectors above a threshold. Here the projection is
    G (G + a I)^-1, a Tikhonov filter in place of the threshold: it needs no eigenvectors of a large
    matrix, and nothing jumps where a singular value crosses the threshold. Its sums along equal
    displacements are the Fourier coefficients of a matrix W(r) of coils by coils in every pixel r,
    whose leading eigenvectors are the sensitivities. Power iterations find them; the first set
    starts from the low-resolution coil images c, so that it has their phase, and W(r)^n c(r) stays
    smooth. Further sets start from the same vector in every pixel and vanish where their eigenvalue
    is below `FURTHER_SETS`, that is, wherever one set explains all signal. Of more than
    `VIRTUAL_COILS` coils the principal components of the calibration region are taken, and the
    result is mapped back.

    Args:
        kspace: complex `[B, coils, H, W]`, its centre at `[H // 2, W // 2]`.
        calibration: bool `[B or 1, H or 1, W]`, the block in the middle that is fully sampled.
        num_sets: sets of sensitivities; two explain objects that fold over into the field of view.

    Returns:
        Sensitivities complex64 `[B, num_sets, coils, H, W]`, of unit norm over the coils (further
        sets: of at most unit norm), and the eigenvalues `[B, num_sets, H, W]` in 0..1: small where
        there is no signal that the set explains.
    """
    coils, height, width = kspace.shape[1:]
    region = calibration.expand(-1, height, -1)
    kspace = kspace * region[:, None]
    rows, columns = min(REGION[0], height), min(REGION[1], width)
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    middle = kspace[..., top : top + rows, left : left + columns]
    inside = region[:, top : top + rows, left : left + columns]
    # The scale of k-space changes nothing, but its squares would leave the range of float32.
    power = torch.view_as_real(middle).square().mean((1, 2, 3, 4), keepdim=True)[..., 0]
    scale = power.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    middle, kspace = middle / scale, kspace / scale
    basis = None
    if coils > VIRTUAL_COILS:
        flat = middle.flatten(2)
        basis = torch.linalg.eigh(flat @ flat.mH)[1][..., -VIRTUAL_COILS:]
        middle = (basis.mH @ flat).unflatten(2, middle.shape[-2:])
        kspace = (basis.mH @ kspace.flatten(2)).unflatten(2, (height, width))
    images = ifft2c(kspace)
    operator = _pixel_operator(_patch_filter(middle, inside), (height, width))
    maps, values = _eigenvectors(operator, images, num_sets)
    if basis is not None:
        maps = (basis[:, None] @ maps.flatten(3)).unflatten(3, (height, width))
    return maps, values


def _patch_filter(middle: Tensor, inside: Tensor) -> Tensor:
    """G (G + a I)^-1 of the patches that lie inside, complex `[B, coils, k, l, coils, k, l]`."""
    high, wide = (min(side, have) for side, have in zip(KERNEL, middle.shape[-2:], strict=True))
    batch, coils = middle.shape[:2]
    patches = middle.unfold(2, high, 1).unfold(3, wide, 1)  # [B, coils, i, j, k, l]
    whole = inside.unfold(1, high, 1).unfold(2, wide, 1).all(-1).all(-1)  # [B or 1, i, j]
    patches = (patches * whole[:, None, :, :, None, None]).permute(0, 1, 4, 5, 2, 3)
    flat = patches.reshape(batch, coils * high * wide, -1)
    gram = flat @ flat.mH
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)[:, None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weight = (REGULARISATION * trace).clamp(min=EPS)
    factor, _ = torch.linalg.cholesky_ex(gram + weight * identity)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(gram), upper=False)
    kept = identity - weight * (inverse.mH @ inverse)
    return kept.view(batch, coils, high, wide, coils, high, wide)


def _pixel_operator(kept: Tensor, size: tuple[int, int]) -> Tensor:
    """W(r), complex `[B, coils, coils, H, W]`."""
    batch, coils, high, wide = kept.shape[:4]
    sums = kept.new_zeros(batch, coils, coils, 2 * high - 1, 2 * wide - 1)
    for i in range(high):
        for j in range(wide):
            down, right = high - 1 - i, wide - 1 - j
            block = kept[..., i, j].permute(0, 1, 4, 2, 3)
            sums[..., down : down + high, right : right + wide] += block
    # Displacement 0 becomes the origin of the transform, the others lie around it, modulo the size.
    rows = torch.arange(1 - high, high, device=kept.device) % size[0]
    columns = torch.arange(1 - wide, wide, device=kept.device) % size[1]
    places = (rows[:, None] * size[1] + columns).flatten()
    padded = kept.new_zeros(batch, coils, coils, size[0] * size[1])
    padded.index_add_(-1, places, sums.flatten(-2))
    operator = torch.fft.ifft2(padded.unflatten(-1, size), norm="forward") / (high * wide)
    return torch.fft.fftshift(operator, dim=(-2, -1))


def _eigenvectors(operator: Tensor, images: Tensor, num_sets: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors `[B, sets, coils, H, W]` and eigenvalues `[B, sets, H, W]`."""
    sets: list[Tensor] = []
    values: list[Tensor] = []
    for number in range(num_sets):
        v = images if number == 0 else _constant(images)
        v, value = _unit(_without(v, sets))
        for _ in range(ITERATIONS):
            v = _without(_apply(operator, v) + FALLBACK * v, sets)
            v, value = _unit(v)
        value = value[:, 0] - FALLBACK
        if number:
            low, high = FURTHER_SETS
            v = v * ((value - low) / (high - low)).clamp(0, 1)[:, None]
        sets.append(v)
        values.append(value)
    return torch.stack(sets, dim=1), torch.stack(values, dim=1)


def _apply(operator: Tensor, v: Tensor) -> Tensor:
    """W v in every pixel; coil by coil, which needs no transposed copy of W."""
    product = operator[:, :, 0] * v[:, None, 0]
    for coil in range(1, v.shape[1]):
        product.addcmul_(operator[:, :, coil], v[:, None, coil])
    return product


def _constant(images: Tensor) -> Tensor:
    """The same vector in every pixel, not orthogonal to any usual set: phases by golden angles."""
    coils = torch.arange(images.shape[1], device=images.device)
    vector = torch.polar(torch.ones_like(coils, dtype=torch.float32), 2.39996 * coils)
    return vector[:, None, None].to(images.dtype).expand_as(images)


def _without(v: Tensor, sets: list[Tensor]) -> Tensor:
    """The part of v that is orthogonal to the sets."""
    for other in sets:
        v = v - other * (other.conj() * v).sum(1, keepdim=True)
    return v


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """A vector of norm 1 over the coils, and its norm before."""
    norm = energy(v, dim=1).sqrt()
    return v / norm.clamp(min=EPS), norm
