"""The parts of a layer for one token of each text on a CPU; see `nirvana.generate.cpu_step`.

Every part has the views of its buffers ready and computes with `__call__`; `refresh` copies the
small weights in the layout that it needs. Large weights are read where they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.generate.decode_states import DecodeStates
from nirvana.ops.reference import TRIGGER_EPS, UNIT_EPS

FEW = 3
"""Texts up to which products are faster with the texts as columns, with one thread, too."""


def squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[N, 1, K]` and its transpose, whose product is the sum of the squares of each row."""
    return x, x.mT


class Product:
    """out = x W', or out += x W', for a large weight W `[N, D]`.

    Of few texts (`FEW`), and of more with several threads, it is computed as W x', whose columns
    are the texts, and then copied: up to three times as fast.

    Args:
        x: `[B, D]`, read at every call.
        out: `[B, N]`, written.
        adds: to what is there.
    """

    def __init__(self, x: Tensor, out: Tensor, adds: bool = False) -> None:
        B, N = out.shape
        self.x, self.out, self.adds = x, out, adds
        self.x_columns, self.columns = x.T, None
        if B > 1 and (B <= FEW or torch.get_num_threads() > 1):
            self.columns = out.new_empty(N, B)
            self.rows = self.columns.T

    def take(self, weight: Tensor) -> None:
        """Multiplies with weight, `[N, D]`, from now on."""
        self.weight, self.matrix = weight, weight.T

    def __call__(self) -> Tensor:
        if self.columns is None:
            if self.adds:
                return self.out.addmm_(self.x, self.matrix)
            return torch.mm(self.x, self.matrix, out=self.out)
        torch.mm(self.weight, self.x_columns, out=self.columns)
        return self.out.add_(self.rows) if self.adds else self.out.copy_(self.rows)


class Gained:
    """A part that ends with a product by its gain `[D]`, unless the next matrix has it.

    Attributes:
        gain: of each column.
        folded: whether the next matrix has it.
    """

    gain: Tensor
    folded: bool

    def refresh(self) -> None:
        """Goes on with the weights that the model has now."""
        self.folded = False

    def fold_into(self, product: Product) -> None:
        """Gives the next product a copy of its matrix, `[D, N]` contiguous, with the gain, which
        this part then leaves out until `refresh`."""
        self.folded = True
        product.take((product.matrix * self.gain[:, None]).contiguous().T)


class Norm(Gained):
    """RMSNorm of the rows of `h` `[B, D]` to those of `out`.

    PyTorch's own is six operations on a CPU.
    """

    def __init__(self, norm: Any, h: Tensor, out: Tensor) -> None:
        self.h, self.out, self.gain, self.mean = h, out, norm.weight, 1 / h.shape[1]
        self.pair = squares(h[:, None])
        self.eps = h.new_full((1, 1, 1), norm.eps)
        self.scale = h.new_empty(h.shape[0], 1, 1)
        self.factor = self.scale[:, 0]

    def __call__(self) -> None:
        torch.baddbmm(self.eps, *self.pair, alpha=self.mean, out=self.scale).rsqrt_()
        out = torch.mul(self.h, self.factor, out=self.out)
        if not self.folded:
            out.mul_(self.gain)


