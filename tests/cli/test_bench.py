"""`nirvana bench`, as a user calls it: figures, files, exit codes."""

import json
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace

import pytest

from nirvana.bench import start
from nirvana.bench.run import Options

SMALL = ("--preset", "tiny", "--layers", 3, "--device", "cpu", "--eager", "--steps", 1)
SIZES = (
    "--train",
    "2x24",
    "--train",
    "1x16",
    "--context",
    40,
    "--decode",
    "1x8",
    "--decode",
    "3x20",
)


@pytest.fixture
def bench(run):
    """Calls `nirvana bench`."""
    return partial(run, "bench")


@pytest.fixture
def _short_gate(monkeypatch):
    """The check before the figures on fewer tokens: its errors do not depend on their number."""
    from nirvana.bench import gate

    monkeypatch.setattr(gate, "LENGTH", 64)


def test_every_part_has_its_figures(bench, tmp_path):
    arguments = (*SMALL, *SIZES, "--new-tokens", 4, "--peers", "llama,llama_compiled")
    code, out, err = bench(*arguments, "--json", "figures.json")
    assert code == 0, err
    assert "tokens/s" in out
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["gate"]["passed"]
    operations = ("linear_branch", "add_low_rank", "window_attention", "trigger_gradient")
    operations = (*operations, "trigger_apply", "decayed_sum", "swiglu")
    assert results["gate"]["backends"] == {name: ["chunked"] for name in operations}
    assert results["environment"]["versions"]["torch"]
    assert results["options"]["train"] == [[2, 24], [1, 16]]
    sizes = {
        (r["part"], r["model"], r.get("how"), r["batch"], r["tokens"]) for r in results["rows"]
    }
    expected = {("train", "llama_compiled", None, 2, 24), ("train", "llama_compiled", None, 1, 16)}
    expected |= {("decode", "llama_compiled", None, *size) for size in ((1, 8), (3, 20))}
    for model in ("nirvana", "llama"):
        expected |= {("train", model, None, 2, 24), ("train", model, None, 1, 16)}
        expected |= {("prefill", model, None, 1, 40)}
        expected |= {("decode", model, "generate", *size) for size in ((1, 8), (3, 20))}
    expected |= {("decode", "nirvana", "Decoder", *size) for size in ((1, 8), (3, 20))}
    expected |= {("trigger", "nirvana", how, 2, 24) for how in ("on", "step off", "no trigger")}
    assert sizes == expected
    for row in results["rows"]:
        if row["model"] == "llama_compiled":
            assert row["failed"] == "not compiled on request"
            continue
        assert "failed" not in row
        assert row["parameters"] > 1e6
        tokens = row["batch"] * (1 if row["part"] == "decode" else row["tokens"])
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["ms"])
        off = row.get("how") in ("step off", "no trigger")
        assert ("time_share_of_trigger" in row) == off


@pytest.mark.usefixtures("_short_gate")
def test_training_in_float8_has_a_row_with_its_error(bench, tmp_path, monkeypatch):
    """On a CPU the products are slow, but the same."""
    monkeypatch.setattr(Options, "has_float8", True)
    arguments = ("--parts", "train", "--train", "2x16", "--peers", "none")
    code, out, err = bench(*SMALL, *arguments, "--json", "figures.json")
    assert code == 0, err
    assert "gradient error" in out
    plain, rounded = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert "how" not in plain
    assert rounded["how"] == "fp8"
    assert 0.01 < rounded["gradient_error"] < 0.3


@pytest.mark.usefixtures("_short_gate")
def test_a_model_that_fails_keeps_its_row(bench, monkeypatch, tmp_path):
    from nirvana.bench import peers

    def missing(config):
        raise ImportError("No module named 'fla.models'")

    monkeypatch.setitem(peers.PEERS, "gated_deltanet", missing)
    arguments = (*SMALL, *SIZES, "--parts", "prefill", "--peers", "gated_deltanet")
    assert bench(*arguments, "--json", "figures.json")[0] == 0
    ours, peer = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert ours["ms"] > 0
    assert peer["failed"] == "not installed: No module named 'fla.models'"


