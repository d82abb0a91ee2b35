"""Released checkpoints: the authors' format to ours and, where nothing is lost, back.

The released code attends to all tokens, because it never passes its window to its attention; here
the configured window applies unless another is given (`window=None` is the code as released). It
has no positions, uses the truncated gradient, a step size of 0.01, no memory along
the sample, and gates both branches independently.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder
from nirvana.model.config import NirvanaConfig, checked_config
from nirvana.model.nirvana import NirvanaForCausalLM

MODEL_TYPE = "transformer_rnn"
RELEASED = {
    "num_prelude_layers": 2,
    "branches": "both",
    "gate": "trigger",
    "conv_size": 4,
    "rope_theta": None,
    "interpolation": "independent",
    "trigger_gradient": "truncated",
    "trigger_lr": 0.01,
    "trigger_lr_learnable": False,
    "trigger_decay": 0.0,
    "trigger_decay_learnable": False,
    "trigger_step": "plain",
}
"""Fields of `NirvanaConfig` that are the same for every released checkpoint."""

CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_hidden_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "concept_dim": "task_dim",
    "logit_dim": "bank_size",
    "window_size": "sliding_window",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
SAME_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")
RESULTS = ("config.json", "generation_config.json", "model*.safetensors*", *TOKENIZER_PATTERNS)

NAMES = {
    "model.embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "model.rnn_router.weight_linear": "model.bank.weight",
    "model.rnn_router.weight_ln": "model.bank.gain",
    "model.rnn_router.bias_linear": "model.bank.bias",
    "model.rnn_router.bias_ln": "model.bank.shift",
}
LAYER_NAMES = {
    "attn_norm.weight": "updater_norm.weight",
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate_up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
MIXER = "Task_Aware_Delta_Net."
MIXER_NAMES = {
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "o_norm.weight": "out_norm.weight",
    "o_proj.weight": "out_proj.weight",
}
TRIGGER_NAMES = {
    "o_proj_attn.0.weight": "window_out.0.weight",
    "o_proj_attn.1.weight": "window_out.1.weight",
    "condition_interpolation.lora.2.weight": "zeta.2.weight",
}
IN_PROJ = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
TRIGGER_IN_PROJ = ("q_lora.0", "k_lora.0", "v_lora.0", "concept_proj")
FOLDED = "condition_interpolation.lora.0.weight"


def convert(
    source: str | Path,
    destination: str | Path,
    window: int | str | None = "configured",
    reverse: bool = False,
) -> Path:
    """Converts the model in the folder `source` into the folder `destination`.

    Args:
        source: a folder with `config.json` and the weights in `model.safetensors`, or in shards
            with their index. Its tokenizer files are copied.
        destination: the folder to write; an earlier result in it is replaced.
        window: "configured" keeps the configuration's; a number, or None for no window, instead.
        reverse: from our format to the authors'.

    Returns:
        the absolute path of `destination`.

    Raises:
        InputError: for what is not such a model; names all tensors that are missing, left over or
            of another shape. With `reverse`, for a model that the authors' code cannot express. For
            a destination that is or contains the source, holds other things, or cannot be written.
    """
    source, destination = Path(source), replaceable_folder(destination, RESULTS)
    read = [file for pattern in RESULTS for file in source.glob(pattern)]
    check_outputs({"the destination": destination}, read)
    given = _read_config(source)
    if reverse:
        config = _own_config(given, source, window)
        expected = {name: tuple(x.shape) for name, x in _empty_state(config).items()}
        state = to_released(_read_weights(source, expected), config)
        written = _released_config(config)
    else:
        config = released_config(given, str(source / "config.json"), window)
        state = to_own(_read_weights(source, released_shapes(config)), config)
        config.architectures = [NirvanaForCausalLM.__name__]
        written = json.loads(config.to_json_string())  # as save_pretrained writes it
    with atomic_folder(destination) as folder:
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        save_torch_state_dict(state, folder)
        for pattern in TOKENIZER_PATTERNS:
            for file in filter(Path.is_file, source.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
    return destination


def released_config(
    given: dict[str, Any], where: str, window: int | str | None = "configured"
) -> NirvanaConfig:
    """Converts the authors' configuration.

    Args:
        given: the contents of their `config.json`.
        where: its path, for errors.
        window: see `convert`.

    Returns:
        our configuration.

    Raises:
        InputError: if it is not a released checkpoint's.
    """
    if given.get("model_type") == NirvanaConfig.model_type:
        raise InputError(f"{where}: this is a model of ours; --reverse converts those")
    missing = sorted(set(CONFIG_KEYS) - set(given) - {"window_size", "tie_word_embeddings"})
    if missing:
        raise InputError(
            f"{where}: no released checkpoint's configuration: {missing[0]} is missing"
        )
    fields: dict[str, Any] = {ours: given[key] for key, ours in CONFIG_KEYS.items() if key in given}
    fields.setdefault("sliding_window", None)
    fields.setdefault("tie_word_embeddings", False)
    if window != "configured":
        fields["sliding_window"] = window
    fields["intermediate_size"] = given.get("intermediate_size")
    if fields["intermediate_size"] is None:
        ratio = given.get("hidden_ratio") or 4
        width = int(fields["hidden_size"] * ratio * 2 / 3)
        fields["intermediate_size"] = -(-width // 256) * 256
    same = {key: given[key] for key in SAME_KEYS if key in given}
    return checked_config({**RELEASED, **same, **fields}, where)


def released_shapes(config: NirvanaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a released checkpoint of this configuration."""
    state = to_released(_empty_state(config), config)
    return {name: tuple(x.shape) for name, x in state.items()}


