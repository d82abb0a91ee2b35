"""The commands and programs of the tutorials give what the pages show."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from nirvana.cli import main

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
BLOCK = re.compile(r"^```(console|python|text)\n(.*?)^```$", flags=re.M | re.S)
ANY = "…"
TOLERANCE = 0.03
"""Relative: what another version of torch or Python's reference changes."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks that are run, and what they print: `(command or program, shown output)`."""
    found: list[tuple[str, str]] = []
    for kind, text in BLOCK.findall(page):
        if kind == "text":
            program, shown = found.pop()
            assert not shown, "two outputs of one program"
            found.append((program, text))
        elif kind == "python":
            found.append((text, ""))
        else:
            for part in re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.M)[1:]:
                command, _, shown = part.partition("\n")
                found.append((f"$ {command}", shown))
    return found


def run(block: str, names: dict) -> str:
    """Runs a command of `nirvana` in this process, or a program in the namespace of the page."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if not block.startswith("$ "):
            exec(block, names)
            return printed.getvalue()
        code: object = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", shlex.split(block[2:]))
            assert sys.argv[0] == "nirvana", f"{block}: only nirvana is run"
            try:
                main()
            except SystemExit as stopped:
                code = stopped.code
    assert not code, f"{block}\n{printed.getvalue()}"
    return printed.getvalue()


def number(word: str) -> float | None:
    try:
        return float(word.replace(",", "").strip("()%"))
    except ValueError:
        return None


def same(shown: str, printed: str) -> bool:
    """Whether a line of the page is a printed one, numbers within the tolerance."""
    left, right = shown.split(), printed.split()
    if len(left) != len(right):
        return False
    for expected, found in zip(left, right, strict=True):
        a, b = number(expected), number(found)
        near = a is not None and b is not None and abs(a - b) <= TOLERANCE * max(abs(a), abs(b))
        if expected not in (ANY, found) and not near:
            return False
    return True


def missing(shown: str, printed: str) -> str | None:
    """The first line of the page that is not printed, in the page's order."""
    lines = iter(printed.splitlines())
    for line in filter(str.strip, shown.splitlines()):
        if not any(same(line, each) for each in lines):
            return line
    return None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(path.name for path in TUTORIALS.glob("*.md")))
def test_a_tutorial_gives_what_it_shows(name, tmp_path, monkeypatch):
    found = blocks((TUTORIALS / name).read_text(encoding="utf-8"))
    if name == "index.md":
        assert not found
        return
    assert len(found) > 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block, shown in found:
        printed = run(block, names)
        line = missing(shown, printed)
        assert line is None, f"{block}\nshows: {line}\nprinted:\n{printed}"


def test_a_wrong_page_is_found():
    page = "```console\n$ nirvana --version\nnirvana 0.1\n```\n\n"
    page += "```python\nprint(1)\n```\n\n```text\n2\n```\n"
    assert blocks(page) == [("$ nirvana --version", "nirvana 0.1\n"), ("print(1)\n", "2\n")]
    assert missing("a 1.00 …\n", "b\na 1.01 7\n") is None
    assert missing("a 1.00\n", "a 1.2\n") == "a 1.00"
    assert missing("b\na\n", "a\nb\n") == "a"
