"""One layer of Nirvana, for networks of one's own."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.model.config import checked_config
from nirvana.model.masks import Borders, create_state_masks
from nirvana.model.outputs import reordered
from nirvana.model.state import NewStates, State
from nirvana.model.trigger import NoBank, WeightBank
from nirvana.model.updater import Attention, Updater
from nirvana.ops import in_autocast, warn_without_kernels

SETTINGS = (
    *("branches", "gate", "conv_size", "rope_theta", "interpolation", "task_dim", "bank_size"),
    *("trigger_gradient", "trigger_lr", "trigger_lr_learnable", "trigger_decay"),
    *("trigger_decay_learnable", "trigger_step", "rms_norm_eps", "initializer_range"),
)
"""Fields of `NirvanaConfig` that concern one layer, beyond the arguments of `NirvanaLayer`."""


class LayerOutput(NamedTuple):
    """The output of a `NirvanaLayer`.

    Attributes:
        y: `[B, T, D]`, to be added to the residual stream.
        fast: `[B, T, 4, R]`, the fast parameters for the layer above.
        state: the state after the tokens, if it was requested.
    """

    y: Tensor
    fast: Tensor
    state: State | None


class NirvanaLayer(nn.Module):
    """Mixes the tokens of a row, as an attention layer does: the Updater under its Trigger.

        layers = [NirvanaLayer(256, num_heads=4)]
        layers += [NirvanaLayer(256, num_heads=4, bank=layers[0].bank) for _ in range(3)]
        ...
        fast = None
        for norm, layer in zip(norms, layers):
            y, fast, _ = layer(norm(x), fast)
            x = x + y

    The fast parameters go from layer to layer, and the bank is shared. A layer without `bank` has
    its own, and one that receives no `fast` starts anew. Initial values are those of the models.

    Args:
        hidden_size: D.
        num_heads: H; the head size K is D / H. GPU kernels take 32, 64 and 128.
        sliding_window: W, tokens that a token attends to, itself included; None means all before.
        bank: of another layer with the same `task_dim` and `bank_size`; None makes one.
        settings: the fields of `NirvanaConfig` in `SETTINGS`.

    Raises:
        TypeError: for another setting.
        InputError: for values that no layer can have, and for a bank of another size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        sliding_window: int | None = 2048,
        bank: WeightBank | NoBank | None = None,
        **settings: Any,
    ):
        super().__init__()
        if unknown := sorted(settings.keys() - set(SETTINGS)):
            raise TypeError(f"unknown setting {unknown[0]!r}: there are {', '.join(SETTINGS)}")
        one_layer = {"vocab_size": 1, "num_hidden_layers": 1, "num_prelude_layers": 0}
        sizes = {"hidden_size": hidden_size, "num_attention_heads": num_heads}
        fields = {**one_layer, **sizes, "sliding_window": sliding_window, **settings}
        self.config = config = checked_config(fields, "NirvanaLayer")
        needed = (config.task_dim, config.bank_size) if config.has_trigger else None
        found = tuple(bank.gain.shape) if isinstance(bank, WeightBank) else None
        if bank is not None and found != needed:
            raise InputError(
                f"NirvanaLayer: the bank's task_dim and bank_size are {found}, needed are {needed}"
            )
        self.bank = bank or (WeightBank if config.has_trigger else NoBank)(config)
        self.updater = (Attention if config.branches == "window" else Updater)(config, 0)

    def forward(
        self,
        x: Tensor,
        fast: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Borders | None = None,
        seq_idx: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> LayerOutput:
        """Mixes the tokens of each row.

        Args:
            x: `[B, T, D]`, usually normalised.
            fast: `[B, T, 4, R]`, of the layer below; None means ones.
            attention_mask: `[B, T]`, 0 at padding, see `nirvana.model.rows.chunk_layout`.
            position_ids: `[B, T]` or `[1, T]`; a sample starts where they do not go on.
            cu_seqlens: `[samples + 1]`, borders of packed samples.
            seq_idx: `[B, T]` or `[1, T]`, a number for each sample.
            state: of the tokens before, see `State`; None means none.
            return_state: return the state after the tokens.

        Returns:
            the update, the fast parameters and the state.

        Raises:
            ValueError: for other shapes, and for masks and borders that `chunk_layout` rejects.
        """
        if x.ndim != 3 or x.shape[2] != self.config.hidden_size:
            raise ValueError(f"x is {list(x.shape)}; it must be [B, T, {self.config.hidden_size}]")
        start = self.bank.start(x)
        if fast is not None and fast.shape != start.shape:
            raise ValueError(
                f"the fast parameters are {list(fast.shape)}; they must be {list(start.shape)}: "
                "layers in a row have one bank_size"
            )
        current: Tensor = start if fast is None else fast
        if state is not None:
            state.require(self.config, x.shape[0])
        warn_without_kernels(in_autocast(x), self.config.head_dim)
        masks = create_state_masks(
            self.config, x, attention_mask, state, position_ids, cu_seqlens, seq_idx
        )
        order, states = masks["order"], None
        if order is not None:
            x, current = reordered(x, order), reordered(current, order)
        if state is not None or return_state:
            states = NewStates(self.config, state, masks["lengths"])
        y = x
        if x.shape[1] > 0:
            y, current = self.updater(x, current, self.bank, masks, states)
        if order is not None:
            back = order.argsort(1)
            y, current = reordered(y, back), reordered(current, back)
        after = states.state_after(masks) if states is not None and return_state else None
        return LayerOutput(y, current, after)
