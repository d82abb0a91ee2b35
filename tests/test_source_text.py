"""The text of the sources: docstrings that a parser reads, and the field's words."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from docstring_parser import DocstringStyle, parse

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "nirvana").rglob("*.py"))
PROGRAMS = [
    path
    for room in ("benchmarks", "docs", "examples", "experiments", "tests")
    for path in (ROOT / room).rglob("*.py")
    if path != Path(__file__)
]
PAGES = [
    path
    for room in (".", "docs", "benchmarks", "experiments", "src/nirvana/assets")
    for path in (ROOT / room).glob("*.md" if room == "." else "**/*.md")
]
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):[ \t]*(.*)$", re.MULTILINE)

# Words of a private language that were replaced, and the field's words for it.
REPLACED = {
    "World": "ProcessContext",
    "world": "processes",
    "worst": "all_reduce_max",
    "costs": "nll",
    "hits": "is_argmax",
    "read_tokens": "token_log_likelihoods",
    "moved": "fast_next, or what was changed",
    "moved_heads": "add_low_rank",
    "apart": "detach_image",
    "ASKED": "FACT_CLASSES",
    "RARE": "PRIOR_LOGIT",
    "aids": "auxiliary losses",
    "Learner": "AuxiliaryHeads",
    "Seen": "KspaceEncoding",
    "_may_look": "may_sync",
    "_tell": "log_progress",
    "_watching": "evaluation_mode",
    "say": "notify",
    "FREE": "NON_SEMANTIC_KEYS",
    "ECHO": "SIGNAL_GRACE_SECONDS",
    "toolbox": "bart",
    "TriggerReport": "TriggerTrace",
    "arm": "model, or variant",
    "arms": "models, or variants",
}
REPLACED |= {f"{name}_bar": f"d{name}" for name in ("q", "k", "v", "o", "h", "beta", "alpha")}
MODULES = {"world", "toolbox", "measured", "heads", "place", "instance", "graphs", "settings"}
SPEECH = re.compile(r"\b(told|tells|heard|hears|says|said|asks|asked|whoever)\b", re.IGNORECASE)
PRIVATE = re.compile(r"\bSPEC\b|\b[Ll]aws? \d")
QUOTED = {"niah.py", "rows.py"}
"""Files with the words of a published task, and with a key of rows that are stored."""
OPTIONS = {"costs"}
"""Settings of a study, of which stored rows have the names."""


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def arguments(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """The names that a docstring's `Args` may list: a signature, or a class's fields."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        return {*names, *(each.arg for each in (given.vararg, given.kwarg) if each is not None)}
    fields = {
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    made = [each for each in definitions(ast.Module(node.body, [])) if each.name == "__init__"]
    return fields.union(*(arguments(each) for each in made))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_docstrings_are_google_style(path: Path) -> None:
    for node in definitions(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node)
        if text is None:
            continue
        where = f"{path.name}: {node.name}"
        for section in SECTION.finditer(text):
            assert not section[2], f"{where}: text on the line of {section[1]}:"
        parsed = parse(text, DocstringStyle.GOOGLE)
        if node.name.startswith("_") or not (found := SECTION.findall(text)):
            continue
        kinds = {kind for kind, _ in found}
        # Several names that share a line are written "a, b: ...".
        listed = [each.arg_name for each in parsed.params if each.args[0] == "param"]
        named = {name.strip() for names in listed for name in names.split(",")}
        assert named or "Args" not in kinds, f"{where}: Args that no parser reads"
        bases = [base for base in getattr(node, "bases", []) if ast.unparse(base) != "nn.Module"]
        if not bases:
            unknown = {name.lstrip("*") for name in named} - arguments(node)
            assert not unknown, f"{where}: {unknown} are no arguments"
        assert ("Raises" in kinds) == bool(parsed.raises), f"{where}: Raises that no parser reads"


def test_names_are_the_fields() -> None:
    for path in (*SOURCES, *PROGRAMS):
        assert path in PROGRAMS or path.stem not in MODULES, path
        known = OPTIONS if path in PROGRAMS else set()
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        for token in tokens:
            if token.type == tokenize.NAME:
                meant = REPLACED.get(token.string)
                assert meant is None or token.string in known, (
                    f"{path.name}:{token.start[0]}: {token.string}: {meant}"
                )


def test_a_program_prints_and_returns() -> None:
    """No verb of speech for a program; and the project cites what its readers have."""
    for path in (*SOURCES, *PROGRAMS, *PAGES):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"{path.name}:{number}: {line.strip()}"
            assert path.name in QUOTED or not SPEECH.search(line), where
            assert not PRIVATE.search(line), where
