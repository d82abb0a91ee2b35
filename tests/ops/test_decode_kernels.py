"""The kernels of a decoding step can be compiled for a GPU; there is no need to have one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = 227 * 1024
"""Bytes of shared memory that a program may use on an H100 or H200."""


def test_they_compile_for_the_1_3b_preset():
    program = Path(__file__).with_name("compile_decode.py")
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program, "1.3b", "1", "8", "64"],
        env=without,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} >= {"product_kernel", "delta_kernel", "attention_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["spilled"] == 0, kernel
