"""The form of every program of the studies.

A module that can be run has `main(arguments=None)`, builds its options with `make_parser`, and ends
in (`script` is that of `nirvana.errors`)

    if __name__ == "__main__":
        script(main)
"""

import argparse
from pathlib import Path

from nirvana.files import atomic_file


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser of a program's options.

    Args:
        module: the full name of the program's module, for the help.
        doc: its docstring, whose first line describes the program.
    """
    summary = (doc or "").strip().partition("\n")[0]
    return argparse.ArgumentParser(prog=f"python -m {module}", description=summary)


def write_page(path: Path, text: str) -> None:
    """Writes a results page whole, or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(path)
