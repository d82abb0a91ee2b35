"""What both steps of one token require of a model, in terms of the model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from nirvana.model.attention import QKV, RMSNorm
from nirvana.model.block import NirvanaBlock, SwiGLU
from nirvana.model.nirvana import NirvanaModel
from nirvana.model.trigger import NoBank, Trigger, WeightBank
from nirvana.model.updater import Updater

PLAIN = frozenset(
    [
        *(nn.Linear, nn.Embedding, nn.ModuleList, nn.Sequential, nn.SiLU, RMSNorm, QKV, SwiGLU),
        *(NirvanaModel, NirvanaBlock, Updater, Trigger, WeightBank, NoBank),
    ]
)
"""The classes of the parts of a model with linear branches. A step reads their weights, and an
adapter, a wrapper or a quantised layer computes more than those."""


def model_refusal(model: Any, taken: Mapping[str, bool]) -> str | None:
    """Why a step does not take a model, whatever its device and dtype: the first setting that the
    step does not compute, with its value, or parts of other classes, or dropped window branches.

    Args:
        model: a `NirvanaForCausalLM`.
        taken: whether the step computes the value that the model has of each of these settings.

    Returns:
        The reason, with the model as "it"; None where there is none.
    """
    for name, computed in taken.items():
        if not computed:
            return f"it has {name} = {getattr(model.config, name)!r}"
    if any(type(part) not in PLAIN for part in model.modules() if part is not model):
        return "it has adapters, or quantised or replaced layers"
    if any(layer.updater.window_kept is not None for layer in model.model.layers):
        return "it drops window branches"
    return None
