"""The kernels of a decoding step, and those of adopted models, can be compiled for a GPU; there is
no need to have one."""

import json
from pathlib import Path

import pytest

from helpers.forks import Forks

pytest.importorskip("triton")

SHARED = 227 * 1024
"""Bytes of shared memory that a program may use on an H100 or H200."""


@pytest.fixture(scope="module")
def compiled():
    """What a program beside this file prints of the kernels that it compiles, in a process that
    has imported them as on a GPU, not for the interpreter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("TRITON_INTERPRET", raising=False)
        with Forks("nirvana.generate.fused_step", "triton") as forks:
            yield lambda program, *arguments: names_of(forks, program, *arguments)


def names_of(forks, program, *arguments):
    """The names of kernels that a program compiles, each of which fits into a GPU."""
    code, output = forks.program(Path(__file__).with_name(program), arguments)
    assert code == 0, output
    kernels = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["spilled"] == 0, kernel
    return {kernel["kernel"] for kernel in kernels}


def test_they_compile_for_the_1_3b_preset(compiled):
    names = compiled("compile_decode.py", "1.3b", "1", "8", "64")
    assert names >= {"product_kernel", "delta_kernel", "attention_kernel"}


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-1.7b"])
def test_they_compile_for_adopted_models(compiled, name):
    names = compiled("compile_decode.py", name, "1", "8")
    assert names >= {"rotary_kernel", "low_rank_kernel", "attention_kernel", "mix_kernel"}
    assert ("qkv_kernel" in names) == name.startswith("qwen")


def test_those_of_adopted_models_compile(compiled):
    names = compiled("compile_adopted.py")
    assert names >= {"unit_kernel", "conv_kernel", "add_kernel", "gradient_kernel"}
