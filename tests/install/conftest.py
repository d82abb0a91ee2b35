"""What the tests of a clean installation share: `make newest` makes the environment and runs them.

They run the installed wheel in a folder of their own, so nothing of the repository can help it.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def _installed_from_a_wheel():
    """Fails where nirvana is installed in place: then its sources are tested, not its wheel."""
    origin = importlib.metadata.distribution("nirvana").read_text("direct_url.json")
    assert origin is not None
    assert json.loads(origin)["url"].endswith(".whl"), "these tests are run by: make newest"


@pytest.fixture(autouse=True)
def _outside_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture
def nirvana(tmp_path) -> Run:
    """Runs the installed program in an empty folder and checks its exit code."""
    program = Path(sys.executable).with_name("nirvana")

    def run(*arguments, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [program, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == code, done.stderr
        return done

    return run
