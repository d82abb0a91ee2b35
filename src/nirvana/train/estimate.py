"""Estimates of what a training needs: floating-point operations, peak throughput, memory."""

import warnings

import torch
from torch import nn

from nirvana.data.loader import PackedLoader
from nirvana.model.config import NirvanaConfig
from nirvana.train.accelerators import find_accelerator

MOST_EPOCHS = 10  # of one source, beyond which a note is printed


def peak_flops(device: torch.device, precision: str) -> float:
    """Returns the peak throughput of a device.

    Args:
        device: any device.
        precision: `run.precision`.

    Returns:
        bf16 FLOP/s, also for fp8, so that shares of it compare; 0 for an unknown device, and for a
        run in float32.
    """
    if device.type != "cuda" or precision == "float32":
        return 0.0
    found = find_accelerator(torch.cuda.get_device_name(device))
    return 0.0 if found is None else found.flops


def memory_bytes(
    model: nn.Module,
    config: NirvanaConfig,
    tokens: int,
    parts: int = 1,
    recompute: int = 0,
    by_muon: int = 0,
) -> dict[str, float]:
    """Estimates the memory of a training on each device.

    Args:
        model: of `config`, also on the meta device.
        config: sizes of the model.
        tokens: of a micro batch.
        parts: processes over which the state is sharded.
        recompute: every n-th block is recomputed; 0: none.
        by_muon: parameters that Muon updates.

    Returns:
        Bytes. "state": float32 weights, gradients and two moments, 16 bytes a parameter; one moment
        with Muon, 12 bytes.
        "activations": bfloat16 tensors that the blocks keep for the backward pass, about 12 D + 2 F
        numbers per token and layer (F: width of SwiGLU), for a recomputed block its input only; and
        the logits with their gradient.
    """
    D, F = config.hidden_size, config.intermediate_size or 0
    kept, whole = 4 * D + 16 * config.bank_size, 2 * (12 * D + 2 * F)
    layers = config.num_hidden_layers
    recomputed = -(-layers // recompute) if recompute else 0
    per_token = recomputed * kept + (layers - recomputed) * whole + (whole if recomputed else 0)
    return {
        "state": (16.0 * sum(p.numel() for p in model.parameters()) - 4.0 * by_muon) / parts,
        "activations": float(tokens * (per_token + 8 * config.vocab_size)),
    }


def warn_of_repetition(loader: PackedLoader, steps: int) -> None:
    """Warns about each source that a run reads more than `MOST_EPOCHS` times.

    Args:
        loader: of the run.
        steps: of the run.
    """
    for name, epochs in loader.epochs(steps).items():
        if epochs > MOST_EPOCHS:
            warnings.warn(
                f"data.train.{name} is read {epochs:.1f} times: beyond {MOST_EPOCHS} epochs a "
                "model mostly memorises; lower run.steps or the source's weight, or give more text",
                stacklevel=2,
            )
