"""The Trigger's step alone, on a GPU: the kernels are checked against PyTorch, then all are timed.

    python benchmarks/trigger.py [--tokens 16384] [--block 64] [--warps 4] [--stages 3]

Prints milliseconds a layer (median) and the peak of memory above the inputs for PyTorch, compiled
PyTorch and Triton, forward and forward + backward, and ends with one line of JSON. No time is
printed where the check fails.
"""

import argparse
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from nirvana.ops import trigger as pytorch
from nirvana.ops.cuda import trigger as kernels

NAMES = ("qkv", "fast", "weight", "gain", "bias", "shift")
Step = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


def kernel_step(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    qkv, fast, weight, gain, bias, shift = inputs.values()
    bank = weight, gain, bias, shift
    q, k, v = qkv.chunk(3, dim=-1)
    fast = fast - 0.01 * kernels.trigger_gradient(k, v, fast, *bank)
    return kernels.trigger_apply(q, fast, *bank), fast


def pytorch_step(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    qkv, fast, weight, gain, bias, shift = inputs.values()
    bank = weight, gain, bias, shift
    q, k, v = (qkv if qkv.dtype == torch.float64 else qkv.float()).chunk(3, dim=-1)
    fast = fast - 0.01 * pytorch.trigger_gradient(k, v, fast, *bank)
    return pytorch.trigger_apply(q, fast, *bank).to(qkv.dtype), fast


def make_inputs(tokens: int, C: int, R: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = ((1, tokens, 3 * C), (1, tokens, 4, R), (C, C, R), (C, R), (C, R), (C, R))
    inputs = {name: torch.randn(s, device="cuda") for name, s in zip(NAMES, shapes, strict=True)}
    inputs["weight"] /= (C * R) ** 0.5
    inputs["fast"] = 1 + inputs["fast"] / 4
    return {
        name: x.to(torch.float32 if name == "fast" else dtype).requires_grad_()
        for name, x in inputs.items()
    }


def gradients(step: Step, inputs: dict[str, Tensor], weights: list[Tensor]) -> dict[str, Tensor]:
    outputs = step(inputs)
    products = [(y * w.to(y.dtype)).sum() for y, w in zip(outputs, weights, strict=True)]
    total = torch.stack([x.double() for x in products]).sum()
    grads = torch.autograd.grad(total, list(inputs.values()))
    return dict(zip(("h", "fast_after", *inputs), (*outputs, *grads), strict=True))


def errors(inputs: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of values and gradients against float64, by name."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    weights = [torch.randn_like(x) for x in kernel_step(inputs)]
    expected = gradients(pytorch_step, exact, weights)
    actual = gradients(kernel_step, inputs, weights)
    return {name: ((actual[name] - y).norm() / y.norm()).item() for name, y in expected.items()}


def measure(run: Callable[[], object], repeats: int = 30) -> tuple[float, float]:
    """Median milliseconds, and the peak of memory in MiB above what was there before."""
    for _ in range(5):
        run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return sorted(start.elapsed_time(end) for start, end in times)[repeats // 2], peak


def bench(step: Step, inputs: dict[str, Tensor]) -> dict[str, float]:
    def backward() -> None:
        outputs = step(inputs)
        torch.autograd.grad(outputs, list(inputs.values()), weights)

    with torch.no_grad():
        weights = [torch.randn_like(x) for x in step(inputs)]
        forward_ms, forward_mib = measure(lambda: step(inputs))
    both_ms, both_mib = measure(backward)
    return {
        "forward_ms": forward_ms,
        "forward_mib": forward_mib,
        "both_ms": both_ms,
        "both_mib": both_mib,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--task-dim", type=int, default=64)
    parser.add_argument("--bank-size", type=int, default=32)
    for name in kernels.TUNING:
        parser.add_argument(f"--{name.lower().replace('_', '-')}", type=int)
    args = parser.parse_args()
    for name in kernels.TUNING:
        if (value := getattr(args, name.lower())) is not None:
            setattr(kernels, name, value)

    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        inputs = make_inputs(args.tokens, args.task_dim, args.bank_size, dtype)
        found = errors(inputs)
        print(f"{dtype}:", "  ".join(f"{name} {error:.1e}" for name, error in found.items()))
        if not max(found.values()) < tolerance:
            sys.exit(f"the kernels are wrong: an error above {tolerance}")

    steps = {
        "pytorch": pytorch_step,
        "compiled": torch.compile(pytorch_step, fullgraph=True),
        "triton": kernel_step,
        "triton, compiled": torch.compile(kernel_step, fullgraph=True),
    }
    results = {name: bench(step, inputs) for name, step in steps.items()}
    print(f"{'ms a layer, MiB':18}{'forward':>10}{'':>10}{'+ backward':>12}")
    for name, x in results.items():
        print(
            f"{name:18}{x['forward_ms']:10.3f}{x['forward_mib']:10.0f}"
            f"{x['both_ms']:12.3f}{x['both_mib']:10.0f}"
        )
    tuning = {name: getattr(kernels, name) for name in kernels.TUNING}
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({**about, "tokens": args.tokens, "tuning": tuning, "results": results}))


if __name__ == "__main__":
    main()
