"""A language model from text to a folder that transformers loads."""

import json
import math
import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from helpers.in_memory import upload
from helpers.stand_in import stop
from helpers.words import WORDS
from nirvana.config import load_config
from nirvana.data.shards import tokenize
from nirvana.errors import InputError
from nirvana.train.config import LanguageConfig
from nirvana.train.export import export
from nirvana.train.language import LanguageTask, train
from nirvana.train.plan import estimate

SMALL = "hidden_size=16 num_hidden_layers=3 num_attention_heads=2 task_dim=4 bank_size=2"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two small domains of short documents."""
    folder = tmp_path_factory.mktemp("language")
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(WORDS), (30, 12), generator=generator)
        texts = [" ".join(WORDS[i] for i in row) for row in picks]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
        other = folder / "a" if name == "b" else None
        tokenize([folder / f"{name}.jsonl"], folder / name, other, 300)
    return folder


@pytest.fixture
def arguments(shards, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("")
    overrides = [f"--model.{item}" for item in SMALL.split()]
    for name in ("a", "b"):
        overrides += [
            f"--data.train.{name}={shards / name}",
            f"--data.valid.{name}={shards / name}",
        ]
    settings = "data.context_length=24 data.batch_size=2 data.valid_documents=3 run.steps=6 "
    settings += "run.device=cpu run.precision=float32 run.compile=false optim.accumulation=2 "
    settings += "optim.lr=0.01 optim.warmup_steps=1 run.log_interval=1"
    overrides += [f"--{item}" for item in settings.split()]
    return path, [*overrides, f"--run.out={tmp_path / 'run'}"]


def test_train(arguments, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = train(*arguments)
    assert outcome.finished
    valid = outcome.last["valid"]
    figures = [valid["a_bits_per_byte"], valid["b_bits_per_byte"]]
    assert valid["mean_bits_per_byte"] == pytest.approx(sum(figures) / 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.bos_token_id == tokenizer.bos_token_id
    # What the run was trained with is enough to train it again.
    saved = load_config(LanguageConfig, tmp_path / "run" / "config.json")
    assert saved == load_config(LanguageConfig, *arguments)
    # Validation equals the evaluation of the exported model.
    from nirvana.data.documents import read_documents
    from nirvana.evaluate.perplexity import Score, score_documents

    texts = list(read_documents(saved.data.train["a"] + ".jsonl"))[:3]
    total = sum(score_documents(model, tokenizer, texts), Score())
    assert total.bits_per_byte == pytest.approx(figures[0], rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    ["gate=input", "gate=constant", "branches=linear", "branches=window num_prelude_layers=0"],
)
def test_peers_train_by_configuration(arguments, tmp_path, fields):
    from transformers import AutoModelForCausalLM

    path, overrides = arguments
    outcome = train(path, [*overrides, *(f"--model.{field}" for field in fields.split())])
    assert outcome.finished
    assert "trigger" not in outcome.last
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config
    assert [getattr(config, f.split("=")[0]) for f in fields.split()[:1]] == [
        fields.split()[0].split("=")[1]
    ]


def test_resume_is_bitwise(arguments, tmp_path, monkeypatch):
    """run(n + m) = run(n), stop, resume, run(m)."""
    train(*arguments)
    path, overrides = arguments
    overrides = [*overrides, f"--run.out={tmp_path / 'parts'}"]
    original = LanguageTask.batch

    def batch(task, step, micro):
        if (step, micro) == (2, 0):
            stop()
        return original(task, step, micro)

    monkeypatch.setattr(LanguageTask, "batch", batch)
    assert train(path, overrides).step == 2
    monkeypatch.undo()
    assert train(path, overrides, resume=True).step == 6
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("run", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_loss_is_that_of_the_documents_alone(arguments):
    """The packed loss is the mean over all pieces of the loss of each piece on its own."""
    task = LanguageTask(load_config(LanguageConfig, *arguments), torch.device("cpu"))
    batch = task.loader.batch(4, 1)
    losses = []
    for ids, positions, labels in zip(*batch.values(), strict=True):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for a, b in pairwise(begins):
            logits = task.model(input_ids=ids[None, a:b], use_cache=False).logits[0]
            losses.append(F.cross_entropy(logits, labels[a:b], reduction="none", ignore_index=-100))
    expected = torch.cat(losses).sum() / (batch["labels"] != -100).sum()
    assert torch.allclose(task.loss(batch)[0], expected, atol=1e-5)


def test_long_validation_documents_are_cut(arguments):
    path, overrides = arguments
    config = load_config(LanguageConfig, path, [*overrides, "--data.valid_tokens=5"])
    task = LanguageTask(config, torch.device("cpu"))
    task.model.eval()
    whole = LanguageTask(load_config(LanguageConfig, path, overrides), torch.device("cpu"))
    whole.model.load_state_dict(task.model.state_dict())
    whole.model.eval()
    assert task.validate() != whole.validate()
    # Untrained, every token has about the same loss, so the bytes must have been cut as well.
    assert task.validate()["a_bits_per_byte"] == pytest.approx(
        whole.validate()["a_bits_per_byte"], rel=0.5
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.preset=huge", "unknown preset 'huge'"),
        ("--model.hiden_size=3", "hiden_size"),
        ("--model.vocab_size=100", "at least the tokenizer's"),
        ("--data.train.c=nowhere", "nowhere: not token shards"),
        ("--run.device=gpu", "cannot be used here"),
    ],
)
def test_wrong_settings(arguments, override, message, tmp_path):
    path, overrides = arguments
    with pytest.raises(InputError, match=message):
        train(path, [*overrides, override])
    assert not (tmp_path / "run").exists()


def test_shards_of_another_tokenizer(arguments, shards, tmp_path):
    tokenize([shards / "b.jsonl"], tmp_path / "other", None, 280)
    path, overrides = arguments
    for kind in ("train", "valid"):
        with pytest.raises(InputError, match="tokenize both with the same"):
            train(path, [*overrides, f"--data.{kind}.c={tmp_path / 'other'}"])


def test_export_of_any_checkpoint(arguments, tmp_path, capsys):
    """A checkpoint becomes what transformers loads: the model that the run had then."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, overrides = arguments
    train(path, [*overrides, "--run.checkpoint_interval=3", "--run.validation_interval=3"])
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000003"
    assert export(checkpoint, tmp_path / "three").checkpoint.step == 3
    assert export(run, tmp_path / "last", "bf16").checkpoint.step == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "three", dtype="auto")
    assert model.dtype == torch.float32
    saved = load_file(next(checkpoint.glob("*.safetensors")))
    for name, value in model.named_parameters():
        assert torch.equal(value.view(saved[name].shape), saved[name])
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "last", dtype="auto").dtype
        == torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "three")
    assert len(tokenizer) == model.config.vocab_size
    card = (tmp_path / "three" / "README.md").read_text()
    assert "step 3 of 6" in card
    third = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])
    assert f"| a_bits_per_byte | {third['valid']['a_bits_per_byte']:.4f} |" in card
    for source, message in ((tmp_path, "neither a run"), (tmp_path / "none", "neither a run")):
        with pytest.raises(InputError, match=message):
            export(source, tmp_path / "no")
    with pytest.raises(InputError, match="must be float32 or bf16"):
        export(run, tmp_path / "no", "fp8")
    next(checkpoint.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(InputError, match="step-00000003 is damaged"):
        export(checkpoint, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_a_run_shows(arguments, tmp_path):
    path, overrides = arguments
    more = ["--data.sample_prompts=['the cat']", "--data.sample_tokens=5", "--run.log_interval=2"]
    train(path, [*overrides, *more])
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        trigger = line["trigger"]
        assert trigger["loss_before"] > 0
        assert trigger["loss_after"] > 0
        assert 0 < trigger["gate"] < 1
        assert trigger["gate"] == pytest.approx(trigger["gate_layer_02"])
        assert line["memory_gib"] > 0
    (sample,) = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    assert list(json.loads(sample)["samples"]) == ["the cat"]


def test_the_trigger_that_is_logged_is_the_models_own(arguments):
    task = LanguageTask(load_config(LanguageConfig, *arguments), torch.device("cpu"))
    batch = task.batch(0, 0)
    task.model.eval()
    with torch.no_grad():
        (report,) = task.model(
            input_ids=batch["input_ids"][:1],
            position_ids=batch["position_ids"][:1],
            output_trigger=True,
        ).trigger
        seen = task.observe(batch)["trigger"]
    assert seen["loss_before"] == pytest.approx(float(report.loss_before.mean()))
    assert seen["loss_after"] == pytest.approx(float(report.loss_after.mean()))


def test_dry_run_writes_nothing(arguments, tmp_path, capsys):
    path, overrides = arguments
    figures = estimate(path, overrides)
    assert not (tmp_path / "run").exists()
    task = LanguageTask(load_config(LanguageConfig, path, overrides), torch.device("cpu"))
    count = sum(p.numel() for p in task.model.parameters())
    assert figures["parameters"] == count
    assert figures["tokens per step"] == 24 * 2 * 2
    assert figures["state per device, GiB"] == pytest.approx(16 * count / 2**30)
    assert f"{count:,}" in capsys.readouterr().out
    with pytest.raises(InputError, match="not token shards"):
        estimate(path, [*overrides, "--data.train.c=nowhere"])


def test_resuming_with_another_tokenizer_or_other_data(arguments, shards, tmp_path, monkeypatch):
    path, overrides = arguments
    monkeypatch.setattr(LanguageTask, "export", lambda task, folder: None)
    train(path, [*overrides, "--model.vocab_size=300"])
    for vocab_size, key in (
        (280, "position.(sources|tokenizer)"),
        (300, "position.sources.0.content"),
    ):
        folder = tmp_path / str(vocab_size)
        source = None if vocab_size == 280 else shards / "a"
        tokenize([shards / "b.jsonl"], folder, source, vocab_size)
        data = [f"--data.{kind}.{name}={folder}" for kind in ("train", "valid") for name in "ab"]
        data += ["--model.vocab_size=300"]
        with pytest.raises(InputError, match=key):
            train(path, [*overrides, *data], resume=True)


def test_dry_run_plans_for_other_machines(arguments, recwarn):
    path, overrides = arguments
    plan = ["--optim.accumulation=128", "--run.precision=bf16", "--run.steps=500"]
    figures = estimate(path, [*overrides, *plan], 64, "H200")
    assert figures["processes"] == 64
    count = figures["parameters"]
    assert figures["state per device, GiB"] == pytest.approx(16 * count / 64 / 2**30)
    flops = figures["FLOP per token"] * figures["tokens per step"]
    seconds = figures["seconds per step, at 40% MFU"]
    assert seconds == pytest.approx(flops / (0.4 * 989e12 * 64))
    assert figures["days of the run, at 40% MFU"] == pytest.approx(500 * seconds / 86400)
    messages = [str(warning.message) for warning in recwarn]
    (a, b) = [text for text in messages if "epochs" in text]
    assert a.startswith("data.train.a is read ")
    assert figures["epochs of a"] > 10
    assert b.startswith("data.train.b is read ")
    muon = estimate(path, [*overrides, *plan, "--optim.name=muon"], 64, "H200")
    assert muon["state per device, GiB"] < figures["state per device, GiB"]
    large = ["--model.preset=1.3b", "--model.hidden_size=2048", "--model.num_hidden_layers=22"]
    large += ["--model.num_attention_heads=16", "--data.context_length=4096"]
    estimate(path, [*overrides, *plan, *large, "--data.batch_size=64"], 1, "L40S")
    assert any("a device would need about" in str(warning.message) for warning in recwarn)
    for more, processes, message in (
        ([], 64, "optim.accumulation = 2 must be a multiple of the 64 processes"),
        ([*plan, "--parallel.shard=7"], 64, "parallel.shard = 7 must divide the 64 processes"),
    ):
        with pytest.raises(InputError, match=message):
            estimate(path, [*overrides, *more], processes, "H200")
    with pytest.raises(InputError, match="'Z80' is not known; known are H100"):
        estimate(path, overrides, 64, "Z80")


def test_many_epochs_are_noted(arguments):
    path, overrides = arguments
    with pytest.warns(UserWarning, match=r"data.train.a is read \d+.\d times: beyond 10 epochs"):
        train(path, [*overrides, "--data.batch_size=64"])


def test_z_loss_is_a_term_of_the_loss(arguments, tmp_path):
    path, overrides = arguments
    settings = ["--run.steps=1", "--optim.accumulation=1"]
    logged = {}
    for weight in ("0.0", "0.01"):
        out = f"--run.out={tmp_path / weight}"
        logged[weight] = train(path, [*overrides, *settings, out, f"--optim.z_loss={weight}"]).last
    plain, with_z = logged.values()
    assert "z_loss" not in plain
    assert with_z["loss"] == pytest.approx(plain["loss"] + with_z["z_loss"], rel=1e-5)
    assert with_z["z_loss"] == pytest.approx(0.01 * math.log(300) ** 2, rel=0.2)


def test_a_run_of_weights_that_diverged_ends_as_others_do(arguments, tmp_path, monkeypatch):
    """Validation and samples of a model without finite logits are null."""
    path, overrides = arguments
    original = LanguageTask.validate

    def validate(task):
        with torch.no_grad():
            task.model.model.norm.weight.fill_(torch.inf)
        return original(task)

    monkeypatch.setattr(LanguageTask, "validate", validate)
    settings = ["--data.sample_prompts=['the cat']", "--data.sample_tokens=3"]
    outcome = train(path, [*overrides, *settings])
    assert outcome.finished
    assert set(outcome.last["valid"].values()) == {None}
    (sample,) = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["samples"] == {"the cat": None}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| a_bits_per_byte | not finite |" in card


def test_a_run_starts_from_a_model(arguments, tmp_path, shards):
    """From a run, a checkpoint and an exported folder: the same weights, a fresh optimiser."""
    path, overrides = arguments
    train(path, [*overrides, "--run.checkpoint_interval=6"])
    run = tmp_path / "run"
    export(run, tmp_path / "folder")
    weights = []
    for number, name in enumerate(("run", "run/checkpoints/step-00000006", "folder")):
        out = tmp_path / f"next{number}"
        more = [f"--run.initial={tmp_path / name}", f"--run.out={out}", "--run.steps=2"]
        assert train(path, [*overrides, *more]).finished
        weights.append((out / "model" / "model.safetensors").read_bytes())
        first, *_ = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert first["lr"] == 0.01
        assert first["loss"] < last["loss"] + 0.5
    assert weights[0] == weights[1] == weights[2]
    assert f"| started from | {tmp_path / 'folder'} |" in (out / "model" / "README.md").read_text()
    # A resumed run no longer needs them.
    (tmp_path / "folder").rename(tmp_path / "elsewhere")
    longer = [*overrides, *more, "--run.steps=3", "--accept-changes"]
    assert train(path, longer[:-1], resume=True, accept_changes=True).step == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run.initial=nowhere"], r"run.initial = 'nowhere': nowhere: neither a run"),
        (["--run.initial=tiny"], r"hidden_size is 192 there and 16 in \[model\]"),
        (["--run.initial={run}", "--model.vocab_size=301"], "vocab_size is 300 there and 301"),
        (["--run.initial={run}", "--model.sliding_window=7"], "sliding_window is 256 there and 7"),
        (["--run.initial={run}", "--data.train={{c='{other}'}}", "--data.valid={{}}"], "another t"),
        (["--run.initial={bare}"], "not a tokenizer: it has no tokenizer.json"),
        (["--run.initial={damaged}"], "is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_refused(arguments, shards, tmp_path, more, message):
    path, overrides = arguments
    train(path, [*overrides, "--model.vocab_size=300"])
    tokenize([shards / "b.jsonl"], tmp_path / "other", None, 290)
    export(tmp_path / "run", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    damaged = tmp_path / "damaged" / "checkpoints" / "step-00000006"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000006", damaged)
    next(damaged.glob("*.safetensors")).write_bytes(b"")
    names = {name: tmp_path / name for name in ("run", "other", "bare")} | {"damaged": damaged}
    settings = ["--model.vocab_size=300", *(each.format(**names) for each in more)]
    settings += [f"--run.out={tmp_path / 'new'}"]
    kept = [each for each in overrides if "--data" not in each] if "data" in more[-1] else overrides
    for call in (train, estimate):
        with pytest.raises(InputError, match=message) as error:
            call(path, [*kept, *settings])
        assert str(error.value).startswith("run.initial = ")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_damaged_tokens_are_found_before_they_are_trained_on(arguments, shards, tmp_path):
    """At the start and on --resume, in a file that has its size."""
    path, overrides = arguments
    copy = tmp_path / "copy"
    shutil.copytree(shards / "a", copy)
    own = [*overrides, f"--data.train.a={copy}"]
    train(path, [*own, "--run.steps=3"])
    (file,) = copy.glob("tokens-*.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"copy/tokens-00000.bin: damaged"):
        train(path, [*own, "--run.steps=4"], resume=True, accept_changes=True)
    with pytest.raises(InputError, match=r"copy/tokens-00000.bin: damaged"):
        train(path, [*own, f"--run.out={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


def test_tokens_at_an_address(arguments, shards, tmp_path):
    """The run is that of the same tokens on the disk."""
    upload(shards / "a", "/corpus/a")
    path, overrides = arguments
    train(path, overrides)
    remote = ["--data.train.a=memory://corpus/a", f"--run.out={tmp_path / 'remote'}"]
    train(path, [*overrides, *remote])
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("run", "remote")]
    assert files[0].read_bytes() == files[1].read_bytes()
