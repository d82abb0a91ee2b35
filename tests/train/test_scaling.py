"""`benchmarks/scaling.py`: its gate lets no wrong run pass; two gloo processes go through it."""

import dataclasses
import importlib
import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

from nirvana.errors import InputError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--preset", "tiny", "--device", "cpu", "--batch-size", "1", "--steps", "6", "--gate", "4"]
MODEL = [
    "--data.context_length=64",
    "--model.hidden_size=48",
    "--model.num_hidden_layers=3",
    "--model.num_attention_heads=3",
]


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measured")


def kernel(name, begin, duration, cat="kernel"):
    return {"cat": cat, "name": name, "ts": begin, "dur": duration}


def test_shares_of_a_step(measured):
    """Two streams: a product from 0 to 40 and one from 60 to 80, NCCL from 30 to 70 and from 90 to
    100, which two kernels share; an annotation of NCCL on the host counts for nothing."""
    events = [
        kernel("gemm", 0, 40),
        kernel("ncclDevKernel_AllGather_RING_LL(args)", 30, 40),
        kernel("gemm", 60, 20),
        kernel("ncclDevKernel_ReduceScatter(args)", 90, 10),
        kernel("ncclDevKernel_ReduceScatter(args)", 92, 5),
        kernel("nccl:_all_gather_base", 0, 500, "user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
    found = measured.summarize_kernels(events, steps=2)
    assert found["step_ms"] == pytest.approx(0.05)
    assert found["communication"] == pytest.approx(0.5)
    assert found["exposed"] == pytest.approx(0.3)
    assert found["idle"] == pytest.approx(0.1)
    assert found["compute_ms"] == pytest.approx(0.03)
    assert found["nccl_ms"]["ncclDevKernel_ReduceScatter"] == pytest.approx(0.0075)
    assert measured.summarize_kernels(events[-2:], steps=2) is None


def process(*losses, first=0):
    return {"first": first, "losses": [list(each) for each in losses]}


def test_losses_of_all_processes_are_compared_by_step(scaling):
    alone = [process((2.0, 4.0), (3.0, 5.0))]
    same = [process((2.0,), (3.0,)), process((4.0,), (5.0,))]
    assert scaling.compare(same, alone, 0, 2, 0.0)["passed"]
    later = [process((3.004, 5.0), first=1)]
    found = scaling.compare(later, alone, 1, 1, 1e-3)
    assert found["passed"]
    assert found["largest_relative"] == pytest.approx(0.0005)
    assert not scaling.compare(later, alone, 1, 1, 1e-4)["passed"]
    for wrong in (float("nan"), float("inf")):
        found = scaling.compare([process((wrong,), (3.0,)), same[1]], alone, 0, 2, 1e-3)
        assert not found["passed"]
        json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("kind", ["losses", "resumption", "skipped steps"])
def test_a_failed_gate_leaves_no_figure(scaling, monkeypatch, tmp_path, kind):
    def read(_study, plan, gpus):
        loss = 3.0
        if (kind, plan.name) == ("losses", "timed") or (kind, plan.name) == (
            "resumption",
            "resumed",
        ):
            loss = 3.1
        found = {
            "first": 0,
            "losses": [[loss]] * 9,
            "seconds": [1.0] * 9,
            "tokens_per_step": 64 * gpus,
            "memory_gib": 1.0,
            "device": "cpu",
            "kernels": None,
        }
        return [found] * gpus

    monkeypatch.setattr(
        scaling, "write_shards", lambda folder, _documents: (folder / "2-0").mkdir()
    )
    monkeypatch.setattr(scaling.Study, "launch", lambda *_: None)
    monkeypatch.setattr(scaling.Study, "read", read)
    monkeypatch.setattr(scaling.Study, "skipped", lambda *_: int(kind == "skipped steps"))
    with pytest.raises(scaling.GateError, match="2 processes do not"):
        scaling.run(*scaling.parse([*SMALL, f"--out={tmp_path}", *MODEL]))
    summary = json.loads((tmp_path / "summary.json").read_text())
    alone, two = summary["entries"]
    assert not summary["complete"]
    assert alone["tokens_per_second"] == 64
    assert "tokens_per_second" not in two


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gpus", "3"], "--gpus 3: must be among 1, 2, 4, 8"),
        (["--gate", "7"], "--gate 7: must be from 2 to --steps, 6"),
        (["--hybrid", "5"], "--hybrid 5: must be"),
        (["--preset", "huge"], "--preset huge: known are 1.3b"),
        (["--run.steps", "9"], "--run.steps is set by this program"),
        (["--model.hiden_size=9"], "unknown field .hiden_size."),
    ],
)
def test_wrong_options(scaling, tmp_path, arguments, reason):
    options = scaling.parse([*SMALL, f"--out={tmp_path}", *arguments])
    with pytest.raises(InputError, match=reason):
        scaling.run(*options)


def test_a_gpu_without_kernels_is_not_measured(scaling, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(scaling, "HAS_KERNELS", False)
    options, _ = scaling.parse(["--out", "out"])
    with pytest.raises(InputError, match=r"nirvana\[cuda\]"):
        scaling.check(options)


def test_the_program_refuses_in_one_line(scaling, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--gpus", "3", "--out", str(tmp_path / "out")])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(scaling.__file__), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 2
    assert "--gpus 3: must be among" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def launched(scaling, forks, monkeypatch):
    """Trainings of one process in a fork, without the seconds in which torchrun and its process
    import; the list of what others torchrun started."""
    launch, by_torchrun = scaling.Study.launch, []

    def run(study, gpus, plans):
        if gpus > 1:
            by_torchrun.append([plan.name for plan in plans])
            launch(study, gpus, plans)
            return
        path = study.folder / "plan.json"
        path.write_text(json.dumps([dataclasses.asdict(plan) for plan in plans]))
        code, output = forks.program(scaling.PROGRAM, [path])
        assert code == 0, output

    monkeypatch.setattr(scaling.Study, "launch", run)
    return by_torchrun


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(scaling, launched, monkeypatch, capsys, tmp_path):
    """The whole program; on the CPU losses are equal to the bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scaling.run(*scaling.parse(["--gpus", "2", "--out", str(tmp_path), *SMALL, *MODEL]))
    assert launched == [["timed"]]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"]
    alone, two = summary["entries"]
    assert (alone["gpus"], two["gpus"], two["resumed"]["gpus"]) == (1, 2, 1)
    assert two["gate"]["largest_absolute"] == two["resumed"]["largest_absolute"] == 0
    assert len(two["gate"]["losses"]) == 4
    assert two["resumed"]["first_step"] == 5
    assert two["tokens_per_step"] == 2 * alone["tokens_per_step"] == 128
    rate = two["tokens_per_second"] / alone["tokens_per_second"]
    assert two["efficiency"] == pytest.approx(rate / 2)
    assert capsys.readouterr().out.count("\n") == 3
