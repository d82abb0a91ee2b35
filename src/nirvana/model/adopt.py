"""Adopts a pretrained Transformer: its weights in a Nirvana model, which starts where it ended.

The window branch takes over the teacher's attention. The linear branch reads the teacher's q, k and
v and has its output projection, but an output gate of zero: it contributes nothing until it is
trained (`nirvana.train.distill`). The blend is the "independent" one with gates of 1/2 for every
token, and both output projections are twice the teacher's: 1/2 of the one is the teacher, and 1/2
of the other is what the linear branch computes alone.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nirvana.data.tokenizer import TOKENIZER_FILES, copy_tokenizer, load_tokenizer
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder, write_json
from nirvana.model.assets import without_progress_bars
from nirvana.model.config import ROPE_TYPES, NirvanaConfig, checked_config
from nirvana.model.nirvana import NirvanaForCausalLM

FAMILIES = {
    "llama": "Llama (SmolLM and SmolLM2, too)",
    "mistral": "Mistral",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3",
}
"""The model types of transformers that can be adopted, and what they are called."""
Branches = Literal["window", "both", "linear"]
REPORT = "adopt.json"
RESULTS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    REPORT,
    *TOKENIZER_FILES,
)
HALF = 2.0
"""Factor of both output projections, under gates of 1/2."""
SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
DEFAULT_WINDOW = 512
DEFAULT_SINKS = 4


@dataclass(frozen=True)
class Teacher:
    """A pretrained Transformer.

    Attributes:
        model: in eval mode.
        path: its folder or GGUF file.
        gguf: the name of that file in its folder, or None.
        dtype: in which its weights are stored, as its configuration has it; None if it does not.
    """

    model: PreTrainedModel
    path: Path
    gguf: str | None
    dtype: torch.dtype | None


def adopt(
    teacher: str | Path,
    out: str | Path,
    branches: Branches = "both",
    window: int | str | None = "default",
    sinks: int | None = None,
    precision: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a Nirvana model with the weights of a Transformer.

    Args:
        teacher: a folder with `config.json` and safetensors, or a GGUF file.
        out: folder to write: the model, its tokenizer, and the report `adopt.json`.
        branches: "window" (the teacher itself, as attention layers), "both" or "linear".
        window: W; "default" is 512 with both branches and else the teacher's; None: no window
            beyond the teacher's.
        sinks: first tokens that stay visible; None is 4 with a window that the teacher lacks, else
            0.
        precision: "float32", "bf16", or "" for the teacher's.
        seed: of the new weights that are drawn.

    Returns:
        the report: settings, what each tensor of the result was made from, and what is new.

    Raises:
        InputError: for what is not a model that can be adopted, settings that no model can have,
            and for a place that cannot be written.
    """
    out = replaceable_folder(out, RESULTS)
    check_outputs({"OUT": out}, [teacher])
    if precision not in ("", "float32", "bf16"):
        raise InputError(f"precision {precision!r} must be float32 or bf16")
    given = load_teacher(teacher)
    config = adopted_config(given.model.config, str(teacher), branches, window, sinks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NirvanaForCausalLM(config)
    sources = copy_weights(given.model, model)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "": torch.float32}[precision]
    if not precision and given.dtype == torch.bfloat16:
        dtype = torch.bfloat16
    nn.Module.to(model, dtype)
    model.generation_config = copy.deepcopy(given.model.generation_config)
    report = _report(given, model, sources, seed)
    with atomic_folder(out) as folder:
        with without_progress_bars():
            model.save_pretrained(folder)
        report["tokenizer"] = write_tokenizer(given, folder)
        write_json(folder / REPORT, report)
    return report


