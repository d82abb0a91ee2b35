"""The language study, end to end on a few made-up documents, and its statistics."""

import importlib
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nirvana.errors import InputError, script
from nirvana.evaluate.perplexity import score_documents
from nirvana.evaluate.tasks import TASKS

STUDY = Path(__file__).parents[2] / "experiments/language"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "bird",
    "near",
    "two",
    "old",
    "dogs",
    "while",
    "rain",
    "fell",
    "over",
    "fields",
]


@pytest.fixture(autouse=True)
def study(monkeypatch):
    """A function that imports one of the study's modules."""
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module


def sentences(random, count):
    rows = random.choice(WORDS, (count, 8))
    return " ".join(" ".join(row).capitalize() + "." for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Text and benchmarks in the form of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for domain in ("general", "novels", "biomed", "law", "finance"):
        (folder / "text" / domain).mkdir(parents=True)
        for split, number in (("train", 6), ("valid", 2), ("test", 4)):
            length = 300 if domain == "novels" else 40
            lines = [json.dumps({"text": sentences(random, length)}) + "\n" for _ in range(number)]
            with lzma.open(folder / "text" / domain / f"{split}.jsonl.xz", "wt") as file:
                file.writelines(lines)
    (folder / "benchmarks").mkdir()
    for task in TASKS.values():
        record = {
            "_choice": {"query": "The cat sat", "choices": ["on a mat", "over rain"], "gold": 0},
            "_blank": {"context_options": ["A so A", "A so B"], "continuation": "won.", "gold": 1},
            "_last": {"text": "The cat sat on a mat"},
            "_verdict": {"context": "Is it? Answer:", "continuation": "maybe"},
        }[task.form.__name__]
        (folder / "benchmarks" / f"{task.file}.jsonl").write_text(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    sys.path.insert(0, str(STUDY))
    prepare = importlib.import_module("prepare")
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "LENGTHS", (160,))
        prepare.prepare(data, folder, megabytes=0.03, questions=3, problems=2)
    sys.path.remove(str(STUDY))
    return folder


@pytest.fixture
def run(study, prepared, tmp_path, monkeypatch):
    """Runs `run.py` with a toy's settings and these arguments."""

    def call(*arguments):
        small = f"run.py --size toy --context 256 --rows 2 --tokens 1536 --data {prepared}"
        given = [*small.split(), "--out", str(tmp_path / "results.jsonl"), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        return study("run").main()

    return call


def test_from_text_to_report(run, study, data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    results, out = tmp_path / "results.jsonl", tmp_path / "docs" / "evidence.md"
    arms = [f"--arm={arm}" for arm in ("nirvana", "hybrid-input", "transformer")]
    arms += ["--seed=0", "--setting=B"]
    assert run(*arms, "--save", str(tmp_path / "models")) == 0
    assert "nirvana: 357,068 parameters, +0.00%" in capsys.readouterr().out
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(line["arm"] for line in lines) == ["hybrid-input", "nirvana", "transformer"]
    for line in lines:
        assert line["steps"] == 3
        assert line["environment"]["versions"]["torch"]
        assert ("trigger" in line) == (line["arm"] == "nirvana")
        assert line["losses"][-1][1] < line["losses"][0][1]
    # The same text through the package's own evaluation.
    from nirvana.data.documents import read_documents
    from nirvana.model.assets import load_language_model

    model, tokenizer = load_language_model(tmp_path / "models" / "nirvana-B-0")
    texts = list(read_documents(data / "text/law/test.jsonl.xz"))
    (line,) = (line for line in lines if line["arm"] == "nirvana")
    found = line["text"]["test"]["law"]
    for text, bits, spelled in zip(texts, found["bits"], found["bytes"], strict=True):
        (score,) = score_documents(model, tokenizer, [text])
        assert sum(bits) == pytest.approx(score.nats / np.log(2), abs=0.3)
        assert sum(spelled) == len(text.encode())
    # Nothing is run twice, and a line that was cut off is not counted.
    before = results.read_text()
    assert run(*arms) == 0
    assert results.read_text() == before
    results.write_text(before + '{"arm": "nirv')
    assert run(*arms) == 0
    results.write_text(before)
    monkeypatch.setattr(sys, "argv", f"report.py --results {results} --out {out}".split())
    study("report").main()
    page = out.read_text()
    assert "nirvana/A/0" in page.partition("missing runs")[2]
    assert "nirvana/B/0" not in page.partition("missing runs")[2]
    assert "`nirvana` minus `hybrid-input` is" in page
    assert (out.parent / "images/evidence-nirvana-B.png").is_file()
    take = study("results").text("law")(line)
    assert f"{take.values.sum() / take.weights.sum():.3f} (" in page


def test_speed_is_told_by_runs_that_had_the_device_alone(study):
    def line(tokens, rows, beside, rate):
        budget = study("arms").Budget(tokens=tokens, rows=rows).to_dict()
        return {
            "arm": "nirvana",
            "setting": "B",
            "seed": beside,
            "budget": budget,
            "environment": {"beside": beside, "device": "GPU"},
            "memory_gib": 1.0,
            "tokens_per_second": rate,
        }

    shared = [line(10**7, 32, beside, 100) for beside in (3, 4)]
    alone, other = line(10**6, 32, 1, 700), line(10**6, 16, 1, 300)
    results = study("results").Results([*shared, alone, other])
    assert results.timed("nirvana") == [alone]
    assert study("results").Results([*shared, other]).timed("nirvana") == shared
    assert "| 700 (700 to 700) |" in study("report")._cost(results)


def test_a_report_of_nothing_says_so(study, tmp_path):
    page = study("report").document(study("results").Results([]), [], tmp_path)
    assert "nirvana/A/0, nirvana/A/1" in page


def test_processes_share_the_arms_out(run, tmp_path):
    assert run("--arm", "gated-deltanet", "--arm", "normalised", "--jobs", "2", "--seed", "1") == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    done = {(line["arm"], line["setting"], line["environment"]["beside"]) for line in lines}
    assert done == {("gated-deltanet", s, 2) for s in "AB"} | {("normalised", "B", 2)}


def test_one_arms_fault_costs_no_other_ones_results(run, study, tmp_path, monkeypatch):
    module = study("run")
    healthy = module.run

    def faulty(arm, *rest):
        if arm == "nirvana":
            raise RuntimeError("no")
        return healthy(arm, *rest)

    monkeypatch.setattr(module, "run", faulty)
    assert run(*["--arm", "nirvana", "--arm", "transformer", "--seed", "0", "--setting", "B"]) == 1
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["arm"] == "transformer"


def test_no_time_left_begins_no_run(run, tmp_path):
    assert run("--arm", "nirvana", "--minutes", "-1") == 0
    assert not (tmp_path / "results.jsonl").exists()


def test_what_the_user_did_wrong_is_one_line(study, run, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="tokens = 0 must be at least 1"):
        run("--tokens", "0")
    with pytest.raises(InputError, match="'task-128' is larger than all of size 'toy'"):
        run("--arm", "task-128")
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        script(study("run").main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_arm_has_the_parameters_of_the_first(study):
    arms = study("arms")
    counts = {arm: arms.parameters(arm, "30m") for arm in arms.ARMS}
    assert 25e6 < counts["nirvana"] < 35e6
    for arm, number in counts.items():
        assert abs(number / counts["nirvana"] - 1) <= 0.02, arm


def test_an_interval_holds_what_varies_and_nothing_else(study):
    bootstrap = study("bootstrap")
    weights = np.array([1.0, 2.0, 5.0])
    same = bootstrap.interval([bootstrap.Stratum(np.stack([2 * weights] * 3), weights)])
    assert same.figure == pytest.approx(2)
    assert (same.low, same.high) == (pytest.approx(2), pytest.approx(2))
    # Seeds alone differ: the interval runs over their means.
    seeds = bootstrap.Stratum(np.array([[1.0], [2.0], [3.0]]) * weights, weights)
    found = bootstrap.interval([seeds])
    assert found.figure == pytest.approx(2)
    assert found.low == pytest.approx(4 / 3, abs=0.34)
    assert found.high == pytest.approx(8 / 3, abs=0.34)
    # Documents alone differ: as wide as the error of their mean.
    values = np.random.default_rng(0).normal(size=(1, 400))
    found = bootstrap.interval([bootstrap.Stratum(values, np.ones(400))])
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert found.low < values.mean() < found.high


def test_a_difference_is_paired(study):
    """What two arms share, hard documents and lucky seeds, cancels."""
    bootstrap = study("bootstrap")
    random = np.random.default_rng(0)
    weights = np.ones(50)
    common = random.normal(size=(1, 50)) * 10 + random.normal(size=(3, 1)) * 10
    a, b = (bootstrap.Stratum(common + shift, weights) for shift in (0.5, 0.0))
    found = bootstrap.interval([bootstrap.minus(a, b)])
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))
    with pytest.raises(ValueError, match="same documents"):
        bootstrap.minus(a, bootstrap.Stratum(common, 2 * weights))
    with pytest.raises(ValueError, match="same runs"):
        bootstrap.interval([a, bootstrap.Stratum(common[:1], weights)])


def test_the_probe_finds_what_is_there(study):
    probe = study("probe")
    torch.manual_seed(0)
    labels = torch.randint(5, (300,))
    noise = torch.randn(300, 20).double()
    signal = noise + 3 * torch.randn(5, 20).double()[labels]
    train, rest = slice(0, 150), slice(150, 300)
    found = probe.ridge(signal[train], labels[train], signal[rest]) == labels[rest]
    blind = probe.ridge(noise[train], labels[train], noise[rest]) == labels[rest]
    assert found.double().mean() > 0.9
    assert blind.double().mean() < 0.4


def test_the_packaged_models_folder(study, data, prepared, tmp_path):
    """A short training, shipped: it loads, and its card holds what `read_files` measures."""
    from nirvana.evaluate.perplexity import read_files
    from nirvana.model.assets import load_language_model
    from nirvana.train.language import train

    shards = study("common").load_data(prepared)[0]
    sizes = "hidden_size=16 num_hidden_layers=3 num_attention_heads=1 task_dim=4 bank_size=2"
    settings = f"data.train.law={shards / 'law'} data.context_length=64 data.batch_size=2 "
    settings += f"run.steps=2 run.out={tmp_path / 'run'} run.device=cpu run.export_precision=bf16"
    (tmp_path / "config.toml").write_text("")
    arguments = [f"--model.{each}" for each in sizes.split()]
    train(tmp_path / "config.toml", [*arguments, *(f"--{each}" for each in settings.split())])
    ship = study("ship").ship
    ship(tmp_path / "run", data, tmp_path / "tiny", 2, torch.device("cpu"))
    model, tokenizer = load_language_model(tmp_path / "tiny")
    files = {"law": data / "text/law/test.jsonl.xz"}
    total = read_files(model, tokenizer, files, 2)["law"].total
    card = (tmp_path / "tiny/README.md").read_text()
    assert f"{total.bits_per_byte:.3f} (" in card
    assert "--model.hidden_size 16" in card
    held = study("candidate").held
    with pytest.raises(
        InputError, match="trained on 256 tokens, the packaged model on 288,358,400"
    ):
        held(tmp_path / "run", data, 2, torch.device("cpu"))
    settled = tmp_path / "run/config.json"
    described = json.loads(settled.read_text())
    described["run"]["steps"] = 288_358_400 // 128
    settled.write_text(json.dumps(described))
    line = held(tmp_path / "run", data, 2, torch.device("cpu")) | {"commit": "abc"}
    law = line["domains"]["law"]
    total = read_files(model, tokenizer, {"law": data / "text/law/valid.jsonl.xz"}, 2)["law"].total
    assert sum(law["candidate"]) == pytest.approx(total.nats / np.log(2), rel=1e-4)
    assert sum(law["packaged"]) < sum(law["candidate"])
    page = study("report").document(study("results").Results([]), [line], tmp_path / "images")
    difference = (sum(law["candidate"]) - sum(law["packaged"])) / sum(law["bytes"])
    assert f"{difference:+.4f} (" in page
    assert "`hidden_size = 16`" in page
    (tmp_path / "run/model/model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        ship(tmp_path / "run", data, tmp_path / "other", 2, torch.device("cpu"))
    assert not (tmp_path / "other").exists()
