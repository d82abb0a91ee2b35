"""A folder with the model's code in it, used where the package is hidden."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import nirvana
from helpers import HELPERS
from helpers.runs import one_thread
from helpers.use_standalone import computed, fine_tune
from nirvana import NirvanaForCausalLM
from nirvana.data.tokenizer import copy_tokenizer
from nirvana.errors import InputError
from nirvana.model import standalone
from nirvana.packaged import packaged
from nirvana.train.export import export

PROGRAM = HELPERS / "use_standalone.py"


def write_inputs(path, vocab_size):
    tokens = torch.randint(3, vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    inputs = {"tokens": tokens, "mask": mask, "positions": positions}
    save_file(inputs, path)
    return inputs


def without_package(folder, tmp_path):
    """What the program computes in a process that cannot import the package."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [PROGRAM, folder, tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"]
    done = subprocess.run(
        [sys.executable, "-I", *map(str, arguments), "--block"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "out.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize(
    "fields",
    [{}, {"interpolation": "independent", "rope_theta": 10000.0, "tie_word_embeddings": False}],
    ids=["plain", "variant"],
)
def test_the_folder_alone_computes_what_the_package_does(tmp_path, small_model, fields):
    """Logits, generation, gradients, a step of fine-tuning, and what is saved afterwards."""
    model = small_model(vocab_size=8192, **fields).float()
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(packaged("tiny"), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "alone", standalone=True)
    inputs = write_inputs(tmp_path / "inputs.safetensors", 8192)
    theirs = without_package(tmp_path / "alone", tmp_path)
    ours = computed(model, inputs)
    fine_tune(model)
    ours["tuned"] = model.eval()(inputs["tokens"]).logits.detach()
    assert not torch.equal(ours["tuned"], ours["logits"])
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert torch.equal(theirs["again"], theirs["tuned"])
    # What was saved there loads here, its code not executed.
    again = NirvanaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(inputs["tokens"]).logits, theirs["tuned"])
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"].keys() == standalone.auto_map().keys()
    assert (tmp_path / "saved" / "modeling_nirvana.py").is_file()


def test_the_file_is_complete_and_readable():
    """It compiles, imports nothing of the package, and defines what it uses once."""
    text = standalone.source()
    tree = ast.parse(text)
    imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    tops = {name.partition(".")[0] for name in imported}
    assert tops - set(sys.stdlib_module_names) == {"huggingface_hub", "torch", "transformers"}
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert len(defined) == len(set(defined))
    assert {name.partition(".")[2] for name in standalone.auto_map().values()} <= set(defined)
    assert "dispatch." not in text
    assert "triton" not in text
    # Comments and docstrings are those of the sources.
    assert '"""Gated delta rule and sliding-window attention on shared q, k and v' in text
    assert "# One product instead of ten: q k v | gate | beta | alpha" in text


def test_the_code_is_executed_on_request_alone(tmp_path):
    """The package's own loaders never execute it; without the package, transformers prompts."""
    export("tiny", tmp_path / "alone", standalone=True)
    (tmp_path / "alone" / "modeling_nirvana.py").write_text("raise SystemExit('executed')")
    model, _ = nirvana.load(tmp_path / "alone")
    assert type(model) is NirvanaForCausalLM
    export(tmp_path / "alone", tmp_path / "plain")
    assert not (tmp_path / "plain" / "modeling_nirvana.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    from transformers import AutoModelForCausalLM

    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "alone")) is NirvanaForCausalLM


def test_cards_state_what_to_install(tmp_path):
    export("tiny", tmp_path / "alone", standalone=True)
    export(tmp_path / "alone", tmp_path / "plain")
    alone, plain = ((tmp_path / name / "README.md").read_text() for name in ("alone", "plain"))
    assert 'pip install "torch' in alone
    assert "trust_remote_code=True" in alone
    assert "clone of its repository:\n\n    pip install ." in plain
    assert "trust_remote_code" not in plain
    for card in (alone, plain):
        assert card.count("## Loading") == 1
        assert card.startswith((packaged("tiny") / "README.md").read_text()[:200])


def test_no_model_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a run"):
        export(tmp_path / "empty", tmp_path / "out", standalone=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(InputError, match="the type 'llama', not 'nirvana'"):
        export(tmp_path / "other", tmp_path / "out", standalone=True)
    assert not (tmp_path / "out").exists()
