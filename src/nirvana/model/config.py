"""The configuration of a Nirvana model, and the presets."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from nirvana.errors import InputError
from nirvana.ops.limits import CONV_WIDTH, LEAST_WINDOW, MAX_SINKS

ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Types of `rope_scaling`: the keys that they require, and those that they also know."""
MAKE_LAYER_TYPES = (
    "num_hidden_layers",
    "num_prelude_layers",
    "branches",
    "sliding_window",
    "num_sinks",
)
"""The fields that `layer_types` follows from."""


@strict
class NirvanaConfig(PreTrainedConfig):
    """Configuration of `NirvanaModel` and `NirvanaForCausalLM`.

    Args:
        vocab_size: number of tokens.
        hidden_size: D, the width of the residual stream.
        num_hidden_layers: L.
        num_prelude_layers: number of first layers, which have neither Trigger nor window branch.
        num_attention_heads: H, heads of both branches.
        num_key_value_heads: G, heads of k and v, each shared by H / G heads of q; None gives H. The
            caches hold G heads; the linear branch has a state for each of the H.
        head_dim: K; None gives D / H.
        qkv_bias: add a bias to q, k and v.
        qk_norm: RMSNorm over K on every head of q and k, before both branches (Qwen3).
        intermediate_size: width of the SwiGLU; None gives 8/3 D rounded up to a multiple of 256.
        branches: of the layers after the prelude: "both", "linear" (all layers are those of the
            prelude: Gated DeltaNet) or "window" (plain attention; without prelude a Transformer).
        gate: the source of the gates: "trigger"; "input", a linear map of the layer's input to C
            numbers in place of the task vector; "constant", learned numbers of the layer.
        conv_size: width of the depthwise convolutions before the delta rule; None means none.
        conv_silu: apply SiLU to the q, k and v of the delta rule, after the convolutions.
        sliding_window: W, tokens that a token attends to, itself included; None means all before
            it. Without a window branch ("linear") it has no effect.
        num_sinks: first tokens of a sample that its tokens attend to beyond the window, too
            (StreamingLLM, arXiv 2309.17453).
        window_output: output projection of the window branch beside a linear branch: "low_rank"
            (rank D / 8) or "full".
        rope_theta: base of rotary positions in the window branch; None means no positions. The
            linear branch never has any.
        rope_scaling: scaling of the rotary frequencies as transformers' `rope_parameters` describe
            it, `{"rope_type": "llama3", "factor": 8.0, ...}`; types: `ROPE_TYPES`.
        interpolation: "convex" (the paper) or "independent" (the released code).
        task_dim: C, size of the Trigger's task vectors.
        bank_size: R, number of weights in the bank from which fast weights are mixed.
        trigger_gradient: "exact", or "truncated" as in the released code.
        trigger_lr: step size of the Trigger, one number or one for each layer that has a Trigger.
        trigger_lr_learnable: train the step sizes, starting there.
        trigger_decay: memory along the sample in 0..1 (0: every token alone), one or per layer.
        trigger_decay_learnable: train the decays, starting there (then 0 < decay < 1).
        trigger_step: "plain" (p - lr m), or "normalised": the step of each fast vector is lr m
            divided by the root mean square of m.
        rms_norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of the initial matrices.

    Raises:
        StrictDataclassError: for values that no model can have; its cause is an `InputError`, which
            names the field and the valid values. `preset` raises that error itself.
    """

    model_type = "nirvana"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  (the library's convention)
    attribute_map = {  # noqa: RUF012
        "num_heads": "num_attention_heads",
        "window_size": "sliding_window",
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 22
    num_prelude_layers: int = 2
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    intermediate_size: int | None = None
    branches: Literal["both", "linear", "window"] = "both"
    gate: Literal["trigger", "input", "constant"] = "trigger"
    conv_size: int | None = 4
    conv_silu: bool = True
    sliding_window: int | None = 2048
    num_sinks: int = 0
    window_output: Literal["low_rank", "full"] = "low_rank"
    rope_theta: float | int | None = None
    rope_scaling: dict[str, Any] | None = None
    interpolation: Literal["convex", "independent"] = "convex"
    task_dim: int = 64
    bank_size: int = 32
    trigger_gradient: Literal["exact", "truncated"] = "exact"
    trigger_lr: float | int | list[float | int] = 0.01
    trigger_lr_learnable: bool = False
    trigger_decay: float | int | list[float | int] = 0.0
    trigger_decay_learnable: bool = False
    trigger_step: Literal["plain", "normalised"] = "plain"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 256)) * 256
        if self.head_dim is None:  # 0 is refused: the width is no multiple
            size, rest = divmod(self.hidden_size, max(1, self.num_attention_heads))
            self.head_dim = 0 if rest else size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._set_layer_types()
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        """Sets a field; one that layer types follow from changes them, too.

        Raises:
            InputError: for a window or sinks that no model can have.
        """
        name = self.attribute_map.get(key, key)
        if name != key:  # the checks of the library go by the name of the field
            setattr(self, name, value)
            return
        complete = self.__dict__.get("layer_types") is not None  # the last field that is set
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if not complete or name not in MAKE_LAYER_TYPES:
            return
        self._set_layer_types()
        try:
            self._validate_window()
        except InputError:
            super().__setattr__(name, before)
            self._set_layer_types()
            raise

    def _set_layer_types(self) -> None:
        """Sets the type of each layer, from which the library's cache reads what it keeps."""
        found = ["linear_attention"] * self.num_hidden_layers
        if self.branches == "linear":
            # Of the library's layer types only those with keys count tokens; here of width zero.
            found[:1] = ["hybrid_sliding"]
            super().__setattr__("layer_types", found)
            super().__setattr__("sliding_window", self.sliding_window or 2048)  # which it requires
            return
        kinds = {
            "both": ("hybrid", "hybrid_sliding"),
            # The library keeps the sinks of a window as a state of its hybrid layers.
            "window": (
                "full_attention",
                "hybrid_sliding" if self.num_sinks else "sliding_attention",
            ),
        }
        prelude = min(self.num_prelude_layers, self.num_hidden_layers)
        kind = kinds[self.branches][self.sliding_window is not None]
        found[prelude:] = [kind] * (self.num_hidden_layers - prelude)
        super().__setattr__("layer_types", found)

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """H, G and K."""
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def qkv_size(self) -> int:
        """(H + 2 G) K, the width of q, k and v side by side."""
        H, G, K = self.head_sizes
        return (H + 2 * G) * K

    @property
    def conv_states(self) -> int:
        """Inputs that the convolution of the next token reads, 0 without convolution."""
        return 0 if self.conv_size is None else self.conv_size - 1

    @property
    def without_kernels(self) -> tuple[str, ...]:
        """The settings, with their values, that no GPU kernel takes."""
        found = []
        linear = self.branches != "window" or self.num_prelude_layers > 0
        if linear and self.conv_size not in (CONV_WIDTH, None):
            found.append("conv_size")
        if self.branches != "linear" and self.num_sinks and self.sliding_window is not None:
            found += ["num_sinks"] if self.num_sinks > MAX_SINKS else []
            found += ["sliding_window"] if self.sliding_window < LEAST_WINDOW else []
        return tuple(f"{name} = {getattr(self, name)}" for name in found)

    @property
    def has_trigger(self) -> bool:
        """Whether the layers after the prelude have a Trigger."""
        return self.branches == "both" and self.gate == "trigger"

    @property
    def counting_layer(self) -> int:
        """Index of the first layer whose cache counts the tokens read."""
        return 0 if self.branches == "linear" else self.num_prelude_layers

    @property
    def number_of_conv_states(self) -> int:
        """The number of convolution states that the library's cache keeps per layer.

        Slot 0 holds the inputs of the convolutions, slot 1 the Trigger's memory m `[B, 4, R]`, slot
        2 the sinks `[B, 2 G K, num_sinks]`. The library's second recurrent state cannot be read
        without a convolution state of its own, and a convolution state of width R that receives R
        new columns is replaced.
        """
        if self.branches != "linear" and self.num_sinks:
            return 3
        return 2 if self.has_memory else 1

    @property
    def has_memory(self) -> bool:
        """Whether any Trigger has a decay above 0, and so a memory along the sample."""
        decays = self.trigger_decay
        if not self.has_trigger:
            return False
        if self.trigger_decay_learnable:
            return True
        return any(decays) if isinstance(decays, list) else decays > 0

    def per_trigger(self, name: Literal["trigger_lr", "trigger_decay"], layer_idx: int) -> float:
        """The value of a per-layer setting.

        Args:
            name: of the setting.
            layer_idx: of a layer with a Trigger, counted from 0.

        Returns:
            the value at that layer.
        """
        value = getattr(self, name)
        return value[layer_idx - self.num_prelude_layers] if isinstance(value, list) else value

    def validate_architecture(self) -> None:
        """Called by the library when it validates a strict configuration.

        Raises:
            InputError: for values that no model can have.
        """
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "task_dim",
            "bank_size",
        )
        for name in sizes:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        conv_size = self.conv_size
        _require(conv_size is None or conv_size >= 2, "conv_size", conv_size, "at least 2, or null")
        H, G, K = self.head_sizes
        right = f"a multiple of num_attention_heads = {H}, unless there is a head_dim of at least 1"
        _require(K >= 1, "hidden_size", self.hidden_size, right)
        _require(H % G == 0, "num_key_value_heads", G, f"a divisor of num_attention_heads = {H}")
        _require(
            0 <= self.num_prelude_layers < self.num_hidden_layers,
            "num_prelude_layers",
            self.num_prelude_layers,
            f"from 0 to below num_hidden_layers = {self.num_hidden_layers}",
        )
        self._validate_window()
        _require(
            self.branches == "both" or self.gate == "trigger",
            "gate",
            self.gate,
            f"left out: with branches = {self.branches!r} there is nothing to blend",
        )
        count = self.num_hidden_layers - self.num_prelude_layers
        for name in ("trigger_lr", "trigger_decay"):
            value = getattr(self, name)
            if isinstance(value, list):
                right = f"one number, or {count} (one for each layer with a Trigger)"
                _require(len(value) == count, name, value, right)
        decays = (
            self.trigger_decay if isinstance(self.trigger_decay, list) else [self.trigger_decay]
        )
        if self.trigger_decay_learnable:
            in_range = all(0 < decay < 1 for decay in decays)
            _require(in_range, "trigger_decay", decays, "between 0 and 1, both excluded")
        else:
            in_range = all(0 <= decay <= 1 for decay in decays)
            _require(in_range, "trigger_decay", decays, "from 0 to 1")
        if self.rope_theta is not None:
            _require(K % 2 == 0, "head_dim", K, "even for rotary positions")
        if self.rope_scaling is not None:
            self._validate_rope_scaling(self.rope_scaling)

    def _validate_window(self) -> None:
        _require(
            self.sliding_window is None or self.sliding_window >= 2,  # the cache keeps W - 1 > 0
            "sliding_window",
            self.sliding_window,
            "at least 2, or null",
        )
        windowed = self.branches != "linear" and self.sliding_window is not None
        right = "at least 0" if windowed else "0: without a sliding window there is none to keep"
        in_range = self.num_sinks == 0 or (windowed and self.num_sinks > 0)
        _require(in_range, "num_sinks", self.num_sinks, right)

    def _validate_rope_scaling(self, given: dict[str, Any]) -> None:
        name, kind = "rope_scaling", given.get("rope_type")
        _require(self.rope_theta is not None, name, given, "null without rope_theta")
        kinds = ", ".join(ROPE_TYPES)
        _require(kind in ROPE_TYPES, f"{name}.rope_type", kind, f"one of {kinds}")
        required, optional = ROPE_TYPES[str(kind)]
        for key in required:
            value = given.get(key)
            number = isinstance(value, float | int) and not isinstance(value, bool) and value > 0
            _require(number, f"{name}.{key}", value, f"a number above 0 for {kind}")
        unknown = sorted(given.keys() - {"rope_type", *required, *optional})
        _require(not unknown, name, given, f"without {', '.join(unknown)}, unknown to {kind}")


