"""The first text that a new process generates, with empty and with full caches of kernels.

    python -m nirvana.bench.start SETTINGS

is that process; SETTINGS are JSON, as `start` writes them. It prints the seconds of each part.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nirvana.bench.run import Options

CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "CUDA_CACHE_PATH": "cuda",
}
"""Variables that move the compilers' caches, and the folders to which they are moved here."""
STAGES = ("import", "model", "first text", "second text")
"""What a process does; the model has random weights."""


def start(
    model: Any, name: str, options: "Options", batch: int, length: int
) -> list[dict[str, Any]]:
    """The first texts of two processes; the first of them fills the caches."""
    settings = {
        "preset": options.preset,
        "fields": {} if options.layers is None else {"num_hidden_layers": options.layers},
        "dtype": str(options.dtype).removeprefix("torch."),
        "device": str(options.device),
        "batch": batch,
        "length": length,
        "new_tokens": options.new_tokens,
        "compiled": options.compiled,
    }
    command = [sys.executable, "-m", __name__, json.dumps(settings)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {variable: str(Path(folder, part)) for variable, part in CACHES.items()}
        for how in ("empty caches", "full caches"):
            done = subprocess.run(
                command, env={**os.environ, **caches}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
            seconds = json.loads(done.stdout.splitlines()[-1])  # compilers print lines, too
            rows.append({"how": how, "ms": 1e3 * seconds["first text"], "seconds": seconds})
    return rows


def main(settings: dict[str, Any]) -> None:
    """Generates two texts with a `Decoder` each, and prints the seconds of `STAGES`."""
    ticks = [time.perf_counter()]
    import torch

    from nirvana.generate.graph_decoder import Decoder
    from nirvana.model.config import preset
    from nirvana.model.nirvana import NirvanaForCausalLM

    ticks.append(time.perf_counter())
    length, new_tokens = settings["length"], settings["new_tokens"]
    with torch.device(settings["device"]):
        model: Any = NirvanaForCausalLM(preset(settings["preset"], **settings["fields"]))
        model.to(getattr(torch, settings["dtype"])).eval()
        ids = torch.randint(model.config.vocab_size, (settings["batch"], length))
    ticks.append(time.perf_counter())
    for _ in range(2):
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            past_key_values=Decoder(model, length + new_tokens, settings["compiled"]),
        )
        text.cpu()
        ticks.append(time.perf_counter())
    print(json.dumps(dict(zip(STAGES, (b - a for a, b in pairwise(ticks)), strict=True))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
