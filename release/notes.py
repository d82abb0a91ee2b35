"""Checks that everything names the version of a tag, and prints the text of the release.

python release/notes.py v0.1.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d{2}-\d{2}))?$", re.M)


def versions() -> dict[str, str]:
    """The version that each file names."""
    places = {
        "src/nirvana/__init__.py": r'^__version__ = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "release/conda/recipe.yaml": r'^  version: "(.+)"$',
    }
    found = {}
    for file, pattern in places.items():
        match = re.search(pattern, (ROOT / file).read_text("utf-8"), flags=re.M)
        if match is None:
            raise SystemExit(f"{file} names no version")
        found[file] = match[1]
    return found


def changes(version: str, changelog: str) -> tuple[str, str]:
    """The date and the text of a version in the changelog.

    Raises:
        SystemExit: the version has no section, no date or no text.
    """
    sections = list(HEADING.finditer(changelog))
    for i, section in enumerate(sections):
        if section["version"] != version:
            continue
        end = sections[i + 1].start() if i + 1 < len(sections) else len(changelog)
        text = changelog[section.end() : end].strip()
        if section["date"] and text:
            return section["date"], text
        raise SystemExit(f"CHANGELOG.md: the section of {version} needs a date and a text")
    raise SystemExit(f"CHANGELOG.md has no section of {version}")


def notes(tag: str) -> str:
    """The text of a release.

    Raises:
        SystemExit: a file names another version or another date than the tag.
    """
    version = tag.removeprefix("v")
    for file, found in versions().items():
        if found != version or not tag.startswith("v"):
            raise SystemExit(f"the tag is {tag}, {file} has {found}")
    date, text = changes(version, (ROOT / "CHANGELOG.md").read_text("utf-8"))
    if f"date-released: {date}\n" not in (ROOT / "CITATION.cff").read_text("utf-8"):
        raise SystemExit(f"CITATION.cff: date-released must be {date}, as in CHANGELOG.md")
    return f"nirvana {version}\n\n{text}\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit((__doc__ or "").strip())
    print(notes(sys.argv[1]), end="")
