"""The callbacks of the page's rooms by name, called as Gradio calls them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

from nirvana.app.config import AppConfig
from nirvana.app.page import Page, build

CHOICE = ("equispaced", "4", 0.08, 0, "auto", "auto", "", "", "", "")
"""Values of the components that choose how a scan is undersampled and read."""
WINDOW = (50, 100, 1, 50, 50)


class Rooms:
    """A page without a server.

    Args:
        config: of the page.
        root: folder of its sessions.
    """

    def __init__(self, config: AppConfig, root: Path) -> None:
        self.root, self.page = root, Page(config, root)
        self.shown: list[tuple[float, str]] = []
        functions = build(self.page).fns.values()
        self._functions: dict[str, Callable[..., Any]] = {
            str(each.api_name): each.fn for each in functions if each.fn is not None
        }

    def call(self, name: str, tab: str, *values: Any) -> Any:
        """Runs a callback for a browser tab; of a generator the last result."""
        function = self._functions[name]
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        self.shown = []
        progress = (self._show,) if "progress" in names else ()
        result = function(SimpleNamespace(session_hash=tab), *progress, *values)
        if isinstance(result, Iterator):
            *_, result = result
        return result

    def upload(self, tab: str, *files: Path) -> Any:
        """Uploads copies of files in the room of scans."""
        self.root.mkdir(exist_ok=True)
        cache = Path(mkdtemp(dir=self.root, prefix="cache-"))
        copies = [str(shutil.copyfile(file, cache / file.name)) for file in files]
        return self.call("scan_upload", tab, copies)

    def reconstruct(self, tab: str, *methods: str, slices: str = "0") -> Any:
        """Reconstructs what the tab uploaded."""
        return self.call("reconstruct", tab, list(methods), slices, *WINDOW, *CHOICE)

    def _show(self, share: float, desc: str) -> None:
        self.shown.append((share, desc))
