"""Files that are either whole or absent."""

import errno
import json
import os
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import save_file

from nirvana import InputError
from nirvana.files import (
    atomic_file,
    atomic_folder,
    check_outputs,
    publish_folder,
    replaceable_folder,
    sole_use,
    writable_file,
    writable_json,
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
    for refuse in (writable_file, lambda path: replaceable_folder(path, [])):
        with pytest.raises(InputError, match=r"b\.json cannot be written: .*file is no folder"):
            refuse(below)
    with pytest.raises(InputError, match="is a folder; give a file"):
        writable_file(tmp_path)
    with pytest.raises(InputError, match=r"b\.json cannot be written"):
        write_json(below, {})
    with pytest.raises(InputError, match="file cannot be written"), sole_use(tmp_path / "file"):
        pass
    assert writable_file(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    assert names(tmp_path) == ["file"]


@pytest.fixture(params=[0o077, 0o022, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(path):
    return {
        str(each.relative_to(path.parent)): stat.S_IMODE(each.stat().st_mode)
        for each in (path, *path.rglob("*"))
    }


def test_files_and_folders_have_the_permissions_of_plain_ones(tmp_path, umask):
    """Whatever wrote them, and whatever was there before."""
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("")
    file_mode, folder_mode = 0o666 & ~umask, 0o777 & ~umask
    assert modes(plain) == {"plain": folder_mode, "plain/file": file_mode}
    for before in (0o600, 0o666):
        write_json(tmp_path / "a.json", {})
        with atomic_file(tmp_path / "b.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        with atomic_folder(tmp_path / "out") as folder:
            Path(mkdtemp(dir=folder)).rename(folder / "inner")
            save_file({"x": torch.zeros(1)}, folder / "inner" / "model.safetensors")
            (folder / "text").write_text("")
        with sole_use(tmp_path / "run"):
            pass
        for file in ("a.json", "b.safetensors"):
            assert modes(tmp_path / file) == {file: file_mode}
            (tmp_path / file).chmod(before)
        assert modes(tmp_path / "out") == {
            "out": folder_mode,
            "out/inner": folder_mode,
            "out/inner/model.safetensors": file_mode,
            "out/text": file_mode,
        }
        assert modes(tmp_path / "run") == {"run": folder_mode, "run/.lock": file_mode}


def test_a_finished_folder_follows_no_links(tmp_path, umask):
    (tmp_path / "mine").write_text("")
    (tmp_path / "mine").chmod(0o600)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "link").symlink_to(tmp_path / "mine")
    assert modes(tmp_path / "mine") == {"mine": 0o600}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("there/old.json")
    (tmp_path / "link").symlink_to("there/folder")
    write_json(tmp_path / "link.json", {"x": 1})
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "one").write_text("1")
    assert json.loads((tmp_path / "there" / "old.json").read_text()) == {"x": 1}
    assert (tmp_path / "there" / "folder" / "one").read_text() == "1"
    assert names(tmp_path) == ["link", "link.json", "there"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link.json").is_symlink()


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(InputError, match="is a file; give a folder"),
        atomic_folder(tmp_path / "out"),
    ):
        pass
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="is a file; give a folder"):
        publish_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    assert names(tmp_path) == ["new", "out"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "one").write_text("1")
    replace = os.replace

    def fail(source, target):
        if Path(target) == tmp_path / "out" and ".partial" in str(source):
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"), atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["one"]


def test_only_regular_files_are_replaced(tmp_path):
    """Renaming would put a file in the place of a device or pipe, or of the program's output."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", os.devnull):
        for refuse in (writable_file, writable_json):
            with pytest.raises(InputError, match="is not a regular file"):
                refuse(path)
    with pytest.raises(InputError, match="is not a regular file"):
        write_json(tmp_path / "link", {})
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputError, match="circle cannot be resolved"):
        writable_file(tmp_path / "circle")
    with pytest.raises(InputError, match="circle/below cannot be resolved"):
        writable_file(tmp_path / "circle" / "below")
    assert names(tmp_path) == ["circle", "link", "pipe"]


@pytest.mark.parametrize("name", ["log.json", "/dev/stdout"])
def test_the_programs_own_output_is_not_replaced(tmp_path, name):
    program = f"from nirvana.files import write_json; print('output'); write_json({name!r}, [])"
    with open(tmp_path / "log.json", "w") as log:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=log, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert b"takes the program's own output" in done.stderr
    assert (tmp_path / "log.json").read_text() == "output\n"


def test_results_replace_results_alone(tmp_path):
    path = tmp_path / "a.json"
    for results in ({}, [], {"x": 1}, [1]):
        write_json(path, results)
        assert writable_json(path) == path
    path.write_text("")
    assert writable_json(path) == path
    for other in ('{"text": "a line of data"}\n', "thesis", "\x89HDF", "\n\n\n\n\n"):
        path.write_text(other)
        with pytest.raises(InputError, match="holds something else than results"):
            writable_json(path)


def test_outputs_are_distinct_from_inputs_and_one_another(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("")
    (tmp_path / "in" / "twin").hardlink_to(tmp_path / "in" / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "in" / "a")
    a = tmp_path / "in" / "a"
    for output, given, reason in (
        (a, a, "--out .* is the input .*in/a, which would be lost"),
        (tmp_path / "in" / ".." / "in" / "twin", a, "is the input"),
        (a / "b", a, "lies in the input"),
        (tmp_path / "in" / "x" / "y", tmp_path / "in", "lies in the input"),
        (tmp_path / "in", a, "contains the input"),
        # The file itself would stay, but not the name by which it was given.
        (tmp_path / "out", tmp_path / "out" / "link", "contains the input"),
    ):
        with pytest.raises(InputError, match=reason):
            check_outputs({"--other": None, "--out": output}, [None, "codec", given])
    for one, two in (("a", "a"), ("a", "a/b"), ("a/b", "a"), ("out/link", "in/twin")):
        with pytest.raises(InputError, match=r"--two .* and --one .* overlap"):
            check_outputs({"--one": tmp_path / one, "--two": tmp_path / two}, [])
    check_outputs({"--one": tmp_path / "x", "--two": tmp_path / "y"}, [a, "hub:name", "a" * 9999])


def test_a_folder_in_use_is_free_again_when_its_process_is_killed(tmp_path):
    program = (
        "import sys, time\nfrom nirvana.files import sole_use\n"
        "with sole_use(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(InputError, match="another process works there"):
            sole_use(tmp_path / "run").__enter__()
        process.kill()
    with (
        sole_use(tmp_path / "run"),
        pytest.raises(InputError, match="another process works there"),
        sole_use(tmp_path / "run"),
    ):
        pass
    with sole_use(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EIO, True)]
)
def test_a_file_system_without_locks_lets_everyone_in(tmp_path, monkeypatch, number, refused):
    def fail(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr("fcntl.flock", fail)
    entered = []
    with (
        pytest.raises(InputError, match="cannot be locked") if refused else nullcontext(),
        sole_use(tmp_path),
    ):
        entered.append(True)
    assert bool(entered) is not refused


def test_nothing_is_imported_that_windows_lacks():
    """Beside what other packages import on this system."""
    program = (
        "import sys, filelock, psutil, torch\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import nirvana.files, nirvana.train.loop"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
