"""Real volumes that the MRI tests share."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def example4d() -> Path:
    """The example series that nibabel ships: one subject, 24 slices of 96 x 128."""
    from nibabel.testing import data_path

    return Path(data_path) / "example4d.nii.gz"


@pytest.fixture(scope="session")
def head_slices(example4d: Path) -> np.ndarray:
    """Four slices of that subject, `[4, 96, 128]` in 0..1."""
    from nirvana.mri.io import read_volume

    return read_volume(example4d)[6:22:4]


@pytest.fixture(scope="session")
def mri_data(data_folder: Path) -> Path:
    """The folder of MRI data."""
    return data_folder / "mri"
