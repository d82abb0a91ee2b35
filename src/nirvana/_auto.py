"""Registers the models with transformers without importing what they need.

transformers' modelling code takes two seconds to import, and its modules import each other in
circles, the Auto classes among them. So the models are entered by name when somebody imports the
Auto classes, and imported when somebody looks up the class.
"""

import importlib
import sys
from collections import UserDict
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from transformers import AutoConfig

from nirvana.model.config import NirvanaConfig

AUTO_MODULE = "transformers.models.auto.modeling_auto"
MODEL_MODULE = "nirvana.model.nirvana"
MODELS = {"AutoModel": "NirvanaModel", "AutoModelForCausalLM": "NirvanaForCausalLM"}
"""The class of `MODEL_MODULE` that each Auto class makes from a `NirvanaConfig`."""


def register() -> None:
    """Enters the configuration and the models wherever the library looks for its own."""
    AutoConfig.register(NirvanaConfig.model_type, NirvanaConfig, exist_ok=True)
    # Pipelines, the server and TRL take `getattr(transformers, config.architectures[0])`. The
    # library runs its `__init__` twice, so that some modules hold another `transformers` than
    # `sys.modules` does. These share their class and nothing else.
    for name in MODELS.values():
        setattr(type(sys.modules["transformers"]), name, _LazyClass(name))
    after_import(AUTO_MODULE, _register_models)


def model_class(name: str) -> Any:
    """Imports and returns the model class called `name`.

    Raises:
        AttributeError: unless `name` is in `MODELS`.
    """
    if name in MODELS.values():
        return getattr(importlib.import_module(MODEL_MODULE), name)
    raise AttributeError(f"module 'nirvana' has no attribute {name!r}")


def after_import(module: str, action: Callable[[], Any]) -> None:
    """Runs `action` behind the import of `module`: at once if that has been imported already."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(module, action))


def _register_models() -> None:
    """Enters each model in both tables of its Auto class.

    `from_pretrained` reads the mapping from configuration to class. Label smoothing, pipelines,
    the server, model cards and lm_eval read the names from which the library makes that mapping
    (`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`); the library's own `register` leaves them as they are.
    """
    for auto_class, name in MODELS.items():
        mapping = getattr(sys.modules[AUTO_MODULE], auto_class)._model_mapping
        mapping._model_mapping[NirvanaConfig.model_type] = name
        mapping._extra_content = _Registered(mapping._extra_content)
        mapping._extra_content[NirvanaConfig] = name


class _LazyClass:
    """An attribute that is one of our model classes, imported when it is read."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: ModuleType | None, owner: type | None = None) -> Any:
        return model_class(self.name)


class _Registered(UserDict):
    """What was registered in one mapping of the library; our models are imported when read."""

    def __getitem__(self, config: Any) -> Any:
        model = super().__getitem__(config)
        return model_class(model) if isinstance(model, str) else model


class _Finder(MetaPathFinder):
    """Finds one module as before, with a loader that runs an action when it has loaded it."""

    def __init__(self, module: str, action: Callable[[], Any]):
        self.module = module
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.module else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            self.finder.action()