def to_own(released: dict[str, Tensor], config: NirvanaConfig) -> dict[str, Tensor]:
    """A released checkpoint's tensors as ours; the inverse of `to_released`."""
    own = {ours: released[name] for name, ours in NAMES.items()}
    if not config.tie_word_embeddings:
        own["lm_head.weight"] = released["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        block, mixer = f"model.layers.{i}.", f"model.layers.{i}.{MIXER}"
        updater = f"{block}updater."
        own |= {block + ours: released[block + name] for name, ours in LAYER_NAMES.items()}
        own |= {updater + ours: released[mixer + name] for name, ours in MIXER_NAMES.items()}
        convolutions = [released[f"{mixer}{x}_conv1d.weight"] for x in "qkv"]
        own[f"{updater}conv_weight"] = torch.cat(convolutions).squeeze(1)
        inputs = IN_PROJ
        if i >= config.num_prelude_layers:
            inputs = (*IN_PROJ, *TRIGGER_IN_PROJ)
            own |= {updater + ours: released[mixer + name] for name, ours in TRIGGER_NAMES.items()}
            ups = [released[f"{mixer}{x}_lora.1.weight"].T for x in "qkv"]
            own[f"{updater}window_up"] = torch.stack(ups)
            gates = [released[f"{mixer}{x}.weight"] for x in ("t_proj", "t2_proj")]
            own[f"{updater}gate_proj.weight"] = torch.cat(gates)
            # Their input is [b, a, h, h]: both blocks of h act as their sum.
            b_and_a, h, h_again = released[mixer + FOLDED].split(
                [2 * config.hidden_size, config.task_dim, config.task_dim], dim=1
            )
            own[f"{updater}zeta.0.weight"] = torch.cat([b_and_a, h + h_again], dim=1)
        parts = [released[f"{mixer}{name}.weight"] for name in inputs]
        own[f"{updater}in_proj.weight"] = torch.cat(parts)
    return own


def to_released(own: dict[str, Tensor], config: NirvanaConfig) -> dict[str, Tensor]:
    """Our tensors as a released checkpoint's, the second block of h zero; no tensor is shared."""
    D, H, C = config.hidden_size, config.num_attention_heads, config.task_dim
    released = {name: own[ours] for name, ours in NAMES.items()}
    if not config.tie_word_embeddings:
        released["lm_head.weight"] = own["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        block, mixer = f"model.layers.{i}.", f"model.layers.{i}.{MIXER}"
        updater = f"{block}updater."
        released |= {block + name: own[block + ours] for name, ours in LAYER_NAMES.items()}
        released |= {mixer + name: own[updater + ours] for name, ours in MIXER_NAMES.items()}
        for x, part in zip("qkv", own[f"{updater}conv_weight"].chunk(3), strict=True):
            released[f"{mixer}{x}_conv1d.weight"] = part[:, None]
        inputs, sizes = IN_PROJ, [D, D, D, D, H, H]
        if i >= config.num_prelude_layers:
            rank = max(1, D // 16)
            inputs, sizes = (*IN_PROJ, *TRIGGER_IN_PROJ), [*sizes, rank, rank, rank, 3 * C]
            released |= {mixer + n: own[updater + ours] for n, ours in TRIGGER_NAMES.items()}
            for x, part in zip("qkv", own[f"{updater}window_up"], strict=True):
                released[f"{mixer}{x}_lora.1.weight"] = part.T
            gates = own[f"{updater}gate_proj.weight"]
            released[f"{mixer}t_proj.weight"] = gates[:1]
            released[f"{mixer}t2_proj.weight"] = gates[1:]
            zeta = own[f"{updater}zeta.0.weight"]
            released[mixer + FOLDED] = torch.cat([zeta, torch.zeros_like(zeta[:, 2 * D :])], dim=1)
        parts = own[f"{updater}in_proj.weight"].split(sizes)
        for name, part in zip(inputs, parts, strict=True):
            released[f"{mixer}{name}.weight"] = part
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in released.items()}


def _empty_state(config: NirvanaConfig) -> dict[str, Tensor]:
    """Names and shapes of our tensors, without memory."""
    with torch.device("meta"):
        state = NirvanaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no model to convert: it has no config.json")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InputError(f"{path}: must be an object")
    return given


def _own_config(given: dict[str, Any], source: Path, window: int | str | None) -> NirvanaConfig:
    """Checks that the authors' code can express a model of ours."""
    if given.get("model_type") != NirvanaConfig.model_type:
        raise InputError(f"{source}: --reverse needs a Nirvana model of ours")
    if window != "configured":
        raise InputError("--window goes with a released checkpoint, not with --reverse")
    known = NirvanaConfig.__dataclass_fields__
    config = checked_config({key: given[key] for key in given if key in known}, str(source))
    for name, value in RELEASED.items():
        if getattr(config, name) != value:
            raise InputError(
                f"{source}: the authors' code has {name} = {value!r} only, this model has "
                f"{getattr(config, name)!r}"
            )
    return config


def _released_config(config: NirvanaConfig) -> dict[str, Any]:
    keys = {key: getattr(config, ours) for key, ours in CONFIG_KEYS.items()}
    same = {key: getattr(config, key) for key in SAME_KEYS}
    return {"model_type": MODEL_TYPE, **keys, "intermediate_size": config.intermediate_size, **same}


def _read_weights(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All tensors of the folder's files, after their names and shapes were found right."""
    files = _weight_files(folder)
    places: dict[str, Path] = {}
    problems = []
    try:
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no mapping)
                    places[name] = file
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if name not in expected:
                        problems.append(f"{name} is not of this model")
                    elif shape != expected[name]:
                        problems.append(f"{name} is {list(shape)}, not {list(expected[name])}")
        problems += [f"{name} is missing" for name in expected if name not in places]
        if problems:
            raise InputError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
        state: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: unreadable weights: {error}") from None
    return state


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise InputError(f"{folder}: no weights: neither model.safetensors nor its index")
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weights: {error}") from None
    for name in names:
        # An index is the user's data: it may not point out of its folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index}: names {name}, which is not in {folder}")
    return [folder / name for name in names]
