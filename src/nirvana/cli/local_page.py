"""`nirvana app`: a local web page for scans, reports and text."""

import signal
import sys
import time
from contextlib import suppress
from typing import Annotated

import typer

from nirvana.cli.console import DeviceOption
from nirvana.packaged import resolve


def app(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 7860,
    codec: Annotated[
        str, typer.Option(help="Folder of the codec that reconstructs, or a packaged one's name.")
    ] = "codec",
    reporter: Annotated[
        str, typer.Option(help="Folder of the codec that reports, or a packaged one's name.")
    ] = "reporter",
    model: Annotated[
        str, typer.Option(help="Folder of the language model, or a packaged one's name.")
    ] = "tiny",
    max_mb: Annotated[
        int, typer.Option(help="MiB of a session's uploads, and of what is read of them.")
    ] = 512,
    max_seconds: Annotated[float, typer.Option(help="After which work is stopped.")] = 600.0,
    max_sessions: Annotated[int, typer.Option(help="Browser tabs at once.")] = 50,
    idle_minutes: Annotated[
        float, typer.Option(help="After which an unused session is closed.")
    ] = 60.0,
    device: DeviceOption = "auto",
) -> None:
    """Serves a web page on this computer: scans by several methods, reports, and text.

    Uploads are removed when their tab is closed; the page loads nothing from the network. Research
    software, not for diagnosis. Docs: docs/app.md.
    """
    resolve(codec, "MRI codec")
    resolve(reporter, "MRI reporter")
    resolve(model)

    from nirvana.app.config import AppConfig
    from nirvana.app.server import LOOPBACK, served
    from nirvana.device import choose_device

    config = AppConfig(
        codec=codec,
        reporter=reporter,
        model=model,
        device=str(choose_device(device)),
        max_mb=max_mb,
        max_seconds=max_seconds,
        max_sessions=max_sessions,
        idle_minutes=idle_minutes,
    )
    if host not in LOOPBACK:
        print(
            f"nirvana: note: everyone who reaches {host} can use this page and this computer's "
            "time; it has no password",
            file=sys.stderr,
        )
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with served(config, host, port) as address:
            print(f"{address}  (Ctrl-C ends it)", flush=True)
            with suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
