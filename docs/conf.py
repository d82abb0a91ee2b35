"""The documentation site: `make site` builds it into build/site.

The repository's root is the source folder, so that pages keep their places and their links work in
a checkout as well as on the site; `include_patterns` chooses the pages.
"""

import re
import subprocess
import sys
from importlib import metadata
from os.path import relpath
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "nirvana"
copyright = "The Nirvana developers"
version = release = metadata.version("nirvana")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "experiments/**",
    "benchmarks/LOG.md",
    "src/nirvana/assets/**",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
]
exclude_patterns = [
    *(".*", "build", "dist", "out", "runs", "docs/figures", "docs/root"),
    *("docs/gallery/**.ipynb", "docs/gallery/**.py"),
    "experiments/report/quoted.md",  # a part of RESULTS.md
]

# Markdown: headings are link targets as on code hosts; `:::` opens the grids of the start page.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# Docstrings are Google style with Markdown's backticks and indented formulas.
default_role = "literal"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

# References into other projects are not followed, for the build needs no network; type variables,
# which are single letters, have no entry of their own.
nitpick_ignore_regex = [(r"py:.*", r"(?!nirvana\.).*"), (r"py:class", r"nirvana\.(\w+\.)*[A-Z]")]

html_theme = "pydata_sphinx_theme"
html_title = f"nirvana {release}"
html_extra_path = ["root"]
html_show_sourcelink = False
html_sidebars = {root_doc: [], "docs/install": []}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}

GALLERY = "docs/gallery"
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": GALLERY,
    "subsection_order": [f"examples/{name}" for name in ("language", "mri", "domains")],
    "filename_pattern": r"\.py$",
    "reset_modules": (),
    "download_all_examples": False,
    "abort_on_example_error": True,
    "show_memory": False,
    "remove_config_comments": True,
    "write_computation_times": False,
    "nested_sections": False,
    "first_notebook_cell": "# Needs nirvana with its extra mri; see the page Install",
}

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
LETTER = re.compile(r"^(\s+\w+: )([A-Za-z])\.")  # a lone one would begin a list
EXAMPLE = re.compile(r"\]\((?:\.\./)+examples/(\w+/\w+\.py|GALLERY_HEADER\.rst)\)")


def link_examples(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns links to an example's program into links to its page in the gallery."""

    def page_of(match: re.Match[str]) -> str:
        name = match[1].replace("GALLERY_HEADER.rst", "index.rst").replace(".py", ".rst")
        return f"]({relpath(f'{GALLERY}/{name}', Path(page).parent)})"

    source[0] = EXAMPLE.sub(page_of, source[0])


def keep_formulas(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]):
    """Makes indented blocks of a docstring literal, as Markdown does: formulas and programs."""
    rewritten: list[str] = []
    in_section = in_block = False
    for line in lines:
        if line and not line.startswith(" "):
            in_section, in_block = bool(SECTION.match(line)), False
        after_blank = not rewritten or not rewritten[-1]
        if line.startswith("    ") and after_blank and not in_section and not in_block:
            rewritten += ["::", ""]
            in_block = True
        rewritten.append(line if in_block else escaped(line))
    lines[:] = rewritten


def escaped(line: str) -> str:
    """Escapes what is markup in reStructuredText but not in Markdown, outside of backticks."""
    line = LETTER.sub(r"\1\\\2.", line)
    parts = line.split("`")
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return "`".join(parts)


def write_commands(app: Sphinx) -> None:
    """Writes the reference of the command line, which the program itself describes."""
    page = Path(app.srcdir) / "docs" / "api" / "commands.md"
    arguments = ("nirvana.cli", "utils", "docs", "--name", "nirvana", "--title", "Commands")
    done = subprocess.run(
        [sys.executable, "-m", "typer", *arguments], capture_output=True, text=True, check=True
    )
    if not page.exists() or page.read_text(encoding="utf-8") != done.stdout:
        page.write_text(done.stdout, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_commands)
    app.connect("source-read", link_examples)
    # Before napoleon, which turns sections into indented fields.
    app.connect("autodoc-process-docstring", keep_formulas, priority=400)
