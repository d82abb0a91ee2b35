"""The examples run, and what they claim to learn they learn."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nirvana.mri.data.simulate import Simulation, simulate_scan
from nirvana.mri.io import write_scan
from nirvana.mri.physics.masks import sampling_mask

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "signal_specialist.py"
NETWORK = ROOT / "examples" / "own_network.py"
ADOPTION = ROOT / "examples" / "adopt.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load(EXAMPLE)


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 120


def test_it_runs():
    command = [sys.executable, str(EXAMPLE), "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for kind in ("none", "nirvana-without-trigger", "nirvana"):
        assert f"\n{kind} " in done.stdout


@pytest.mark.parametrize("kind", ["none", "nirvana"])
def test_training_helps(example, kind):
    few = example.decibels(example.train(kind, 1), example.TRAINED)
    more = example.decibels(example.train(kind, 15), example.TRAINED)
    assert more > few + 1


def test_a_network_of_ones_own_learns_to_recall():
    example = load(NETWORK)
    network = example.Network(example.KEYS + example.VALUES, 64)
    assert example.accuracy(network) < 0.2
    example.train(network, 120)
    assert example.accuracy(network) > 0.7


def test_the_adoption_runs_and_learns():
    command = [sys.executable, str(ADOPTION), "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"^(attention|logits): loss ([\d.]+) -> ([\d.]+)$", done.stdout, flags=re.M)
    assert [name for name, _, _ in found] == ["attention", "logits"]
    assert all(float(last) < float(first) for _, first, last in found)


def test_the_documentation_shows_that_network():
    """The network and its training, 15 lines, as they are in the example."""
    text, page = NETWORK.read_text(), (ROOT / "docs" / "building.md").read_text()
    core = text[text.index("class Network") : text.index("@torch.no_grad")]
    lines = [line for line in core.splitlines() if line.strip()]
    assert len(lines) == 15
    block = page[page.index("    class Network") :].splitlines()
    shown = [line[4:] for line in block if line.strip()][:15]
    assert shown == lines


def readme(words: str) -> str:
    """The example in README that holds these words."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (found,) = (block for block in blocks if words in block)
    return found


def test_the_readmes_example_of_mri_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, columns = np.mgrid[-1:1:96j, -1:1:80j]
    head = np.clip(1.2 - rows**2 - columns**2, 0, 1).astype(np.float32)
    scan = simulate_scan(np.stack([head] * 2), "head", 0, Simulation(num_coils=2), (5.0, 2.0, 2.0))
    mask = sampling_mask("equispaced", 80, 4, 0.1, seed=0).numpy()
    write_scan(
        tmp_path / "scan.h5", replace(scan, kspace=scan.kspace * mask, mask=mask, target=None)
    )
    monkeypatch.chdir(tmp_path)
    code = readme("nirvana.mri")
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(code, names)
    assert (names["images"].shape, names["images"].dtype) == ((2, 96, 80), np.complex64)
    assert len(capsys.readouterr().out.splitlines()) == 2
