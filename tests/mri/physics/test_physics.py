"""Fourier transform, forward operator, masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss
from nirvana.mri.physics.masks import Sampling, calibration_columns, find_mask, sampling_mask
from nirvana.mri.physics.sense import CartesianSense

FACTS = json.loads((Path(__file__).parent / "fastmri_masks.json").read_text())["masks"]


def _complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (9, 13), (32, 8)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_fft_is_centred_and_orthonormal(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = _complex(3, *size, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.complex64 else 1e-12
    axes = (-2, -1)
    expected = np.fft.fftshift(
        np.fft.fft2(np.fft.ifftshift(x.numpy(), axes=axes), norm="ortho"), axes=axes
    )
    kspace = fft2c(x)
    assert kspace.dtype == dtype
    np.testing.assert_allclose(kspace.numpy(), expected, atol=tolerance)
    torch.testing.assert_close(ifft2c(kspace), x, atol=tolerance, rtol=0)
    torch.testing.assert_close(kspace.norm(), x.norm(), rtol=1e-5, atol=0)


def test_a_constant_image_lies_in_the_middle_of_kspace() -> None:
    kspace = fft2c(torch.ones(9, 12, dtype=torch.complex64))
    assert int(kspace.abs().argmax()) == 4 * 12 + 6
    assert kspace.abs().amax().item() == pytest.approx((9 * 12) ** 0.5, rel=1e-5)


def test_rss_is_the_norm_over_coils() -> None:
    x = _complex(2, 5, 7, 6)
    torch.testing.assert_close(rss(x), (x.abs() ** 2).sum(dim=1).sqrt())


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("size", [(12, 16), (11, 17)])
def test_the_adjoint_is_the_adjoint(batch: tuple[int, ...], size: tuple[int, int]) -> None:
    mask = sampling_mask("random", size[-1], 2, 0.2, seed=1)
    operator = CartesianSense(_complex(*batch, 4, *size), mask)
    x, y = _complex(*batch, *size, seed=1), _complex(*batch, 4, *size, seed=2)
    left = (operator.forward(x).conj() * y).sum()
    right = (x.conj() * operator.adjoint(y)).sum()
    assert abs(left - right) / (operator.forward(x).norm() * y.norm()) < 1e-5


def test_the_operator_is_linear_and_keeps_only_sampled_columns() -> None:
    mask = sampling_mask("equispaced", 16, 2, 0.2, seed=1)
    operator = CartesianSense(_complex(2, 4, 12, 16), mask[None, None, None])
    x, y, factor = _complex(2, 12, 16, seed=1), _complex(2, 12, 16, seed=2), 0.3 - 2j
    together = operator.forward(factor * x + y)
    separate = factor * operator.forward(x) + operator.forward(y)
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=1e-5)
    assert together.shape == (2, 4, 12, 16)
    assert not together[..., ~mask].any()
    full = CartesianSense(operator.sensitivities).forward(factor * x + y)
    torch.testing.assert_close(together[..., mask], full[..., mask])


def test_the_operator_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="complex"):
        CartesianSense(torch.ones(4, 8, 8))
    with pytest.raises(ValueError, match="width of 8"):
        CartesianSense(_complex(4, 8, 8), torch.ones(9, dtype=torch.bool))


@pytest.mark.parametrize("fact", FACTS, ids=lambda f: f"{f['kind']}-{f['width']}-{f['seed']}")
def test_masks_equal_fastmri(fact: dict) -> None:
    sampling = Sampling(fact["kind"], fact["acceleration"], fact["center_fraction"])
    mask = sampling.mask(fact["width"], fact["seed"])
    assert mask.dtype == torch.bool
    assert mask.nonzero().flatten().tolist() == fact["columns"]


def test_acceleration_one_samples_everything() -> None:
    assert sampling_mask("equispaced", 40, 1, 0.1, seed=0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("radial", 64, 4, 0.08, 0), "equispaced"),
        (("random", 7, 2, 0.2, 0), "at least 8"),
        (("random", 64, 0.5, 0.08, 0), "1 or more"),
        (("random", 64, float("nan"), 0.08, 0), "1 or more"),
        (("random", 64, 4, 0.001, 0), "no central column"),
        (("random", 64, 4, 0.0, 0), "not between"),
        (("equispaced", 64, 4, 0.25, 0), "less than 0.250"),
        (("equispaced", 64, 4, 0.5, 0), "less than 0.250"),
        (("random", 64, 4, 0.08, -1), "out of range"),
    ],
)
def test_nonsense_is_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        sampling_mask(*arguments)


def test_find_mask_reads_the_mask_off_the_kspace() -> None:
    mask = sampling_mask("random", 24, 3, 0.1, seed=4)
    kspace = _complex(2, 3, 8, 24) * mask
    assert torch.equal(find_mask(kspace), mask)
    assert torch.equal(find_mask(kspace.numpy()), mask)


def test_the_calibration_columns_are_the_central_block() -> None:
    mask = torch.tensor([column == "1" for column in "10111101"])
    assert calibration_columns(mask).tolist() == [
        False,
        False,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
