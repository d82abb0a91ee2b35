"""A standalone folder in an environment with torch and transformers and without this package."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import nirvana as package
from helpers import HELPERS
from helpers.use_standalone import computed, fine_tune


def environment_without_the_package(folder):
    """A virtual environment that shares every installed distribution but this one, by links."""
    venv.create(folder, with_pip=False)
    here = Path(sysconfig.get_path("purelib"))
    scheme = {"base": str(folder), "platbase": str(folder)}
    there = Path(sysconfig.get_path("purelib", vars=scheme))
    for entry in here.iterdir():
        if "nirvana" not in entry.name.lower():
            (there / entry.name).symlink_to(entry)
    return folder / Path(sys.executable).parent.name / Path(sys.executable).name


def test_it_computes_what_the_package_does(nirvana, tmp_path):
    nirvana("export", "tiny", "alone", "--standalone")
    python = environment_without_the_package(tmp_path / "environment")
    tokens = torch.randint(3, 8192, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(10), torch.arange(30)])[None]
    inputs = {"tokens": tokens, "mask": mask, "positions": positions}
    save_file(inputs, tmp_path / "inputs.safetensors")
    done = subprocess.run(
        [
            python,
            "-I",
            HELPERS / "use_standalone.py",
            "alone",
            "inputs.safetensors",
            "out.safetensors",
        ],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    torch.set_num_threads(1)
    model, _ = package.load("tiny")
    ours = computed(model, inputs)
    fine_tune(model)
    ours["tuned"] = model.eval()(tokens).logits.detach()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value)
    torch.testing.assert_close(theirs["again"], theirs["tuned"])
