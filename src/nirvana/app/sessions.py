"""Sessions: what each browser tab uploaded and computed, in a folder that is removed with it."""

import secrets
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nirvana.errors import InputError

UPLOADS = "uploads"


@dataclass
class Session:
    """One browser tab.

    Attributes:
        folder: of its files; its name cannot be guessed.
        scan: the uploaded file that is read, or None for the example.
        results: room -> what was computed there last.
        cached: Gradio's copies of the uploads, with the numbers of their inodes: their names follow
            from their contents, so another tab's upload may take the place of a copy.
        stop: set when the work of the session is to stop.
        closed: whether the tab is gone: nothing may be written any more.
        used: when it was used last, by `time.monotonic`.
        uploads: number of uploads so far.
    """

    folder: Path
    scan: Path | None = None
    results: dict[str, Any] = field(default_factory=dict)
    cached: dict[Path, int] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    closed: bool = False
    used: float = field(default_factory=time.monotonic)
    uploads: int = 0

    def new_folder(self, name: str) -> Path:
        """An empty folder for results, in place of an earlier one.

        Raises:
            InputError: the session was closed.
        """
        if self.closed:
            raise InputError("the page was closed")
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def close(self) -> None:
        """Forgets the results and removes the files."""
        self.closed = True
        self.stop.set()
        self.results.clear()
        self.scan = None
        shutil.rmtree(self.folder, ignore_errors=True)
        for file, inode in self.cached.items():  # each in a folder of its own
            with suppress(OSError):
                if file.stat().st_ino == inode:
                    file.unlink()
                    file.parent.rmdir()


class Sessions:
    """The open sessions.

    Args:
        root: folder in which theirs are made.
        most: sessions at once.
        idle_seconds: after which an unused one is closed.
    """

    def __init__(self, root: Path, most: int, idle_seconds: float) -> None:
        self.root, self.most, self.idle_seconds = root, most, idle_seconds
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, key: str) -> Session:
        """The session of a browser tab, a new one if it has none.

        Args:
            key: Gradio's name of the tab.

        Raises:
            InputError: too many are open.
        """
        with self._lock:
            self._close_idle()
            if key not in self._open:
                if len(self._open) >= self.most:
                    raise InputError(
                        f"{self.most} people use this page, which is its limit; try again later"
                    )
                folder = self.root / secrets.token_hex(16)
                folder.mkdir(mode=0o700, parents=True)
                self._open[key] = Session(folder)
            session = self._open[key]
            session.used = time.monotonic()
            return session

    def close(self, key: str) -> None:
        """Closes the session of a tab, if it has one."""
        with self._lock:
            session = self._open.pop(key, None)
        if session is not None:
            session.close()

    def close_all(self) -> None:
        """Closes every session."""
        for key in list(self._open):
            self.close(key)

    def _close_idle(self) -> None:
        oldest = time.monotonic() - self.idle_seconds
        for key in [key for key, session in self._open.items() if session.used < oldest]:
            self._open.pop(key).close()
