"""The panel is written whole, and shows what it was given."""

import itertools
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from nirvana.mri.evaluate.figure import SliceGeometry, error_scale, panel, slice_geometry


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


def test_edges_are_the_patients_sides() -> None:
    """Those of nibabel's axis codes, for images in any of the 24 right-angled orientations."""
    axes = np.eye(3)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = axes[:, order] * signs
            _, down, across = nibabel.orientations.aff2axcodes(affine)
            edges = slice_geometry(None, affine).edges
            assert edges is not None
            left, right, top, bottom = edges
            assert (right, bottom) == (across, down)
            opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
            assert (left, top) == (opposite[across], opposite[down])


def test_oblique_and_unknown_edges_are_not_named() -> None:
    assert slice_geometry((5.0, 1.0, 2.0), None) == SliceGeometry((1.0, 2.0), None)
    affine = np.eye(4)
    affine[:3, 2] = (0.6, 0.55, 0.58)
    assert slice_geometry(None, affine).edges == ("", "", "P", "A")


def test_the_error_scale_suits_the_smallest_errors() -> None:
    errors = {"far": np.full((8, 8), 0.4), "near": np.full((8, 8), 0.03)}
    assert error_scale(errors) == 0.05
    assert error_scale({"far": errors["far"]}) == 0.5
    assert error_scale({}) == 0.01


def test_the_geometry_shapes_the_picture(tmp_path: Path, head_slices: np.ndarray) -> None:
    """Rows at twice the distance of columns give a taller picture; marks are drawn where known."""
    images = _images(head_slices)
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    panel(plain, images, geometry=SliceGeometry((2.0, 1.0)))
    panel(marked, images, geometry=SliceGeometry((2.0, 1.0), ("R", "L", "A", "P")))
    assert Image.open(plain).height > 1.5 * _height(tmp_path, images)
    difference = np.asarray(Image.open(plain)) != np.asarray(Image.open(marked))
    rows, columns = np.nonzero(difference.any(axis=-1))
    width = difference.shape[1] / len(images)
    assert len(rows) > 100
    assert columns.max() < 1.1 * width  # on the first image only


def _height(folder: Path, images: dict[str, np.ndarray]) -> int:
    panel(folder / "square.png", images, geometry=SliceGeometry((1.0, 1.0)))
    return Image.open(folder / "square.png").height
