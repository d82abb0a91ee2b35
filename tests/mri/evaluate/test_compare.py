"""Evaluation: one mask for all methods, scores of the metrics, statistics over volumes."""

import json
from collections.abc import Iterator
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import wilcoxon

from nirvana.files import finite
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import measure
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate import compare as ev
from nirvana.mri.evaluate.metrics import head_mask, score
from nirvana.mri.evaluate.tables import FORMATS, rows_table, summary_table
from nirvana.mri.io import Scan
from nirvana.mri.methods import SliceImage, fourier_method
from nirvana.mri.physics.masks import Sampling, sampling_mask


@pytest.fixture(scope="module")
def scan(head_slices: np.ndarray) -> Scan:
    return simulate_scan(head_slices, "head", 0, Simulation(num_coils=4))


def test_every_method_sees_the_same_seeded_mask(scan: Scan) -> None:
    seen = []

    def method(acquisition: Acquisition) -> Iterator[SliceImage]:
        seen.append(acquisition)
        return fourier_method(acquisition)

    rows = ev.evaluate_volume(scan, {"a": method, "b": method}, Sampling(), seed=5)
    mask = sampling_mask("equispaced", 128, 4, 0.08, seed=5).numpy()
    for acquisition in seen:
        assert np.array_equal(acquisition.pattern, mask)
        for kspace, whole in zip(acquisition.slices(), scan.kspace, strict=True):
            assert np.array_equal(kspace, whole * mask)
    assert scan.target is not None
    expected = score(scan.target, zero_filled(scan.kspace, mask), head_mask(scan.target))
    for row, name in zip(rows, "ab", strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert (row["method"], row["volume"], row["seed"]) == (name, "head", 5)
        assert row["sampled"] == pytest.approx(mask.mean())
        assert row["seconds_per_slice"] > 0


def test_the_images_of_one_method_are_kept_complex(scan: Scan) -> None:
    counted: list[int] = []
    methods = {"a": fourier_method, "b": fourier_method}
    found = ev.run_methods(measure(scan), methods, lambda name: counted.append, combined="b")
    assert len(counted) == 2 * len(scan.kspace)
    assert found["a"].combined is None
    assert scan.target is not None
    np.testing.assert_allclose(found["a"].images, scan.target, atol=1e-5)
    combined = found["b"].combined
    assert combined is not None
    inside = head_mask(scan.target)
    np.testing.assert_allclose(np.abs(combined)[inside], scan.target[inside], atol=0.05)


def _rows(ours: list[float], theirs: list[float]) -> list[ev.Row]:
    facts = {"psnr": 30.0, "nmse": 0.1, "seconds_per_slice": 1.0}
    return [
        {"volume": str(number), "method": method, "ssim": value, **facts}
        for method, values in (("ours", ours), ("theirs", theirs))
        for number, value in enumerate(values)
    ]


def test_statistics_over_volumes() -> None:
    ours, theirs = [0.9, 0.8, 0.95, 0.85, 0.7], [0.8, 0.75, 0.96, 0.7, 0.5]
    first, second = ev.summarise(_rows(ours, theirs), "ours")
    assert second["ssim"]["mean"] == pytest.approx(np.mean(theirs))
    assert second["ssim"]["std"] == pytest.approx(np.std(theirs, ddof=1))
    assert second["ssim"]["p"] == pytest.approx(wilcoxon(ours, theirs).pvalue)
    assert first["ssim"]["p"] is None
    assert second["psnr"]["p"] is None
    assert second["volumes"] == 5
    assert "ssim_head" not in first


def test_one_volume_has_no_spread() -> None:
    for line in ev.summarise(_rows([0.9], [0.8]), "ours"):
        assert (line["ssim"]["std"], line["ssim"]["p"]) == (None, None)


def test_tables_show_every_row() -> None:
    rows = _rows([0.91, 0.82], [0.73, 0.64])
    console = Console(width=80, file=StringIO())
    console.print(rows_table(rows))
    console.print(summary_table(ev.summarise(rows, "ours")))
    text = console.file.getvalue()
    for figure in ("0.9100", "0.8200", "0.7300", "0.6400", "0.8650", "± 0.0636", "p = 0.5"):
        assert figure in text


def test_infinite_scores_become_null_in_json() -> None:
    value = {"rows": [{"psnr": float("inf"), "ssim": 1.0}], "n": 3}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == {
        "rows": [{"psnr": None, "ssim": 1.0}],
        "n": 3,
    }


def test_numbers_are_whole_on_a_narrow_terminal() -> None:
    figures = dict.fromkeys(FORMATS, 12.345678)
    rows = [{"volume": f"a rather long name {n}", "method": "L1-wavelet", **figures} for n in "12"]
    console = Console(width=80, file=StringIO(), record=True)
    console.print(rows_table(rows))
    text = console.export_text()
    assert "…" not in text
    assert text.count("12.3457") == 2 * 4  # what is shown to four places
