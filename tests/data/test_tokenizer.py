"""A tokenizer's folder is data: nothing in it is executed, and there is no prompt to allow it."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest

from nirvana import InputError
from nirvana.data.tokenizer import load_tokenizer
from nirvana.model.assets import load_language_model
from nirvana.packaged import packaged

CODE = """
from pathlib import Path
Path({trace!r}).write_text("executed")
from transformers import PreTrainedTokenizerFast
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path):
    """A copy of the packaged model, with code beside it that leaves a trace when it runs."""
    copy = tmp_path / "copy"
    shutil.copytree(packaged("tiny"), copy)
    (copy / "code.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    return copy


def change(file, **fields):
    described = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in described.items() if v is not None}))


AUTO_MAPS = [
    {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
    {"AutoTokenizer": [None, "code.Tokenizer"]},
    {"AutoTokenizer": "code.Tokenizer"},
    ["code.Tokenizer", "code.Tokenizer"],
    {"AutoTokenizer": ["code.Tokenizer", "someone/else--code.Tokenizer"]},
]


@pytest.mark.parametrize("auto_map", AUTO_MAPS)
@pytest.mark.parametrize("known", [True, False], ids=["class known", "class of its own"])
def test_code_in_the_folder_is_not_executed(folder, auto_map, known, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    kind = {"tokenizer_class": "TokenizersBackend" if known else "Tokenizer"}
    change(folder / "tokenizer_config.json", auto_map=auto_map, **kind)
    (folder / "config.json").unlink()
    refused = pytest.raises(InputError, match="needs Python code of its own")
    with nullcontext() if known else refused:
        assert load_tokenizer(folder).encode("a") == load_tokenizer(packaged("tiny")).encode("a")
    assert not (tmp_path / "trace").exists()


def test_a_models_own_code_is_not_executed(folder, tmp_path, monkeypatch):
    """Neither that of its configuration, of the network, nor of its way to generate."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    change(folder / "config.json", auto_map=dict.fromkeys(classes, "code.Tokenizer"))
    change(folder / "tokenizer_config.json", auto_map=AUTO_MAPS[0])
    (folder / "custom_generate").mkdir()
    shutil.copyfile(folder / "code.py", folder / "custom_generate" / "generate.py")
    model, tokenizer = load_language_model(folder)
    model.generate(max_new_tokens=1, bos_token_id=tokenizer.bos_token_id)
    assert not (tmp_path / "trace").exists()


def test_no_command_executes_or_prompts(folder, tmp_path):
    """On a terminal, where the library would prompt, with yes as the answer to everything."""
    pty = pytest.importorskip("pty")
    change(folder / "tokenizer_config.json", auto_map=AUTO_MAPS[0], tokenizer_class="Tokenizer")
    change(folder / "config.json", model_type=None)
    (tmp_path / "a.txt").write_text("a text")
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", "from nirvana.cli import main; main()", "data", "tokenize"]
    command += ["a.txt", "--out", "out", "--tokenizer", str(folder), "--workers", "1"]
    with open(controller, "wb", buffering=0) as answers:
        answers.write(b"y\n" * 10)
        done = subprocess.run(
            command, cwd=tmp_path, stdin=terminal, capture_output=True, text=True, timeout=200
        )
    assert not (tmp_path / "trace").exists()
    assert done.returncode == 2
    assert "needs Python code of its own" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE"}'),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "NoSuch"}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"auto_map": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", "nonsense"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(
        InputError, match=r"copy: (not a readable tokenizer|the tokenizer)"
    ) as found:
        load_tokenizer(folder)
    assert "\n" not in str(found.value)


def test_required_tokens(folder):
    change(folder / "tokenizer_config.json", bos_token=None)
    with pytest.raises(InputError, match="has no bos_token; name one in its config"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, required=()).eos_token_id is not None
