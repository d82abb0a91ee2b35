"""Compiles the kernels of a decoding step for an H100 or H200; needs Triton, and no GPU.

    python tests/ops/compile_decode.py PRESET BATCH [BATCH ...]

Prints a line of JSON for each kernel: its name, shared memory in bytes, and the bytes that a thread
spills.
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

from nirvana import NirvanaForCausalLM, preset
from nirvana.generate.decode_states import DecodeStates, Place
from nirvana.generate.fused_step import FusedStep
from nirvana.ops.cuda import decode_products, decode_step

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
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
    for module in (decode_step, decode_products):
        module.launch = launch
    with torch.device("meta"):
        model = NirvanaForCausalLM(preset(name, num_hidden_layers=4)).to(torch.bfloat16)
        for batch in map(int, batches):
            place = Place(slot=torch.zeros(batch, dtype=torch.long))
            like = model.model.norm.weight
            states = [DecodeStates(model.config, layer, 2048, place, like) for layer in range(4)]
            FusedStep(model, states, place.slot)(torch.zeros(batch, 1, dtype=torch.long))


if __name__ == "__main__":
    main(*sys.argv[1:])
