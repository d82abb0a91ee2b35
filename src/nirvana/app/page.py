"""The page: its rooms, its sessions, and what a callback does with errors."""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from nirvana.app.config import AppConfig
from nirvana.app.sessions import Session, Sessions
from nirvana.app.uploads import without_folders
from nirvana.app.work import Models, Watch
from nirvana.errors import InputError

log = logging.getLogger(__name__)

TITLE = "Nirvana"
FAULT = "This is a fault of the program, not of the input; its terminal shows it."
QUEUE_SIZE = 200
VIEWS_AT_ONCE = 4
CLEAN_EVERY, CACHE_SECONDS = 60, 300
"""Seconds after which Gradio looks for uploads that no session took, and their age then."""
STYLE = """
.pictures { overflow-x: auto; }
.pictures .grid { display: grid; gap: 6px; }
.pictures figure { margin: 0; min-width: 0; }
.pictures figcaption { font-size: 0.8rem; text-align: center; overflow-wrap: anywhere; }
.pictures figcaption.name { font-weight: 600; }
.picture { position: relative; background: #000; }
.picture img { width: 100%; display: block; max-height: 70vh; object-fit: contain; }
.picture .side { position: absolute; top: 45%; left: 4px; color: #fff; text-shadow: 0 0 3px #000; }
.picture .side.right { left: auto; right: 4px; }
.scale { display: flex; gap: 8px; align-items: center; font-size: 0.85rem; margin: 8px 0; }
.scale .bar { flex: 0 1 240px; height: 12px; }
.tokens { white-space: pre-wrap; font-family: monospace; line-height: 1.7; max-height: 45vh;
  overflow: auto; overflow-wrap: anywhere; }
.tokens mark { border-radius: 2px; }
.scores { overflow-x: auto; }
.scores table { border-collapse: collapse; font-size: 0.85rem; }
.scores th, .scores td { padding: 2px 12px 2px 0; text-align: left; border: 0;
  border-bottom: 1px solid var(--border-color-primary); }
.note { font-size: 0.85rem; overflow-wrap: anywhere; }
"""


class Page:
    """What the callbacks of a page share.

    Args:
        config: what is served, and its limits.
        root: folder of all that the page keeps while it runs.
    """

    def __init__(self, config: AppConfig, root: Path) -> None:
        self.config = config
        self.models = Models(config)
        self.sessions = Sessions(root, config.max_sessions, 60 * config.idle_minutes)

    @contextmanager
    def session(self, request: gr.Request) -> Iterator[Session]:
        """The session of a request. Wrong input becomes one line in the page; of anything else the
        page shows nothing, and the terminal all.

        Args:
            request: Gradio's.

        Raises:
            gr.Error: in place of every exception of the block.
        """
        session = None
        try:
            session = self.sessions.of(str(request.session_hash))
            yield session
        except gr.Error:
            raise
        except InputError as error:
            line = " ".join(str(error).split())
            if session is not None:
                line = without_folders(line, session)
            raise gr.Error(html.escape(line), duration=None, print_exception=False) from None
        except Exception as error:
            log.exception("a callback of the page failed")
            raise gr.Error(FAULT, duration=None, print_exception=False) from error

    @contextmanager
    def work(self, request: gr.Request, progress: Any = None) -> Iterator[tuple[Session, Watch]]:
        """As `session`, with the limits of work and, until the block ends, the models alone.

        Args:
            request: Gradio's.
            progress: Gradio's, or None.

        Raises:
            gr.Error: see `session`.
        """
        with self.session(request) as session:
            watch = self.watch(session, progress)
            with self.models.in_use():
                yield session, watch

    def watch(self, session: Session, progress: Any = None) -> Watch:
        """Progress and limits of work for a session that begins now."""
        show = None if progress is None else lambda share, text: progress(share, desc=text)
        return Watch(session, self.config.max_seconds, show)

    def close(self, request: gr.Request) -> None:
        """Closes the session of a tab that is gone."""
        self.sessions.close(str(request.session_hash))


PROGRESS: Any = gr.Progress()
"""The default of a callback's argument by which it shows progress, as Gradio finds it."""
WORK_EVENT: dict[str, Any] = {
    "concurrency_id": "work",
    "concurrency_limit": 1,
    "api_visibility": "undocumented",
}
"""Arguments of an event that computes: one at a time, of all people."""
VIEW_EVENT: dict[str, Any] = {
    "concurrency_id": "view",
    "concurrency_limit": VIEWS_AT_ONCE,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
    "api_visibility": "undocumented",
}
"""Arguments of an event that shows another part of a result."""


def build(page: Page) -> gr.Blocks:
    """Lays out the page.

    Args:
        page: what its callbacks share.
    """
    from nirvana.app.report_room import report_room
    from nirvana.app.scan_room import scan_room
    from nirvana.app.text_room import text_room

    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(CLEAN_EVERY, CACHE_SECONDS)
    ) as blocks:
        gr.Markdown(
            "# Nirvana\nResearch software, not for diagnosis. Uploads stay on this computer and "
            "are removed when the tab is closed."
        )
        with gr.Tabs():
            scan_room(page)
            report_room(page)
            text_room(page)
        blocks.unload(page.close)
    blocks.queue(max_size=QUEUE_SIZE, default_concurrency_limit=VIEWS_AT_ONCE)
    return blocks
