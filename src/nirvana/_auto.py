"""Makes the models known to transformers' Auto classes without importing what these need.

transformers' modelling code takes two seconds to import. The Auto model classes live in one of its
modules, so the registration waits until somebody imports that module, if anybody does.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from transformers import AutoConfig

from nirvana.model.config import NirvanaConfig

AUTO_MODELS = "transformers.models.auto.modeling_auto"
MODELS = "nirvana.model.nirvana"
"""Registers its models itself when it is imported."""


def register() -> None:
    """Registers the configuration now, and the models now or when `AUTO_MODELS` is imported."""
    AutoConfig.register(NirvanaConfig.model_type, NirvanaConfig, exist_ok=True)
    if AUTO_MODELS in sys.modules:
        importlib.import_module(MODELS)
    else:
        sys.meta_path.insert(0, _WhenAutoModelsAreImported())


class _WhenAutoModelsAreImported(MetaPathFinder):
    """Finds that one module as ever, but with a loader that registers our models behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(MODELS)
