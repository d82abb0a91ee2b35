"""The panel is written whole, and shows what it was given."""

from pathlib import Path

import numpy as np
from PIL import Image

from nirvana.mri.evaluate.figure import panel


def _images(head_slices: np.ndarray) -> dict[str, np.ndarray]:
    target = head_slices[1]
    return {"target": target, "half": target / 2, "near": target * 0.95}


def test_the_panel_shows_images_and_errors(tmp_path: Path, head_slices: np.ndarray) -> None:
    scores = {"half": {"ssim": 0.5, "psnr": 12.0, "nmse": 0.25}}
    panel(tmp_path / "p.png", _images(head_slices), "target", scores, "a head")
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("L"), dtype=float)
    middle = [pixels[:, part] for part in np.array_split(np.arange(pixels.shape[1]), 3)]
    upper, lower = slice(None, len(pixels) // 2), slice(len(pixels) // 2, None)
    assert middle[0][upper].mean() > middle[1][upper].mean() + 5
    assert middle[1][lower].mean() > middle[2][lower].mean() + 5


def test_without_a_target_there_is_one_row(tmp_path: Path, head_slices: np.ndarray) -> None:
    panel(tmp_path / "one.png", _images(head_slices))
    panel(tmp_path / "two.png", _images(head_slices), "target")
    one, two = (Image.open(tmp_path / name).height for name in ("one.png", "two.png"))
    assert two > 1.6 * one


def test_images_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    panel(tmp_path / "p.png", {"a": np.zeros((16, 16)), "b": np.zeros((16, 16))}, "a")
    assert (tmp_path / "p.png").stat().st_size > 0
