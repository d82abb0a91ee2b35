"""A frozen model that adapts to each sample while it reads it.

    from nirvana.adapt import adapt

    sample = adapt(model, tokens)                # reads, scores and learns
    with sample.task.applied(model):
        model.generate(tokens)

The names are imported when they are first used, so that the import stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nirvana.adapt.adaptation import Adaptation, adapt, adapt_documents
    from nirvana.adapt.config import AdaptConfig
    from nirvana.adapt.task import Task, load_task, merge_tasks, save_task

__all__ = [
    "AdaptConfig",
    "Adaptation",
    "Task",
    "adapt",
    "adapt_documents",
    "load_task",
    "merge_tasks",
    "save_task",
]

_HOMES = {
    "AdaptConfig": "nirvana.adapt.config",
    "Adaptation": "nirvana.adapt.adaptation",
    "Task": "nirvana.adapt.task",
    "adapt": "nirvana.adapt.adaptation",
    "adapt_documents": "nirvana.adapt.adaptation",
    "load_task": "nirvana.adapt.task",
    "merge_tasks": "nirvana.adapt.task",
    "save_task": "nirvana.adapt.task",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nirvana.adapt' has no attribute {name!r}")