class Recent:
    """A convolution. `ring`, `[width, 3, B, D]`, holds the sums of the next tokens as far as their
    terms were read; q, k and v are apart, so that the heads of all texts are one batch."""

    def __init__(self, updater: Any, x: Tensor) -> None:
        (width, taps), B = updater.conv_weight.shape, x.shape[0]
        self.updater, self.taps, self.phase = updater, taps, 0
        self.ring = x.new_zeros(taps, 3, B, width // 3)
        self.slots = self.ring.unbind()
        self.weights = x.new_empty(taps, taps, 3, 1, width // 3)
        self.by_phase = self.weights.unbind()
        self.new = x[:, :width].view(B, 3, -1).transpose(0, 1)

    def refresh(self) -> None:
        weight = self.updater.conv_weight.T.view(self.taps, 3, 1, -1)
        for phase in range(self.taps):  # the newest token's sum is in slot `phase`
            for slot in range(self.taps):
                self.weights[phase, slot] = weight[(phase - slot - 1) % self.taps]

    def load(self, conv: Tensor) -> None:
        """Takes the inputs of the last tokens, `[B, 3 D, width - 1]`, oldest first."""
        self.ring.zero_()
        for phase, past in enumerate(conv.unbind(2), start=1):
            self._add(phase, past.view(past.shape[0], 3, -1).transpose(0, 1))
        self.phase = 0

    def __call__(self) -> int:
        """The slot that holds the convolved q, k and v of the new token, `[3, B, D]`."""
        phase = self.phase
        self.phase = (phase + 1) % self.taps
        self._add(phase, self.new)
        if self.updater.config.conv_silu:
            F.silu(self.slots[phase], inplace=True)
        return phase

    def _add(self, phase: int, new: Tensor) -> None:
        """Adds the terms of a token, `[3, B, D]`; the sum of the one before it was read."""
        self.slots[phase - 1].zero_()
        self.ring.addcmul_(self.by_phase[phase], new)


class Linear(Gained):
    """The linear branch, whose output is `out` `[B, D]`, before the output projection.

    Args:
        updater: of the layer.
        x: `[B, X]`, the output of its projection.
        state: `[B, H, K, K]`, of the delta rule.
        slots: `[3, B, H K]` each, where q, k and v may be after the convolution; overwritten.
    """

    def __init__(self, updater: Any, x: Tensor, state: Tensor, slots: Sequence[Tensor]) -> None:
        B, H, K, _ = state.shape
        self.updater, self.state = updater, state.view(B * H, K, K)
        width, D, *_ = updater.sections
        self.gate = x[:, width : width + D]
        self.gates = x[:, width + D : width + D + 2 * H].view(B, 2, H).transpose(0, 1)
        self.slots = []
        for slot in slots:
            q_k, (q, k, v) = slot[:2].view(2 * B * H, 1, K), slot.view(3, B * H, 1, K)
            self.slots.append((q_k, squares(q_k), q, k, k.mT, v))
        self.unit_eps = x.new_full((1, 1, 1), UNIT_EPS)
        self.norm_eps = x.new_full((1, 1, 1), updater.out_norm.eps)
        self.lengths, self.scale = x.new_empty(2 * B * H, 1, 1), x.new_empty(B * H, 1, 1)
        self.write, self.o = x.new_empty(2, B * H, 1, K)
        self.o_pair, self.out = squares(self.o), self.o.view(B, H * K)
        self.both = x.new_empty(2, B, H)
        self.beta, self.decay = self.both.view(2, B * H, 1, 1)
        self.signs = x.new_tensor([1.0, -1.0])[:, None, None]
        self.bias, self.rates = x.new_zeros(2, 1, H), x.new_ones(2, 1, H)
        self.root, self.mean, self.heads = K**-0.5, 1 / K, H

    def refresh(self) -> None:
        super().refresh()
        updater = self.updater
        self.bias[1] = -updater.dt_bias
        self.rates[1] = updater.A_log.exp()
        self.gain = updater.out_norm.weight.repeat(self.heads)

    def __call__(self, slot: int) -> None:
        q_k, pair, q, k, k_column, v = self.slots[slot]
        torch.baddbmm(self.unit_eps, *pair, out=self.lengths).rsqrt_()
        q_k.mul_(self.lengths)
        # Both are exponentials of A log(sigmoid), with A = 1 for beta: -softplus(a) is that of -a.
        # `MIN_LOG_ALPHA` would make a difference of less than 1e-17.
        logs = F.logsigmoid(torch.addcmul(self.bias, self.gates, self.signs, out=self.both))
        torch.mul(logs, self.rates, out=self.both).exp_()
        S = self.state.mul_(self.decay)
        torch.baddbmm(v, k, S, alpha=-1, out=self.write).mul_(self.beta)
        S.addcmul_(k_column, self.write)
        torch.baddbmm(self.o, q, S, beta=0, alpha=self.root, out=self.o)
        torch.baddbmm(self.norm_eps, *self.o_pair, alpha=self.mean, out=self.scale).rsqrt_()
        self.o.mul_(self.scale)
        out = self.out.mul_(F.silu(self.gate))
        if not self.folded:
            out.mul_(self.gain)


class Window:
    """The window branch, whose output is `out` `[B, D]`, before the output projection.

    Args:
        updater: of the layer.
        x: `[B, X]`, the output of its projection.
        state: holds keys and values `[2, B, H, slots, K]`.
        slot: `[B, 1, 1, 1]`, int64, where the new ones go.
        bias: `[B, H, 1, slots]`, of the scores: 0 at tokens that were read, else -inf.
    """

    def __init__(
        self, updater: Any, x: Tensor, state: DecodeStates, slot: Tensor, bias: Tensor
    ) -> None:
        assert state.keys_values is not None
        self.keys_values = state.keys_values
        _, B, H, _, K = self.keys_values.shape
        qkv, *_, factors, _ = x.split(updater.sections, dim=1)
        self.qkv, self.factors = (y.view(B, 3, -1).transpose(0, 1) for y in (qkv, factors))
        self.up = updater.window_up
        self.bias, self.slot = bias.flatten(0, 1), slot.expand(2, B, H, 1, K)
        self.q_k_v = x.new_empty(3, B, H * K)
        self.new = self.q_k_v[1:].view(2, B, H, 1, K)
        self.q, self.o = self.q_k_v[0].view(B * H, 1, K), x.new_empty(B * H, 1, K)
        self.out, self.scale = self.o.view(B, H * K), K**-0.5

    def read(self, slots: int) -> None:
        """From now on, the first so many slots are read."""
        keys, values = self.keys_values.flatten(1, 2)[:, :, :slots]
        self.seen = self.bias[:, :, :slots], self.q, keys.mT
        self.seen_values, self.scores = values, self.q.new_empty(len(keys), 1, slots)

    def __call__(self) -> None:
        torch.baddbmm(self.qkv, self.factors, self.up, out=self.q_k_v)
        self.keys_values.scatter_(3, self.slot, self.new)
        scores = torch.baddbmm(*self.seen, alpha=self.scale, out=self.scores)
        torch.bmm(scores.softmax(-1), self.seen_values, out=self.o)


class Trigger:
    """A step of the Trigger; the task vector is written to `h_task` `[B, C]`.

    Args:
        updater: of the layer.
        bank: of the model.
        x: `[B, X]`, the output of the layer's projection.
        memory: `[B, 4, R]`, or None.
        fast: `[B, 4, R]`, changed in place.
        h_task: `[B, C]`.
    """

    def __init__(
        self, updater: Any, bank: Any, x: Tensor, memory: Tensor | None, fast: Tensor,
        h_task: Tensor,
    ) -> None:  # fmt: skip
        (B, _, R), C = fast.shape, h_task.shape[1]
        self.trigger, self.bank, self.C, self.h_task = updater.trigger, bank, (C,), h_task
        task = x.split(updater.sections, dim=1)[5]
        self.q, self.k, self.v = task.split(C, dim=1)
        self.weight = bank.weight.view(C, C * R)
        projected = x.new_empty(B, 2, C, R)
        rows = projected.flatten(2)
        if B == 1:
            self.products = [(task[0, : 2 * C].view(2, C), rows[0])]
        else:
            self.products = [(self.q, rows[:, 0]), (self.k, rows[:, 1])]
        self.U_q, self.U_k = projected.unbind(1)
        self.U_k_mT = self.U_k.mT
        self.step = x.new_zeros(B, 4, R) if memory is None else memory
        self.step_w, self.step_others = self.step[:, 0], self.step[:, 1:].flatten(1)
        self.gradient = x.new_empty(B, R, 1)
        self.gradient_w = self.gradient[:, :, 0]
        self.fast, self.fast_w, self.fast_others = fast, fast[:, 0, :, None], fast[:, 1:].flatten(1)
        self.forms = x.new_zeros(3 * R, 3 * C)
        applied = x.new_empty(B, 3 * C)
        self.applied, (self.scale, bias, self.shift) = applied, applied.split(C, dim=1)
        self.bias, z = bias[:, :, None], x.new_empty(B, C, 1)
        self.z, self.z_row = z, z[:, :, 0]
        self.vectors = x.new_empty(B, 3 * C)
        self.e_n, self.delta, self.e = self.vectors.split(C, dim=1)
        self.delta_column = self.delta[:, :, None]

    def refresh(self) -> None:
        C, R = self.bank.gain.shape
        for part, form in enumerate((self.bank.gain, self.bank.bias, self.bank.shift)):
            self.forms[part * R : (part + 1) * R, part * C : (part + 1) * C] = form.T
        self.lr, self.decay = float(self.trigger.lr), float(self.trigger.decay)
        self.decay = self.decay if self.trigger.has_memory else 0.0

    def __call__(self) -> None:
        for task, projected in self.products:
            torch.mm(task, self.weight, out=projected)
        if self.trigger.enabled:
            self._descend()
        n, _ = self._normalised(self.U_q)
        torch.addcmul(self.q, self.scale, n, out=self.h_task).add_(self.shift)

    def _normalised(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """n `[B, C]` and 1 / s `[B, 1]` of `nirvana.ops.trigger_apply`, with gain p_g in `scale`
        and shift p_s in `shift`."""
        torch.mm(self.fast_others, self.forms, out=self.applied)
        torch.baddbmm(self.bias, U, self.fast_w, out=self.z)
        n, self.mean, inverse = torch.native_layer_norm(self.z_row, self.C, None, None, TRIGGER_EPS)
        return n, inverse

    def _descend(self) -> None:
        """The gradient of `nirvana.ops.trigger_gradient`, into the memory, and the step."""
        n, inverse = self._normalised(self.U_k)
        e = torch.sub(self.k, self.v, out=self.e).add_(self.shift).addcmul_(self.scale, n)
        torch.mul(e, n, out=self.e_n)
        u = self.scale.mul_(e)
        if self.trigger.exact:
            given = u, self.z_row, self.C, self.mean, inverse, None, None, [True, False, False]
            self.delta.copy_(torch.ops.aten.native_layer_norm_backward(*given)[0])
        else:
            torch.mul(u, inverse, out=self.delta)
        # A batched product adds to contiguous tensors only without a loop over the batch.
        torch.bmm(self.U_k_mT, self.delta_column, out=self.gradient)
        torch.add(self.gradient_w, self.step_w, alpha=self.decay, out=self.step_w)
        self.step_others.addmm_(self.vectors, self.forms.T, beta=self.decay)
        self.fast.add_(self.step, alpha=-self.lr)
