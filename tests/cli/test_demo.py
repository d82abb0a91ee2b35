"""The demo, and what the whole program does with wrong input."""

import json
import sys

import h5py
import numpy as np
import pytest

from nirvana.cli.demo import BYTES_PER_TEXT, found_texts
from nirvana.model.config import preset
from nirvana.mri.reports.grammar import parse
from nirvana.mri.reports.score import auc


def test_three_kinds_of_text_are_found():
    texts = found_texts()
    assert set(texts) == {"licences", "python_reference", "numpy_documentation"}
    for documents in texts.values():
        size = sum(len(text.encode()) for text in documents)
        assert BYTES_PER_TEXT <= size < 2 * BYTES_PER_TEXT
        assert all(text.strip() for text in documents)


def test_demo(run, tmp_path):
    own = tmp_path / "mine.txt"
    own.write_text("The patient was admitted with chest pain and shortness of breath.")
    code, out, err = run("demo", "--out", tmp_path / "demo", "--text", own)
    assert code == 0, err
    assert "Continuation" in out
    assert sorted(file.name for file in (tmp_path / "demo").iterdir()) == [
        "metrics.json",
        "mri.png",
        "reconstruction.h5",
        "report.png",
    ]
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["seconds"] > 0
    assert set(metrics["mri"]) == {"zero_filled", "wavelet", "nirvana"}
    empty, ours = metrics["mri"]["zero_filled"], metrics["mri"]["nirvana"]
    assert ours["psnr"] >= empty["psnr"] + 3
    assert ours["ssim"] > empty["ssim"]
    assert ours["nmse"] < empty["nmse"]
    assert len(metrics["language"]) == 4
    for figures in metrics["language"].values():
        assert 0 < figures["bits_per_byte"] < 5
        assert figures["bits_per_byte_without_trigger"] > 0
    simulated = [report["simulated"]["finding"] for report in metrics["reports"]]
    assert {True, False} == set(simulated)
    found = [report["probability_of_a_finding"] for report in metrics["reports"]]
    assert auc(found, simulated) > 0.9
    for report in metrics["reports"]:
        assert parse(report["text"]).to_dict() == report["facts"]
        assert report["text"].split(" in the ")[0][:40] in out
    with h5py.File(tmp_path / "demo" / "reconstruction.h5") as file:
        assert file["reconstruction"].shape == (24, 96, 128)


def make_inputs(folder) -> None:
    (folder / "notes.txt").write_text("this is no k-space")
    (folder / "empty.txt").write_text("")
    with h5py.File(folder / "other.h5", "w") as file:
        file["image"] = np.zeros((2, 3))
    kspace = np.ones((2, 2, 16, 24), np.complex64)
    with h5py.File(folder / "wide.h5", "w") as file:
        file["kspace"], file["mask"] = kspace, np.ones(23, bool)
    kspace[0, 0, 3, 3] = np.nan
    with h5py.File(folder / "nan.h5", "w") as file:
        file["kspace"] = kspace
    preset("tiny").save_pretrained(folder / "weightless")
    rest = '[data]\ntrain = {a = "b"}\n[run]\nout = "new"\nsteps = 1\n'
    (folder / "unknown.toml").write_text('[model]\npreset = "huge"\n' + rest)
    (folder / "odd.toml").write_text("[model]\nhidden_size = 50\n" + rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mri", "reconstruct", "missing.h5", "--out", "new"], "missing.h5"),
        (["mri", "reconstruct", "notes.txt", "--out", "new"], "notes.txt"),
        (["mri", "reconstruct", "other.h5", "--out", "new"], "no array that could be k-space"),
        (["mri", "reconstruct", "nan.h5", "--out", "new"], "NaN"),
        (["mri", "reconstruct", "wide.h5", "--out", "new"], "mask"),
        (["generate", "weightless", "--prompt", "a"], "no weights"),
        (["eval", "weightless", "--data", "notes.txt", "--json", "new"], "no weights"),
        (["train", "unknown.toml"], "unknown preset 'huge': the presets are tiny, 60m, 340m, 1.3b"),
        (["train", "odd.toml"], "hidden_size = 50 must be a multiple of num_attention_heads = 3"),
        (["eval", "tiny", "--data", "empty.txt", "--json", "new"], "empty.txt"),
        (["data", "tokenize", "empty.txt", "--out", "new"], "empty.txt"),
        (["data", "tokenize", "notes.txt", "--out", "."], "holds"),
        (["data", "tokenizer", "notes.txt", "--out", "."], "holds"),
        (["generate", "tiny", "--prompt", " "], "empty"),
        (["demo", "--out", "new", "--text", "missing.txt"], "missing.txt"),
        (["demo", "--out", "new", "--text", "empty.txt"], "empty.txt"),
        (["demo", "--out", "."], "holds"),
        (["mri", "evaluate", "missing.nii.gz", "--json", "new"], "missing.nii.gz"),
        (["mri", "train", "missing.toml"], "missing.toml"),
        (["no-such-command"], "no-such-command"),
        (["generate", "tiny"], "--prompt"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, message):
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("nirvana: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_extra_is_named(run, tmp_path, monkeypatch):
    make_inputs(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "nirvana.mri.io", raising=False)
    code, _, err = run("mri", "reconstruct", tmp_path / "nan.h5", "--out", tmp_path / "new")
    assert (code, err) == (2, "nirvana: this needs h5py: pip install 'nirvana[mri]'\n")
