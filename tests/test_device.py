"""Choosing a device."""

import warnings

import pytest
import torch

from nirvana.device import choose_device
from nirvana.errors import InputError


def test_choose_device():
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match="cannot be used here"):
            choose_device(name)


def test_a_gpu_without_kernels_warns(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr("nirvana.device.HAS_KERNELS", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_device("cuda")
    monkeypatch.setattr("nirvana.device.HAS_KERNELS", False)
    with pytest.warns(UserWarning, match=r"nirvana\[cuda\]"):
        choose_device("cuda")
