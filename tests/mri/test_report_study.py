"""The study of reports from end to end, at a size for a test."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from helpers.report_codec import small_backbone
from helpers.report_heads import drawn_heads
from nirvana import InputError
from nirvana.mri.report.heads import save_heads
from nirvana.mri.report.score import best_threshold

FOLDER = Path(__file__).parents[2] / "experiments" / "report"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"report_study_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_study_runs_resumes_and_is_written_up(tmp_path: Path) -> None:
    run, report = script("run"), script("report")
    heads, out = tmp_path / "heads.npz", tmp_path / "out"
    save_heads(heads, drawn_heads((64, 64), names=("train/a", "valid/b", "test/c", "test/d")))
    options = ["--toy", "--samples", "6", "--weights", small_backbone(tmp_path / "net")]
    arguments = [str(heads), str(out), *options]
    run.main(arguments)
    files = sorted((out / "rows").iterdir())
    assert len(files) == len(run.cells(False)) + len(run.cells(True))
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
    run.main(arguments)
    after = {file: file.stat().st_mtime_ns for file in sorted((out / "rows").iterdir())}
    assert set(after) == set(kept)
    assert all(after[file] == kept[file] for file in files[1:])
    page = tmp_path / "evidence.md"
    case = out / "shown" / "stroke"
    case.mkdir(parents=True)
    facts = {"finding": True, "side": "left"}
    slices = [{"slice": 4, "facts": facts, "text": "One mass.", "probability": {"side": 0.6}}]
    said = {"slices": slices}
    (case / "report.json").write_text(json.dumps(said | {"panel": {"slice": 4}, "sampled": 0.25}))
    (case.parent / "about.md").write_text("A stroke on the left.")
    report.main([str(out), str(page)])
    text = page.read_text()
    assert "| `stroke` | 1 | 1 (1 left) | 4: One mass. (side 60%) |" in text
    assert "A stroke on the left." in text
    line = next(line for line in text.splitlines() if line.startswith("| oracle"))
    assert line.count("1.000 [1.000, 1.000]") == 3
    assert "| presence F1 | >= 0.90 |" in text
    for words in ("no image", "shuffled", "majority", "zero-filled", "contrast 0.15", "| 1.0% |"):
        assert words in text
    # The threshold that was read with is the one that the page's rule gives.
    told = json.loads((out / "nirvana" / "reporter" / "report.json").read_text())["threshold"]
    validation = json.loads((out / "nirvana" / "validation.json").read_text())
    likely = validation["finding"]["wording 0"]
    assert len(likely) == len(validation["present"]) == 6
    assert told == best_threshold(validation["present"], likely, run.TOY.hallucinated)["threshold"]
    record = out / "nirvana" / "validation.json"
    validation["finding"]["wording 0"] = [p / 2 for p in likely]  # of another model
    record.write_text(json.dumps(validation))
    with pytest.raises(InputError, match=f"another threshold than {told / 2}"):
        report.main([str(out), str(page)])
    record.unlink()
    with pytest.raises(InputError, match=r"validation.json cannot be read"):
        report.main([str(out), str(page)])


def test_roles_must_be_there(tmp_path: Path) -> None:
    run, report = script("run"), script("report")
    save_heads(tmp_path / "heads.npz", drawn_heads((64, 64)))
    with pytest.raises(InputError, match="role train"):
        run.main([str(tmp_path / "heads.npz"), str(tmp_path / "out"), "--toy"])
    with pytest.raises(InputError, match=r"--hallucinated 2.0 must be from 0 to 1"):
        run.main([str(tmp_path / "heads.npz"), str(tmp_path / "out"), "--hallucinated", "2"])
    with pytest.raises(InputError, match="no rows"):
        report.main([str(tmp_path / "out"), str(tmp_path / "page.md")])
