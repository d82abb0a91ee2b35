"""The commands and programs of the tutorials give what the pages show."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
PROGRAM = runpy.run_path(str(ROOT / "docs" / "figures" / "tutorials.py"))
blocks, run, missing, renewed = (PROGRAM[n] for n in ("blocks", "run", "missing", "renewed"))


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
    # Their text is Python's own reference, of which each version has another.
    another = any("pydoc_data" in block for block, _ in found) and sys.version_info[:2] != (3, 11)
    tolerance = {"tolerance": float("inf")} if another else {}
    for block, shown in found:
        printed = run(block, names)
        line = missing(shown, printed, **tolerance)
        assert line is None, f"{block}\nshows: {line}\nprinted:\n{printed}"


def test_a_wrong_page_is_found():
    page = "```console\n$ nirvana --version\nnirvana 0.1\n```\n\n"
    page += "```python\nprint(1)\n```\n\n```text\n2\n```\n"
    assert blocks(page) == [("$ nirvana --version", "nirvana 0.1\n"), ("print(1)\n", "2\n")]
    assert missing("a 1.00 …\n", "b\na 1.01 7\n") is None
    assert missing("a 1.00\n", "a 1.2\n") == "a 1.00"
    assert missing("b\na\n", "a\nb\n") == "a"


def test_numbers_are_renewed_in_their_places():
    assert missing("a  1.00  …\n", "a 7.5 9\n", tolerance=float("inf")) is None
    assert missing("a  1.00\n", "b 7.5\n", tolerance=float("inf")) == "a  1.00"
    assert renewed("  a  1.00  …  12%", "a 7.5 9 8%") == "  a   7.5  …   8%"
    with pytest.raises(RuntimeError, match=r"(?i)no such command"):
        run("$ nirvana trian", {})
