"""The commands about text, as a user calls them: output, files and exit codes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from nirvana import NirvanaConfig, NirvanaForCausalLM
from nirvana.data.tokenizer import load_tokenizer, train_tokenizer

TEXT = "The cat sat on the mat, and the dog sat on the cat. "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text(TEXT * 9)
    train_tokenizer([text], folder, 280)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    config = NirvanaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        task_dim=4,
        bank_size=2,
        sliding_window=8,
    )
    NirvanaForCausalLM(config).save_pretrained(folder)
    return folder


def test_from_text_to_figures(run, tmp_path):
    """The path of a new user: text, tokenizer, shards, training, evaluation, generation."""
    (tmp_path / "a.txt").write_text(TEXT * 20)
    assert run("data", "tokenizer", "a.txt", "--out", "tokenizer", "--vocab-size", 280)[0] == 0
    code, out, _ = run("data", "tokenize", "a.txt", "--out", "shards", "--tokenizer", "tokenizer")
    assert code == 0
    assert "1 documents" in out
    assert "bytes per token" in out
    (tmp_path / "config.toml").write_text(
        "[model]\nhidden_size = 16\nnum_hidden_layers = 3\nnum_attention_heads = 2\n"
        '[data]\ntrain = { a = "shards" }\ncontext_length = 16\nbatch_size = 2\n'
        '[optim]\nwarmup_steps = 1\n[run]\nout = "run"\nsteps = 3\ndevice = "cpu"\n'
    )
    settings = ["--optim.lr", "1e-2", "--run.steps=2", "--data.valid.a", "shards"]
    code, _, err = run("train", "config.toml", *settings)
    assert code == 0
    assert "done: 2 steps" in err
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["optim"]["lr"], saved["run"]["steps"]) == (0.01, 2)
    code, out, _ = run(
        "eval", "run/model", "--data", "a.txt", "--device", "cpu", "--json", "r.json"
    )
    assert code == 0
    assert "bits per byte" in out
    results = json.loads((tmp_path / "r.json").read_text())
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    expected = last["valid"]["a_bits_per_byte"]
    assert results["files"]["a.txt"]["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert run("generate", "run/model", "--prompt", "The", "--max-new-tokens", 3)[0] == 0
    code, _, err = run("train", "config.toml")
    assert code == 2
    assert "--resume" in err
    code, _, err = run("train", "config.toml", *settings, "--resume")
    assert code == 0
    assert "continuing after step 2" in err
    other = [*settings, "--optim.lr", "1e-3", "--resume"]
    code, _, err = run("train", "config.toml", *other)
    assert code == 2
    assert "optim.lr: 0.01 -> 0.001" in err
    assert run("train", "config.toml", *other, "--accept-changes")[0] == 0
    code, out, _ = run("export", "run", "exported", "--precision", "bf16", "--standalone")
    assert code == 0
    assert "step-00000002" in out
    assert (tmp_path / "exported" / "modeling_nirvana.py").is_file()
    assert run("eval", "exported", "--data", "a.txt", "--device", "cpu")[0] == 0


def test_evaluation_and_comparison(run, model, tmp_path):
    """Text by domain and position, recall and a local benchmark; then two results side by side."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'nirvana[eval]'")
    lines = [json.dumps({"text": f"{TEXT}{i} " * (1 + i)}) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "hay.txt").write_text(TEXT * 80)
    question = {"query": "The cat", "choices": ["sat", "dog"], "gold": 0}
    (tmp_path / "copa.jsonl").write_text(json.dumps(question))
    recall = ["--tasks", "mqar,s_niah_1", "--tasks", "s_niah_2,s_niah_3,copa", "--lengths", "400"]
    text = ["--data", "cats=a.jsonl", "--data", "hay.txt", "--limit", 5, "--device", "cpu"]
    more = ["--haystack", "hay.txt", "--task-data", ".", "--json"]
    code, out, _ = run("eval", model, *text, *recall, *more, "a.json")
    assert code == 0
    assert "from 64" in out
    results = json.loads((tmp_path / "a.json").read_text())
    cats = results["files"]["cats"]
    assert sum(part["bytes"] for part in cats["positions"]) == cats["bytes"]
    assert sum(cats["each"]["bits"]) / cats["bytes"] == pytest.approx(cats["bits_per_byte"])
    assert len(cats["each"]["bits"]) == 5
    names = ["mqar@400", "s_niah_1@400", "s_niah_2@400", "s_niah_3@400", "copa"]
    assert list(results["tasks"]) == names
    assert [len(task["each"]["points"]) for task in results["tasks"].values()] == [5, 5, 5, 5, 1]
    assert all(f"{name} " in out for name in names)
    code, _, _ = run("eval", model, *text, *recall, "--no-trigger", *more, "b.json")
    assert code == 0
    code, out, _ = run("eval", "--compare", "a.json", "b.json", "--json", "c.json")
    assert code == 0
    assert "B - A" in out
    other = json.loads((tmp_path / "b.json").read_text())
    found = json.loads((tmp_path / "c.json").read_text())["differences"]
    for name, a, b in (
        ("cats", cats, other["files"]["cats"]),
        ("total", results["total"], other["total"]),
    ):
        difference = found["bits per byte"][name]
        assert difference["a"] == pytest.approx(a["bits_per_byte"])
        assert difference["difference"] == pytest.approx(b["bits_per_byte"] - a["bits_per_byte"])
        assert difference["low"] <= difference["difference"] <= difference["high"]
    assert list(found["acc"]) == names
    assert run("eval", model, "--data", "cats=a.jsonl", "--json", "d.json")[0] == 0
    code, _, err = run("eval", "--compare", "a.json", "d.json")
    assert code == 2
    assert "cats is not the same documents" in err


