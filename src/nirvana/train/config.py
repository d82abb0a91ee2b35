"""Settings of trainings: sections shared by all of them, and those of a language model."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nirvana.config import REST, from_dict, require, unknown_key
from nirvana.errors import InputError

if TYPE_CHECKING:
    import torch

# torch and transformers are imported where they are first needed: everything but [model] is checked
# before, so that a wrong setting is refused at once.


@dataclass(frozen=True)
class OptimConfig:
    """[optim]: the optimiser and its schedule."""

    # "muon": torch.optim.Muon for the matrices of linear maps, AdamW for all other parameters
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3  # highest learning rate, reached at the end of the warm-up
    min_lr: float = 1e-4  # learning rate at the last step, the end of the schedule
    warmup_steps: int = 100  # steps of linear rise from zero
    # after the warm-up; "wsd": the rate stays at lr, then decays; such a run can be prolonged
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay_share: float = 0.2  # of run.steps, at their end: the decay of "wsd"
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment, 0..1
    eps: float = 1e-8  # added to the root of the second moment
    momentum: float = 0.95  # of Muon
    weight_decay: float = 0.1  # on matrices; never on embeddings, norms, biases or scalars
    clip: float = 1.0  # largest norm of the whole gradient; 0 means no clipping
    accumulation: int = 1  # micro batches of one step, divided among all processes

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, "from 0 to optim.lr")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "at least 0")
        right = "above 0 and at most 1"
        require(0 < self.decay_share <= 1, "optim.decay_share", self.decay_share, right)
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "from 0 to below 1")
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "from 0 to below 1")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        require(self.clip >= 0, "optim.clip", self.clip, "at least 0")
        require(self.accumulation >= 1, "optim.accumulation", self.accumulation, "at least 1")


@dataclass(frozen=True)
class LanguageOptimConfig(OptimConfig):
    """[optim] of a language model."""

    # weight of the mean of (log Z)^2 in the loss, Z the sum of the exponentials of a token's logits
    # (PaLM, arXiv 2204.02311, trains with 1e-4); 0: none
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.z_loss >= 0, "optim.z_loss", self.z_loss, "at least 0")


@dataclass(frozen=True)
class RunConfig:
    """[run]: where, how long and on what to train."""

    out: str  # folder of this run: configuration, metrics, checkpoints, finally the model
    steps: int  # optimiser steps from the beginning to the end
    # weights to start from, with a fresh optimiser: the folder of a model, a packaged one's name, a
    # run or one of its checkpoints; empty: random ones
    initial: str = ""
    seed: int = 0  # of the initial weights and of the order of the data
    device: str = "auto"  # "auto" takes a GPU when there is one; or "cpu", "cuda", "cuda:1"
    precision: Literal["bf16", "float32"] = "bf16"  # bf16 autocast (float32 state), on CUDA only
    compile: bool = True  # torch.compile, on CUDA only
    log_interval: int = 10  # steps between lines of metrics.jsonl
    validation_interval: int = 500  # steps between validations; 0: only at the end
    checkpoint_interval: int = 500  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # number of the newest checkpoints kept on the disk
    export_precision: Literal["float32", "bf16"] = "float32"  # of the model written at the end
    most_skipped: int = 5  # the run ends after this many non-finite steps in a row
    wandb: bool = False  # also log to Weights & Biases, which must be installed

    def autocast_dtype(self, device: "torch.device") -> "torch.dtype | None":
        """Returns the autocast type that `precision` selects on a device; None without autocast."""
        import torch

        rounds = self.precision != "float32" and device.type == "cuda"
        return torch.bfloat16 if rounds else None

    @property
    def export_dtype(self) -> "torch.dtype":
        """`export_precision` as a torch dtype."""
        import torch

        return torch.bfloat16 if self.export_precision == "bf16" else torch.float32

    def __post_init__(self) -> None:
        require(bool(self.out), "run.out", self.out, "the name of a folder")
        require(self.steps >= 1, "run.steps", self.steps, "at least 1")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "from 0 to 2^63 - 1")
        require(self.log_interval >= 1, "run.log_interval", self.log_interval, "at least 1")
        for name in ("validation_interval", "checkpoint_interval"):
            require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "at least 0")
        for name in ("keep_checkpoints", "most_skipped"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True)
class LanguageRunConfig(RunConfig):
    """[run] of a language model."""

    # "fp8": bf16 with the large products of the blocks in float8, on GPUs that have it
    precision: Literal["bf16", "fp8", "float32"] = "bf16"  # type: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True)
class ParallelConfig:
    """[parallel]: how the processes of torchrun share the work; the results do not depend on it."""

    shard: int = 0  # processes over which one copy of the state is sharded; 0: all of them
    reshard: bool = True  # free gathered weights between forward and backward: less memory
    recompute: int = 0  # recompute every n-th block in the backward pass: less memory; 0: none
    tensor: int = 1  # tensor parallelism; only 1, see docs/training.md

    def __post_init__(self) -> None:
        require(self.shard >= 0, "parallel.shard", self.shard, "at least 0")
        require(self.recompute >= 0, "parallel.recompute", self.recompute, "at least 0")
        right = "1: in_proj is one fused product, whose parts cannot be split up (docs/training.md)"
        require(self.tensor == 1, "parallel.tensor", self.tensor, right)


@dataclass(frozen=True)
class ModelSection:
    """[model]: a preset, and any field of `NirvanaConfig` to override."""

    preset: str = "tiny"
    fields: dict[str, Any] = field(default_factory=dict, metadata=REST)

    def __post_init__(self) -> None:
        from nirvana.model.config import preset

        preset(self.preset, **self.fields)  # wrong settings fail before any data is opened


@dataclass(frozen=True)
class DataSection:
    """[data]: token shards, as written by `nirvana data tokenize`.

    A folder may also be an address that fsspec opens (s3://BUCKET/FOLDER); it is cached locally.
    """

    train: dict[str, str]  # name -> folder of token shards
    valid: dict[str, str] = field(default_factory=dict)  # name -> folder; scored separately
    # name -> share of the rows of a batch, normalised to sum 1; empty: by number of tokens
    weights: dict[str, float] = field(default_factory=dict)
    context_length: int = 2048  # T, tokens in a row
    batch_size: int = 8  # rows in a micro batch; tokens per step = rows x T x accumulation
    reset: bool = True  # every document starts with a fresh state; false: every row
    workers: int = 2  # threads that prefetch batches; no effect on the batches
    valid_documents: int = 16  # scored documents of every valid folder, from the first
    valid_tokens: int = 4096  # scored tokens of each of them, at most
    sample_prompts: list[str] = field(default_factory=list)  # continued at every validation
    sample_tokens: int = 64  # tokens of each continuation

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "a table: name = folder of shards")
        for name in (
            "context_length",
            "batch_size",
            "workers",
            "valid_documents",
            "sample_tokens",
        ):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        require(self.valid_tokens >= 2, "data.valid_tokens", self.valid_tokens, "at least 2")
        for name, weight in self.weights.items():
            if name not in self.train:
                raise InputError(unknown_key(f"data.weights.{name}", "data.weights", self.train))
            require(weight >= 0, f"data.weights.{name}", weight, "at least 0")
        if self.weights:
            missing = [name for name in self.train if name not in self.weights]
            require(not missing, "data.weights", missing, "given for every name in data.train")
            require(sum(self.weights.values()) > 0, "data.weights", self.weights, "not all zero")


@dataclass(frozen=True)
class LanguageConfig:
    """All settings of a language-model training."""

    data: DataSection
    run: LanguageRunConfig
    optim: LanguageOptimConfig = field(default_factory=LanguageOptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelSection = field(default_factory=ModelSection)


@dataclass(frozen=True)
class DistillSection:
    """[distill]: what the model learns from its teacher."""

    teacher: str = ""  # the Transformer that `nirvana adopt` read: its folder or GGUF file
    # "attention": each layer alone, on the teacher's inputs; "logits": the teacher's distribution;
    # "context": the same for tokens within the teacher's length, beyond it the text
    stage: Literal["attention", "logits", "context"] = "attention"
    # probability at the first and at the last step that a layer drops the window branch of a row,
    # linear in between; empty: [1.0, 0.5], [0.5, 0.0] and [0.0, 0.0] for the three stages
    window_dropout: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        right = "the folder or the GGUF file of a Transformer"
        require(bool(self.teacher), "distill.teacher", self.teacher, right)
        given = self.window_dropout
        in_range = len(given) in (0, 2) and all(0 <= p <= 1 for p in given)
        require(in_range, "distill.window_dropout", given, "two numbers from 0 to 1, or empty")


@dataclass(frozen=True)
class DistillConfig(LanguageConfig):
    """All settings of a distillation; [model] is that of `run.initial`."""

    distill: DistillSection = field(default_factory=DistillSection)

    def __post_init__(self) -> None:
        right = "the model that nirvana adopt wrote, or the run of the stage before"
        require(bool(self.run.initial), "run.initial", self.run.initial, right)


def saved_language_config(tree: dict[str, Any]) -> LanguageConfig:
    """Reads the configuration that a training of a language model saved.

    Args:
        tree: sections and their settings.

    Returns:
        A `LanguageConfig`; a `DistillConfig` of a distillation.

    Raises:
        InputError: for wrong settings.
    """
    return from_dict(DistillConfig if "distill" in tree else LanguageConfig, tree, "")
