"""What all work of the page has: models that are loaded once, a time limit, and its progress."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from nirvana.app.config import AppConfig
from nirvana.app.sessions import Session
from nirvana.errors import InputError

if TYPE_CHECKING:
    from nirvana.model.nirvana import NirvanaForCausalLM
    from nirvana.mri.model.codec import CodecModel
    from nirvana.mri.reports.reporter import Reporter

T = TypeVar("T")
ShowProgress = Callable[[float, str], None]
"""Called with the share of the work that is done, 0..1, and what is being done."""


class Models:
    """The models of the page, loaded when they are first used; one caller at a time uses them.

    Args:
        config: names and device.
    """

    def __init__(self, config: AppConfig) -> None:
        self.config = config
        self._loaded: dict[str, Any] = {}
        self._lock = threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator["Models"]:
        """Keeps other callers out: adaptation and seeds change what all of them would see."""
        with self._lock:
            yield self

    def codec(self) -> "CodecModel":
        """The codec that reconstructs."""
        from nirvana.mri.model.checkpoint import load_codec

        return self._load("codec", lambda: load_codec(self.config.codec, self.config.device))

    def reporter(self) -> "Reporter":
        """The codec that reports."""
        from nirvana.mri.reports.reporter import load_reporter

        return self._load(
            "reporter", lambda: load_reporter(self.config.reporter, self.config.device)
        )

    def language(self) -> "tuple[NirvanaForCausalLM, Any]":
        """The language model and its tokenizer."""
        from nirvana.model.assets import load_language_model

        return self._load(
            "model", lambda: load_language_model(self.config.model, self.config.device)
        )

    def _load(self, name: str, load: Callable[[], T]) -> T:
        if name not in self._loaded:
            self._loaded[name] = load()
        return self._loaded[name]


class Watch:
    """Shows progress, and stops work that takes too long or whose page was closed.

    Args:
        session: for which the work is done.
        seconds: after which it is stopped.
        progress: see `ShowProgress`; None shows nothing.
    """

    def __init__(
        self, session: Session, seconds: float, progress: ShowProgress | None = None
    ) -> None:
        self._session, self._seconds = session, seconds
        if not session.closed:
            session.stop.clear()
        self._end = time.monotonic() + seconds
        self._progress = progress or (lambda share, text: None)

    def check(self) -> None:
        """Raises an error if the work must stop.

        Raises:
            InputError: it takes too long, the user stopped it, or the page was closed.
        """
        if self._session.stop.is_set():
            raise InputError("stopped")
        if time.monotonic() > self._end:
            raise InputError(
                f"stopped after {self._seconds:g} seconds, the limit of --max-seconds; choose "
                "fewer slices, methods or tokens"
            )

    def show(self, text: str, share: float = 0.0) -> None:
        """Shows progress; see `check` for the errors."""
        self.check()
        self._session.used = time.monotonic()
        self._progress(min(1.0, share), text)

    def counter(self, text: str, total: int, first: float = 0.0, last: float = 1.0):
        """A counter of parts of the work.

        Args:
            text: what is being done.
            total: number of parts.
            first: share of the whole work that is done before.
            last: the same after it.

        Returns:
            A function that takes the number of parts that were just done.
        """
        done = 0
        self.show(text, first)

        def count(number: int) -> None:
            nonlocal done
            done += number
            share = done / max(total, 1)
            self.show(f"{text}: {done} of {total}", first + share * (last - first))

        return count
