"""TRL's trainers on the packaged model: their losses and log-probabilities, computed again here."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nirvana import NirvanaForCausalLM, NirvanaForSequenceClassification
from nirvana.model.assets import load_language_model
from nirvana.packaged import resolve

datasets = pytest.importorskip("datasets", reason="needs datasets (the extra train)")
peft = pytest.importorskip("peft", reason="needs peft (the extra dev)")
trl = pytest.importorskip("trl", reason="needs trl (the extra dev)")

TINY = str(resolve("tiny"))
PROMPTS = ["The court held", "Patients were randomly", "The company", "It was a dark night, and"]
COMPLETIONS = [
    " that the defendant was not liable for the damages.",
    " assigned to two groups.",
    " reported revenue of ten million, and its shares rose.",
    " the rain fell in torrents upon the roof of the old house by the sea.",
]
TEXTS = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
STEPS = 3
LENGTH = 12


@pytest.fixture(scope="module")
def tiny():
    return load_language_model("tiny")


@pytest.fixture
def settings(tmp_path):
    """What all trainers here are configured with; all rows make one batch."""
    return {
        "output_dir": tmp_path / "out",
        "max_steps": STEPS,
        "per_device_train_batch_size": len(TEXTS),
        "per_device_eval_batch_size": len(TEXTS),
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def lora():
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def token_nll(model, tokens):
    """`[T - 1]`: the negative log likelihood of each token but the first, in a row of its own."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    return F.cross_entropy(logits, tokens[1:], reduction="none")


def encode(tokenizer, text):
    """The tokens of a text as TRL makes them: BOS, which the tokenizer adds, the text, EOS."""
    return tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids[0]


def history(trainer, name):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def wrapped(documents, length):
    """The documents one behind the other, cut into rows of that length."""
    return list(torch.cat(documents).split(length))


def split(documents, length):
    return [part for document in documents for part in document.split(length)]


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, lambda documents: documents),
        ({"padding_free": True, "max_length": None}, lambda documents: documents),
        ({"packing": True, "max_length": 64}, lambda documents: documents),
        (
            {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
            lambda documents: split(documents, 8),
        ),
        (
            {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
            lambda documents: wrapped(documents, 16),
        ),
    ],
    ids=["plain", "padding free", "packed", "packed and split", "wrapped"],
)
def test_sft_has_the_loss_of_its_rows_alone(tiny, settings, given, rows):
    """However documents are laid out: nothing crosses their borders, and no token is left out."""
    model, tokenizer = tiny
    expected = [token_nll(model, row) for row in rows([encode(tokenizer, text) for text in TEXTS])]
    data = datasets.Dataset.from_dict({"text": TEXTS})
    settings["per_device_train_batch_size"] = settings["per_device_eval_batch_size"] = 16
    trainer = trl.SFTTrainer(
        TINY,
        trl.SFTConfig(**{**settings, **given}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    loss = torch.cat(expected).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(loss, abs=1e-4)
    assert history(trainer, "loss")[-1] < loss - 0.1


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "LoRA"])
def test_sft_of_completions_only(tiny, settings, adapter):
    model, tokenizer = tiny
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        start, tokens = tokenizer(prompt).input_ids, encode(tokenizer, text)
        assert tokens[: len(start)].tolist() == start  # else the border would lie in a token
        expected.append(token_nll(model, tokens)[len(start) - 1 :])
    data = datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": COMPLETIONS})
    trainer = trl.SFTTrainer(
        TINY,
        trl.SFTConfig(**settings, completion_only_loss=True),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )
    loss = torch.cat(expected).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(loss, abs=1e-4)
    assert history(trainer, "loss")[-1] < loss


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "LoRA"])
def test_dpo_starts_at_its_reference(tiny, settings, adapter):
    """Without a reference TRL loads one from the policy's folder, or switches the adapter off."""
    model, tokenizer = tiny
    rejected = [" " + completion[:0:-1] for completion in COMPLETIONS]
    data = {"prompt": PROMPTS, "chosen": COMPLETIONS, "rejected": rejected}
    trainer = trl.DPOTrainer(
        TINY,
        args=trl.DPOConfig(**settings),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=lora() if adapter else None,
    )
    assert isinstance(trainer.ref_model, type(None) if adapter else NirvanaForCausalLM)
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 0.01
    for name, endings in (("chosen", COMPLETIONS), ("rejected", rejected)):
        total = 0.0
        for prompt, ending in zip(PROMPTS, endings, strict=True):
            start = len(tokenizer(prompt).input_ids)
            total -= token_nll(model, encode(tokenizer, prompt + ending))[start - 1 :].sum().item()
        assert history(trainer, f"logps/{name}")[0] == pytest.approx(total / len(endings), rel=1e-3)
        assert history(trainer, f"rewards/{name}")[0] == pytest.approx(0, abs=1e-5)


