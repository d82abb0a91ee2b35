"""The study of adopting a Transformer, at toy size, and what it measures."""

import json
import lzma
import random

import pytest

from experiments.adopt import measure, page, prepare, study
from experiments.common.results import read_rows
from helpers.teachers import save_random_teacher
from helpers.words import WORDS
from nirvana.data.shards import TokenShards
from nirvana.data.tokenizer import train_tokenizer
from nirvana.errors import InputError
from nirvana.evaluate.harness import run_tasks
from nirvana.model.adopt import adopt
from nirvana.model.assets import load_language_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text of one domain, and a random teacher that knows its tokens."""
    place = tmp_path_factory.mktemp("adoption")
    folder = place / "data" / "text" / "law"
    folder.mkdir(parents=True)
    dice = random.Random(0)
    for split, count in (("train", 30), ("test", 3)):
        with lzma.open(folder / f"{split}.jsonl.xz", "wt") as file:
            for _ in range(count):
                sentences = [" ".join(dice.choices(WORDS, k=9)) + "." for _ in range(20)]
                file.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    (place / "data" / "benchmarks").mkdir()
    with lzma.open(place / "data" / "benchmarks" / "piqa.jsonl.xz", "wt") as file:
        for _ in range(8):
            query, *choices = (" ".join(dice.choices(WORDS, k=4)) for _ in range(3))
            file.write(json.dumps({"query": query, "choices": choices, "gold": 1}) + "\n")
    train_tokenizer([folder / "train.jsonl.xz"], place / "teacher", 300)
    save_random_teacher(
        place / "teacher",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return place


def test_the_study_runs(place, monkeypatch):
    given = ["--data", str(place / "data"), "--domains", "law"]
    prepared = place / "prepared"
    source = ["--teacher", str(place / "teacher"), "--window", "16", "--megabytes", "0.02"]
    prepare.main([*given, *source, "--out", str(prepared)])
    assert 0.02e6 <= TokenShards(prepared / "shards" / "law").bytes.sum() < 0.025e6
    sizes = "--tokens 1500 --context 64 --rows 2 --documents 2 --lengths 140 --costs 8 48"
    sizes += " --problems 2 --tasks piqa --device cpu"
    arguments = [*given, "--prepared", str(prepared), "--runs", str(place / "runs")]
    arguments += ["--out", str(place / "rows.jsonl"), *sizes.split()]
    study.main([*arguments, "--minutes", "0"])
    assert read_rows(place / "rows.jsonl") == []
    study.main([*arguments, "--commit", "of the test"])
    rows = {row["model"]: row for row in read_rows(place / "rows.jsonl")}
    distilled = {"both, 1,500 tokens", "linear, 1,500 tokens"}
    assert set(rows) == {"teacher", "window", "both"} | distilled
    assert [*rows][:2] == ["teacher", "window"]
    assert rows["teacher"]["positions"] == 64
    for row in rows.values():
        assert row["environment"]["commit"]
        assert row["epochs"] == row["tokens"] / row["corpus"]["law"]
        assert [each["stage"] for each in row["stages"]] == [*study.SHARES][: 3 * row["tokens"]]
        assert row["bits per byte"]["law"] > 0
        assert set(row["niah"]) == {"1 at 140", "2 at 140"}
        assert row["niah"] == measure.shares(row["points"]["niah"])
        assert set(row["generated"]) == set(measure.KINDS)
        assert [len(each) for each in row["points"]["generated"].values()] == [2] * 4
        assert len(row["tasks"]["piqa"]["points"]) == 2
        assert row["tasks"]["piqa"]["chance"] == 0.5
        _, bits, size = map(sum, zip(*row["documents"]["law"], strict=True))
        assert row["bits per byte"]["law"] == pytest.approx(bits / size, rel=1e-4)
        assert set(row["generation"]) == {"8", "48"}
        # A Decoder needs linear branches.
        graphs = set() if row["branches"] == "window" else {"8", "48"}
        assert set(row.get("graph generation", ())) == graphs
    assert rows["both"]["linear shares"] == [0.0, 0.0]
    assert all(share > 0 for share in rows["both, 1,500 tokens"]["linear shares"])
    # Untrained, both branches are the teacher with the same window.
    untrained, window = (rows[name]["bits per byte"]["law"] for name in ("both", "window"))
    assert untrained == pytest.approx(window, abs=1e-5)
    monkeypatch.setattr(study, "_distilled", None)  # nothing is left to be done
    study.main(arguments)
    assert len(read_rows(place / "rows.jsonl")) == 5
    written = page.page(read_rows(place / "rows.jsonl"), [])
    assert "| `both`, 0.0015 M tokens | context |" in written
    assert "- `linear` after 50 M tokens\n" in written
    assert "- the adaptation of an adopted model to samples\n" in written
    assert "nan" not in written


def test_a_missing_benchmark_stops_the_study_before_it_works(place, tmp_path):
    given = ["--data", place / "data", "--out", tmp_path / "rows.jsonl", "--tasks", "piqa", "copa"]
    with pytest.raises(InputError, match="copa"):
        study.main([*map(str, given), "--prepared", str(tmp_path), "--runs", str(tmp_path / "r")])


def test_problems_are_solvable():
    dice = random.Random(3)
    for kind in measure.KINDS:
        question, answer = measure.problem(kind, dice)
        assert answer.endswith("\n")
        assert answer.startswith(" ")
    question, answer = measure.problem("add", dice)
    a, b = (int(x) for x in question.removesuffix(" =").split(" + "))
    assert answer == f" {a + b}\n"
    question, answer = measure.problem("recall", dice)
    word = question.splitlines()[1].removeprefix("Value of ").removesuffix(":")
    assert f"{word} ={answer.rstrip()}" in question


def test_right_answers_are_found(place, tmp_path):
    """A model that copies the answer from its question would score; this one, random, does not."""
    adopt(place / "teacher", tmp_path / "out", "both", window=16)
    model, tokenizer = load_language_model(tmp_path / "out")
    found = measure.generated(model, tokenizer, 2)
    assert found == dict.fromkeys(measure.KINDS, "00")
    assert measure.shares(found) == dict.fromkeys(measure.KINDS, 0.0)


@pytest.mark.parametrize("branches", ["window", "both", "linear"])
def test_rows_continue_together_as_alone(place, tmp_path, branches):
    adopt(place / "teacher", tmp_path / "out", branches, None if branches == "linear" else 16)
    model, _ = load_language_model(tmp_path / "out")
    dice = random.Random(1)
    rows = [[dice.randrange(3, 90) for _ in range(length)] for length in (1, 7, 30, 19)]
    together = measure.continued(model, rows, 12)
    for row, found in zip(rows, together, strict=True):
        alone = measure.continued(model, [row], 12)[0]
        # A row that ends before the others is padded.
        assert found[: len(alone)].equal(alone)
        assert not found[len(alone) :].any()


def test_benchmarks_have_the_points_of_lm_eval(place, tmp_path):
    adopt(place / "teacher", tmp_path / "out", "both", window=16)
    model, tokenizer = load_language_model(tmp_path / "out")
    folder = place / "data" / "benchmarks"
    own = measure.benchmarks(model, tokenizer, ["piqa"], 8, folder)["piqa"]["points"]
    library = run_tasks(model, tokenizer, ["piqa"], [], folder, 8)["piqa"]["each"]["points"]
    assert [*map(float, own)] == library
    assert 0 < sum(library) < len(library)
