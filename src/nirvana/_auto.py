"""Registers the models with transformers without importing transformers or torch.

Both take seconds to import, and transformers' modules import each other in circles, the Auto
classes among them. So each part of the registration runs when the module that it changes is
imported, and the model classes are imported when somebody looks them up.
"""

import importlib
import sys
from collections import UserDict
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIG_MODULE = "transformers.models.auto.configuration_auto"
AUTO_MODULE = "transformers.models.auto.modeling_auto"
MODELS = {
    "AutoModel": "NirvanaModel",
    "AutoModelForCausalLM": "NirvanaForCausalLM",
    "AutoModelForSequenceClassification": "NirvanaForSequenceClassification",
    "AutoModelForTokenClassification": "NirvanaForTokenClassification",
}
"""The class that each Auto class makes from a `NirvanaConfig`."""


def register() -> None:
    """Enters the configuration and the models wherever the library looks for its own, now or when
    the library is imported."""
    after_import("transformers", _add_names)
    after_import(CONFIG_MODULE, _register_config)
    after_import(AUTO_MODULE, _register_models)
    after_import("nirvana.model.nirvana", _set_decoder)


def after_import(module: str, action: Callable[[], Any]) -> None:
    """Runs `action` after the import of `module`: at once if it has been imported already."""
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(module, action))


def _add_names() -> None:
    """Makes the model classes attributes of `transformers`.

    Pipelines, the server and TRL take `getattr(transformers, config.architectures[0])`. The library
    runs its `__init__` twice, so that some modules hold another `transformers` than `sys.modules`
    does. These share their class and nothing else.
    """
    for name in MODELS.values():
        setattr(type(sys.modules["transformers"]), name, _LazyClass(name))


def _register_config() -> None:
    from nirvana.model.config import NirvanaConfig

    auto_config = sys.modules[CONFIG_MODULE].AutoConfig
    auto_config.register(NirvanaConfig.model_type, NirvanaConfig, exist_ok=True)


def _register_models() -> None:
    """Enters each model in both tables of its Auto class.

    `from_pretrained` reads the mapping from configuration to class. Label smoothing, pipelines,
    the server, model cards and lm_eval read the names from which the library makes that mapping
    (`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`); the library's own `register` leaves them as they are.
    """
    from nirvana.model.config import NirvanaConfig

    for auto_class, name in MODELS.items():
        mapping = getattr(sys.modules[AUTO_MODULE], auto_class)._model_mapping
        mapping._model_mapping[NirvanaConfig.model_type] = name
        mapping._extra_content = _Registered(mapping._extra_content)
        mapping._extra_content[NirvanaConfig] = name


def _set_decoder() -> None:
    """Hands the model the decoder of plain `generate`, which is made of the model's parts and so
    cannot be imported by it."""

    def decoder_for(model: Any, max_length: int) -> Any:
        module = importlib.import_module("nirvana.generate.graph_decoder")
        return module.cpu_decoder(model, max_length)

    model_class = sys.modules["nirvana.model.nirvana"].NirvanaForCausalLM
    model_class.decoder_for = staticmethod(decoder_for)


def _model_class(name: str) -> Any:
    module = "classification" if name.endswith("Classification") else "nirvana"
    return getattr(importlib.import_module(f"nirvana.model.{module}"), name)


class _LazyClass:
    """An attribute that is one of our model classes, imported when it is read."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: ModuleType | None, owner: type | None = None) -> Any:
        return _model_class(self.name)


class _Registered(UserDict):
    """What was registered in one mapping of the library; our models are imported when read."""

    def __getitem__(self, config: Any) -> Any:
        model = super().__getitem__(config)
        return _model_class(model) if isinstance(model, str) else model


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, with a loader that runs an action after loading."""

    def __init__(self, module: str, action: Callable[[], Any]):
        self.module = module
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        # Another action may wait for the same module: its finder, behind this one, comes next.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, which also reads its source and its data files.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            self.finder.action()
