"""The loop: resuming is bitwise, signals save, steps that are not finite change nothing."""

import errno
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import HELPERS
from helpers.stand_in import OPTIM, StandIn, stop, train
from nirvana.errors import InputError
from nirvana.files import sole_use
from nirvana.train import checkpoint
from nirvana.train.metrics import MetricsLog
from nirvana.train.trainer import seed_generators


def tensors(task):
    return {name: value.clone() for name, value in task.model.state_dict().items()}


def assert_same(a, b):
    for name, value in tensors(a).items():
        assert torch.equal(value, tensors(b)[name]), name


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("n", [1, 5, 11])
def test_resume_is_bitwise(tmp_path, n):
    """run(n + m) = run(n), stop, resume, run(m)."""
    whole, _, _ = train(tmp_path / "whole")
    stopped, outcome, logged = train(tmp_path / "parts", {n - 1: stop})
    assert (outcome.step, outcome.finished) == (n, False)
    assert "continue with --resume" in logged[-1]
    torch.manual_seed(12345)
    resumed, outcome, _ = train(tmp_path / "parts", resume=True)
    assert (outcome.step, outcome.finished) == (12, True)
    assert_same(whole, resumed)
    assert not torch.equal(stopped.model[0].weight, whole.model[0].weight)
    timeless = [
        [
            {
                k: v
                for k, v in line.items()
                if k not in ("samples_per_second", "memory_gib", "valid")
            }
            for line in each
        ]
        for each in (lines(tmp_path / "whole"), lines(tmp_path / "parts"))
    ]
    assert timeless[0] == timeless[1]


def test_validation_changes_no_result(tmp_path):
    often, _, _ = train(tmp_path / "often", validation_interval=1)
    never, _, _ = train(tmp_path / "never", validation_interval=0)
    assert_same(often, never)
    assert ["valid" in line for line in lines(tmp_path / "often")] == [True] * 12
    assert ["valid" in line for line in lines(tmp_path / "never")] == [False] * 11 + [True]


def test_one_line_per_step_after_a_crash(tmp_path):
    """A run that dies after its last checkpoint has written lines that its resumption repeats."""

    def crash():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, {9: crash}, checkpoint_interval=4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')
    assert train(tmp_path, resume=True)[1].finished
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))


