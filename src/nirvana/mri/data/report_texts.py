"""Texts of reports that a training reads from a file of JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path

from nirvana.errors import InputError
from nirvana.files import decode_utf8

Reports = Mapping[tuple[str, int | None], str]
"""(file name of a volume, index of a slice or None for all of its slices) -> report."""


def read_reports(path: str | Path) -> dict[tuple[str, int | None], str]:
    """Reads lines `{"volume": file name, "slice": index, "report": text}`.

    A line without "slice" holds for every slice of the volume that has no line of its own.

    Raises:
        InputError: the file is missing or not UTF-8, or a line has another form.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of reports")
    reports: dict[tuple[str, int | None], str] = {}
    for number, line in enumerate(decode_utf8(path.read_bytes(), path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            volume, where, text = entry["volume"], entry.get("slice"), entry["report"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            volume, where, text = None, None, None
        if not (isinstance(volume, str) and isinstance(text, str)) or not (
            where is None or type(where) is int
        ):
            raise InputError(
                f'{path}, line {number}: must be {{"volume": name, "slice": n, "report": text}}'
            )
        reports[volume, where] = text
    return reports


def report_of(reports: Reports, file: Path, index: int) -> str:
    """The report of a file's slice.

    Raises:
        InputError: the slice has none.
    """
    text = reports.get((file.name, index), reports.get((file.name, None)))
    if text is None:
        raise InputError(f"{file}: slice {index} has no report")
    return text