@pytest.mark.usefixtures("_short_gate")
def test_our_own_failure_is_listed_and_ends_in_1(bench, monkeypatch, tmp_path):
    import torch

    from nirvana.bench import parts

    def full(*arguments):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setitem(parts.PARTS, "prefill", full)
    code, out, _ = bench(*SMALL, "--parts", "prefill", "--peers", "none", "--json", "figures.json")
    assert code == 1
    assert "memory" in out
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["failed"] == "out of memory"


@pytest.mark.usefixtures("_short_gate")
def test_a_wrong_gradient_stops_before_any_figure(bench, monkeypatch, tmp_path):
    """The scale is right and the direction too, in all parameters but one, which is off by half."""
    from nirvana.bench import gate

    def wrong(model, ids, skip_logits):
        logits, loss, gradients = right(model, ids, skip_logits)
        if skip_logits:
            gradients["model.layers.2.updater.in_proj.weight"] *= 1.5
        return logits, loss, gradients

    right = gate.outcome
    monkeypatch.setattr(gate, "outcome", wrong)
    code, out, err = bench(*SMALL, *SIZES, "--json", "figures.json")
    assert code == 1
    assert "no figures" in err
    assert "layers.2.updater.in_proj.weight" in err
    assert "tokens/s" not in out
    assert not (tmp_path / "figures.json").exists()


def test_the_trigger_is_back_after_its_absence():
    from nirvana import preset
    from nirvana.bench.parts import _bypassed
    from nirvana.model.nirvana import NirvanaForCausalLM
    from nirvana.model.trigger import Trigger

    model = NirvanaForCausalLM(preset("tiny", num_hidden_layers=3))
    before = [module for module in model.modules() if isinstance(module, Trigger)]
    assert len(before) == 1
    with _bypassed(model):
        assert not any(isinstance(module, Trigger) for module in model.modules())
    assert [module for module in model.modules() if isinstance(module, Trigger)] == before


def test_warm_names_the_caches_and_measures_nothing(bench, tmp_path):
    how = ("--preset", "tiny", "--layers", 3, "--device", "cpu", "--warm")
    code, out, err = bench(*how, "--parts", "prefill,decode", *SIZES)
    assert code == 0, err
    lines = out.splitlines()
    sizes = [line.partition(":")[0] for line in lines[1:-2]]
    assert sizes == ["prefill, 1 x 40", *["decode, 1 x 8"] * 2, *["decode, 3 x 20"] * 2]
    assert lines[-2].startswith("PyTorch keeps its kernels in ")
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("_short_gate")
def test_start_measures_a_process_with_empty_and_one_with_full_caches(bench, tmp_path, monkeypatch):
    """Here the process is this one; it prints its figures after other lines."""
    folders = []

    def run(command, env, **how):
        folders.append({name: env[name] for name in start.CACHES})
        with redirect_stdout(StringIO()) as printed:
            print("compiled a kernel")
            start.main(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stdout=printed.getvalue(), stderr="")

    monkeypatch.setattr(start, "subprocess", SimpleNamespace(run=run))
    arguments = ("--parts", "start", "--new-tokens", 2, "--peers", "none")
    code, _, err = bench(*SMALL, *arguments, "--json", "figures.json")
    assert code == 0, err
    assert folders[0] == folders[1]
    assert len(set(folders[0].values())) == 4
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["how"] for row in rows] == ["empty caches", "full caches"]
    for row in rows:
        assert list(row["seconds"]) == ["import", "model", "first text", "second text"]
        assert row["ms"] == pytest.approx(1e3 * row["seconds"]["first text"])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (("--preset", "13b"), "unknown preset"),
        (("--parts", "train,fly"), "--parts 'fly'"),
        (("--train", "4096"), "4x4096"),
        (("--train", "0x64"), "4x4096"),
        (("--context", "0"), "--context = 0"),
        (("--decode", "1k"), "--decode '1k'"),
        (("--steps", "0"), "--steps = 0"),
        (("--peers", "gpt"), "--peers 'gpt'"),
        (("--dtype", "int8"), "bfloat16, float32"),
        (("--layers", "2"), "num_prelude_layers"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--json", "."), "is a folder"),
        (("--warm", "--eager"), "--warm"),
    ],
)
def test_wrong_options_get_one_line(bench, wrong, reason):
    code, out, err = bench("--preset", "tiny", *wrong)
    assert code == 2
    assert not out
    assert reason in err
    assert err.count("\n") == 1