def test_dry_run(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 20)
    assert run("data", "tokenize", "a.txt", "--out", "shards", "--vocab-size", 280)[0] == 0
    (tmp_path / "config.toml").write_text('[data.train]\na="shards"\n[run]\nout="run"\nsteps=3\n')
    code, out, _ = run("train", "config.toml", "--dry-run")
    assert code == 0
    assert "parameters" in out
    assert not (tmp_path / "run").exists()


def test_generate_repeats_itself_for_the_same_seed(run, model):
    arguments = ("generate", model, "--prompt", "The cat", "--max-new-tokens", 20)
    first, again = run(*arguments), run(*arguments)
    assert first[0] == 0
    assert first[1] == again[1]
    assert "The cat" not in first[1][:8]
    assert run(*arguments, "--seed", 1)[1] != first[1]
    greedy = [run(*arguments, "--temperature", 0, "--seed", seed)[1] for seed in (0, 1)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate MODEL --prompt=", "--prompt is empty"),
        ("generate MODEL --prompt=a --top-p 0", "--top-p = 0.0 must be"),
        ("generate MODEL --prompt=a --seed 99999999999999999999", "'--seed'"),
        ("generate MODEL --prompt=a --temperature -1", "--temperature = -1.0 must be"),
        ("generate MODEL --prompt=a --temperature 1e-40", "must be 0, or 1e-6 or more"),
        ("generate MODEL --prompt=a\udcff", "'a\\udcff': not valid Unicode"),
        ("generate MODEL --prompt=a --max-new-tokens 0", "--max-new-tokens = 0 must be"),
        ("generate MODEL --prompt=a --device gpu", "'gpu' cannot be used"),
        ("generate nowhere --prompt a", "nowhere"),
        ("generate . --prompt a", "no config.json"),
        ("generate MODEL", "--prompt"),
        ("eval MODEL --data none.txt", "none.txt: no such file"),
        ("eval MODEL --data .", ". is a folder; give a file"),
        ("eval MODEL --data empty.txt", "empty.txt: holds no document"),
        ("eval MODEL --data empty.txt --limit 0", "--limit = 0 must be"),
        ("eval MODEL", "--data"),
        ("eval", "which model?"),
        ("eval MODEL --data =a.txt", "must be FILE or DOMAIN=FILE"),
        ("eval MODEL --data full.txt --data full.txt", "the name full.txt is taken"),
        ("eval MODEL --data total=full.txt", "the name total is taken"),
        ("eval MODEL --tasks arc_hard", "no task 'arc_hard'; known are arc_challenge"),
        ("eval MODEL --tasks hub:", "no task 'hub:'"),
        ("eval MODEL --tasks copa --task-data none", "none: no such folder"),
        ("eval MODEL --tasks copa --task-data .", "copa.jsonl (or .xz, .gz, .zst): no such file"),
        ("eval MODEL --tasks mqar --lengths 64,a", "--lengths = 64,a must be numbers"),
        ("eval MODEL --tasks mqar --lengths 32", "32 must be at least 33"),
        ("eval MODEL --tasks mqar --pairs 0", "--pairs = 0 must be at least 1"),
        ("eval MODEL --tasks s_niah_1 --lengths 50", "s_niah_1: length = 50 must be at least"),
        ("eval MODEL --tasks s_niah_2 --haystack none.txt", "none.txt: no such file"),
        ("eval MODEL --tasks s_niah_2 --haystack full.txt", "s_niah_2: the haystack has"),
        ("eval MODEL --compare a.json b.json", "--compare A B takes two results"),
        ("eval --compare a.json b.json", "a.json: no such file"),
        ("data tokenize none.txt --out o", "none.txt: no such file"),
        ("data tokenize empty.txt --out o", "holds no document"),
        ("data tokenize full.txt --out o --tokenizer none", "not a tokenizer"),
        ("data tokenize full.txt --out o --vocab-size 3", "at least 266"),
        ("train none.toml", "none.toml: no such configuration file"),
        ("train config.toml --run.stepz 3", "did you mean run.steps?"),
        ("train config.toml --dry-run", "none: not token shards"),
        ("train config.toml --parallel.tensor 2", "parallel.tensor = 2 must be 1"),
        ("train config.toml --processes 4", "--processes and --device-name are for --dry-run"),
        ("train config.toml --dry-run --processes 0", "'--processes'"),
        ("train config.toml --dry-run --device-name Z80", "'Z80' is not known; known are H100"),
        ("train config.toml --optim.schedule const", "'cosine' or 'linear' or 'wsd'"),
        ("train config.toml --optim.decay_share 0", "optim.decay_share = 0.0 must be above 0"),
        ("train config.toml --optim.name sgd", "'adamw' or 'muon'"),
        ("train config.toml --optim.z_loss -1", "optim.z_loss = -1.0 must be at least 0"),
        ("mri train codec --optim.z_loss 1e-4", "unknown key optim.z_loss"),
        ("export . out", "neither a run"),
        ("export . out --standalone", "neither a run"),
        ("export tiny out --precision fp8", "--precision 'fp8' must be float32 or bf16"),
        ("train config.toml more", "unexpected argument 'more'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*empty documents")
def test_wrong_input(run, model, tmp_path, arguments, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full.txt").write_text(TEXT)
    (tmp_path / "config.toml").write_text('[data.train]\na="none"\n[run]\nout="run"\nsteps=3\n')
    before = sorted(tmp_path.iterdir())
    code, _, err = run(*(str(model) if a == "MODEL" else a for a in arguments.split()))
    assert code == 2
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_tokenizer_is_one_line(run, model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    whole = (copy / "tokenizer.json").read_text()
    for damaged in (whole[: len(whole) // 2], "{}", "[]"):
        (copy / "tokenizer.json").write_text(damaged)
        code, _, err = run("generate", copy, "--prompt", "the")
        assert code == 2
        assert err.count("\n") == 1
        assert "copy: not a readable tokenizer" in err


def test_outputs_are_checked_before_the_work(run, model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    code, _, err = run("eval", model, "--data", "text.txt", "--json", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "is a folder; give a file to write" in err


def test_a_prompt_that_cannot_be_read(run, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = run("generate", model, "--prompt", "-")
    assert (code, err) == (2, "nirvana: --prompt -: the standard input is closed\n")


def _called(*arguments, **options):
    """The program in a process of its own, whose streams are the operating system's."""
    command = [sys.executable, "-m", "nirvana", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_characters_that_the_output_lacks_are_escaped(tmp_path):
    (tmp_path / "t\u00e4st").mkdir()
    file = tmp_path / "t\u00e4st" / "a.txt"
    file.write_text(TEXT * 9, encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    options = {"stdout": subprocess.PIPE, "env": environment}
    out = file.with_name("tokenizer")
    done = _called("data", "tokenizer", file, "--out", out, "--vocab-size", 280, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "t\\xe4st/tokenizer: a tokenizer from 1 documents" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = _called("config", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "nirvana: the output cannot be written: No space left on device\n"


def test_an_interruption_prints_one_line(run, model, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nirvana.model.assets.load_language_model", interrupted)
    code, _, err = run("generate", model, "--prompt", "the")
    assert (code, err) == (130, "interrupted\n")


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5_000])
def test_json_that_no_parser_takes(run, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    code, _, err = run("eval", "tiny", "--data", "a.jsonl")
    assert code == 2
    assert "a.jsonl, line 1: not JSON" in err
