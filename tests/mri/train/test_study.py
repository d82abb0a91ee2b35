"""The study's scripts at a size that takes seconds: an arm, its resumption, the report."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

STUDY = Path(__file__).parents[3] / "experiments" / "mri"


@pytest.fixture
def archive(tmp_path: Path, head_slices: np.ndarray) -> Path:
    eight_bits = np.round(head_slices[:2, 8:88:2, 4:124:2] * 255).astype(np.uint8)
    kspace = np.random.default_rng(0).normal(size=(1, 1, 32, 40)).astype(np.complex64)
    arrays = {"train/a_T1": eight_bits, "test/b_T1": eight_bits, "kspace/head": kspace}
    np.savez_compressed(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(STUDY / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arms_are_run_once_and_reported(archive: Path, tmp_path: Path):
    places = ("--data", archive, "--out", tmp_path / "runs", "--device", "cpu", "--tiny")
    script("run.py", "--arm", "zero-filled", *places)
    shown = script("run.py", "--arm", "none", "--steps", 2, *places)
    assert "zero-filled" in shown
    results = tmp_path / "runs" / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["zero-filled", "none"]
    own = load_file(tmp_path / "runs" / "codec-none-0" / "model.safetensors")
    assert sum(x.size for x in own.values()) == lines[1]["parameters"]["trained"]
    assert {x.dtype for x in own.values()} == {np.dtype(np.float16)}
    rows = lines[1]["volumes"]
    assert {row["group"] for row in rows} == {"unseen people", "inverted contrast", "measured head"}
    # One volume and one measured scan under four masks each, and the inverted volume under one.
    assert len(rows) == 4 + 4 + 1
    assert "done already" in script("run.py", "--arm", "none", *places)
    assert len(results.read_text().splitlines()) == 2
    out = tmp_path / "evidence.md"
    script("report.py", results, "--out", out)
    text = out.read_text()
    psnr = np.mean([r["psnr"] for r in rows if r["group"] == "inverted contrast"])
    assert f"| none | {psnr:.2f} |" in text
    assert f"| none | 0 | {lines[1]['parameters']['trained']:,} | 0 | 2 |" in text
