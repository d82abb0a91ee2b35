"""The commands of adaptation, as a user calls them."""

import inspect
import json
import math

import pytest
import torch
from PIL import Image

import nirvana
from nirvana.adapt import AdaptConfig, adapt_documents, load_task


@pytest.fixture
def texts(tmp_path):
    """Python sources: a kind of text that the packaged model was not trained on."""
    found = [inspect.getsource(each)[-1500:] for each in (inspect, torch.nn.init)]
    lines = [json.dumps({"text": text}) for text in found]
    (tmp_path / "code.jsonl").write_text("\n".join(lines))
    return found


SMALL = ("--chunk", 128, "--parameters", "norm", "--lr", 0.02)


def test_eval_adapts_scores_and_traces(run, tmp_path, texts):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'nirvana[mri]'")
    files = ("--data", "code=code.jsonl", "--device", "cpu")
    assert run("eval", "tiny", *files, "--json", "frozen.json")[0] == 0
    outputs = ("--json", "a.json", "--trace", "t.json", "--picture", "t.png")
    code, out, err = run("eval", "tiny", *files, "--adapt", *SMALL, *outputs)
    assert code == 0, err
    assert "from 256" in out
    frozen, adapted, trace = (
        json.loads((tmp_path / name).read_text()) for name in ("frozen.json", "a.json", "t.json")
    )
    before, after = frozen["files"]["code"], adapted["files"]["code"]
    assert after["each"]["sha256"] == before["each"]["sha256"]
    assert after["bits_per_byte"] < 0.99 * before["bits_per_byte"]
    assert after["positions"][0]["bits_per_byte"] == pytest.approx(
        before["positions"][0]["bits_per_byte"], rel=1e-4
    )
    assert adapted["adapt"]["chunk"] == 128
    # The JSON holds what Python computes.
    model, tokenizer = nirvana.load("tiny")
    rows = [tokenizer(text).input_ids for text in texts]
    config = AdaptConfig(("norm",), chunk=128, lr={"norm": 0.02})
    scores, _ = adapt_documents(model, rows, config)
    for score, bits in zip(scores, after["each"]["bits"], strict=True):
        assert float(score.sum()) / math.log(2) == pytest.approx(bits, rel=1e-4)
    for document, bits, plain in zip(
        trace["documents"], after["each"]["bits"], before["each"]["bits"], strict=True
    ):
        assert sum(document["nll"]) / math.log(2) == pytest.approx(bits, rel=1e-4)
        assert sum(document["frozen"]) / math.log(2) == pytest.approx(plain, rel=1e-4)
        assert set(document["without"]) == {*map(str, range(8)), "final"}
        assert len(document["size"]) == 17
        assert document["size"]["norm/model.norm"][0] == 0
        assert all(size > 0 for size in document["size"]["norm/model.norm"][1:])
        assert document["starts"][:2] == [1, 129]
        lost = sum(sum(values) for values in document["without"].values())
        assert lost > 9 * sum(document["nll"])  # each layer's task parameters help a little
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width > 500


def test_a_domain_becomes_a_file_that_every_command_takes(run, tmp_path, texts):
    code, out, err = run(
        "adapt",
        "tiny",
        "code.jsonl",
        "--out",
        "code.safetensors",
        *SMALL,
        "--device",
        "cpu",
        "--batch-size",
        2,
        "--json",
        "a.json",
    )
    assert code == 0, err
    assert "3,264 numbers" in out
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["task"]["files"] == ["code.jsonl"]
    assert load_task(tmp_path / "code.safetensors").about["documents"] == len(texts)
    files = ("--data", "code.jsonl", "--device", "cpu", "--json", "b.json")
    bits = []
    for options in ((), ("--task", "code.safetensors")):
        assert run("eval", "tiny", *files, *options)[0] == 0
        bits.append(json.loads((tmp_path / "b.json").read_text())["total"]["bits_per_byte"])
    assert bits[1] < bits[0]
    assert run("eval", "tiny", *files, "--task", "code.safetensors", "--adapt", *SMALL)[0] == 0
    both = json.loads((tmp_path / "b.json").read_text())["total"]["bits_per_byte"]
    assert both < bits[1]
    code, out, _ = run("task", "info", "code.safetensors", "--model", "tiny")
    assert code == 0
    assert "norm/model.layers.0.updater_norm" in out
    merged = ("task", "merge", "code.safetensors", "code.safetensors", "--out", "m.safetensors")
    assert run(*merged, "--weights", "1,0.5")[0] == 0
    values = [load_task(tmp_path / f"{name}.safetensors").values for name in ("code", "m")]
    torch.testing.assert_close(*values)


