"""Nirvana (arXiv 2510.26083): a language model that adapts to every sample while it reads it.

Importing the package makes its models known to transformers' Auto classes. The model classes are
imported when they are first asked for, so that the import stays quick.
"""

from typing import TYPE_CHECKING, Any

from nirvana import _auto
from nirvana.errors import InputError
from nirvana.model.config import NirvanaConfig, preset
from nirvana.model.trigger import without_trigger

if TYPE_CHECKING:
    from nirvana.model.nirvana import NirvanaForCausalLM, NirvanaModel

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "NirvanaConfig",
    "NirvanaForCausalLM",
    "NirvanaModel",
    "preset",
    "without_trigger",
]

_auto.register()


def __getattr__(name: str) -> Any:
    return _auto.model_class(name)
