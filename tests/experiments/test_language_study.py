"""The language study, end to end on a few made-up documents, and its statistics."""

import json
import lzma

import numpy as np
import pytest
import torch

from experiments.common.results import read_rows
from experiments.language import (
    candidate,
    page,
    prepare,
    probe,
    scores,
    ship,
    study,
    variants,
    verdicts,
    windows,
)
from experiments.language.data import CANDIDATES, HERE, RESULTS, load_data
from helpers.words import WORDS
from nirvana.errors import InputError, script
from nirvana.evaluate.perplexity import score_documents
from nirvana.evaluate.tasks import TASKS
from nirvana.statistics import t_interval


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
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "LENGTHS", (160,))
        prepare.prepare(data, folder, megabytes=0.03, questions=3, problems=2)
    return folder


@pytest.fixture
def run(prepared, tmp_path):
    """Runs the study with a toy's settings and these arguments."""

    def call(*arguments):
        small = f"--size toy --context 256 --rows 2 --tokens 1536 --data {prepared}"
        return study.main([*small.split(), "--out", str(tmp_path / "results.jsonl"), *arguments])

    return call


def test_from_text_to_results_page(run, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, out = tmp_path / "results.jsonl", tmp_path / "docs" / "RESULTS.md"
    given = [f"--variant={name}" for name in ("nirvana", "hybrid-input", "transformer")]
    given += ["--seed=0", "--setting=B"]
    assert run(*given, "--save", str(tmp_path / "models")) == 0
    assert "nirvana: 357,068 parameters, +0.00%" in capsys.readouterr().out
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(line["variant"] for line in lines) == ["hybrid-input", "nirvana", "transformer"]
    for line in lines:
        assert line["steps"] == 3
        assert line["environment"]["versions"]["torch"]
        assert ("trigger" in line) == (line["variant"] == "nirvana")
        assert line["losses"][-1][1] < line["losses"][0][1]
    # The same text through the package's own evaluation.
    from nirvana.data.documents import read_documents
    from nirvana.model.assets import load_language_model

    model, tokenizer = load_language_model(tmp_path / "models" / "nirvana-B-0")
    texts = list(read_documents(data / "text/law/test.jsonl.xz"))
    (line,) = (line for line in lines if line["variant"] == "nirvana")
    found = line["text"]["test"]["law"]
    for text, bits, spelled in zip(texts, found["bits"], found["bytes"], strict=True):
        (score,) = score_documents(model, tokenizer, [text])
        assert sum(bits) == pytest.approx(score.nats / np.log(2), abs=0.3)
        assert sum(spelled) == len(text.encode())
    # Nothing is run twice, and a line that was cut off is not counted.
    before = results.read_text()
    assert run(*given) == 0
    assert results.read_text() == before
    results.write_text(before + '{"variant": "nirv')
    assert run(*given) == 0
    results.write_text(before)
    page.main(["--results", str(results), "--out", str(out)])
    written = out.read_text()
    assert "nirvana/A/0" in written.partition("missing runs")[2]
    assert "nirvana/B/0" not in written.partition("missing runs")[2]
    assert "Nothing to compare: no pair has two runs" in written
    assert (out.parent / "images/nirvana-B.png").is_file()
    # A single run is shown as a figure without an interval.
    assert f"| {scores.context_scores(line, 'law').figure:.3f} |" in written


def test_speed_comes_from_runs_that_had_the_device_alone():
    def line(tokens, rows, beside, rate):
        budget = variants.Budget(tokens=tokens, rows=rows).to_dict()
        return {
            "variant": "nirvana",
            "setting": "B",
            "seed": beside,
            "budget": budget,
            "environment": {"beside": beside, "device": "GPU"},
            "memory_gib": 1.0,
            "tokens_per_second": rate,
        }

    shared = [line(10**7, 32, beside, 100) for beside in (3, 4)]
    alone, other = line(10**6, 32, 1, 700), line(10**6, 16, 1, 300)
    results = scores.Results([*shared, alone, other])
    assert results.timed("nirvana") == [alone]
    assert scores.Results([*shared, other]).timed("nirvana") == shared
    assert "| 700 (700 to 700) |" in page._cost(results)


def test_a_page_without_runs_lists_them_as_missing(tmp_path):
    assert "nirvana/A/0, nirvana/A/1" in page.page(scores.Results([]), [], tmp_path)


def test_processes_divide_the_variants(run, tmp_path):
    assert (
        run("--variant", "gated-deltanet", "--variant", "normalised", "--jobs", "2", "--seed", "1")
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    done = {(line["variant"], line["setting"], line["environment"]["beside"]) for line in lines}
    assert done == {("gated-deltanet", s, 2) for s in "AB"} | {("normalised", "B", 2)}


def test_windows_are_compared_by_seed(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(windows, "WINDOWS", (8, 64))
    out = tmp_path / "windows.jsonl"
    small = f"--size toy --context 256 --rows 2 --tokens 1536 --data {prepared} --out {out}"
    windows.main([*small.split(), "--seeds", "1"])
    windows.main([*small.split(), "--seeds", "2"])
    rows = read_rows(out)
    assert [(row["window"], row["seed"]) for row in rows] == [
        (w, s) for s in (0, 1) for w in (8, 64)
    ]
    assert len({str(row["text"]) for row in rows}) == 4
    assert len({row["parameters"] for row in rows}) == 1
    found = windows.comparison(rows)
    takes = [scores.text(domain, ranges=slice(None)) for domain in variants.DOMAINS]
    figures = [scores.mean_figure(row, takes) for row in rows]
    difference = t_interval([figures[0] - figures[1], figures[2] - figures[3]]).show(4, True)
    assert found[0].startswith("all positions: ")
    assert found[0].endswith(f" with 64, {difference}")
    assert found[1].startswith("positions 1 to 255: ")
    assert capsys.readouterr().out.endswith("\n".join(found) + "\n")


def test_a_failed_run_does_not_cost_the_results_of_others(run, tmp_path, monkeypatch):
    healthy = study.run

    def faulty(variant, *rest):
        if variant == "nirvana":
            raise RuntimeError("no")
        return healthy(variant, *rest)

    monkeypatch.setattr(study, "run", faulty)
    assert (
        run(*["--variant", "nirvana", "--variant", "transformer", "--seed", "0", "--setting", "B"])
        == 1
    )
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["variant"] == "transformer"


def test_no_time_left_begins_no_run(run, tmp_path):
    assert run("--variant", "nirvana", "--minutes", "-1") == 0
    assert not (tmp_path / "results.jsonl").exists()


def test_wrong_input_is_refused_in_one_line(run, tmp_path, capsys):
    with pytest.raises(InputError, match="tokens = 0 must be at least 1"):
        run("--tokens", "0")
    with pytest.raises(InputError, match="'task-128' does not fit in the parameters of size 'toy'"):
        run("--variant", "task-128")
    with pytest.raises(SystemExit) as ended:
        script(lambda: study.main(["--data", str(tmp_path)]))
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_variant_has_the_parameters_of_the_first():
    counts = {name: variants.parameters(name, "30m") for name in variants.VARIANTS}
    assert 25e6 < counts["nirvana"] < 35e6
    for name, number in counts.items():
        assert abs(number / counts["nirvana"] - 1) <= 0.02, name


@pytest.fixture(scope="module")
def recorded():
    """The committed rows."""
    return scores.Results(read_rows(RESULTS))


def test_the_committed_rows_are_whole(recorded):
    assert len(recorded.rows) == 72
    assert recorded.missing() == []


def test_the_committed_rows_give_the_committed_page(recorded, tmp_path):
    pytest.importorskip("matplotlib")
    written = page.page(recorded, read_rows(CANDIDATES), tmp_path)
    assert (HERE / "RESULTS.md").read_text(encoding="utf-8") == written
    shown = {path.name for path in (HERE / "images").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == shown


def test_the_page_of_verdicts_agrees(recorded):
    """What docs/results.md counts by hand is what the rows give."""
    verdicts_page = (HERE.parents[1] / "docs/results.md").read_text(encoding="utf-8")
    found = {q.title: verdicts.compare(recorded, q) for q in verdicts.QUESTIONS}
    trigger, transformer, *others = found.values()
    assert "**Not shown.**" in verdicts.conclude(trigger)
    assert f"none of {len(trigger)} intervals" in verdicts_page
    for comparisons in others:
        assert "**Not shown.**" in verdicts.conclude(comparisons)
        assert f"none of {len(comparisons)} |" in verdicts_page
    excluding = sum(t_interval(each.differences).excludes_zero for each in transformer)
    smallest = min(each.corrected for each in transformer)
    assert f"all {len(transformer)} comparisons and {excluding} intervals" in verdicts_page
    assert f"smallest p {smallest:.2g}" in verdicts_page


def test_differences_are_paired_by_seed(recorded):
    takes = [scores.text(domain) for domain in variants.DOMAINS]
    own, other = (recorded.figures(v, "A", takes) for v in ("nirvana", "transformer"))
    found = recorded.differences("nirvana", "transformer", "A", takes)
    assert found.tolist() == [own[seed] - other[seed] for seed in (0, 1, 2)]
    back = recorded.differences("transformer", "nirvana", "A", takes)
    assert found.tolist() == (-back).tolist()


def test_a_verdict_needs_an_interval_that_excludes_zero_and_the_correction(recorded):
    def verdict(*pairs):
        comparisons = verdicts.compare(recorded, verdicts.Question("?", pairs))
        assert all(each.corrected >= each.p for each in comparisons)
        return verdicts.conclude(comparisons)

    same = scores.Results([{**row, "seed": seed} for row in recorded.rows for seed in range(3)])
    assert verdict(("nirvana", "hybrid-input")).startswith("**Not shown.** None of 3")
    assert "Shown for" not in verdict(("nirvana", "hybrid-input"), ("bank-8", "nirvana"))
    # Without any spread between runs even a tiny difference is shown.
    comparisons = verdicts.compare(
        same, verdicts.Question("?", (("nirvana", "transformer"), ("nirvana", "hybrid-input")))
    )
    assert "**Shown for 6 of 6**" in verdicts.conclude(comparisons)


def test_the_greek_piece_is_left_out_of_the_novels_alone(recorded):
    (row, *_) = recorded.runs("nirvana", "A")
    for domain in variants.DOMAINS:
        every, rest = (scores.context_scores(row, domain, greek=g) for g in (True, False))
        assert len(every.values) - len(rest.values) == (domain == "novels")
    novels = scores.context_scores(row, "novels")
    bits = novels.values / novels.weights
    assert bits.argmax() == scores.GREEK[1]
    assert bits[scores.GREEK[1]] == pytest.approx(11.8, abs=0.05)
    assert scores.context_scores(row, "novels", greek=False).figure < novels.figure


def test_one_run_is_shown_without_an_interval():
    assert scores.show_runs([0.5]) == "0.500"
    assert scores.show_runs([]) == "-"
    assert scores.show_runs([0.4, 0.5, 0.6]) == "0.500 (0.252 to 0.748)"


def test_the_probe_finds_what_is_there():
    torch.manual_seed(0)
    labels = torch.randint(5, (300,))
    noise = torch.randn(300, 20).double()
    signal = noise + 3 * torch.randn(5, 20).double()[labels]
    train, rest = slice(0, 150), slice(150, 300)
    found = probe.ridge(signal[train], labels[train], signal[rest]) == labels[rest]
    blind = probe.ridge(noise[train], labels[train], noise[rest]) == labels[rest]
    assert found.double().mean() > 0.9
    assert blind.double().mean() < 0.4


def test_the_packaged_models_folder(data, prepared, tmp_path):
    """A short training, shipped: it loads, and its card holds what `read_files` measures."""
    from nirvana.evaluate.perplexity import read_files
    from nirvana.model.assets import load_language_model
    from nirvana.train.language import train

    shards = load_data(prepared)[0]
    sizes = "hidden_size=16 num_hidden_layers=3 num_attention_heads=1 task_dim=4 bank_size=2"
    settings = f"data.train.law={shards / 'law'} data.context_length=64 data.batch_size=2 "
    settings += f"run.steps=2 run.out={tmp_path / 'run'} run.device=cpu run.export_precision=bf16"
    (tmp_path / "config.toml").write_text("")
    arguments = [f"--model.{each}" for each in sizes.split()]
    train(tmp_path / "config.toml", [*arguments, *(f"--{each}" for each in settings.split())])
    ship.ship(tmp_path / "run", data, tmp_path / "tiny", 2, torch.device("cpu"))
    model, tokenizer = load_language_model(tmp_path / "tiny")
    files = {"law": data / "text/law/test.jsonl.xz"}
    total = read_files(model, tokenizer, files, 2)["law"].total
    card = (tmp_path / "tiny/README.md").read_text()
    assert f"| {total.bits_per_byte:.3f} |" in card
    assert "--model.hidden_size 16" in card
    compare = candidate.compare_with_packaged
    with pytest.raises(
        InputError, match="trained on 256 tokens, the packaged model on 288,358,400"
    ):
        compare(tmp_path / "run", data, 2, torch.device("cpu"))
    settled = tmp_path / "run/config.json"
    described = json.loads(settled.read_text())
    described["run"]["steps"] = 288_358_400 // 128
    settled.write_text(json.dumps(described))
    line = compare(tmp_path / "run", data, 2, torch.device("cpu")) | {"commit": "abc"}
    law = line["domains"]["law"]
    total = read_files(model, tokenizer, {"law": data / "text/law/valid.jsonl.xz"}, 2)["law"].total
    assert sum(law["candidate"]) == pytest.approx(total.nats / np.log(2), rel=1e-4)
    assert sum(law["packaged"]) < sum(law["candidate"])
    written = page.page(scores.Results([]), [line], tmp_path / "images")
    difference = (sum(law["candidate"]) - sum(law["packaged"])) / sum(law["bytes"])
    assert f"| {difference:+.4f} |" in written
    assert "`hidden_size = 16`" in written
    (tmp_path / "run/model/model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        ship.ship(tmp_path / "run", data, tmp_path / "other", 2, torch.device("cpu"))
    assert not (tmp_path / "other").exists()
