"""Runs the tutorials, and puts the numbers that they print into their pages.

python docs/figures/tutorials.py

Lines of a page and printed lines belong together where they differ in numbers alone; where a page
shows a line that is not printed, the program ends with an error and the page stays as it is.
"""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from nirvana.cli import main

TUTORIALS = Path(__file__).parents[1] / "tutorials"
BLOCK = re.compile(r"^```(console|python|text)\n(.*?)^```$", flags=re.M | re.S)
WORD = re.compile(r"\S+")
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
    """Runs a command of `nirvana` in this process, or a program in the namespace of the page.

    Raises:
        RuntimeError: the command failed.
    """
    printed = io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if not block.startswith("$ "):
            exec(block, names)
            return printed.getvalue()
        words = shlex.split(block[2:])
        assert words[0] == "nirvana", f"{block}: only nirvana is run"
        with mock.patch.object(sys, "argv", words):
            try:
                main()
            except SystemExit as stopped:
                code = stopped.code
    if code:
        raise RuntimeError(f"{block}\n{printed.getvalue()}")
    return printed.getvalue()


def number(word: str) -> float | None:
    """The number that a word is, or None."""
    try:
        return float(word.replace(",", "").strip("()%"))
    except ValueError:
        return None


def same(shown: str, printed: str, tolerance: float = TOLERANCE) -> bool:
    """Whether a line of the page is a printed one, numbers within the tolerance."""
    left, right = shown.split(), printed.split()
    if len(left) != len(right):
        return False
    for expected, found in zip(left, right, strict=True):
        a, b = number(expected), number(found)
        near = a is not None and b is not None and abs(a - b) <= tolerance * max(abs(a), abs(b))
        if expected not in (ANY, found) and not near:
            return False
    return True


def matches(
    shown: str, printed: str, tolerance: float = TOLERANCE
) -> Iterator[tuple[str, str | None]]:
    """The lines of the page, each with the printed line that it is, in the page's order, or None;
    the first None is the last."""
    lines = iter(printed.splitlines())
    for line in filter(str.strip, shown.splitlines()):
        found = next((each for each in lines if same(line, each, tolerance)), None)
        yield line, found
        if found is None:
            return


def missing(shown: str, printed: str, tolerance: float = TOLERANCE) -> str | None:
    """The first line of the page that is not printed."""
    return next((line for line, found in matches(shown, printed, tolerance) if found is None), None)


def renewed(shown: str, printed: str) -> str:
    """A shown line with the numbers of the printed one, in the places of its own."""
    words = iter(printed.split())

    def replaced(match: re.Match[str]) -> str:
        word = next(words)
        return match[0] if match[0] == ANY else word.rjust(len(match[0]))

    return WORD.sub(replaced, shown)


def renew(page: Path) -> None:
    """Runs a tutorial in an empty folder and renews the numbers that its page shows.

    Raises:
        RuntimeError: a command failed, or a line of the page is not printed.
    """
    text = page.read_text(encoding="utf-8")
    names: dict = {}
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block, shown in blocks(text):
            printed = run(block, names)
            for line, found in matches(shown, printed, tolerance=float("inf")):
                if found is None:
                    raise RuntimeError(f"{page.name}: {block}\nshows: {line}\nprinted:\n{printed}")
                text = text.replace(line, renewed(line, found))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    for path in sorted(TUTORIALS.glob("*.md")):
        renew(path)
