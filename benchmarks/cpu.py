"""Speed and memory on two CPU cores: python benchmarks/cpu.py [--json FILE]

The chunked delta rule beside the PyTorch version in transformers (Qwen3-Next), its memory over the
length, and decoding with the packaged `tiny` model, of one text and of batches. No figure unless
values and gradients agree.
"""

import inspect
import os
import platform
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.models.qwen3_next import modeling_qwen3_next

from nirvana import ops
from nirvana.bench.measure import commit
from nirvana.cli.console import JsonOption
from nirvana.errors import script
from nirvana.files import write_json
from nirvana.model.assets import load_language_model

THREADS = 2
SHAPES = [(1, 1024, 4, 64), (1, 4096, 4, 64), (4, 512, 4, 64), (1, 2048, 8, 128)]  # B, T, H, K
MEMORY_LENGTHS = [1024, 2048, 4096, 8192]
SECONDS = 5.0  # for each cell of the table
PROMPT, NEW = 16, 256
BATCHES = [1, 2, 4, 8]

# The decorator would hand over to fla, which computes nothing on a CPU, wherever that is installed.
qwen3_next = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)


def ours(*inputs: Tensor) -> Tensor:
    return ops.gated_delta_rule(*inputs)[0]


def theirs(*inputs: Tensor) -> Tensor:
    return qwen3_next(*inputs)[0]


def delta_inputs(B: int, T: int, H: int, K: int) -> list[Tensor]:
    """q, k, v `[B, T, H, K]`, log_alpha and beta `[B, T, H]`, as a trained model has them."""
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, B, T, H, K), dim=-1)
    v = torch.randn(B, T, H, K)
    return [q, k, v, -F.softplus(torch.randn(B, T, H) - 3), torch.rand(B, T, H)]


def forward(rule: Callable, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [rule(*inputs)]


def forward_backward(rule: Callable, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = rule(*leaves)
    return [o.detach(), *torch.autograd.grad(o.square().mean(), leaves)]


def disagreement(shape: tuple[int, ...]) -> float:
    """The largest difference of values and gradients, each relative to the largest entry."""
    inputs = delta_inputs(*shape)
    pairs = zip(forward_backward(ours, inputs), forward_backward(theirs, inputs), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def milliseconds(run: Callable, shape: tuple[int, ...]) -> tuple[float, float]:
    """Medians of ours and theirs, measured in turns so that a disturbance meets both."""
    inputs = delta_inputs(*shape)
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for rule in times:
        run(rule, inputs)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[ours]) < 5:
        for rule, taken in times.items():
            start = time.perf_counter()
            run(rule, inputs)
            taken.append(1e3 * (time.perf_counter() - start))
    return median(times[ours]), median(times[theirs])


def peak_bytes(rule: Callable, T: int) -> int:
    """Most memory held at once by forward and backward, beyond the inputs."""
    inputs = delta_inputs(1, T, 4, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(rule, inputs)
    # Every allocation (+) and release (-); the summary by operation has only their net sums.
    kineto: Any = profiler.profiler
    recorded = kineto.kineto_results.events()
    changes = [e for e in recorded if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in changes))


def tokens_per_second(threads: int, batch: int, runs: int = 7) -> float:
    """Plain `generate` of the packaged model, greedy, of a fixed length, of all texts together."""
    torch.set_num_threads(threads)
    loaded = load_language_model("tiny", torch.device("cpu"))
    model: Any = loaded[0]  # pyright does not accept it as transformers' generative model
    tokenizer = loaded[1]
    text = (
        "The patients were randomly assigned to two groups of equal size, and the outcome was " * 2
    )
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT]
    prompt = prompt.repeat(batch, 1)
    model.generation_config.eos_token_id = None  # a least length would change the logits each time
    rates = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        out = model.generate(prompt, do_sample=False, max_new_tokens=NEW)
        rates.append(batch * (out.shape[1] - PROMPT) / (time.perf_counter() - start))
    return median(rates[1:])


def main(
    json: JsonOption = None,
) -> None:
    torch.set_num_threads(THREADS)
    console = Console()
    results: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {THREADS} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit() or "unknown",
    }
    console.print(", ".join(f"{name} {value}" for name, value in results.items()), soft_wrap=True)

    largest = max(disagreement(shape) for shape in SHAPES)
    results["disagreement"] = largest
    if not largest < 1e-4:
        console.print(f"[red]values or gradients differ by {largest:.1e}: no figures")
        sys.exit(1)
    console.print(f"values and gradients agree to {largest:.1e}, relative, float32")

    table = Table("B, T, H, K", "pass", "ours, ms", "theirs, ms", "theirs / ours")
    results["delta_rule"] = []
    for shape in SHAPES:
        for name, run in (("forward", forward), ("forward + backward", forward_backward)):
            mine, peer = milliseconds(run, shape)
            cell = {"shape": shape, "pass": name, "ours_ms": mine, "theirs_ms": peer}
            results["delta_rule"].append(cell | {"ratio": peer / mine})
            sizes = ", ".join(map(str, shape))
            table.add_row(sizes, name, f"{mine:.1f}", f"{peer:.1f}", f"{peer / mine:.2f}")
    console.print(table)

    table = Table("T", "ours, MiB", "ours, KiB a token", "theirs, KiB a token")
    results["memory"] = []
    for T in MEMORY_LENGTHS:
        mine, peer = peak_bytes(ours, T), peak_bytes(theirs, T)
        results["memory"].append({"T": T, "ours_bytes": mine, "theirs_bytes": peer})
        per_token = (f"{x / T / 2**10:.1f}" for x in (mine, peer))
        table.add_row(str(T), f"{mine / 2**20:.1f}", *per_token)
    console.print("Peak of forward + backward, B 1, H 4, K 64:", table)

    # Every product of several threads waits for the slowest: one thread is what is left of the
    # speed when another program takes the second core.
    table = Table("threads", *(f"batch {batch}" for batch in BATCHES))
    results["decode_tokens_per_second"] = {}
    for threads in (THREADS, 1):
        rates = {batch: tokens_per_second(threads, batch) for batch in BATCHES}
        results["decode_tokens_per_second"][threads] = rates
        table.add_row(str(threads), *(f"{rate:.0f}" for rate in rates.values()))
    console.print(f"tiny, generate, {NEW} tokens, tokens/s:", table)
    if json is not None:
        write_json(json, results)


if __name__ == "__main__":
    script(lambda: typer.run(main))
