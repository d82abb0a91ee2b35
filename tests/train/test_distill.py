"""Distillation of a toy Transformer: every stage learns, resumes, and needs no certain number of
processes."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from helpers import HELPERS
from helpers.runs import one_thread
from helpers.stand_in import stop
from helpers.words import WORDS
from nirvana import InputError
from nirvana.config import load_config
from nirvana.data.shards import tokenize
from nirvana.data.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_folder
from nirvana.model.adopt import adopt
from nirvana.model.assets import load_language_model
from nirvana.ops import dispatch
from nirvana.train.checkpoint import latest
from nirvana.train.config import DistillConfig
from nirvana.train.distill import DistillTask, distill, token_losses, with_initial_model
from nirvana.train.teacher import attention_pairs, prepare_teacher, teacher_logits

WINDOW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token shards, a random teacher that knows their tokens, and a model adopted from it."""
    folder = tmp_path_factory.mktemp("distill")
    picks = torch.randint(len(WORDS), (40, 14), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(WORDS[i] for i in row) for row in picks]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text("".join(lines))
    tokenize([folder / "a.jsonl"], folder / "shards", None, 300)
    tokens = load_tokenizer(folder / "shards")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    copy_tokenizer(tokenizer_folder(folder / "shards"), folder / "teacher")
    adopt(folder / "teacher", folder / "adopted", window=WINDOW, sinks=1)
    return folder


@pytest.fixture
def arguments(folder, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("")
    settings = {
        "distill.teacher": folder / "teacher",
        "run.initial": folder / "adopted",
        "run.out": tmp_path / "run",
        "data.train.a": folder / "shards",
        "data.valid.a": folder / "shards",
    }
    fixed = "data.context_length=32 data.batch_size=4 data.valid_documents=3 run.steps=20 "
    fixed += "run.device=cpu run.precision=float32 run.compile=false run.log_interval=1 "
    fixed += "optim.lr=0.01 optim.warmup_steps=1 optim.accumulation=2"
    return path, [*(f"--{k}={v}" for k, v in settings.items()), *(f"--{x}" for x in fixed.split())]


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def mean_loss(lines):
    return sum(line["loss"] for line in lines) / len(lines)


def test_the_stages_follow_one_another(arguments, tmp_path):
    path, overrides = arguments
    first = distill(path, overrides)
    assert first.finished
    lines = lines_of(tmp_path / "run")
    assert mean_loss(lines[-3:]) < 0.75 * mean_loss(lines[:3])
    assert all(line["worst_layer"] >= line["loss"] for line in lines)

    second = [*overrides, "--distill.stage=logits", f"--run.initial={tmp_path / 'run'}"]
    distill(path, [*second, f"--run.out={tmp_path / 'two'}"])
    lines = lines_of(tmp_path / "two")
    assert mean_loss(lines[-3:]) < 0.6 * mean_loss(lines[:3])
    assert all(line["kl"] == pytest.approx(line["loss"], rel=1e-5) for line in lines)

    third = [*overrides, "--distill.stage=context", f"--run.initial={tmp_path / 'two/model'}"]
    third += ["--data.context_length=64", "--data.batch_size=2", "--data.reset=false"]
    distill(path, [*third, f"--run.out={tmp_path / 'three'}", "--run.steps=4"])
    lines = lines_of(tmp_path / "three")
    assert all(line["kl"] != pytest.approx(line["loss"], rel=1e-3) for line in lines)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "three" / "model")
    assert (model.config.sliding_window, model.config.num_sinks) == (WINDOW, 1)
    card = (tmp_path / "three" / "model" / "README.md").read_text()
    assert "adopted from `" in card


def test_only_the_mixers_learn_attention(arguments, folder, tmp_path):
    """Other weights stay as they were, and the teacher is no part of the checkpoint."""
    path, overrides = arguments
    before = {p: p.read_bytes() for p in (folder / "teacher").iterdir()}
    distill(path, [*overrides, "--run.steps=3"])
    found = latest(tmp_path / "run")
    assert found is not None
    old, _ = load_language_model(folder / "adopted")
    new, _ = load_language_model(tmp_path / "run" / "model")
    for (name, x), y in zip(old.named_parameters(), new.parameters(), strict=True):
        learned = ".updater." in name or "bank" in name
        assert torch.equal(x, y) or learned, name
    changed = new.model.layers[1].updater.in_proj.weight
    assert not torch.equal(old.model.layers[1].updater.in_proj.weight, changed)
    assert before == {p: p.read_bytes() for p in (folder / "teacher").iterdir()}


