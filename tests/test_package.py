"""The package as a whole: its import, its registration, its packaged models."""

import subprocess
import sys

import pytest
import torch

from nirvana import InputError, NirvanaForCausalLM, preset
from nirvana.model.assets import load_language_model, resolve


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_pulls_in_nothing_heavy():
    code = "import nirvana, sys; print(*sorted(sys.modules))"
    loaded = set(python(code).split())
    heavy = {"triton", "datasets", "matplotlib", "monai", "scipy", "h5py", "nibabel"}
    assert not loaded & heavy
    assert "transformers.modeling_utils" not in loaded


@pytest.mark.parametrize(
    "imports",
    [
        "import nirvana; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import nirvana",
        "from nirvana import NirvanaModel; from transformers import AutoModelForCausalLM",
        "import nirvana.model.nirvana; from transformers import AutoModelForCausalLM",
    ],
)
def test_the_auto_classes_know_the_model_in_any_order(imports):
    code = f"{imports}; import nirvana; c = nirvana.preset('tiny', hidden_size=48, vocab_size=9)"
    code += "; print(type(AutoModelForCausalLM.from_config(c)).__name__)"
    assert python(code) == "NirvanaForCausalLM"


def test_the_packaged_model_reads_and_writes():
    model, tokenizer = load_language_model("tiny")
    text = "Magnetic resonance imaging — of the brain, 3.5 µm\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert next(model.parameters()).dtype == torch.float32
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert loss < 6  # an untrained model pays ln 8192 = 9.0


def test_unknown_names_and_folders_are_told(tmp_path):
    with pytest.raises(InputError, match=r"no language model 'huge'.*tiny"):
        resolve("huge")
    with pytest.raises(InputError, match=r"no MRI codec 'tiny'.*codec"):
        resolve("tiny", "MRI codec")
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve(tmp_path)
    preset("tiny").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no weights"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_language_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="does not hold a Nirvana language model"):
        load_language_model(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    NirvanaForCausalLM(preset("tiny", vocab_size=50)).save_pretrained(tmp_path)
    preset("tiny", vocab_size=50, num_hidden_layers=9).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"do not fit its config\.json: missing.*layers\.8"):
        load_language_model(tmp_path)
