"""A language model from text to a folder that transformers loads."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from stand_in import stop

from nirvana.errors import InputError
from nirvana.train.config import LanguageConfig, load_config
from nirvana.train.language import LanguageTask, train
from nirvana.train.tokenize import tokenize

SMALL = "hidden_size=16 num_hidden_layers=3 num_attention_heads=2 task_dim=4 bank_size=2"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "see", "one", "bird"]


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
    # Validation is what the evaluation says of the exported model.
    from nirvana.evaluate.perplexity import Score, score_documents
    from nirvana.text import read_documents

    texts = list(read_documents(saved.data.train["a"] + ".jsonl"))[:3]
    total = sum(score_documents(model, tokenizer, texts), Score())
    assert total.bits_per_byte == pytest.approx(figures[0], rel=1e-5)


def test_resume_is_bitwise(arguments, tmp_path, monkeypatch):
    """Law 11 for the language model itself."""
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
    """The packed loss is the mean over all pieces of what each piece costs on its own."""
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
    # Untrained, every token costs about the same, so the bytes must have been cut as well.
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
