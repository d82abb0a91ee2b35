"""Nirvana (arXiv 2510.26083): a language model that adapts to every sample while it reads it.

Importing the package registers its models with transformers' Auto classes, without importing
transformers or torch: both are imported on the first use of a name that needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nirvana import _auto
from nirvana.errors import InputError

if TYPE_CHECKING:
    from nirvana.model.assets import load_language_model as load
    from nirvana.model.classification import (
        NirvanaForSequenceClassification,
        NirvanaForTokenClassification,
    )
    from nirvana.model.config import NirvanaConfig, preset
    from nirvana.model.layer import NirvanaLayer
    from nirvana.model.nirvana import NirvanaForCausalLM, NirvanaModel
    from nirvana.model.state import State
    from nirvana.model.trigger import without_trigger

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "NirvanaConfig",
    "NirvanaForCausalLM",
    "NirvanaForSequenceClassification",
    "NirvanaForTokenClassification",
    "NirvanaLayer",
    "NirvanaModel",
    "State",
    "load",
    "preset",
    "without_trigger",
]

_LAZY = {
    "NirvanaConfig": ("nirvana.model.config", "NirvanaConfig"),
    "NirvanaForCausalLM": ("nirvana.model.nirvana", "NirvanaForCausalLM"),
    "NirvanaForSequenceClassification": (
        "nirvana.model.classification",
        "NirvanaForSequenceClassification",
    ),
    "NirvanaForTokenClassification": (
        "nirvana.model.classification",
        "NirvanaForTokenClassification",
    ),
    "NirvanaLayer": ("nirvana.model.layer", "NirvanaLayer"),
    "NirvanaModel": ("nirvana.model.nirvana", "NirvanaModel"),
    "State": ("nirvana.model.state", "State"),
    "load": ("nirvana.model.assets", "load_language_model"),
    "preset": ("nirvana.model.config", "preset"),
    "without_trigger": ("nirvana.model.trigger", "without_trigger"),
}
"""Where each public name is defined that is imported on first use."""

_auto.register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nirvana' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
