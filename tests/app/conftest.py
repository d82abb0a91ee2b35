"""A page with a small codec, and a small scan. What needs Gradio is imported where it is used, so
that the tests are skipped without it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from helpers.small_codec import small_config
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.io import write_scan
from nirvana.mri.model.checkpoint import save_codec
from nirvana.mri.model.codec import CodecModel

if TYPE_CHECKING:
    from helpers.app_rooms import Rooms


@pytest.fixture(scope="session")
def small_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec") / "small"
    save_codec(CodecModel(small_config("none"), None).eval(), folder)
    return folder


@pytest.fixture
def rooms(small_codec: Path, tmp_path: Path) -> Iterator["Rooms"]:
    from helpers.app_rooms import Rooms
    from nirvana.app.config import AppConfig

    made = Rooms(AppConfig(codec=str(small_codec), max_mb=8), tmp_path / "root")
    yield made
    made.page.sessions.close_all()
    assert not [file for file in made.root.rglob("*") if file.is_file()]


@pytest.fixture(scope="session")
def scan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fully sampled scan of five slices."""
    image = np.random.default_rng(0).random((5, 40, 48), dtype=np.float32)
    scan = simulate_scan(image, "small", 0, Simulation(num_coils=2), (5.0, 2.0, 2.0))
    path = tmp_path_factory.mktemp("scans") / "small.h5"
    write_scan(path, scan)
    return path