def test_log_interval_means(tmp_path):
    train(tmp_path / "one")
    train(tmp_path / "four", log_interval=4)
    single = [line["loss"] for line in lines(tmp_path / "one")]
    means = [sum(single[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert [line["step"] for line in lines(tmp_path / "four")] == [4, 8, 12]
    for line, mean in zip(lines(tmp_path / "four"), means, strict=True):
        assert math.isclose(line["loss"], mean, rel_tol=1e-5)
        assert math.isclose(line["twice"], 2 * mean, rel_tol=1e-5)


def test_accumulation_and_clipping(tmp_path, monkeypatch):
    """A step sees the mean gradient of its micro batches, scaled down to the largest norm."""
    task = StandIn()
    losses = []
    for micro in range(OPTIM.accumulation):
        seed_generators(0, 0, micro)
        losses.append(task.loss(task.batch(0, micro))[0])
    (sum(losses) / len(losses)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in task.trainable()])
    assert norm > OPTIM.clip
    seen = []
    original = torch.optim.AdamW.step

    def step(optimizer):
        seen.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return original(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(tmp_path, {0: stop})
    decayed_first = sorted(task.trainable(), key=lambda item: item[1].ndim < 2)
    for gradient, (_, parameter) in zip(seen, decayed_first, strict=True):
        assert torch.allclose(gradient, parameter.grad * OPTIM.clip / norm, rtol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, bad):
    def spoil_and_stop():
        stop()
        return bad

    good, _, _ = train(tmp_path / "three steps", {2: stop})
    spoiled, outcome, _ = train(tmp_path / "and a bad one", {3: spoil_and_stop})
    assert (outcome.step, outcome.last["skipped"], outcome.last["loss"]) == (4, 1, None)
    for (_, a), (_, b) in zip(good.trainable(), spoiled.trainable(), strict=True):
        assert torch.equal(a, b)
    _, outcome, _ = train(tmp_path / "and a bad one", resume=True)
    assert outcome.finished
    assert outcome.last["skipped"] == 1


@pytest.mark.parametrize("log_interval", [1, 6])
def test_divergence_ends_the_run_with_a_checkpoint(tmp_path, log_interval):
    hooks = {step: lambda: math.nan for step in range(4, 12)}
    with pytest.raises(InputError, match=r"not finite for \d steps in a row .*optim\.lr"):
        train(tmp_path / "run", hooks, log_interval=log_interval, checkpoint_interval=0)
    assert lines(tmp_path / "run")[-1]["loss"] is None or log_interval == 6
    good, _, _ = train(tmp_path / "good", {3: stop})
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    saved = StandIn()
    checkpoint.restore(found, saved.model, saved.trainable())
    for (_, a), (_, b) in zip(good.trainable(), saved.trainable(), strict=True):
        assert torch.equal(a, b)


def test_figures_that_are_not_finite_are_null(tmp_path, monkeypatch):
    """A validation of any outcome is logged, and ends no run."""
    figures = {"nan": math.nan, "inf": -math.inf, "good": 1.5}
    monkeypatch.setattr(StandIn, "validate", lambda task: figures)
    monkeypatch.setattr(StandIn, "observe", lambda task, batch: {"group": {"x": math.nan}})
    _, outcome, logged = train(tmp_path)
    assert outcome.finished
    last = lines(tmp_path)[-1]
    assert last["valid"] == {"nan": None, "inf": None, "good": 1.5}
    assert last["group"] == {"x": None}
    assert any("nan not finite" in text and "good 1.5000" in text for text in logged)


def test_a_run_folder_in_use_is_refused(tmp_path):
    train(tmp_path / "a", {0: stop})
    with pytest.raises(InputError, match="--resume"):
        train(tmp_path / "a")
    _, outcome, logged = train(tmp_path / "new", {0: stop}, resume=True)
    assert outcome.step == 1
    assert "beginning at step 0" in logged[0]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    train(tmp_path, {2: stop})
    with sole_use(tmp_path), pytest.raises(InputError, match="another process works there"):
        train(tmp_path, resume=True)
    assert train(tmp_path, resume=True)[1].finished


def test_data_that_cannot_be_read_end_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    original = StandIn.batch

    def batch(task, step, micro):
        if (step, micro) == (5, 1):
            raise InputError("shard 3 has vanished")
        return original(task, step, micro)

    whole, _, _ = train(tmp_path / "whole")
    monkeypatch.setattr(StandIn, "batch", batch)
    with pytest.raises(InputError, match=r"shard 3 has vanished; saved in .*step-00000005"):
        train(tmp_path / "parts")
    monkeypatch.undo()
    resumed, _, _ = train(tmp_path / "parts", resume=True)
    assert_same(whole, resumed)


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be written: No space left"):
        train(tmp_path)


def test_wandb_is_chosen_by_name(tmp_path):
    with pytest.raises(InputError, match="needs the package wandb"):
        train(tmp_path, wandb=True)


def test_another_configuration_is_refused_unless_accepted(tmp_path):
    train(tmp_path, {2: stop}, config={"a": 1, "run": {"out": "x"}})
    other = {"a": 2, "run": {"out": "y"}}
    with pytest.raises(InputError, match=r"a: 1 -> 2 .*--accept-changes"):
        train(tmp_path, resume=True, config=other)
    assert json.loads((tmp_path / "config.json").read_text())["a"] == 1
    _, outcome, logged = train(tmp_path, resume=True, config=other, accept_changes=True)
    assert outcome.finished
    assert "note: changed since the checkpoint: a: 1 -> 2" in logged
    # Where a run lies is no part of what it computes.
    train(tmp_path, resume=True, config={"a": 2, "run": {"out": "z"}})


def test_settings_without_effect_are_logged(tmp_path):
    task, _, logged = train(tmp_path, {0: stop}, precision="bf16", compile=True)
    assert "float32" in logged[0]
    assert "not compiled" in logged[1]
    assert task.compiled == 0


def test_outputs(tmp_path):
    _, outcome, logged = train(tmp_path, checkpoint_interval=2, keep_checkpoints=3)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    folders = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step-00000008", "step-00000010", "step-00000012"]
    assert (tmp_path / "model" / "exported").is_file()
    assert list((tmp_path / "tensorboard").iterdir())
    assert "done: 12 steps" in logged[-1]
    assert outcome.last["lr"] == OPTIM.min_lr
    # A run that is complete only exports again.
    _, outcome, _ = train(tmp_path, resume=True)
    assert (outcome.step, outcome.finished) == (12, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_0(tmp_path, number):
    program = HELPERS / "stand_in.py"
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, program, out])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == 0
    finally:
        process.kill()
    newest = checkpoint.latest(out)
    assert newest is not None
    assert newest.step == lines(out)[-1]["step"]


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(tmp_path, {0: stop})
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
