"""The kernels of a decoding step, and those of adopted models, can be compiled for a GPU; there is
no need to have one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = 227 * 1024
"""Bytes of shared memory that a program may use on an H100 or H200."""


def compiled(program, *arguments):
    """What a program beside this file prints of the kernels that it compiles."""
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(program), *arguments],
        env=without,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["spilled"] == 0, kernel
    return {kernel["kernel"] for kernel in kernels}


def test_they_compile_for_the_1_3b_preset():
    names = compiled("compile_decode.py", "1.3b", "1", "8", "64")
    assert names >= {"product_kernel", "delta_kernel", "attention_kernel"}


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-1.7b"])
def test_they_compile_for_adopted_models(name):
    names = compiled("compile_decode.py", name, "1", "8")
    assert names >= {"rotary_kernel", "low_rank_kernel", "attention_kernel", "mix_kernel"}
    assert ("qkv_kernel" in names) == name.startswith("qwen")


def test_those_of_adopted_models_compile():
    names = compiled("compile_adopted.py")
    assert names >= {"unit_kernel", "conv_kernel", "add_kernel", "gradient_kernel"}
