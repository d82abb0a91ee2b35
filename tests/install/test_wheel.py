"""The wheel without extras, with the newest versions of what it needs, as a user installs it."""

import importlib.metadata
import json
import os
import tarfile
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import torch
from transformers import AutoModelForCausalLM

import nirvana as package
from nirvana import NirvanaForCausalLM

COMMANDS = ("demo", "convert", "mri", "data", "train", "export", "eval", "generate", "app", "bench")


def test_the_wheel_holds_the_package_and_nothing_else():
    files = importlib.metadata.files("nirvana")
    assert files is not None
    metadata = f"nirvana-{importlib.metadata.version('nirvana')}.dist-info"
    programs = {"nirvana", "nirvana.exe"}
    held = [Path(file) for file in files if Path(file).name not in programs]
    assert {file.parts[0] for file in held} == {"nirvana", metadata}
    names = {file.as_posix() for file in held}
    for model in ("tiny", "codec", "reporter"):
        assert f"nirvana/assets/{model}/model.safetensors" in names
    assert f"{metadata}/licenses/LICENSE" in names
    assert not any("test" in part for file in held for part in file.parts)


def test_the_source_distribution_holds_the_package_and_nothing_else():
    origin = importlib.metadata.distribution("nirvana").read_text("direct_url.json")
    assert origin is not None
    wheel = Path(url2pathname(urlparse(json.loads(origin)["url"]).path))
    (source,) = wheel.parent.glob("nirvana-*.tar.gz")
    with tarfile.open(source) as archive:
        held = {Path(name).parts[1] for name in archive.getnames()}
    assert held >= {"src", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert not held & {"tests", "experiments", "benchmarks", "docs", "build"}


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help(nirvana, command):
    assert "Usage: nirvana" in nirvana(*command, "--help").stdout


def test_generate(nirvana):
    arguments = ("generate", "tiny", "--prompt", "The patients were", "--max-new-tokens", 12)
    first = nirvana(*arguments).stdout
    assert len(first.split()) > 1
    assert nirvana(*arguments).stdout == first


def test_eval(nirvana, tmp_path):
    (tmp_path / "a.txt").write_text("The patients were randomly assigned to two groups. " * 8)
    nirvana("eval", "tiny", "--data", "a.txt", "--json", "a.json")
    file = json.loads((tmp_path / "a.json").read_text())["files"]["a.txt"]
    assert 0 < file["bits_per_byte"] < 3  # 13 bits a token would be chance


def test_a_command_that_needs_an_extra_names_it(nirvana, tmp_path):
    (tmp_path / "scan.h5").write_bytes(b"no scan")
    done = nirvana("mri", "reconstruct", "scan.h5", "--out", "out", code=2)
    assert "pip install 'nirvana[mri]'" in done.stderr
    assert os.listdir(tmp_path) == ["scan.h5"]


def test_generation_keeps_its_cache(tmp_path):
    """Each step reads one new token, and writes what a forward of the whole text would."""
    assets = Path(package.__file__).parent / "assets"
    model = AutoModelForCausalLM.from_pretrained(assets / "tiny")
    assert type(model) is NirvanaForCausalLM
    lengths = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    tokens = torch.randint(3, 8192, (2, 40), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(tokens, **settings)
    assert lengths == [40, 1, 1, 1, 1, 1]
    assert torch.equal(model.generate(tokens, use_cache=False, **settings), cached)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(tokens, **settings), cached)
