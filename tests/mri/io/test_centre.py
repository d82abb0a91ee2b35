"""The origin of k-space is found where it is, and shifted only where that is clear."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.phantom import combined, error, fft2c, head, picture
from nirvana.errors import InputError
from nirvana.mri.io import ReadOptions, Scan, read_scan
from nirvana.mri.io.arrange import arranged
from nirvana.mri.physics.masks import sampling_mask

PATH = Path("scan.h5")


def read(kspace: np.ndarray, options: ReadOptions | None = None, **facts: object) -> Scan:
    scan = Scan(**{"kspace": kspace, "mask": None, "target": None, "name": "s", **facts})
    return arranged(scan, options or ReadOptions(phase_encode="columns"), PATH, None, None)


@pytest.mark.parametrize("size", [(40, 48), (41, 47), (64, 33)])
@pytest.mark.parametrize("axes", [(-2, -1), (-2,), (-1,)])
def test_an_origin_in_the_corner(size: tuple[int, int], axes: tuple[int, ...]) -> None:
    kspace = head(2, 3, *size)
    scan = read(np.fft.ifftshift(kspace, axes=axes))
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert len(scan.remarks) == 1
    assert "was moved to the middle" in scan.remarks[0]


@pytest.mark.parametrize("kind", ["equispaced", "random"])
def test_an_origin_in_the_corner_of_undersampled_kspace(kind: str) -> None:
    mask = sampling_mask(kind, 96, 4, 0.08, seed=1).numpy()  # type: ignore[arg-type]
    kspace = head(2, 3, 80, 96) * mask
    np.testing.assert_array_equal(read(kspace).kspace, kspace)
    found = read(np.fft.ifftshift(kspace, axes=(-2, -1)))
    np.testing.assert_array_equal(found.kspace, kspace)


@pytest.mark.parametrize("missing", [8, 16, 20])
def test_partial_fourier_without_zeros_gets_them(missing: int) -> None:
    """What was not measured at one side is added, so that the origin is in the middle."""
    kspace = head(2, 3, 40, 48)
    affine = np.array([[0, 0, 2, 5], [0, 3, 0, 6], [4, 0, 0, 7], [0, 0, 0, 1.0]])
    for part, first in ((kspace[..., missing:], missing), (kspace[..., : 48 - missing], 0)):
        scan = read(part, affine=affine, spacing=(4.0, 3.0, 2.0))
        assert scan.kspace.shape == kspace.shape
        kept = slice(first, first + 48 - missing)
        np.testing.assert_array_equal(scan.kspace[..., kept], part)
        assert not np.delete(scan.kspace, np.arange(48)[kept], axis=-1).any()
        # The field of view is the same, so pixels are smaller than the file states.
        assert scan.spacing == pytest.approx((4, 3, 2 * (48 - missing) / 48))
        assert scan.affine is not None
        width = 48 - missing
        np.testing.assert_allclose(
            scan.affine @ [0, 0, 24, 1], affine @ [0, 0, width // 2, 1], atol=1e-9
        )


def test_a_wrong_centre_in_the_zeros_of_partial_fourier() -> None:
    kspace = head(2, 3, 40, 48)
    kspace[..., :12] = 0
    displaced = np.roll(kspace, -12, axis=-1)
    scan = read(displaced)
    np.testing.assert_array_equal(scan.kspace, kspace)
    assert "column 12 of 48" in scan.remarks[0]
    # Given the origin, it does the same; given that it is in the middle, nothing.
    named = read(displaced, ReadOptions(centre=(20, 12), phase_encode="columns"))
    np.testing.assert_array_equal(named.kspace, kspace)
    as_it_is = read(displaced, ReadOptions(centre="middle"))
    np.testing.assert_array_equal(as_it_is.kspace, displaced)
    assert not as_it_is.remarks


@pytest.mark.parametrize("centre", [(40, 0), (0, 48)])
def test_an_origin_outside_is_refused(centre: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="outside of its 40 rows and 48 columns"):
        read(head(1, 1, 40, 48), ReadOptions(centre=centre))


def test_the_corner_by_name() -> None:
    kspace = head(1, 2, 41, 48)
    corner = np.fft.ifftshift(kspace, axes=(-2, -1))
    found = read(corner, ReadOptions(centre="corner"))
    np.testing.assert_array_equal(found.kspace, kspace)


@pytest.mark.parametrize("shifts", [(0, 0), (1, -1), (-2, 2)])
def test_an_echo_a_little_off_stays(shifts: tuple[int, int]) -> None:
    kspace = np.roll(head(2, 3, 40, 48), shifts, axis=(-2, -1))
    np.testing.assert_array_equal(read(kspace).kspace, kspace)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(8, 40)] * 2),
    zeros=st.floats(0, 0.9),
)
def test_noise_has_no_origin(seed: int, shape: tuple[int, int, int, int], zeros: float) -> None:
    generator = np.random.default_rng(seed)
    kspace = (generator.standard_normal((2, *shape)) * [[[[[1]]]], [[[[1j]]]]]).sum(0)
    kspace = (kspace * (generator.random(shape[-1]) >= zeros)).astype(np.complex64)
    if kspace.any():
        np.testing.assert_array_equal(read(kspace).kspace, kspace)


def test_a_spike_is_no_origin() -> None:
    kspace = head(2, 3, 40, 48)
    kspace[0, 1, 3, 5] = 1e6
    np.testing.assert_array_equal(read(kspace).kspace, kspace)


def test_partitions_of_a_3d_scan() -> None:
    values = np.fft.fftshift(np.fft.fft(head(12, 2, 24, 20), axis=0), axes=0).astype(np.complex64)
    corner = np.fft.ifftshift(values, axes=(0, 2, 3))
    np.testing.assert_array_equal(read(corner, volume_encoding="3D").kspace, values)
    # Slices of a 2D scan have no origin.
    np.testing.assert_array_equal(read(values).kspace, values)


@pytest.mark.parametrize("size", [(40, 48), (41, 47)])
@pytest.mark.parametrize("shifted", [False, True])
def test_images_around_the_corner_of_their_view(size: tuple[int, int], shifted: bool) -> None:
    """`fft2` of an image, with or without `fftshift` after it, leaves the image's own origin in the
    corner."""
    image = picture(*size)
    kspace = np.fft.fft2(image, norm="ortho")
    kspace = np.fft.fftshift(kspace) if shifted else kspace
    scan = read(kspace[None, None].astype(np.complex64))
    assert "around the corner" in scan.remarks[-1]
    assert error(combined(scan.kspace)[0], image) < 1e-10
    unchanged = fft2c(image)[None, None].astype(np.complex64)
    np.testing.assert_array_equal(read(unchanged).kspace, unchanged)


def test_measured_kspace_stays_as_it_is(mri_data: Path) -> None:
    import scipy.io

    for name, key in (
        ("larson_se_t1_sag_data", "data"),
        ("larson_coronal_fatsat_2D_knee", "kdata"),
    ):
        path = mri_data / "kspace" / f"{name}.mat"
        values = scipy.io.loadmat(path)[key].astype(np.complex64)
        np.testing.assert_array_equal(read_scan(path).kspace[0, 0], values)
        found = read(np.fft.ifftshift(values)[None, None])
        np.testing.assert_array_equal(found.kspace[0, 0], values)
    path = mri_data / "kspace" / "sigpy_brain8ch_undersampled_cartesian_ksp.npy"
    np.testing.assert_array_equal(read_scan(path).kspace[0], np.load(path))


def test_the_mask_moves_along(tmp_path: Path) -> None:
    mask = sampling_mask("random", 48, 3, 0.2, seed=2).numpy()
    kspace = head(2, 3, 40, 48) * mask
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["kspace"] = np.fft.ifftshift(kspace, axes=(-2, -1))
        file["mask"] = np.fft.ifftshift(mask)
    scan = read_scan(tmp_path / "s.h5")
    np.testing.assert_array_equal(scan.kspace, kspace)
    np.testing.assert_array_equal(scan.mask, mask)
