"""The functions of `nirvana.mri`: arrays, tensors and scans in memory to images and reports."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import nirvana.mri
from helpers.small_codec import small_backbone, small_config
from nirvana import InputError
from nirvana.data.tokenizer import load_tokenizer
from nirvana.model.backbone import backbone_folder, load_backbone
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.io import Scan, write_scan
from nirvana.mri.model.checkpoint import save_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.masks import sampling_mask
from nirvana.mri.reports.grammar import parse
from nirvana.mri.reports.reporter import DISCLAIMER, Reporter, save_reporter


@pytest.fixture(scope="module")
def scan(head_slices: np.ndarray) -> Scan:
    """A scan of which every fourth column and the centre are measured."""
    full = simulate_scan(head_slices[:2], "head", 0, Simulation(num_coils=2), (3.0, 2.0, 2.0))
    mask = sampling_mask("equispaced", 128, 4, 0.08, seed=0).numpy()
    return replace(full, kspace=full.kspace * mask, target=None)


@pytest.fixture(scope="module")
def reporter(tmp_path_factory: pytest.TempPathFactory) -> Reporter:
    name = small_backbone(tmp_path_factory.mktemp("backbone"))
    torch.manual_seed(3)
    model = CodecModel(small_config(name), load_backbone("nirvana", name)).eval()
    return Reporter(model, load_tokenizer(backbone_folder(name), required=()), threshold=0.0)


@pytest.fixture(scope="module")
def codec() -> CodecModel:
    torch.manual_seed(0)
    return CodecModel(small_config("none"), None).eval()


def test_the_import_loads_nothing_but_its_own_module() -> None:
    program = (
        "import sys, nirvana; before = set(sys.modules); import nirvana.mri; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "['nirvana.mri']", done.stderr
    assert set(nirvana.mri.__all__) <= set(nirvana.mri._HOMES)
    for name in nirvana.mri.__all__:
        assert callable(getattr(nirvana.mri, name))
    with pytest.raises(AttributeError, match=r"'nirvana\.mri' has no attribute 'nothing'"):
        _ = nirvana.mri.nothing


def test_arrays_tensors_and_scans_give_the_same_images(scan: Scan, codec: CodecModel) -> None:
    mask = sampling_mask("equispaced", 128, 4, 0.08, seed=0)
    counted: list[int] = []
    found = nirvana.mri.reconstruct(scan, codec=codec, batch_size=1, progress=counted.append)
    assert (found.shape, found.dtype) == ((2, 96, 128), np.float32)
    assert counted == [1, 1]
    expected = codec.reconstruct(torch.from_numpy(scan.kspace), mask).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    double = scan.kspace.astype(np.complex128)
    for kspace in (scan.kspace, double, torch.from_numpy(scan.kspace)):
        again = nirvana.mri.reconstruct(kspace, codec=codec, batch_size=1)
        np.testing.assert_array_equal(again, found)


def test_kspace_without_gaps_needs_no_codec(head_slices: np.ndarray) -> None:
    """Full k-space gives its own image; of one side alone, the completed one."""
    full = simulate_scan(head_slices[:2], "head", 0, Simulation(num_coils=2, noise=(0, 0)))
    found = nirvana.mri.reconstruct(full, codec="missing")
    np.testing.assert_allclose(found, full.target, atol=1e-5)
    side = np.arange(128) < 90
    completed = nirvana.mri.reconstruct(full.kspace, side, codec="missing")
    empty = zero_filled(full.kspace, side)
    assert full.target is not None
    assert np.abs(completed - full.target).mean() < 0.5 * np.abs(empty - full.target).mean()


def test_points_and_patterns_of_slices_are_masks(scan: Scan, codec: CodecModel) -> None:
    mask = sampling_mask("equispaced", 128, 4, 0.08, seed=0).numpy()
    expected = nirvana.mri.reconstruct(scan, mask, codec=codec)
    for shape in ((96, 128), (2, 128), (2, 96, 128)):
        given = np.broadcast_to(mask, shape)
        np.testing.assert_array_equal(nirvana.mri.reconstruct(scan, given, codec=codec), expected)
    points = np.random.default_rng(0).random((96, 128)) < 0.5
    points[36:60, 52:76] = True
    images = np.ones((2, 96, 128), np.float32)
    full = simulate_scan(images, "even", 0, Simulation(num_coils=2, noise=(0, 0)))
    found = nirvana.mri.reconstruct(full.kspace, points, codec=codec)
    assert np.isfinite(found).all()
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found, full.target, atol=1e-2)


def test_a_mask_leaves_columns_out(scan: Scan, codec: CodecModel) -> None:
    mask = sampling_mask("equispaced", 128, 4, 0.08, seed=0).numpy()
    fewer = mask & (np.arange(128) >= 20)
    assert fewer.sum() < mask.sum()
    expected = nirvana.mri.reconstruct(scan.kspace * fewer, codec=codec)
    for given in (fewer, torch.from_numpy(fewer)):
        np.testing.assert_array_equal(nirvana.mri.reconstruct(scan, given, codec=codec), expected)


def test_complex_images(scan: Scan, codec: CodecModel) -> None:
    magnitude = nirvana.mri.reconstruct(scan, codec=codec)
    for method in ("nirvana", "sense", "zero-filled"):
        found = nirvana.mri.reconstruct(scan, codec=codec, method=method, complex_images=True)
        assert (found.shape, found.dtype) == (magnitude.shape, np.complex64)
        assert 0.5 * magnitude.sum() < np.abs(found).sum() < 1.2 * magnitude.sum()
    with pytest.raises(InputError, match="--method nothing is unknown; choose one of nirvana, l1"):
        nirvana.mri.reconstruct(scan, method="nothing")


def test_a_codec_is_loaded_by_its_folder(scan: Scan, codec: CodecModel, tmp_path: Path) -> None:
    save_codec(codec, tmp_path / "codec")
    write_scan(tmp_path / "scan.h5", scan)
    found = nirvana.mri.reconstruct(
        nirvana.mri.read_scan(tmp_path / "scan.h5"), codec=tmp_path / "codec"
    )
    np.testing.assert_array_equal(found, nirvana.mri.reconstruct(scan, codec=codec))


@pytest.mark.parametrize(
    ("change", "mask", "words"),
    [
        (lambda k: k[0], None, r"must be complex \[slices, coils, H, W\]"),
        (lambda k: np.abs(k), None, "must be complex"),
        (lambda k: k * np.nan, None, "NaN"),
        (lambda k: k, np.ones(64, bool), r"the mask is \(64,\); k-space of 2 slices of 96 x 128"),
        (lambda k: k, np.arange(128) < 40, "at least 2 in the centre"),
        (lambda k: k * (np.arange(96) % 2)[:, None], None, "0 contiguous rows and columns"),
        (lambda k: (np.arange(96) % 2)[:, None] + 0 * k, None, "lacks rows of k-space"),
    ],
)
def test_wrong_kspace_is_refused(scan: Scan, codec: CodecModel, change, mask, words: str) -> None:
    with pytest.raises(InputError, match=words):
        nirvana.mri.reconstruct(change(scan.kspace), mask, codec=codec)


def test_slices_are_reported(scan: Scan, reporter: Reporter, tmp_path: Path) -> None:
    found = nirvana.mri.report(scan, reporter=reporter)
    assert list(found.readings) == [0, 1]
    for index, reading in found.readings.items():
        assert parse(reading.text) == reading.facts
        assert f"Slice {index + 1}: {reading.text}\n" in found.text
    assert found.text.endswith(DISCLAIMER + "\n")
    likely = {index: reading.finding for index, reading in found.readings.items()}
    assert likely[found.most_suspicious] == max(likely.values())

    save_reporter(reporter, tmp_path / "reporter")
    one = nirvana.mri.report(
        scan.kspace, spacing=scan.spacing, slices=[1], reporter=tmp_path / "reporter"
    )
    assert one.readings[1].finding == pytest.approx(found.readings[1].finding, abs=1e-4)
    assert "1 of 2 slices were read." in one.text
    np.testing.assert_allclose(one.images, found.images, rtol=1e-4, atol=1e-5)


def test_no_side_is_named_where_the_orientation_is_unknown(scan: Scan, reporter: Reporter) -> None:
    found = nirvana.mri.report(scan, reporter=reporter)
    stated = nirvana.mri.report(scan, radiological=True, reporter=reporter)
    assert "which side is left is unknown" in found.text
    assert "unknown" not in stated.text
    for index, reading in found.readings.items():
        assert stated.readings[index].facts.side in ("left", "right")
        assert reading.facts == replace(stated.readings[index].facts, side=None)
        assert "left or right" in reading.text
        described = reading.to_dict()
        assert described["facts"]["side"] is None
        assert "side" not in described["probability"]
        assert "side" not in described["alternatives"]
    np.testing.assert_array_equal(found.images, stated.images)


def test_wrong_scans_are_not_reported(scan: Scan, reporter: Reporter) -> None:
    with pytest.raises(InputError, match="the size of its pixels is unknown"):
        nirvana.mri.report(scan.kspace, reporter=reporter)
    with pytest.raises(InputError, match="slice 2 does not exist; give 0 to 1"):
        nirvana.mri.report(scan, slices=[0, 2], reporter=reporter)
    with pytest.raises(InputError, match="no slice was chosen"):
        nirvana.mri.report(scan, slices=[], reporter=reporter)
    with pytest.raises(InputError, match="at least 2 in the centre"):
        nirvana.mri.report(scan, np.arange(128) < 40, reporter=reporter)


def test_a_codec_adapts_to_a_scan(scan: Scan, codec: CodecModel) -> None:
    codec = deepcopy(codec)
    with torch.no_grad():
        codec.decoder.write.weight.normal_(0, 0.1)  # an image error that can be unlearned
    plain = nirvana.mri.reconstruct(scan, codec=codec)
    still = nirvana.mri.ScanAdaptConfig(steps=0)
    np.testing.assert_array_equal(nirvana.mri.reconstruct(scan, codec=codec, adapt=still), plain)
    some = nirvana.mri.ScanAdaptConfig("all", steps=8, lr=3e-3)
    assert (nirvana.mri.reconstruct(scan, codec=codec, adapt=some) != plain).any()
    np.testing.assert_array_equal(nirvana.mri.reconstruct(scan, codec=codec), plain)
    with pytest.raises(InputError, match="adapt is for method 'nirvana', not 'sense'"):
        nirvana.mri.reconstruct(scan, method="sense", adapt=some)