def test_grpo_samples_from_what_it_trains(tiny, settings):
    """The log-probabilities of generation, token by token from the cache, are those of training,
    where prompts of two lengths stand in one batch; the reference starts as the policy."""
    _, tokenizer = tiny
    settings["per_device_train_batch_size"] = 8
    trainer = trl.GRPOTrainer(
        TINY,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(**settings, num_generations=4, max_completion_length=LENGTH, beta=0.05),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.ref_model, NirvanaForCausalLM)
    sampled, scored = [], []

    def record(module, args, inputs, output):
        if inputs.get("fused_lm_head"):
            scored.append((inputs, output))
        elif not scored:
            sampled.append((inputs["input_ids"], output.logits[:, -1].log_softmax(-1)))

    trainer.model.register_forward_hook(record, with_kwargs=True)
    trainer.train()
    inputs, output = scored[0]
    tokens, log_probs = inputs["input_ids"], output.log_probs.detach()
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 2
    # TRL shuffles the rows between generation and training.
    read = torch.cat([step for step, _ in sampled], 1)  # all but the last token
    same = (read[:, None] == tokens[None, :, :-1]).all(-1)
    assert (same.sum(0) == 1).all()
    logits = torch.stack([step for _, step in sampled], 1)[same.int().argmax(0)]
    generated = logits.gather(-1, tokens[:, -LENGTH:, None])[..., 0]
    labelled = output.label_mask[:, -LENGTH:]
    assert labelled.sum() > 4 * LENGTH
    torch.testing.assert_close(
        log_probs[:, -LENGTH:][labelled], generated[labelled], atol=1e-4, rtol=0
    )
    kl = history(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-5


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "LoRA"])
def test_a_reward_model_learns_preferences(tiny, settings, adapter):
    """The first loss is that of every text scored in a row of its own, by the same new head."""
    _, tokenizer = tiny
    rejected = [" " + completion[:0:-1] for completion in COMPLETIONS]
    data = {"prompt": PROMPTS, "chosen": COMPLETIONS, "rejected": rejected}
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    settings["learning_rate"] = 1e-3
    data = datasets.Dataset.from_dict(data)
    trainer = trl.RewardTrainer(
        TINY,
        args=trl.RewardConfig(**settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=config if adapter else None,
    )
    model = trainer.model
    inner = model.get_base_model() if adapter else model
    assert isinstance(inner, NirvanaForSequenceClassification)

    def score(text):
        with torch.no_grad():
            return model(input_ids=encode(tokenizer, text)[None]).logits[0, 0]

    margins = torch.stack(
        [
            score(prompt + good) - score(prompt + bad)
            for prompt, good, bad in zip(PROMPTS, COMPLETIONS, rejected, strict=True)
        ]
    )
    loss = -F.logsigmoid(margins).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[0] == pytest.approx(loss, abs=1e-4)
    assert losses[-1] < losses[0] - 0.05
    assert trainer.evaluate()["eval_accuracy"] > 0.7


def test_sft_from_the_command_line(tmp_path, tiny):
    """`trl sft` starts its script in another process, which knows our models as well."""
    model, tokenizer = tiny
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "train.jsonl").write_text("".join(lines))
    flags = {
        "model_name_or_path": TINY,
        "dataset_name": folder,
        "output_dir": out,
        "max_steps": 1,
        "per_device_train_batch_size": len(TEXTS),
        "report_to": "none",
        "bf16": False,
        "logging_steps": 1,
    }
    options = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "nirvana.launch", "trl", "sft", *options, "--use_cpu"],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    expected = torch.cat([token_nll(model, encode(tokenizer, text)) for text in TEXTS]).mean()
    state = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    trained = NirvanaForCausalLM.from_pretrained(out)
    changed = [not p.equal(model.get_parameter(name)) for name, p in trained.named_parameters()]
    assert sum(changed) > len(changed) / 2
