"""The program, called in this process."""

import sys

import pytest

from nirvana.cli import main


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Calls the program in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["nirvana", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call