@pytest.mark.parametrize("stage", ["attention", "logits"])
def test_resume_is_bitwise(arguments, tmp_path, monkeypatch, stage):
    path, overrides = arguments
    overrides = [*overrides, f"--distill.stage={stage}", "--run.steps=5"]
    distill(path, overrides)
    overrides = [*overrides, f"--run.out={tmp_path / 'parts'}"]
    original = DistillTask.batch

    def batch(task, step, micro):
        if (step, micro) == (2, 0):
            stop()
        return original(task, step, micro)

    monkeypatch.setattr(DistillTask, "batch", batch)
    assert distill(path, overrides).step == 2
    monkeypatch.undo()
    assert distill(path, overrides, resume=True).step == 5
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("run", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("stage", ["attention", "logits"])
def test_two_processes_compute_what_one_computes(arguments, forks, tmp_path, stage):
    path, overrides = arguments
    overrides = [*overrides, f"--distill.stage={stage}", "--run.steps=3", "--run.log_interval=1"]
    overrides += ["--parallel.recompute=1"]
    with one_thread():
        distill(path, overrides)
    given = ["distillation", "none", 0, path, *overrides, f"--run.out={tmp_path / 'two'}"]
    code, output = forks.together(HELPERS / "processes.py", given)
    assert code == 0, output
    alone, together = (
        load_language_model(tmp_path / name / "model")[0].state_dict() for name in ("run", "two")
    )
    for name, x in alone.items():
        torch.testing.assert_close(together[name], x, rtol=1e-5, atol=1e-6, msg=name)


def task_of(arguments, *more) -> DistillTask:
    path, overrides = arguments
    config = load_config(DistillConfig, path, [*overrides, *more])
    return DistillTask(with_initial_model(config), torch.device("cpu"))


@torch.no_grad()
def test_the_teacher_separates_packed_documents(arguments):
    task = task_of(arguments)
    batch = task.batch(0, 0)
    ids, positions = batch["input_ids"][:1], batch["position_ids"][:1]
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), positions.shape[1]]
    assert len(starts) > 2
    borders = {"segments": (positions == 0).cumsum(1), "cu_seqlens": None}
    packed = teacher_logits(task.teacher, {"input_ids": ids, "position_ids": positions}, borders)
    for begin, end in pairwise(starts):
        alone = task.teacher(input_ids=ids[:, begin:end]).logits
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_untrained_the_loss_is_zero_within_the_window(arguments):
    """Where no row loses its window: the model is the teacher."""
    kept = ["--distill.window_dropout=[0.0,0.0]", f"--data.context_length={WINDOW}"]
    for stage in ("attention", "logits"):
        task = task_of(arguments, f"--distill.stage={stage}", *kept)
        task.initialize(task.config.run.initial)
        loss, _ = task.loss(task.batch(0, 0))
        assert abs(float(loss)) < 1e-6


@torch.no_grad()
def test_a_dropped_window_is_the_linear_branch(arguments):
    """Untrained it is zero, so that the whole of the teacher's output is missing. Validation and
    the steps' traces see the windows again."""
    task = task_of(arguments, "--distill.window_dropout=[1.0,1.0]")
    task.initialize(task.config.run.initial)
    loss, _ = task.loss(task.batch(0, 0))
    assert float(loss) == pytest.approx(1.0, abs=1e-6)
    task.model.eval()
    task.validate()
    assert all(block.updater.window_kept is None for block in task.blocks)


def test_the_dropout_falls_along_the_run(arguments):
    task = task_of(arguments)
    shares = [float(task.batch(step, 0)["dropout"][0]) for step in (0, 10, 19)]
    assert shares[0] == 1.0
    assert shares[2] == pytest.approx(0.5)
    assert shares[0] > shares[1] > shares[2]


