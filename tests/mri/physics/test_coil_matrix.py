"""Noise whitening and coil compression."""

import numpy as np
import pytest

from nirvana.errors import InputError
from nirvana.mri.physics.coil_matrix import compression_matrix, noise_covariance, whitening_matrix


def correlated_noise(coils: int, samples: int, seed: int = 0) -> np.ndarray:
    """Complex noise `[coils, samples]` of unequal and correlated coils."""
    random = np.random.default_rng(seed)
    white = random.standard_normal((coils, samples)) + 1j * random.standard_normal((coils, samples))
    mixing = np.eye(coils) + 0.3 * random.standard_normal((coils, coils))
    return (mixing * np.linspace(0.5, 4, coils)[:, None]) @ white


def test_whitened_noise_has_unit_covariance() -> None:
    noise, other = np.split(correlated_noise(6, 20_000), [2000], axis=1)
    covariance = noise_covariance(noise)
    matrix = whitening_matrix(covariance, "scan")
    scale = np.median(np.real(np.diagonal(covariance)))
    found = noise_covariance(matrix @ noise) / scale
    np.testing.assert_allclose(found, np.eye(6), atol=1e-5)
    # And so has other noise of the same scan, to its own statistical error.
    np.testing.assert_allclose(noise_covariance(matrix @ other) / scale, np.eye(6), atol=0.2)


def test_coils_of_equal_noise_stay_as_they_are() -> None:
    np.testing.assert_allclose(whitening_matrix(9 * np.eye(4), "scan"), np.eye(4), atol=1e-6)


def test_coils_without_noise_are_left_out() -> None:
    covariance = np.diag([1.0, 0.0, 4.0, 4.0])
    matrix = whitening_matrix(covariance, "scan")
    assert matrix.shape == (3, 4)
    assert not matrix[:, 1].any()


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        (np.array([[1, 2], [3, 4.0]]), "not Hermitian"),
        (np.array([[1, 2], [2, 1.0]]), "not positive definite"),
        (np.array([[1, np.nan], [0, 1.0]]), "no finite"),
    ],
)
def test_a_matrix_that_is_no_covariance_is_refused(covariance: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=f"scan: .*{words}"):
        whitening_matrix(covariance, "scan")


def test_compression_to_all_coils_is_a_rotation() -> None:
    samples = correlated_noise(6, 300)
    matrix, share = compression_matrix(samples @ samples.conj().T, 6)
    assert share == pytest.approx(1)
    np.testing.assert_allclose(matrix @ matrix.conj().T, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(matrix @ samples, axis=0), np.linalg.norm(samples, axis=0), rtol=1e-5
    )


def test_compression_keeps_the_most_energy() -> None:
    samples = correlated_noise(2, 300)
    mixed = np.random.default_rng(3).standard_normal((8, 2)) @ samples  # two sources in eight coils
    matrix, share = compression_matrix(mixed @ mixed.conj().T, 2)
    assert share == pytest.approx(1)
    np.testing.assert_allclose(
        np.linalg.norm(matrix @ mixed, axis=0), np.linalg.norm(mixed, axis=0), rtol=1e-5
    )
    assert compression_matrix(mixed @ mixed.conj().T, 1)[1] < 1
