"""Compiles the kernels of a decoding step for an H100 or H200; needs Triton, and no GPU.

    python tests/ops/compile_decode.py MODEL BATCH [BATCH ...]

MODEL is a preset or one of `ADOPTED`. Prints a line of JSON for each kernel: its name, shared
memory in bytes, and the bytes that a thread spills.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nirvana import NirvanaConfig, NirvanaForCausalLM, preset
from nirvana.generate.decode_states import DecodeStates, Place
from nirvana.generate.fused_step import FusedStep
from nirvana.ops.cuda import decode_products, decode_step, decode_window

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
NEW = {
    "num_prelude_layers": 0,
    "conv_size": None,
    "conv_silu": False,
    "window_output": "full",
    "interpolation": "independent",
    "sliding_window": 512,
    "num_sinks": 4,
    "rope_theta": 100000.0,
}
"""Settings that `nirvana.model.adopt` chooses."""
ADOPTED = {
    "smollm2-135m": {
        **NEW,
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "qwen3-1.7b": {
        **NEW,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
        "num_sinks": 0,
        "qk_norm": True,
        "qkv_bias": True,
    },
}
"""Sizes of two Transformers. For the sake of the kernels the second has biases and no sinks."""
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
compiled = set()


def launch(kernel, grid, *args, **constants):
    """In place of `nirvana.ops.cuda.launch.launch`: compiles what that would compile and run."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") & constants.keys()}
    types, fixed, attributes = {}, dict(constants), {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (type(value) is int and value == 1):
            fixed[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0
        if name in types and aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    types |= dict.fromkeys(fixed, "constexpr")
    key = (kernel.__name__, *types.items(), *fixed.items(), *attributes, *options.items())
    if key not in compiled:
        compiled.add(key)
        source = ASTSource(kernel, types, constexprs=fixed, attrs=attributes)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        about = {"kernel": kernel.__name__, "shared": code.metadata.shared}
        print(json.dumps(about | {"spilled": spilled(code.asm["ptx"])}), flush=True)


def spilled(ptx):
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [PTXAS, "-v", "-arch=sm_90a", file, "-o", Path(folder, "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))


def main(name, *batches):
    for module in (decode_step, decode_products, decode_window):
        module.launch = launch
    config = preset(name) if name not in ADOPTED else NirvanaConfig(**ADOPTED[name])
    config.num_hidden_layers = config.num_prelude_layers + 2
    with torch.device("meta"):
        model = NirvanaForCausalLM(config).to(torch.bfloat16)
        for batch in map(int, batches):
            place = Place(slot=torch.zeros(batch, dtype=torch.long))
            like, slots = model.model.norm.weight, config.sliding_window
            layers = range(config.num_hidden_layers)
            states = [DecodeStates(config, layer, slots, place, like) for layer in layers]
            FusedStep(model, states, place.slot)(torch.zeros(batch, 1, dtype=torch.long))


if __name__ == "__main__":
    main(*sys.argv[1:])
