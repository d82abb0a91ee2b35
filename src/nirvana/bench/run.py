"""The benchmark's options, and its rows: every part, for our model and the peers."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nirvana.bench.measure import clean_room
from nirvana.bench.parts import PARTS, Row
from nirvana.bench.peers import OURS, build, parameters
from nirvana.model.config import NirvanaConfig, preset
from nirvana.train.float8 import has_float8

START = (1, 1024)
"""Batch x tokens of the first prompt of a process."""


@dataclass(frozen=True)
class Options:
    """The options of a run; sizes are batch x tokens."""

    preset: str
    parts: tuple[str, ...]
    train: tuple[tuple[int, int], ...]
    context: int
    decode: tuple[tuple[int, int], ...]
    new_tokens: int
    steps: int
    peers: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    layers: int | None = None
    compiled: bool = True

    @property
    def config(self) -> NirvanaConfig:
        depth = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return preset(self.preset, **depth)

    @property
    def has_floor(self) -> bool:
        """Whether the floors of `parts` are for this model and device."""
        known = self.preset == "1.3b" and self.layers is None and self.dtype == torch.bfloat16
        return (
            known
            and self.device.type == "cuda"
            and "H200" in torch.cuda.get_device_name(self.device)
        )

    @property
    def has_float8(self) -> bool:
        """Whether training is measured in float8, too."""
        rounds = self.compiled and self.dtype == torch.bfloat16
        return rounds and has_float8(self.device)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dtype": str(self.dtype), "device": str(self.device)}

    def tokens(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (batch, length), generator=generator)
        return ids.to(self.device)


def measure(options: Options) -> Iterator[Row]:
    """Measures every part, size and model.

    Our model is first, because tuning a peer's kernels may take minutes.

    Args:
        options: of the benchmark.

    Yields:
        one row each; a failed measurement has its reason in "failed".
    """
    for name in (OURS, *options.peers):
        for part in options.parts:
            if not _applies(part, name):
                continue
            for batch, length in _sizes(part, options):
                about = {"part": part, "model": name, "batch": batch, "tokens": length}
                for row in _attempt(PARTS[part], name, options, batch, length):
                    yield about | row


def _applies(part: str, name: str) -> bool:
    """Whether a part is measured of a model. A compiled prefill is specific to a length, so that
    Llama's is not compared."""
    if part in ("trigger", "start"):
        return name == OURS
    return part != "prefill" or name != "llama_compiled"


def _sizes(part: str, options: Options) -> list[tuple[int, int]]:
    if part == "prefill":
        return [(1, options.context)]
    if part == "start":
        return [START]
    if part == "decode":
        return list(options.decode)
    return list(options.train[:1] if part == "trigger" else options.train)


def _attempt(
    part: Callable[..., list[Row]], name: str, options: Options, batch: int, length: int
) -> list[Row]:
    """The part's rows, or one row with the reason why there are none."""
    if name == "llama_compiled" and not options.compiled:
        return [{"failed": "not compiled on request"}]
    with clean_room():
        try:
            blocks = options.compiled and part is PARTS["train"]
            model = build(name, options.config, options.device, options.dtype, blocks)
            rows = part(model, name, options, batch, length)
            return [{"parameters": parameters(model)} | row for row in rows]
        except torch.OutOfMemoryError:
            return [{"failed": "out of memory"}]
        except ImportError as error:
            return [{"failed": f"not installed: {error}"}]
        except Exception as error:  # a peer's failure must not stop the other measurements
            traceback.print_exc()
            return [
                {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
            ]