def _require(condition: bool, name: str, value: Any, right: str) -> None:
    if not condition:
        raise InputError(f"{name} = {value!r} must be {right}")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "sliding_window": 256,
        "task_dim": 32,
        "bank_size": 16,
        "trigger_lr_learnable": True,
        "trigger_decay": 0.9,
        "trigger_decay_learnable": True,
    },
    "60m": {
        "hidden_size": 512,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "sliding_window": 1024,
    },
    "340m": {
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "num_attention_heads": 8,
        "sliding_window": 2048,
    },
    "1.3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "sliding_window": 2048,
    },
}
PRESETS["1.3b-window-512"] = {**PRESETS["1.3b"], "sliding_window": 512}


def preset(name: str, **overrides: Any) -> NirvanaConfig:
    """Builds a preset's configuration.

    Args:
        name: one of `PRESETS`.
        overrides: fields of `NirvanaConfig`.

    Returns:
        the configuration.

    Raises:
        InputError: for a name that is not in `PRESETS`, a field that does not exist, or values that
            no model can have.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: the presets are {', '.join(PRESETS)}")
    known = NirvanaConfig.__dataclass_fields__
    for field in overrides:
        if field not in known:
            raise InputError(f"unknown field {field!r} of the model's configuration")
    return checked_config({**PRESETS[name], **overrides}, f"preset {name}")


def checked_config(fields: dict[str, Any], where: str) -> NirvanaConfig:
    """Builds a configuration from fields.

    Args:
        fields: of `NirvanaConfig`.
        where: their source, with which an error begins.

    Returns:
        the configuration.

    Raises:
        InputError: for values that no model can have.
    """
    try:
        return NirvanaConfig(**fields)
    except StrictDataclassError as error:
        raise InputError(f"{where}: {error.__cause__ or error}") from error
