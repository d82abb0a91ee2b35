"""Serves the page, and removes all that it kept when it ends."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nirvana.app.config import AppConfig
from nirvana.errors import InputError

ADDRESS = re.compile(r"(file|proxy)=[a-z]+:", re.IGNORECASE)
"""In a path: something elsewhere, which Gradio would fetch for a visitor."""
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
THREADS = 40
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LocalOnly:
    """Answers requests for something elsewhere with "not found", and passes all others on.

    Args:
        app: the server's, by ASGI.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and ADDRESS.search(scope["path"]):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, send)


@contextmanager
def served(config: AppConfig, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serves the page in the block.

    Args:
        config: what is served, and its limits.
        host: address to listen on.
        port: 0 takes a free one.

    Yields:
        The page's address.

    Raises:
        InputError: the port is in use, or the address is not one of this machine.
    """
    root = Path(tempfile.mkdtemp(prefix="nirvana-app-"))
    # Gradio reads these when it is imported, and when components are made. It requests its own page
    # to see whether it has started, which must not go through a proxy.
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK, host]
    names = {
        **OFFLINE,
        "GRADIO_TEMP_DIR": str(root / "uploads"),
        "no_proxy": ",".join(dict.fromkeys(filter(None, direct))),
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    blocks = page = None
    try:
        from gradio.themes import Default

        from nirvana.app.page import STYLE, Page, build

        page = Page(config, root / "uploads")
        blocks = build(page)
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port or free_port(host),
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                max_threads=THREADS,
                app_kwargs={"middleware": [(LocalOnly, (), {})]},
                max_file_size=config.max_bytes,
                state_session_capacity=config.max_sessions,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                show_error=False,
                _frontend=False,  # else a computer that answers after 3 s is an error
                theme=Default(),  # its fonts are the server's own files
                css=STYLE,
            )
        except OSError as error:
            raise InputError(
                f"{host}:{port} cannot be listened on ({error}); give another --port or --host"
            ) from error
        yield address
    finally:
        if blocks is not None:
            blocks.close(verbose=False)
        if page is not None:
            page.sessions.close_all()
        shutil.rmtree(root, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_port(host: str) -> int:
    """A port that nothing listens on now.

    Args:
        host: address to listen on.
    """
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
