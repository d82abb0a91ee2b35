"""Files that are either whole or absent."""

import json

import pytest

from nirvana import InputError
from nirvana.files import (
    atomic_file,
    atomic_folder,
    replaceable_folder,
    sole_use,
    writable_file,
    write_json,
)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def half_written(path):
    path.write_text("half")
    (path.parent / "no such folder" / "more").write_text("")


def test_a_failed_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(FileNotFoundError), atomic_file(path) as temporary:
        half_written(temporary)
    assert json.loads(path.read_text()) == {"x": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "one").write_text("1")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out") as folder:
        half_written(folder / "two")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["one"]
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "three").write_text("3")
    assert names(tmp_path / "out") == ["three"]
    assert names(tmp_path) == ["out"]


def test_only_results_may_be_replaced(tmp_path):
    patterns = ["tokens-*.bin", "meta.json"]
    assert replaceable_folder(tmp_path / "new", patterns) == tmp_path / "new"
    (tmp_path / "tokens-00000.bin").write_text("")
    assert replaceable_folder(tmp_path, patterns) == tmp_path
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds thesis\.tex"):
        replaceable_folder(tmp_path, patterns)
    with pytest.raises(InputError, match="is a file"):
        replaceable_folder(tmp_path / "thesis.tex", patterns)


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file/out cannot be written: "),
        atomic_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "a" / "b.json"
    for asked in (writable_file, lambda path: replaceable_folder(path, [])):
        with pytest.raises(InputError, match=r"b\.json cannot be written: .*file is no folder"):
            asked(below)
    with pytest.raises(InputError, match="is a folder; give a file"):
        writable_file(tmp_path)
    with pytest.raises(InputError, match=r"b\.json cannot be written"):
        write_json(below, {})
    with pytest.raises(InputError, match="file cannot be written"), sole_use(tmp_path / "file"):
        pass
    assert writable_file(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    assert names(tmp_path) == ["file"]