@torch.no_grad()
def test_mixed_is_what_the_layers_compute(arguments):
    """On the model's own inputs."""
    task = task_of(arguments)
    seen, outputs = [], []
    for block in task.blocks:
        block.updater.register_forward_hook(
            lambda part, given, out: (seen.append(given[0]), outputs.append(out[0]))[-1:] and None
        )
    batch = task.batch(0, 0)
    positions = batch["position_ids"]
    task.model(input_ids=batch["input_ids"], position_ids=positions)
    inputs, expected = list(seen), list(outputs)
    for mine, own in zip(task.model.mixed(inputs, positions, None), expected, strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.parametrize("window", [None, 5])
def test_the_teacher_reads_packed_documents(window):
    """Each as if it were alone, by the library's own attention; in the hooked layers, too."""
    torch.manual_seed(0)
    kind = LlamaConfig if window is None else MistralConfig
    config = kind(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        sliding_window=window,
    )
    teacher = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tokens, lengths = torch.randint(31, (1, 40)), (7, 21, 12)
    parts = tokens.split(lengths, dim=1)
    with torch.no_grad():
        alone = torch.cat([teacher(part, use_cache=False).logits for part in parts], dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    given = {"input_ids": tokens, "position_ids": positions}
    packed = {"segments": segments, "cu_seqlens": None}
    prepare_teacher(teacher)
    with dispatch.recorded_backends() as used:
        together = teacher_logits(teacher, given, packed)
    assert used == {"window_attention": ["chunked"]}
    torch.testing.assert_close(together, alone)
    inputs, outputs = attention_pairs(teacher, given, packed)
    layer = teacher.model.layers[0]
    torch.testing.assert_close(inputs[0], layer.input_layernorm(teacher.model.embed_tokens(tokens)))
    after = teacher.model.embed_tokens(tokens) + outputs[0]
    after = after + layer.mlp(layer.post_attention_layernorm(after))
    torch.testing.assert_close(inputs[1], teacher.model.layers[1].input_layernorm(after))


def test_token_losses():
    logits, taught = torch.randn(2, 2, 700, 11)
    labels = torch.randint(11, (2, 700))
    labels[0, :50] = -100
    within = torch.arange(700)[None].expand(2, -1) < 400
    loss, scalars = token_losses(logits, taught, labels, within)
    real = labels != -100
    kl = (taught.softmax(-1) * (taught.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    entropy = F.cross_entropy(logits.mT, labels.clamp(min=0), reduction="none")
    torch.testing.assert_close(loss, torch.where(within, kl, entropy)[real].mean())
    torch.testing.assert_close(scalars["kl"], kl[real].mean())
    torch.testing.assert_close(scalars["cross_entropy"], entropy[real].mean())


def test_wrong_settings_are_named(arguments, folder, tmp_path):
    path, overrides = arguments
    for more, message in [
        (["--distill.teacher="], "distill.teacher = '' must be the folder"),
        (["--run.initial="], "run.initial = '' must be the model that nirvana adopt wrote"),
        (["--distill.window_dropout=[0.5]"], "must be two numbers from 0 to 1"),
        (["--model.sliding_window=9"], "model.sliding_window = 9 contradicts run.initial"),
        (["--distill.stage=logits", "--data.context_length=64"], "exceeds the teacher's length"),
        (["--distill.teacher=nowhere"], "no model 'nowhere'"),
        ([f"--run.out={folder / 'teacher'}"], "holds a run already|would be lost|lies in"),
    ]:
        with pytest.raises(InputError, match=message):
            distill(path, [*overrides, *more])
    adopt(folder / "teacher", tmp_path / "alone", "window", window=WINDOW)
    alone = [f"--run.initial={tmp_path / 'alone'}"]
    with pytest.raises(InputError, match="needs a linear branch beside the window branch"):
        distill(path, [*overrides, *alone, "--distill.window_dropout=[0.5,0.0]"])
    assert distill(path, [*overrides, *alone, "--run.steps=2"]).finished
