"""Several processes compute what one computes, from two to one and back, on gloo."""

import json
import shutil

import pytest
import torch
from torch import nn

from helpers import HELPERS
from helpers.runs import curve, one_thread, torchrun, weights
from nirvana import NirvanaConfig, NirvanaForCausalLM
from nirvana.data.shards import tokenize
from nirvana.errors import InputError
from nirvana.train import float8
from nirvana.train.config import ParallelConfig
from nirvana.train.distributed import ProcessContext
from nirvana.train.language import LanguageTask, train
from nirvana.train.parallel import clip, make_mesh, recompute_blocks
from nirvana.train.trainer import Trainer

PROGRAM = HELPERS / "processes.py"
# Learned step sizes have no dimension, and one row of a gate cannot be cut in two.
MODEL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "task_dim": 4,
    "bank_size": 3,
    "trigger_lr_learnable": True,
    "trigger_decay": 0.5,
    "trigger_decay_learnable": True,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    texts = [f"the cat number {i} sat on mat {i * i}" for i in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenize([folder / "a.jsonl"], folder / "shards", None, 300)
    lines = ["[model]", *(f"{k} = {json.dumps(v)}" for k, v in MODEL.items())]
    lines += ["[data]", f"train.a = '{folder / 'shards'}'", f"valid.a = '{folder / 'shards'}'"]
    lines += ["context_length = 20", "batch_size = 2", "valid_documents = 2"]
    lines += ["sample_prompts = ['the']", "sample_tokens = 3"]
    lines += ["[optim]", "lr = 0.02", "warmup_steps = 1", "clip = 0.5", "accumulation = 4"]
    lines += ["[run]", "steps = 6", "device = 'cpu'", "precision = 'float32'", "compile = false"]
    lines += ["log_interval = 1", "validation_interval = 3", f"out = '{folder / 'alone'}'"]
    path = folder / "config.toml"
    path.write_text("\n".join(lines))
    assert train(path).finished
    return path


def arguments(config, out, *more, kind="none", at=0):
    return ["language", kind, at, config, f"--run.out={out}", *more]


@pytest.fixture
def together(forks):
    """Runs the training in two processes; returns their exit code and what they logged."""

    def call(*given, **interruption):
        return forks.together(PROGRAM, arguments(*given, **interruption))

    return call


def test_two_processes_then_one(config, tmp_path):
    """One of two processes gets a signal: both save after the same step, and one alone goes on."""
    code, output = torchrun(PROGRAM, arguments(config, tmp_path / "run", kind="sigterm", at=4))
    assert code == 0, output
    assert output.count("stopped after step 4") == 1
    assert len(list((tmp_path / "run/checkpoints/step-00000004").glob("shard-*"))) == 2
    assert train(config, [f"--run.out={tmp_path / 'run'}"], resume=True).finished
    assert weights(tmp_path / "run") == weights(config.parent / "alone")
    assert curve(tmp_path / "run") == curve(config.parent / "alone")
    samples = [
        (run / "samples.jsonl").read_text() for run in (tmp_path / "run", config.parent / "alone")
    ]
    assert samples[0] == samples[1]


def test_one_process_then_two(config, together, tmp_path, monkeypatch):
    """The other way round, with a whole copy in each process and every second block recomputed."""
    original = LanguageTask.batch

    def batch(task, step, micro):
        if step == 2:
            raise InputError("pulled out")
        return original(task, step, micro)

    monkeypatch.setattr(LanguageTask, "batch", batch)
    with pytest.raises(InputError, match=r"pulled out; saved in .*step-00000002"):
        train(config, [f"--run.out={tmp_path / 'run'}"])
    options = ["--resume", "--parallel.shard=1", "--parallel.recompute=2"]
    code, output = together(config, tmp_path / "run", *options)
    assert code == 0, output
    assert weights(tmp_path / "run") == weights(config.parent / "alone")
    assert curve(tmp_path / "run") == curve(config.parent / "alone")


def test_data_that_one_process_cannot_read_end_both_with_a_checkpoint(config, together, tmp_path):
    code, output = together(config, tmp_path / "run", kind="unreadable", at=3)
    assert code != 0
    assert "shard-7: can no longer be read; saved in" in output
    assert (tmp_path / "run/checkpoints/step-00000003/state.json").is_file()
    assert train(config, [f"--run.out={tmp_path / 'run'}"], resume=True).finished
    assert weights(tmp_path / "run") == weights(config.parent / "alone")


@pytest.fixture(scope="module")
def rounded(config):
    """The run of one process whose products are rounded to bfloat16."""

    def autocast(trainer):
        return torch.autocast("cpu", torch.bfloat16)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "autocast", autocast)
        train(config, [f"--run.out={config.parent / 'rounded'}"])
    return config.parent / "rounded"