def load_teacher(path: str | Path, dtype: torch.dtype = torch.float32) -> Teacher:
    """Loads a Transformer that can be adopted; nothing of its folder is executed or unpickled.

    Args:
        path: a folder with `config.json` and safetensors, or a GGUF file.
        dtype: of its parameters.

    Returns:
        the teacher, in eval mode on the CPU.

    Raises:
        InputError: for what is no language model, or one of another architecture.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no model {str(path)!r}: give a folder, or a .gguf file")
    gguf = path.name if path.is_file() else None
    folder = path.parent if path.is_file() else path
    if gguf is None and not (folder / "config.json").is_file():
        raise InputError(f"{path} holds no model: it has no config.json")
    if gguf is not None and path.suffix != ".gguf":
        raise InputError(f"{path} is neither a folder nor a .gguf file")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    options |= {} if gguf is None else {"gguf_file": gguf}
    with _readable(path), without_progress_bars():
        config = AutoConfig.from_pretrained(folder, **options)
        _require_family(config, path)
        quantized = getattr(config, "quantization_config", None)
        if quantized is not None and gguf is None:
            raise InputError(
                f"{path}: quantised weights ({_method(quantized)}) cannot be adopted: save the "
                "model dequantised"
            )
        stored: Any = config.dtype  # which loading replaces
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    wrong = [f"{what}: {name}" for what, names in info.items() for name in sorted(map(str, names))]
    if wrong:
        raise InputError(f"the weights of {path} do not fit its configuration: {wrong[0]}")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if head is not embedding and not torch.equal(head, embedding):
        # The library loads both weights of a file that has both, whatever is configured.
        model.config.tie_word_embeddings = False
    return Teacher(model.eval(), path, gguf, stored)


def adopted_config(
    teacher: Any,
    where: str,
    branches: Branches = "both",
    window: int | str | None = "default",
    sinks: int | None = None,
) -> NirvanaConfig:
    """The configuration of the model that adopts a teacher.

    Args:
        teacher: configuration of a Transformer of transformers.
        where: its source, with which an error begins.
        branches: see `adopt`.
        window: see `adopt`.
        sinks: see `adopt`.

    Returns:
        the configuration.

    Raises:
        InputError: for a teacher that no setting expresses, and for settings that no model can
            have.
    """
    _require_expressible(teacher, where)
    own = _own_window(teacher, where)
    if window == "default":
        window = DEFAULT_WINDOW if branches == "both" else None
    if not (window is None or isinstance(window, int)):
        raise InputError(f"window = {window!r} must be a number of tokens")
    narrowed = window is not None and (own is None or window < own)
    size = window if narrowed else own
    if sinks is None:
        sinks = DEFAULT_SINKS if narrowed and branches != "linear" else 0
    D, H = teacher.hidden_size, teacher.num_attention_heads
    fields: dict[str, Any] = {name: getattr(teacher, name) for name in SAME}
    fields |= {name: getattr(teacher, name, None) for name in OPTIONAL if hasattr(teacher, name)}
    fields |= {
        "num_key_value_heads": teacher.num_key_value_heads,
        "head_dim": getattr(teacher, "head_dim", None) or D // H,
        "qkv_bias": teacher.model_type == "qwen2",
        "qk_norm": teacher.model_type == "qwen3",
        "intermediate_size": teacher.intermediate_size,
        "rms_norm_eps": teacher.rms_norm_eps,
        "tie_word_embeddings": teacher.tie_word_embeddings,
        "num_prelude_layers": 0,
        "branches": branches,
        "sliding_window": size,
        "num_sinks": sinks,
        "conv_size": None,
        "conv_silu": False,
        "window_output": "full",
        "interpolation": "independent",
        **_rope(teacher, where),
    }
    return checked_config(fields, where)


@torch.no_grad()
def copy_weights(teacher: PreTrainedModel, model: NirvanaForCausalLM) -> dict[str, list[str]]:
    """Copies a teacher's weights into a model of its `adopted_config`, and sets what is new.

    Args:
        teacher: the Transformer.
        model: receives the weights; what is not set here keeps its initial values.

    Returns:
        name of each parameter that holds weights of the teacher -> the names of those.
    """
    given = dict(teacher.state_dict())
    own = dict(model.named_parameters())
    sources: dict[str, list[str]] = {}

    def put(name: str, names: list[str], rows: int | None = None, factor: float = 1.0) -> None:
        values = torch.cat([given[each] for each in names]) if len(names) > 1 else given[names[0]]
        own[name][:rows].copy_(values * factor)
        sources[name] = names

    put("model.embed_tokens.weight", ["model.embed_tokens.weight"])
    put("model.norm.weight", ["model.norm.weight"])
    if not model.config.tie_word_embeddings:
        put("lm_head.weight", ["lm_head.weight"])
    size, (H, _, K) = model.config.qkv_size, model.config.head_sizes
    factor = HALF if model.config.branches == "both" else 1.0
    for i in range(model.config.num_hidden_layers):
        block = f"model.layers.{i}."
        updater, attention, mlp = f"{block}updater.", f"{block}self_attn.", f"{block}mlp."
        put(f"{block}updater_norm.weight", [f"{block}input_layernorm.weight"])
        put(f"{block}mlp_norm.weight", [f"{block}post_attention_layernorm.weight"])
        put(f"{mlp}gate_up_proj.weight", [f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"])
        put(f"{mlp}down_proj.weight", [f"{mlp}down_proj.weight"])
        inputs = [f"{attention}{x}_proj" for x in "qkv"]
        put(f"{updater}in_proj.weight", [f"{name}.weight" for name in inputs], size)
        if model.config.qkv_bias:
            put(f"{updater}qkv.bias", [f"{name}.bias" for name in inputs])
        if model.config.qk_norm:
            for x in ("q_norm", "k_norm"):
                put(f"{updater}qkv.{x}.weight", [f"{attention}{x}.weight"])
        output = [f"{attention}o_proj.weight"]
        put(f"{updater}out_proj.weight", output, factor=factor)
        if model.config.branches == "both":
            put(f"{updater}window_out.0.weight", output, factor=factor)
            if model.config.gate != "constant":
                own[f"{updater}gate_proj.weight"].zero_()
        if model.config.branches != "window":
            own[f"{updater}in_proj.weight"][size : size + H * K].zero_()  # the output gate
    return sources


def _require_family(config: Any, path: Path) -> None:
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{path}: a model of the type {config.model_type!r} cannot be adopted: supported are "
            f"{', '.join(FAMILIES.values())}"
        )


def _require_expressible(teacher: Any, where: str) -> None:
    """Raises for what no setting of `NirvanaConfig` expresses."""
    _require_family(teacher, Path(where))
    for name in ("attention_bias", "mlp_bias"):
        if getattr(teacher, name, False):
            raise InputError(
                f"{where}: {name} = true cannot be adopted: only q, k and v may have biases"
            )
    if teacher.hidden_act != "silu":
        raise InputError(f"{where}: hidden_act = {teacher.hidden_act!r} must be 'silu'")


def _method(quantized: Any) -> str:
    """The name of a quantisation, as a configuration gives it: a dictionary or an object."""
    values = quantized if isinstance(quantized, dict) else vars(quantized)
    return str(values.get("quant_method", "of an unknown method"))


def _own_window(teacher: Any, where: str) -> int | None:
    """The teacher's sliding window, the same in all of its layers; None without."""
    window = getattr(teacher, "sliding_window", None)
    if teacher.model_type.startswith("qwen") and not teacher.use_sliding_window:
        return None
    kinds = set(getattr(teacher, "layer_types", None) or ())
    if window is not None and len(kinds) > 1:
        raise InputError(
            f"{where}: layers with and without a sliding window cannot be adopted together"
        )
    return None if kinds == {"full_attention"} else window


