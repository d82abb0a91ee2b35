"""The study of reports from end to end, at a size for a test."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.common.results import read_rows
from experiments.report import detection, packaged, page, study
from experiments.report.rows import READ
from helpers.drawn_brain import drawn_brain_slices
from helpers.small_codec import small_backbone
from nirvana import InputError
from nirvana.mri.anatomy.brain_slices import save_brain_slices
from nirvana.mri.reports.grammar import NORMAL, Facts
from nirvana.mri.reports.score import best_threshold

MASS = Facts(True, 1, "mass", "left", "frontal", 12, "hyperintense")


def test_the_study_runs_resumes_and_is_written_up(tmp_path: Path) -> None:
    brains, out = tmp_path / "brain_slices.npz", tmp_path / "out"
    save_brain_slices(
        brains, drawn_brain_slices((64, 64), names=("train/a", "valid/b", "test/c", "test/d"))
    )
    options = ["--toy", "--samples", "6", "--weights", small_backbone(tmp_path / "net")]
    arguments = [str(brains), str(out), *options]
    study.main(arguments)
    files = sorted((out / "rows").iterdir())
    assert len(files) == len(study.cells(False)) + len(study.cells(True))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    wording = [row for row in rows if row["kind"] == "wording" and row["model"] == "nirvana"]
    assert len(wording) == 6 * 6
    # The same samples in every cell, whatever the acceleration and wording.
    by_cell: dict[tuple[float, int], list] = {}
    for row in wording:
        by_cell.setdefault((row["acceleration"], row["wording"]), []).append(row["truth"])
    assert all(truth == by_cell[4.0, 0] for truth in by_cell.values())
    assert {row["subject"] for row in rows} <= {"test/c", "test/d"}
    # What is there is not made again; what is missing is.
    kept = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    study.main(arguments)
    after = {file: file.stat().st_mtime_ns for file in sorted((out / "rows").iterdir())}
    assert set(after) == set(kept)
    assert all(after[file] == kept[file] for file in files[1:])
    results = tmp_path / "RESULTS.md"
    case = out / "shown" / "stroke"
    case.mkdir(parents=True)
    facts = {"finding": True, "side": "left"}
    slices = [{"slice": 4, "facts": facts, "text": "One mass.", "probability": {"side": 0.6}}]
    content = {"slices": slices}
    (case / "report.json").write_text(
        json.dumps(content | {"panel": {"slice": 4}, "sampled": 0.25})
    )
    (case.parent / "about.md").write_text("A stroke on the left.")
    page.main(["--study", str(out), "--out", str(results)])
    text = results.read_text()
    assert "| `stroke` | 1 | 1 (1 left) | 4: One mass. (side 60%) |" in text
    assert "A stroke on the left." in text
    line = next(line for line in text.splitlines() if line.startswith("| oracle"))
    assert line.count(" 1.000 (1.000 to 1.000) ") == 3
    assert "| presence F1 | >= 0.90 |" in text
    for words in ("no image", "shuffled", "majority", "zero-filled", "contrast 0.15", "| 1.0% |"):
        assert words in text
    # The threshold that was read with is the one that the page's rule gives.
    stored = json.loads((out / "nirvana" / "reporter" / "report.json").read_text())["threshold"]
    validation = json.loads((out / "nirvana" / "validation.json").read_text())
    likely = validation["finding"]["wording 0"]
    assert len(likely) == len(validation["present"]) == 6
    assert (
        stored == best_threshold(validation["present"], likely, study.TOY.hallucinated)["threshold"]
    )
    record = out / "nirvana" / "validation.json"
    validation["finding"]["wording 0"] = [p / 2 for p in likely]  # of another model
    record.write_text(json.dumps(validation))
    with pytest.raises(InputError, match=f"another threshold than {stored / 2}"):
        page.main(["--study", str(out), "--out", str(results)])
    record.unlink()
    with pytest.raises(InputError, match=r"validation.json cannot be read"):
        page.main(["--study", str(out), "--out", str(results)])


def test_roles_must_be_there(tmp_path: Path) -> None:
    save_brain_slices(tmp_path / "brain_slices.npz", drawn_brain_slices((64, 64)))
    with pytest.raises(InputError, match="role train"):
        study.main([str(tmp_path / "brain_slices.npz"), str(tmp_path / "out"), "--toy"])
    with pytest.raises(InputError, match=r"--hallucinated 2.0 must be from 0 to 1"):
        study.main(
            [str(tmp_path / "brain_slices.npz"), str(tmp_path / "out"), "--hallucinated", "2"]
        )
    with pytest.raises(InputError, match="no rows"):
        page.main(["--study", str(tmp_path / "out"), "--out", str(tmp_path / "page.md")])


def test_the_packaged_reporters_rows_are_written_once(tmp_path: Path) -> None:
    brains, out = tmp_path / "brain_slices.npz", tmp_path / "results.jsonl.xz"
    save_brain_slices(
        brains, drawn_brain_slices((64, 64), names=("train/a", "valid/b", "test/c", "test/d"))
    )
    given = [str(brains), "--samples", "3", "--at-once", "2", "--out", str(out), "--device", "cpu"]
    packaged.main(given)
    rows = read_rows(out)
    assert len(rows) == 3
    assert {row["subject"] for row in rows} <= {"test/c", "test/d"}
    assert {row["model"] for row in rows} == {packaged.NAME}
    with pytest.raises(InputError, match="3 rows at 4x already"):
        packaged.main(given)
    with pytest.raises(InputError, match="--at-once 0 must be at least 1"):
        packaged.main([*given, "--at-once", "0"])


def row(person: str, finding: float, lesion: bool, found: bool, size: float = 12.0) -> dict:
    truth = MASS if lesion else NORMAL
    read = MASS if found else NORMAL
    size = size if lesion else 0.0
    return {
        "subject": f"test/{person}",
        "truth": truth,
        READ: read,
        "finding": finding,
        "size": size,
        "threshold": 0.5,
    }


def test_detection_is_counted_by_hand() -> None:
    rows = [
        row("a", 0.9, True, True),
        row("a", 0.4, True, False),
        row("a", 0.7, True, True, size=5.0),  # small: counts for all sizes alone
        row("a", 0.6, False, True),
        row("a", 0.1, False, False),
        row("b", 0.8, True, True),
        row("b", 0.2, False, False),
    ]
    found = detection.by_person(rows)
    assert (found["a"].lesions, found["a"].normals) == (2, 2)
    assert (found["a"].sensitivity, found["a"].false) == (0.5, 0.5)
    assert found["a"].auc == 0.75
    assert found["a"].auc_all == pytest.approx(5 / 6)
    assert found["a"].f1 == pytest.approx(2 / (2 + 1 + 1))
    # No normal slice of three may get a finding at 5 %: the threshold lies above them all.
    assert (found["a"].sensitivity_fixed, found["a"].false_fixed) == (0.5, 0.0)
    assert (found["b"].auc, found["b"].sensitivity_fixed) == (1.0, 1.0)
    assert np.isnan(detection.detect(rows[:2], 0.5).false)


def test_the_fixed_threshold_keeps_to_its_share() -> None:
    random = np.random.default_rng(0)
    rows = [row("a", p, False, False) for p in random.uniform(size=200)]
    for most in (0.0, 0.05, 0.5, 1.0):
        threshold = detection.at_false(rows, most)
        share = np.mean([each["finding"] >= threshold for each in rows])
        assert share == pytest.approx(most, abs=1e-9)


def test_the_committed_rows_give_the_committed_page() -> None:
    cells = page.load([packaged.RESULTS])
    written = page.page(cells, packaged.NAME)
    assert (page.HERE / "RESULTS.md").read_text(encoding="utf-8").startswith(written)
