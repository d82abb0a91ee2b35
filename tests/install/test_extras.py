"""The wheel with its extras, on the newest versions: what users do with the model elsewhere."""

import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import peft
import torch
from nibabel.testing import data_path
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from nirvana.model.assets import load_language_model


def test_a_trainer_takes_a_step(tmp_path):
    model, tokenizer = load_language_model("tiny")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = [{"input_ids": tokenizer("The cat sat on the mat. " * n).input_ids} for n in (1, 2, 3)]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loss = Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    assert 0 < loss.training_loss < 9  # ln 8192 is chance
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    tokens = torch.tensor([data[0]["input_ids"]])
    torch.testing.assert_close(saved(tokens).logits, model.eval()(tokens).logits)


def test_an_adapter_is_trained_saved_and_loaded(tmp_path):
    base, tokenizer = load_language_model("tiny")
    tokens = torch.tensor([tokenizer("The cat sat on the mat.").input_ids])
    plain = base(tokens).logits.detach()
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = model.eval()(tokens).logits.detach()
    assert (adapted - plain).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    fresh, _ = load_language_model("tiny")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens).logits, adapted)


def test_a_task_is_scored(nirvana, tmp_path):
    settings = ("--lengths", 256, "--limit", 2, "--json", "a.json")
    nirvana("eval", "tiny", "--tasks", "mqar", *settings)
    tasks = json.loads((tmp_path / "a.json").read_text())["tasks"]
    assert list(tasks) == ["mqar@256"]


def test_a_volume_is_reconstructed(nirvana, tmp_path):
    volume = nibabel.load(Path(data_path) / "example4d.nii.gz").slicer[:, :, 10:12, 0]
    nibabel.save(volume, "two.nii.gz")
    nirvana("mri", "reconstruct", "two.nii.gz", "--out", "out", "--no-wavelet")
    with h5py.File(tmp_path / "out" / "reconstruction.h5") as file:
        image = file["reconstruction"][()]
    assert len(image) == 2
    assert np.isfinite(image).all()
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    psnr = {row["method"]: row["psnr"] for row in rows}
    assert psnr["Nirvana"] > psnr["zero-filled"] + 1
