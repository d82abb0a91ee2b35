"""What the documentation names exists: files, headings, commands, options and settings."""

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import nirvana
import nirvana.adapt
import nirvana.mri
import nirvana.ops
from nirvana.cli import app
from nirvana.config import load_config
from nirvana.packaged import config_file
from nirvana.train.config import LanguageConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        ROOT / "benchmarks" / "LOG.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs").glob("concepts/*.md"),
        *(ROOT / "docs").glob("tutorials/*.md"),
        *(ROOT / "experiments").glob("*/*.md"),
        *(ROOT / "src/nirvana/assets").glob("*/README.md"),
    ]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PROGRAM = re.compile(r"(?:^\s*(?:\$ )?nirvana|\$\(which nirvana\)\"?) (?=[a-z-])(.*)")
TEST = re.compile(r"tests/[\w/]+\.py(?:::\w+)?(?:`, `test_\w+(?!\w*\.py)\b)*")
PLANNED = {"--processes": 1, "--device-name": 1}
"""Options of a dry run, and the number of their values."""
NAMES = {page.relative_to(ROOT).as_posix(): page for page in PAGES}


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def commands(text: str) -> list[str]:
    """The command lines of `nirvana` in a page's code blocks, lines that end in \\ joined."""
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, flags=re.M | re.S)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    found = [PROGRAM.search(line.partition(" # ")[0].partition(";")[0]) for line in lines]
    return [match.group(1).strip() for match in found if match]


def refusal(words: list[str]) -> str | None:
    """Why the program would refuse a command line of which files need not exist; None: it would
    not."""
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        if name.startswith("-"):
            return None if name in options(command) else f"no option {name}"
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    known = options(command)
    for word in words:
        option = word.partition("=")[0]
        if word.startswith("--") and option not in known and not is_setting(command, option):
            return f"{command.name} has no option {option}"
    return None


def options(command: Any) -> set[str]:
    names = {"--help", "-h"}
    for parameter in command.params:
        names |= {*parameter.opts, *parameter.secondary_opts}
    return names


def is_setting(command: Any, option: str) -> bool:
    """Whether a training takes the option as a setting of its configuration."""
    return bool(command.context_settings.get("ignore_unknown_options")) and "." in option


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = NAMES[name]
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = page if not file else page.parent / file
        assert found.exists(), f"{target}: no such file"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found.read_text(encoding="utf-8")), (
                f"{target}: no such heading"
            )


@pytest.mark.parametrize("name", NAMES)
def test_named_tests_exist(name):
    """Files of tests, and the functions that follow them: `tests/a.py::test_b`, `test_c`."""
    for named in TEST.findall(NAMES[name].read_text(encoding="utf-8")):
        file, *functions = re.findall(r"tests/[\w/]+\.py|test_\w+(?!\w*\.py)", named)
        assert (ROOT / file).is_file(), f"{file}: no such file"
        code = (ROOT / file).read_text(encoding="utf-8")
        for function in functions:
            assert f"def {function}(" in code, f"{file} has no {function}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name):
    for line in commands(NAMES[name].read_text(encoding="utf-8")):
        reason = refusal(shlex.split(line.replace("[...]", "").rstrip("\\")))
        assert reason is None, f"nirvana {line}: {reason}"


def test_named_configurations_and_settings_exist():
    """`nirvana train NAME --section.key value` in the documentation is accepted as written."""
    checked = 0
    for page in NAMES.values():
        for line in commands(page.read_text(encoding="utf-8")):
            words = shlex.split(line.rstrip("\\"))
            if words[0] != "train" or not re.fullmatch(r"[\w.-]+", words[1]) or "..." in line:
                continue
            settings = words[2:]
            for option, values in (("--resume", 0), ("--dry-run", 0), *PLANNED.items()):
                if option in settings:
                    at = settings.index(option)
                    del settings[at : at + 1 + values]
            if words[1].isupper() or words[1].endswith(".toml"):
                continue
            load_config(LanguageConfig, config_file(words[1]), settings)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize(
    "package", [nirvana, nirvana.adapt, nirvana.mri, nirvana.ops], ids=lambda p: p.__name__
)
def test_the_reference_holds_every_public_name(package):
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.rst"))
    whole = re.findall(r"automodule:: (\S+)\n   :members:\n", pages)
    for name in package.__all__:
        homes = {package.__name__, getattr(getattr(package, name), "__module__", None)}
        alone = re.search(rf":: {re.escape(package.__name__)}\.{name}$", pages, flags=re.M)
        assert alone or homes & set(whole), f"{package.__name__}.{name} is on no page of docs/api"


def test_the_drawings_are_those_of_their_program(tmp_path):
    """`make figures` was run; another version of Matplotlib may draw them otherwise."""
    matplotlib = pytest.importorskip("matplotlib")
    runpy.run_path(str(ROOT / "docs" / "figures" / "concepts.py"))["draw"](tmp_path)
    committed = ROOT / "docs" / "images"
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in committed.glob("*.svg")}
    for path in tmp_path.iterdir():
        text = (committed / path.name).read_text("utf-8")
        if f"v{matplotlib.__version__}," in text:
            assert path.read_text("utf-8") == text, f"{path.name}: run make figures"


def test_wrong_commands_are_found():
    """The checks above can fail."""
    page = "    nirvana trian tiny\n    nirvana eval tiny --date FILE   # no such option\n"
    assert [refusal(shlex.split(line)) for line in commands(page)] == [
        "no command trian",
        "eval has no option --date",
    ]
    assert anchors("# One GPU, or two\n") == {"one-gpu-or-two"}
