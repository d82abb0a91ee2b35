"""The examples run, and what they claim to learn they learn."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "signal_specialist.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("signal_specialist", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