def test_weights_rounded_before_they_are_gathered(config, rounded, together, tmp_path):
    """They are what autocast makes of them afterwards."""
    code, output = together(config, tmp_path / "run", kind="rounded")
    assert code == 0, output
    assert curve(tmp_path / "run") == curve(rounded)
    assert curve(tmp_path / "run") != curve(config.parent / "alone")
    assert weights(tmp_path / "run") == weights(rounded)


def test_the_fused_optimiser_takes_cut_and_whole_parameters(config, rounded, together, tmp_path):
    """On the CPU it rounds the last entries of a tensor differently, hence the tolerance."""
    code, output = together(config, tmp_path / "run", kind="fused")
    assert code == 0, output
    for a, b in zip(curve(rounded), curve(tmp_path / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_float8_in_two_processes_is_that_of_one(config, together, tmp_path, monkeypatch):
    monkeypatch.setattr(float8, "has_float8", lambda device: True)
    # Sizes of which most products are multiples of 16.
    options = ["--run.precision=fp8", "--data.context_length=16", "--model.hidden_size=32"]
    options += ["--model.num_attention_heads=1", "--model.task_dim=8"]
    train(config, [*options, f"--run.out={tmp_path / 'one'}"])
    code, output = together(config, tmp_path / "two", *options, kind="float8")
    assert code == 0, output
    assert output.count("130 x 32 stay in bf16") == 1
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    train(config, [*options, "--run.precision=float32", f"--run.out={tmp_path / 'exact'}"])
    assert curve(tmp_path / "two") != curve(tmp_path / "exact")


def test_muon_in_two_processes_is_that_of_one(config, together, tmp_path):
    """Its matrices are sharded; its products are in bfloat16, hence the tolerance."""
    options = ["--optim.name=muon", "--optim.lr=0.005"]
    train(config, [*options, f"--run.out={tmp_path / 'one'}"])
    code, output = together(config, tmp_path / "two", *options, kind="sigterm", at=4)
    assert code == 0, output
    assert train(config, [*options, f"--run.out={tmp_path / 'two'}"], resume=True).finished
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert one[-1]["loss"] < one[0]["loss"] - 0.1
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    # Resuming itself is exact: momentum and moments are saved.
    steps = [*options, "--run.checkpoint_interval=3", f"--run.out={tmp_path / 'three'}"]
    train(config, steps)
    shutil.rmtree(tmp_path / "three" / "checkpoints" / "step-00000006")
    train(config, steps, resume=True)
    assert weights(tmp_path / "three") == weights(tmp_path / "one")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_gpus_are_one_to_rounding(config, tmp_path, name):
    """In bfloat16, each block compiled: what the real runs do."""
    options = ["--run.device=auto", "--run.precision=bf16", "--run.compile=true"]
    options += [f"--optim.name={name}", "--optim.z_loss=0.001"]
    options += ["--optim.lr=0.005"] if name == "muon" else []
    train(config, [*options, f"--run.out={tmp_path / 'one'}"])
    given = config, tmp_path / "two", *options
    code, output = torchrun(PROGRAM, arguments(*given, kind="sigterm", at=3))
    assert code == 0, output
    code, output = torchrun(PROGRAM, arguments(*given, "--resume", "--parallel.shard=1"))
    assert code == 0, output
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=5e-2)


def test_recomputed_blocks_have_the_same_gradients():
    config = NirvanaConfig(**MODEL, vocab_size=31, intermediate_size=32)
    model = NirvanaForCausalLM(config)
    ids = torch.randint(31, (2, 9))
    gradients, kept = [], []
    for every in (0, 1):
        recompute_blocks(list(model.model.layers), every)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_clip():
    linear = nn.Linear(3, 2)
    linear(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in linear.parameters()]
    norm = torch.cat([g.flatten() for g in before]).norm()
    assert torch.allclose(clip(linear.parameters(), 0), norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(linear.parameters(), before, strict=True))
    clip(linear.parameters(), 0.5)
    for parameter, gradient in zip(linear.parameters(), before, strict=True):
        assert torch.allclose(parameter.grad, gradient * 0.5 / norm)


def test_what_cannot_be_shared_out_is_refused():
    processes = ProcessContext(torch.device("cpu"), rank=1, size=4)
    assert list(processes.local_micro_batches(8)) == [2, 3]
    with pytest.raises(InputError, match=r"optim.accumulation = 6 must be a multiple of the 4"):
        processes.local_micro_batches(6)
    with pytest.raises(InputError, match=r"parallel.shard = 3 must divide the 4 processes"):
        make_mesh(ParallelConfig(shard=3), processes)
    with pytest.raises(InputError, match=r"parallel.tensor = 2 must be 1: in_proj"):
        ParallelConfig(tensor=2)
