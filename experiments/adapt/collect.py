"""Collects the domains that no training saw from files that Debian's packages carry.

    python -m experiments.adapt.collect [--out FOLDER]

Downloads the packages of `domains.py` with apt-get, unpacks them beside each other, and writes one
`<domain>.jsonl.xz` for each. Nothing is installed.
"""

import gzip
import json
import lzma
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.adapt.data import FOLDER, order
from experiments.adapt.domains import UNSEEN, VALIDATION, Source
from experiments.common.program import make_parser
from nirvana.errors import InputError, script
from nirvana.files import atomic_file

MACRO = re.compile(r"^[.'][ \t]*(\\\"|[A-Za-z]*)[ \t]*", re.M)
COMMENT = re.compile(r"^[.'][ \t]*\\\".*\n", re.M)
ESCAPES = ((r"\\-", "-"), (r"\\f(?:[BIPRC]|\(..|\[[A-Z]*\])", ""), (r"\\&|\\/|\\,|\\%", ""))
LARGEST = 400_000  # characters of a document at most: 32,768 tokens are fewer
SMALLEST = 6_000  # and at least: 4,096 tokens are more
MOST = 400  # documents of a domain, the first by the SHA-256 of their text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.adapt.collect", __doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "texts")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for domain, source in {**UNSEEN, **VALIDATION}.items():
            folder = Path(name) / domain
            folder.mkdir()
            _unpack(source.package, folder)
            rows = [
                {"id": file, "source": source.package, "licence": source.licence, "text": text}
                for file, text in sorted(
                    documents(folder, source), key=lambda each: order(each[1])
                )[:MOST]
            ]
            if not rows:
                raise InputError(f"{source.package} has no file {source.pattern}")
            with atomic_file(options.out / f"{domain}.jsonl.xz") as path:
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                path.write_bytes(lzma.compress(lines.encode()))
            print(f"{domain}: {len(rows):,} documents, {sum(len(r['text']) for r in rows):,} bytes")


def _unpack(package: str, folder: Path) -> None:
    """Downloads a package and unpacks its files, without installing it."""
    fetch = subprocess.run(
        ["apt-get", "download", package], cwd=folder, capture_output=True, text=True
    )
    if fetch.returncode != 0:
        raise InputError(f"{package} cannot be downloaded: {fetch.stderr.strip()}")
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)


def documents(folder: Path, source: Source) -> Iterator[tuple[str, str]]:
    """The documents of an unpacked package, sorted by name: (name, text).

    Args:
        folder: of the package.
        source: which files.

    Yields:
        each document of valid UTF-8; a longer file is cut, at ends of lines.
    """
    for file in sorted(folder.glob(source.pattern)):
        if file.is_symlink() or not file.is_file():
            continue
        content = file.read_bytes()
        try:
            text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
        except UnicodeDecodeError:
            continue
        name = str(file.relative_to(folder))
        text = plain(text) if source.manual else text
        for number, piece in enumerate(_pieces(text, source.piece)):
            yield f"{name}#{number}" if source.piece else name, piece


def plain(text: str) -> str:
    """A manual page without its roff markup.

    Args:
        text: the page's source.

    Returns:
        its text, one line for each of the source.
    """
    text = MACRO.sub("", COMMENT.sub("", text))
    for pattern, replacement in ESCAPES:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _pieces(text: str, size: int) -> Iterator[str]:
    if not size:
        if len(text) >= SMALLEST:
            yield text[:LARGEST]
        return
    start = 0
    while start < len(text):
        stop = text.find("\n", start + size) + 1 or len(text)
        yield text[start:stop]
        start = stop


if __name__ == "__main__":
    script(main)
