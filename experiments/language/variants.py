"""The models of the study, its settings and its sizes, as data.

A variant is what differs from `BASE`, the model as published. All variants of a size have the same
number of parameters within `TOLERANCE`: the width of SwiGLU is chosen for that.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from nirvana.errors import InputError
from nirvana.model.config import PRESETS, NirvanaConfig, preset
from nirvana.model.nirvana import NirvanaForCausalLM

DOMAINS = ("general", "novels", "biomed", "law", "finance")
SETTINGS = {"A": DOMAINS, "B": ("general", "novels")}
REFERENCE = "nirvana"
TOLERANCE = 0.02
VOCABULARY = 8192

BASE: dict[str, Any] = {
    "trigger_lr": 0.01,
    "trigger_lr_learnable": False,
    "trigger_decay": 0.0,
    "trigger_decay_learnable": False,
}
ATTENTION = {"branches": "window", "num_prelude_layers": 0, "rope_theta": 10000.0}
MEMORY = {"trigger_decay": 0.9}
LEARNED = {**MEMORY, "trigger_decay_learnable": True, "trigger_lr_learnable": True}

PEERS: dict[str, dict[str, Any]] = {
    "transformer": {**ATTENTION, "sliding_window": None},
    "transformer-window": ATTENTION,
    "gated-deltanet": {"branches": "linear"},
    "hybrid-constant": {"gate": "constant"},
    "hybrid-input": {"gate": "input"},
    "nirvana": {},
    "nirvana-memory": MEMORY,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "independent": {"interpolation": "independent"},
    "truncated": {"trigger_gradient": "truncated"},
    "lr-zero": {"trigger_lr": 0.0},
    "lr-negative": {"trigger_lr": -0.01},
    "lr-tenfold": {"trigger_lr": 0.1},
    "lr-learned": {"trigger_lr_learnable": True},
    "memory-half": {"trigger_decay": 0.5},
    "memory-long": {"trigger_decay": 0.99},
    "memory-negative": {**MEMORY, "trigger_lr": -0.01},
    "memory-learned": LEARNED,
    "normalised": {"trigger_step": "normalised"},
    "normalised-memory": {**MEMORY, "trigger_step": "normalised"},
    "normalised-learned": {**LEARNED, "trigger_step": "normalised"},
    "bank-2": {"bank_size": 2},
    "bank-4": {"bank_size": 4},
    "bank-8": {"bank_size": 8},
    "bank-128": {"bank_size": 128},
    "task-128": {"task_dim": 128},
    "window-128": {"sliding_window": 128},
    "window-all": {"sliding_window": None},
    "prelude-0": {"num_prelude_layers": 0},
    "prelude-4": {"num_prelude_layers": 4},
    "prelude-0-bank-8": {"num_prelude_layers": 0, "bank_size": 8},
    "prelude-0-constant": {"num_prelude_layers": 0, "gate": "constant"},
    "prelude-0-input": {"num_prelude_layers": 0, "gate": "input"},
}
VARIANTS = {**PEERS, **ABLATIONS}
DESCRIPTIONS = {
    "transformer": "attention to everything, rotary positions (transformers' Llama)",
    "transformer-window": "the same, attention limited to the window",
    "gated-deltanet": "the linear branch alone",
    "hybrid-constant": "both branches, a learned constant gate, no Trigger",
    "hybrid-input": "both branches, gate and zeta from the input, no Trigger",
    "nirvana": "as published: Trigger, decay 0 (no memory between tokens), step size 0.01",
    "nirvana-memory": "the Trigger's gradient is accumulated along the sample, decay 0.9",
}


@dataclass(frozen=True)
class Size:
    """A width and depth; `fields` are those of every variant."""

    fields: dict[str, Any]
    step: int  # in which the width of SwiGLU changes


SIZES = {
    "30m": Size(
        {
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,  # of 128, for which the fastest kernels are
            "num_prelude_layers": 2,
            "sliding_window": 512,
            "task_dim": 64,
            "bank_size": 32,
        },
        64,
    ),
    "tiny": Size(
        {
            name: PRESETS["tiny"][name]
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "sliding_window",
                "task_dim",
                "bank_size",
            )
        }
        | {"num_prelude_layers": 2},
        16,
    ),
    "toy": Size(
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_prelude_layers": 1,
            "sliding_window": 16,
            "task_dim": 8,
            "bank_size": 4,
        },
        4,
    ),
}


@dataclass(frozen=True)
class Budget:
    """How a model is trained; two runs compare only if they share it."""

    size: str = "30m"
    tokens: int = 32_000_000
    context_length: int = 2048
    rows: int = 32  # of a step
    lr: float = 2e-3
    warmup: float = 0.1  # share of the steps
    data: str = ""  # identifies the prepared data

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.context_length * self.rows))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def fields_of(variant: str, size: str, vocab_size: int = VOCABULARY) -> dict[str, Any]:
    """All fields of a variant's `NirvanaConfig`; its number of parameters sets SwiGLU's width.

    Raises:
        InputError: for an unknown variant or size, or a variant too large for the size.
    """
    for name, known in ((variant, VARIANTS), (size, SIZES)):
        if name not in known:
            raise InputError(f"{name!r} is none of {', '.join(known)}")
    shared = {**BASE, **SIZES[size].fields, "vocab_size": vocab_size}
    target = count(preset("tiny", **shared))
    fields = {**shared, **VARIANTS[variant]}
    width, step = preset("tiny", **shared).intermediate_size, SIZES[size].step
    assert width is not None
    have = count(preset("tiny", **fields, intermediate_size=width))
    each = 3 * shared["hidden_size"] * shared["num_hidden_layers"] * step
    fields["intermediate_size"] = width + step * round((target - have) / each)
    if fields["intermediate_size"] < step:
        raise InputError(f"variant {variant!r} does not fit in the parameters of size {size!r}")
    off = count(preset("tiny", **fields)) / target - 1
    assert abs(off) <= TOLERANCE, f"{variant}: {off:+.1%} parameters"
    return fields


def parameters(variant: str, size: str) -> int:
    """Of a variant as it is trained."""
    return count(preset("tiny", **fields_of(variant, size)))


def count(config: NirvanaConfig) -> int:
    """Parameters of a model, the tied head once."""
    with torch.device("meta"):
        return sum(p.numel() for p in NirvanaForCausalLM(config).parameters())
