"""What a release is made of: one version, complete cards, workflows and recipes that fit."""

import os
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import nirvana
from nirvana.cli import EXTRAS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOTES = runpy.run_path(str(ROOT / "release" / "notes.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read(path: Path | str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def test_every_file_names_the_same_version():
    assert set(NOTES["versions"]().values()) == {nirvana.__version__}
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/nirvana/__init__.py"


def test_the_text_of_a_release_is_its_section():
    log = (
        "# Log\n\n## [Unreleased]\n\n- b\n\n## [1.2.0] - 2026-01-02\n\n- a\n\n## [1.1.0]\n\n- old\n"
    )
    assert NOTES["changes"]("1.2.0", log) == ("2026-01-02", "- a")
    for missing in ("1.1.0", "9.9.9"):
        with pytest.raises(SystemExit, match=re.escape(missing)):
            NOTES["changes"](missing, log)


def test_this_version_could_be_tagged():
    text = NOTES["notes"](f"v{nirvana.__version__}")
    assert text.startswith(f"nirvana {nirvana.__version__}\n\n")
    for tag in (nirvana.__version__, "v9.9.9"):
        with pytest.raises(SystemExit, match=re.escape(tag)):
            NOTES["notes"](tag)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_what_exists(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w./-]+@[\w./]+", step.get("uses", "a/b@v1"))
            for target in re.findall(r"^make (\S+)", step.get("run", ""), flags=re.M):
                assert re.search(rf"^{target}:", makefile, flags=re.M), target
            for file in re.findall(r"(?:python3?|^) ?(\S+\.py|\.ci/run)", step.get("run", "")):
                assert (ROOT / file).is_file(), file


def test_only_publishing_jobs_may_ask_for_identities():
    """Trusted publishing: no workflow reads a secret, and a job that publishes runs no program."""
    for path in WORKFLOWS:
        assert "secrets." not in path.read_text("utf-8")
        for job in read(path)["jobs"].values():
            if "id-token" in job.get("permissions", {}):
                assert "environment" in job
                assert all("run" not in step for step in job["steps"])


def test_the_recipe_has_the_ranges_of_the_package():
    recipe = read("release/conda/recipe.yaml")
    renamed = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
    stated = {}
    for line in recipe["requirements"]["run"]:
        name, _, ends = line.partition(" ")
        stated[renamed.get(name, name)] = ends
    assert stated.pop("python") == PROJECT["project"]["requires-python"]
    extras = PROJECT["project"]["optional-dependencies"]
    required = [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *extras["mri"]]]
    ranges = {
        each.name: ",".join(sorted(map(str, each.specifier), reverse=True))
        for each in required
        if each.marker is None or each.marker.evaluate({"sys_platform": "linux"})
    }
    assert stated == ranges
    (builder,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert f"{builder.name} {builder.specifier}" in recipe["requirements"]["host"]
    script = recipe["build"]["python"]["entry_points"]
    assert script == [f"nirvana = {PROJECT['project']['scripts']['nirvana']}"]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_copies_what_exists(name):
    file = ROOT / "release" / "docker" / f"{name}.Dockerfile"
    text = file.read_text("utf-8")
    ignored = file.with_name(f"{file.name}.dockerignore").read_text("utf-8").split()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, flags=re.M):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source
    (installed,) = re.findall(r"'\.\[(.*)\]'", text)
    extras = set(installed.split(","))
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    assert extras >= set(EXTRAS.values()), "a command of the image would ask for an extra"
    for python in re.findall(r"^FROM python:([\d.]+)", text, flags=re.M):
        assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python)
    assert "\nUSER nirvana\n" in text


def test_the_page_of_installation_names_every_extra():
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", page, flags=re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("name", ["tiny", "codec", "reporter"])
def test_a_packaged_model_has_a_card(name):
    """Licence, data with theirs, how it was made, what it reaches, and what it is not for."""
    card = (ROOT / "src" / "nirvana" / "assets" / name / "README.md").read_text("utf-8")
    _, facts, text = card.split("---\n", 2)
    assert yaml.safe_load(facts)["license"] == "apache-2.0"
    for section in ("## Data", "## Recipe", "## Figures"):
        assert section in text
    assert "licence and source" in text
    assert re.search(r"not for diagnosis|do\s+not\s+rely", text)


def test_the_citation_is_complete():
    citation = read("CITATION.cff")
    for key in ("cff-version", "message", "title", "version", "date-released", "license"):
        assert citation[key], key
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2510.26083"


def test_without_a_browser_ci_ends_with_one_line(tmp_path):
    """Otherwise the page's tests would be skipped, and nobody would see it."""
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    unnamed = {key: value for key, value in os.environ.items() if key != "NIRVANA_CHROMIUM"}
    done = subprocess.run(
        [ROOT / ".ci" / "run"],
        env={**unnamed, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "the page's tests need a browser" in line
    assert "NIRVANA_CHROMIUM" in line