def _rope(teacher: Any, where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`."""
    given = {key: value for key, value in teacher.rope_parameters.items() if value is not None}
    theta, kind = given.pop("rope_theta"), given.pop("rope_type", "default")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where}: partial rotary positions cannot be adopted")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ROPE_TYPES:
        kinds = ", ".join(ROPE_TYPES)
        raise InputError(f"{where}: rope_type = {kind!r} cannot be adopted, only {kinds}")
    required, optional = ROPE_TYPES[kind]
    if "original_max_position_embeddings" in required:
        given.setdefault("original_max_position_embeddings", teacher.max_position_embeddings)
    known = {key: value for key, value in given.items() if key in (*required, *optional)}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **known}}


def _report(
    teacher: Teacher, model: NirvanaForCausalLM, sources: dict[str, list[str]], seed: int
) -> dict[str, Any]:
    config, parameters = model.config, dict(model.named_parameters())
    size, (H, _, K) = config.qkv_size, config.head_sizes
    mapped: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        if name not in sources:
            zero = bool((parameter == 0).all())
            new[name] = {"shape": shape, "initial": "zero" if zero else "as in a new model"}
            continue
        mapped[name] = {"shape": shape, "from": sources[name]}
        if name.endswith("in_proj.weight") and shape[0] > size:
            mapped[name]["rows"] = size
            more: dict[str, Any] = {"shape": [shape[0] - size, shape[1]]}
            more["initial"] = f"rows of the output gate ({H * K}) zero, the rest as in a new model"
            new[f"{name} (rows from {size})"] = more
    total = sum(p.numel() for p in parameters.values())
    fresh = sum(_count(each["shape"]) for each in new.values())
    return {
        "teacher": str(teacher.path),
        "family": FAMILIES[teacher.model.config.model_type],
        "branches": config.branches,
        "window": None if config.branches == "linear" else config.sliding_window,
        "sinks": config.num_sinks,
        "seed": seed,
        "parameters": total,
        "mapped parameters": total - fresh,
        "new parameters": fresh,
        "step 0": _step_0(config),
        "mapped": mapped,
        "new": new,
    }


def _count(shape: list[int]) -> int:
    return int(torch.tensor(shape).prod()) if shape else 1


def _step_0(config: NirvanaConfig) -> str:
    if config.branches == "linear":
        return "not the teacher: its attention is replaced by a linear branch that contributes 0"
    if config.sliding_window is None:
        return "the teacher"
    return f"the teacher, up to {config.sliding_window} tokens"


def write_tokenizer(teacher: Teacher, folder: Path) -> str:
    """Writes the teacher's tokenizer and chat template.

    Args:
        teacher: of `load_teacher`.
        folder: to write to, which exists.

    Returns:
        what was written, in words.

    Raises:
        InputError: the tokenizer cannot be read, or has no token that a text can begin with.
    """
    source = teacher.path.parent if teacher.gguf else teacher.path
    if teacher.gguf is None and (source / "tokenizer.json").is_file():
        copy_tokenizer(source, folder)
    else:
        options: dict[str, Any] = {} if teacher.gguf is None else {"gguf_file": teacher.gguf}
        with _readable(teacher.path):
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, local_files_only=True, **options
            )
            tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder, required=())
    if tokenizer.bos_token is not None:
        return "the teacher's"
    first = tokenizer.pad_token or tokenizer.eos_token
    if first is None:
        raise InputError(f"{teacher.path}: the tokenizer has no BOS, EOS or padding token")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**settings, "bos_token": first})
    return f"the teacher's, with {first} as the BOS token that it lacks"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the library's errors about files into an `InputError`."""
    try:
        yield
    except ImportError as error:
        if path.suffix == ".gguf":
            raise InputError(f"{path}: GGUF files need a package: pip install gguf") from error
        raise
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} does not hold a language model: {_first(error)}") from error


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
