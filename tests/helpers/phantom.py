"""A head-like picture without symmetry, seen by coils: k-space whose image is known."""

import numpy as np

ELLIPSES = (  # row, column, half axes, brightness; from -1 to 1
    (0.0, 0.0, 0.84, 0.68, 0.9),
    (0.02, 0.0, 0.76, 0.6, -0.35),
    (-0.22, 0.2, 0.28, 0.12, -0.2),
    (-0.18, -0.24, 0.22, 0.1, -0.25),
    (0.36, 0.06, 0.16, 0.22, 0.3),
    (0.5, -0.26, 0.06, 0.1, 0.45),
    (-0.48, 0.3, 0.08, 0.05, 0.5),
)


def fft2c(images: np.ndarray) -> np.ndarray:
    shifted = np.fft.ifftshift(images, axes=(-2, -1))
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=(-2, -1))


def combined(kspace: np.ndarray) -> np.ndarray:
    """Root-sum-of-squares images `[slices, H, W]`."""
    shifted = np.fft.ifftshift(kspace, axes=(-2, -1))
    images = np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
    return np.sqrt(np.square(np.abs(images)).sum(axis=1))


def picture(height: int, width: int, number: int = 0) -> np.ndarray:
    """Real `[H, W]`; with the number of a slice one detail grows."""
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image = np.zeros((height, width))
    for row, column, high, wide, brightness in ELLIPSES:
        high += 0.02 * number if brightness == 0.45 else 0
        inside = ((rows - row) / high) ** 2 + ((columns - column) / wide) ** 2 <= 1
        image[inside] += brightness
    return image


def sensitivities(coils: int, height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    maps = []
    for angle in 2 * np.pi * np.arange(coils) / coils:
        distance = (rows - 1.2 * np.sin(angle)) ** 2 + (columns - 1.2 * np.cos(angle)) ** 2
        maps.append(np.exp(-distance / 2) * np.exp(1j * (angle + 0.5 * rows * np.cos(angle))))
    return np.array(maps)


def head(
    slices: int = 2, coils: int = 3, height: int = 40, width: int = 48, noise: float = 0.002
) -> np.ndarray:
    """Fully sampled k-space, complex64 `[slices, coils, H, W]`, origin in the middle."""
    images = np.stack([picture(height, width, number) for number in range(slices)])
    kspace = fft2c(images[:, None] * sensitivities(coils, height, width))
    generator = np.random.default_rng(0)
    real, imaginary = generator.standard_normal((2, *kspace.shape))
    return (kspace + noise * (real + 1j * imaginary)).astype(np.complex64)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Energy of the difference over that of what is expected."""
    return float((np.abs(found - expected) ** 2).sum() / (np.abs(expected) ** 2).sum())