def test_generate_adapts_to_its_prompt(run, texts):
    options = ("--max-new-tokens", 12, "--temperature", 0, "--device", "cpu")
    code, plain, _ = run("generate", "tiny", "--prompt", texts[0], *options)
    assert code == 0
    code, adapted, err = run(
        "generate", "tiny", "--prompt", texts[0], *options, "--adapt", "--lr", 0.05
    )
    assert code == 0, err
    assert adapted != plain
    still = run("generate", "tiny", "--prompt", texts[0], *options, "--adapt", "--steps", 0)
    assert still[1] == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval tiny --data code.jsonl --chunk 64", "--chunk has no effect without --adapt"),
        ("eval tiny --data code.jsonl --trace t.json", "--trace has no effect without --adapt"),
        ("eval tiny --tasks mqar --adapt", "--adapt reads texts"),
        ("eval tiny --data code.jsonl --adapt --chunk 0", "chunk = 0 must be at least 1"),
        ("eval tiny --data code.jsonl --adapt --parameters gain", "different groups of norm"),
        ("eval tiny --data code.jsonl --adapt --lr fast", "must be a number"),
        ("eval tiny --data code.jsonl --task none.safetensors", "no such task file"),
        ("eval tiny --data code.jsonl --task code.jsonl", "code.jsonl is no task file"),
        ("generate tiny --prompt a --steps 2", "--steps has no effect without --adapt"),
        ("adapt tiny code.jsonl --out a.txt", "must be a file name that ends in .safetensors"),
        ("adapt tiny none.jsonl --out a.safetensors", "none.jsonl: no such file"),
        ("adapt tiny code.jsonl --out a.safetensors --limit 0", "--limit = 0 must be at least 1"),
        ("task info none.safetensors", "no such task file"),
        ("task merge code.jsonl --out a.safetensors", "code.jsonl is no task file"),
        ("task merge code.jsonl --out a.safetensors --weights a", "must be numbers"),
    ],
)
def test_wrong_input(run, tmp_path, texts, arguments, message):
    before = sorted(tmp_path.iterdir())
    code, _, err = run(*arguments.split())
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_figures_that_are_not_finite_are_null(run, tmp_path, texts):
    """An adaptation with too large steps ends in no traceback, after the work."""
    steps = ["--adapt", "--lr", "1e30", "--chunk", 64, "--device", "cpu"]
    code, out, _ = run("eval", "tiny", "--data", "code.jsonl", *steps, "--json", "r.json")
    assert code == 0
    assert "nan" in out
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["files"]["code.jsonl"]["bits_per_byte"] is None
    assert results["files"]["code.jsonl"]["each"]["bits"] == [None, None]
    code, _, err = run("generate", "tiny", "--prompt", texts[0], *steps)
    assert (code, err.count("\n")) == (2, 1)
    assert "the adaptation diverged" in err


def test_one_document_has_no_halves(run, tmp_path):
    (tmp_path / "one.txt").write_text("a text of one document")
    code, out, _ = run("adapt", "tiny", "one.txt", "--out", "a.safetensors", "--device", "cpu")
    assert code == 0
    assert "nan" not in out
    assert "half" not in out
