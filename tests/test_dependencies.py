"""What is imported is declared; what is declared has a range, and both its ends are tested."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from nirvana import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nirvana"
FOLDERS = ("src", "tests", "experiments", "benchmarks", "examples", "docs", "release")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Modules whose distribution need not be installed where these tests run.
OPTIONAL = {
    "cudnn": "nvidia-cudnn-frontend",
    "fla.models": "flash-linear-attention",
    "flash_qla": "flash-qla",
    "pyppmd": "pyppmd",
    "wandb": "wandb",
}

# Rooms that only who has an extra enters: their modules may import it on being imported.
ROOMS = {"app/": "app", "mri/": "mri", "evaluate/harness.py": "eval", "ops/cuda/": "cuda"}

# Declared although no module imports them: another package does on request.
INDIRECT = {"tensorboard": "torch.utils.tensorboard"}

# Extras of those who work on the package, not of its users.
WORK = ("dev", "docs")

CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
DECLARED = [*CORE, *(each for lines in EXTRAS.values() for each in lines)]


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


INSTALLED = packages_distributions()  # slow: it reads the lists of files of all distributions
SCRIPTS = sources(*FOLDERS[1:])  # they import each other by name, the package never does
OWN = {"nirvana", *(path.stem for path in SCRIPTS), *(path.parent.name for path in SCRIPTS)}


def imports(path: Path, *, at_once: bool = False) -> Iterator[str]:
    """The modules of other packages that a file imports.

    Args:
        at_once: only those that importing the file imports: none in a function, none for types.
    """
    own = {"nirvana"} if path.is_relative_to(PACKAGE) else OWN
    nodes: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for module in found:
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in own:
                yield module
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not (at_once and (function or for_types)):
            nodes.extend(ast.iter_child_nodes(node))


def distributions(module: str) -> set[str]:
    """The distributions that can bring a module."""
    for known, distribution in OPTIONAL.items():
        if module == known or module.startswith(f"{known}."):
            return {distribution}
    found = INSTALLED.get(module.partition(".")[0], ())
    return {canonicalize_name(name) for name in found}


def undeclared(path: Path, declared: set[str], *, at_once: bool = False) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for module in imports(path, at_once=at_once)
        if not distributions(module) & declared
    ]


def test_every_import_of_the_package_is_declared():
    """Some extra that a user can ask for brings what a module imports."""
    declared = names(
        [*CORE, *(each for extra in EXTRAS if extra not in WORK for each in EXTRAS[extra])]
    )
    assert not [line for path in sources("src") for line in undeclared(path, declared)]


def test_importing_a_module_needs_no_extra_of_another_room():
    lines = []
    for path in sources("src"):
        inside = path.relative_to(PACKAGE).as_posix()
        rooms = [extra for room, extra in ROOMS.items() if inside.startswith(room)]
        declared = names([*CORE, *(each for extra in rooms for each in EXTRAS[extra])])
        lines += undeclared(path, declared, at_once=True)
    assert not lines


def test_the_program_names_the_extra_of_a_missing_module():
    """Where an extra is not installed, a command ends with the line that installs it."""
    offered = {extra: names(EXTRAS[extra]) for extra in ("train", "mri", "eval", "app")}
    for module in {m for path in sources("src") for m in imports(path)}:
        extras = {extra for extra, given in offered.items() if distributions(module) & given}
        if extras:
            assert cli.EXTRAS[module.partition(".")[0]] in extras, module


def test_every_import_of_tests_and_scripts_is_declared():
    declared = names(DECLARED)
    assert not [line for path in SCRIPTS for line in undeclared(path, declared)]


def test_every_dependency_of_the_package_is_imported():
    used = {name for path in sources("src") for m in imports(path) for name in distributions(m)}
    for extra, requirements in {"": CORE, **EXTRAS}.items():
        if extra not in WORK:
            assert names(requirements) - set(INDIRECT) <= used, extra


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_a_range_has_two_ends(requirement):
    assert sorted(part.operator for part in requirement.specifier) == ["<", ">="]


def lowest(requirement: Requirement) -> Version:
    return next(Version(part.version) for part in requirement.specifier if part.operator == ">=")


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in found
    }


def test_the_lowest_versions_are_the_lower_ends():
    extras = ("train", "mri", "eval", "app", *WORK)
    tested = [*CORE, *(each for extra in extras for each in EXTRAS[extra])]
    assert pins("constraints-lowest.txt") == {
        canonicalize_name(requirement.name): lowest(requirement) for requirement in tested
    }


def test_a_dependency_has_the_same_range_everywhere():
    ranges: dict[str, set[str]] = {}
    for requirement in DECLARED:
        ranges.setdefault(canonicalize_name(requirement.name), set()).add(
            str(requirement.specifier)
        )
    assert not {name: found for name, found in ranges.items() if len(found) > 1}


def test_the_constraints_lie_within_the_ranges():
    pinned = pins("constraints.txt")
    for requirement in DECLARED:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or version in requirement.specifier, requirement


def test_the_page_of_dependencies_states_the_ranges():
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8").splitlines()
    for requirement in DECLARED:
        ends = sorted(requirement.specifier, key=lambda part: part.operator, reverse=True)
        stated = f"| {requirement.name} | {', '.join(f'{e.operator}{e.version}' for e in ends)} |"
        assert any(line.startswith(stated) for line in page), stated


def test_the_tests_on_the_newest_versions_exist():
    """The Makefile names them one by one, and pytest runs none of them if one is missing."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = re.findall(r"tests/[\w/]+(?:\.py)?", makefile)
    assert len(named) > 5
    assert not [path for path in named if not (ROOT / path).exists()]
