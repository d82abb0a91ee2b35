"""Linear combinations of receive coils: noise whitening and coil compression."""

import numpy as np

from nirvana.errors import InputError

# Samples of noise for each coil that a covariance needs.
SAMPLES_PER_COIL = 4
# Coils with less noise than this share of the median's have none: they were switched off.
DEAD = 1e-6


def noise_covariance(noise: np.ndarray) -> np.ndarray:
    """The covariance of complex noise of zero mean, C = n n^H / samples.

    Args:
        noise: complex `[coils, samples]`.

    Returns:
        complex128 `[coils, coils]`.
    """
    noise = np.asarray(noise, np.complex128)
    return noise @ noise.conj().T / noise.shape[1]


def whitening_matrix(covariance: np.ndarray, name: str) -> np.ndarray:
    """Combinations of the coils whose noise is white (Pruessmann et al., 2001): with C = L L^H,

        W = s L^-1          W C W^H = s^2 I

    s is the median standard deviation of the coils' noise, so that images of coils of equal noise
    keep their scale. Coils without noise, which were switched off, are left out.

    Args:
        covariance: Hermitian `[coils, coils]`.
        name: of what it belongs to, for the error.

    Returns:
        complex64 `[coils with noise, coils]`.

    Raises:
        InputError: it is not Hermitian and positive definite.
    """
    covariance = np.asarray(covariance, np.complex128)
    coils = len(covariance)
    if covariance.shape != (coils, coils) or not np.isfinite(covariance).all():
        raise InputError(f"{name}: its noise covariance is no finite [coils, coils] matrix")
    difference = np.abs(covariance - covariance.conj().T).max()
    if difference > 1e-3 * np.abs(covariance).max():
        raise InputError(f"{name}: its noise covariance is not Hermitian")
    variance = np.real(np.diagonal(covariance))
    live = np.flatnonzero(variance > DEAD**2 * np.median(variance)) if coils > 1 else np.arange(1)
    try:
        factor = np.linalg.cholesky(covariance[np.ix_(live, live)])
    except np.linalg.LinAlgError:
        raise InputError(
            f"{name}: its noise covariance is not positive definite; some coils' noise is a "
            "combination of others'"
        ) from None
    scale = np.sqrt(np.median(variance[live]))
    matrix = np.zeros((len(live), coils), np.complex64)
    matrix[:, live] = scale * np.linalg.inv(factor)
    return matrix


def compression_matrix(gram: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The combinations of coils that hold the most of the signal (Huang et al., 2008).

    The rows are orthonormal: white noise stays white, and with all coils the root sum of squares
    does not change.

    Args:
        gram: complex `[coils, coils]`, sum over samples k of k_c conj(k_d).
        count: number of virtual coils, at most that of the coils.

    Returns:
        complex64 `[count, coils]`, and the share of the samples' energy that is kept.
    """
    values, vectors = np.linalg.eigh(np.asarray(gram, np.complex128))
    kept = vectors[:, ::-1][:, :count]
    share = values[::-1][:count].sum() / max(values.sum(), np.finfo(float).tiny)
    return kept.conj().T.astype(np.complex64), float(share)
