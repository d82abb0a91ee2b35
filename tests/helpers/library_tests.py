"""The library's own tests of its models, fetched where these tests run: its wheel has none of them.

Its source distribution, from the package index that pip uses, holds the model and training mixins.
The generation mixin is in its repository alone, at the tag of the installed version. A tag can move
and has no checksum, so that code is fetched and run only with `NIRVANA_PEER_TAG=1`. Both
go to a folder in the user's cache, never into this repository.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock

VERSION = transformers.__version__
PACKAGE = "transformers_tests"
MODEL_TESTS = "test_modeling_common"
TRAINING_TESTS = "test_training_mixin"
GENERATION_TESTS = "generation.test_utils"
EXPORT_TESTS = "exporters.test_export"
ASK = "NIRVANA_PEER_TAG"
TAG = f"https://raw.githubusercontent.com/huggingface/transformers/v{VERSION}/tests"


class Unavailable(Exception):
    """Why tests cannot be had here."""


def load() -> str | None:
    """Makes `PACKAGE` importable.

    Its tests of exported programs, which this model does not promise to pass, are an empty class.
    So are those of generation without the tag: then the answer is the reason, else None.

    Raises:
        Unavailable: if the model tests, or the tag where it is required, cannot be had.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nirvana" / "peer"
    folder = cache / f"transformers-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with_tag = os.environ.get(ASK) == "1"
    with FileLock(cache / "lock"):  # several test processes start at once
        if not folder.exists():
            fetch_source_distribution(folder)
        if with_tag:
            fetch_from_tag(folder, GENERATION_TESTS)
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    _empty_class(EXPORT_TESTS, "ExportTesterMixin")
    if with_tag:
        return None
    _empty_class(GENERATION_TESTS, "GenerationTesterMixin")
    return f"only in the repository of transformers: {ASK}=1 fetches and runs its tag v{VERSION}"


def fetch_source_distribution(folder: Path) -> None:
    """Moves the tests in the source distribution of the installed version to `folder`.

    Raises:
        Unavailable: if pip cannot download it, or it is not of that version, or has no model tests.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1"]
        what = ["--no-deps", "--no-binary", "transformers", f"transformers=={VERSION}"]
        done = subprocess.run(
            [*pip, *what, "--dest", temporary], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise Unavailable(f"pip could not download transformers {VERSION}: {last}")
        top = f"transformers-{VERSION}"
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            wanted = [
                member
                for member in archive
                if member.isfile() and member.name.startswith((f"{top}/tests/", f"{top}/PKG-INFO"))
            ]
            archive.extractall(temporary, wanted, filter="data")
        source = Path(temporary) / top
        if f"\nVersion: {VERSION}\n" not in (source / "PKG-INFO").read_text("utf-8"):
            raise Unavailable(f"what pip downloaded is not transformers {VERSION}")
        for name in (MODEL_TESTS, TRAINING_TESTS):
            if not (source / "tests" / f"{name}.py").exists():
                raise Unavailable(f"transformers {VERSION} is distributed without {name}.py")
        os.replace(source / "tests", folder)


def fetch_from_tag(folder: Path, module: str) -> None:
    """Downloads one module of the library's tests, unless `folder` has it.

    Raises:
        Unavailable: if it cannot be downloaded.
    """
    name = module.replace(".", "/") + ".py"
    target = folder / name
    if target.exists():
        return
    try:
        with urllib.request.urlopen(f"{TAG}/{name}", timeout=20) as answer:
            text = answer.read()
    except OSError as error:  # also urllib's own errors and the timeout
        raise Unavailable(f"{name} of transformers {VERSION} is out of reach: {error}") from error
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".part").write_bytes(text)
    os.replace(target.with_suffix(".part"), target)


def _empty_class(module: str, name: str) -> None:
    """Puts a class without tests where the model tests import one that is not here."""
    parent = f"{PACKAGE}.{module.split('.')[0]}"
    sys.modules[parent] = ModuleType(parent)
    stand_in = ModuleType(f"{PACKAGE}.{module}")
    setattr(stand_in, name, type(name, (), {}))
    sys.modules[f"{PACKAGE}.{module}"] = stand_in
