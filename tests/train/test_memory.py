"""The peak of memory in bytes, whatever unit the operating system has."""

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from nirvana.device import peak_memory


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1), ("win32", None)])
def test_units(monkeypatch, platform, unit):
    usage = SimpleNamespace(ru_maxrss=7000)
    fake = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    if platform == "win32":
        fake = None  # does not exist there
        memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7000))
        monkeypatch.setattr(psutil, "Process", lambda: memory)
    monkeypatch.setitem(sys.modules, "resource", fake)
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory(torch.device("cpu")) == 7000 * (unit or 1)


def test_it_grows_with_what_is_held():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**26)
    assert before > 2**26
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) > held.nbytes
