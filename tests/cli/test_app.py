"""`nirvana app` as a program: its refusals, and that nothing is left of it."""

import builtins
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nirvana import cli

PROGRAM = [sys.executable, "-m", "nirvana", "app"]
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs the extra app"
)


def refusal(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["nirvana", "app", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_without_its_extra_the_command_names_it(monkeypatch, capsys):
    real = builtins.__import__

    def without_gradio(name, *rest, **more):
        if name.partition(".")[0] == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_gradio)
    assert "pip install 'nirvana[app]'" in refusal(monkeypatch, capsys)


def test_a_wrong_model_is_refused_at_once(monkeypatch, capsys):
    assert "no MRI codec 'nowhere'" in refusal(monkeypatch, capsys, "--codec", "nowhere")
    assert "no MRI reporter 'codec'" in refusal(monkeypatch, capsys, "--reporter", "codec")
    assert "no language model 'none'" in refusal(monkeypatch, capsys, "--model", "none")


@needs_gradio
def test_wrong_limits_and_a_port_in_use_are_refused(monkeypatch, capsys):
    assert "max_mb" in refusal(monkeypatch, capsys, "--max-mb", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be listened on" in refusal(
            monkeypatch, capsys, "--port", port
        )


@needs_gradio
@pytest.mark.slow
def test_the_page_is_served_and_nothing_is_left(tmp_path: Path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    command = [*PROGRAM, "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        address = program.stdout.readline().split()[0].replace("0.0.0.0", "127.0.0.1")
        with urllib.request.urlopen(address) as page:
            text = page.read().decode()
        assert "Nirvana" in text
        for elsewhere in ("file=http://127.0.0.1:9/a", "proxy=https://a.hf.space/b"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}gradio_api/{elsewhere}")
        assert list(tmp_path.iterdir())
        program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=60)
    assert program.returncode == 0
    assert "everyone who reaches 0.0.0.0 can use this page" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@needs_gradio
def test_a_slow_computer_may_answer_late(monkeypatch, tmp_path: Path):
    """Gradio requests its own page, and raises if there is no answer within three seconds."""
    from gradio import networking

    from nirvana.app.config import AppConfig
    from nirvana.app.server import served

    monkeypatch.setattr(networking, "url_ok", lambda address: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")
    with served(AppConfig(), port=0) as address:
        assert os.environ["no_proxy"] == "example.org,127.0.0.1,localhost,::1"
        assert address.startswith("http://127.0.0.1:")
    assert "no_proxy" not in os.environ
    assert list(tmp_path.iterdir()) == []
