"""No command replaces what it reads, or any file that it was not to replace."""

import hashlib
import inspect
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import typer

from nirvana.cli import app, main

# What every command reads and writes: its arguments, with {name} where a path stands; the inputs
# and outputs among these names; and parameters of it that are texts, but no paths.
Case = tuple[str, dict[str, str], dict[str, str], set[str]]
CODEC = {"codec": "codec/"}
READING = {"centre", "measurement", "select", "phase_encode", "variable", "axes"}
CASES: dict[str, Case] = {
    "demo": ("--out {out} --text {text}", {"text": "a.txt"}, {"out": "out/"}, set()),
    "convert": (
        "{source} {destination}",
        {"source": "model/"},
        {"destination": "out/"},
        {"window"},
    ),
    "adopt": (
        "{teacher} {out}",
        {"teacher": "model/"},
        {"out": "out/"},
        {"branches", "window", "precision"},
    ),
    "export": (
        "{source} {out} --tokenizer {tokenizer}",
        {"source": "checkpoint/", "tokenizer": "tokenizer/"},
        {"out": "out/"},
        {"precision"},
    ),
    "data tokenize": (
        "{files} --out {out} --tokenizer {tokenizer}",
        {"files": "a.txt", "tokenizer": "tokenizer/"},
        {"out": "out/"},
        set(),
    ),
    "data tokenizer": ("{files} --out {out}", {"files": "a.txt"}, {"out": "out/"}, set()),
    "train": (
        "{config} --run.out {run} --data.train.a {train} --data.valid.a {valid} "
        "--run.initial {initial}",
        {"config": "language.toml", "train": "shards/", "valid": "others/", "initial": "model/"},
        {"run": "out/"},
        {"ctx", "device_name"},
    ),
    "distill": (
        "{config} --run.out {run} --data.train.a {train} --run.initial {initial} "
        "--distill.teacher {teacher}",
        {
            "config": "language.toml",
            "train": "shards/",
            "initial": "model/",
            "teacher": "teacher/",
        },
        {"run": "out/"},
        {"ctx"},
    ),
    "eval": (
        "{model} --data {data} --tasks s_niah_2,copa --haystack {haystack} "
        "--task-data {task_data} --task {task} --json {json}",
        {
            "model": "model/",
            "data": "a.txt",
            "haystack": "hay.txt",
            "task_data": "tasks/",
            "task": "a.safetensors",
        },
        {"json": "out.json"},
        {"tasks", "compare", "device", "lengths", "parameters", "lr", "trace", "picture"},
    ),
    "eval --adapt": (
        "{model} --data {data} --task {task} --trace {trace} --picture {picture}",
        {"model": "model/", "data": "a.txt", "task": "a.safetensors"},
        {"trace": "out.json", "picture": "out.png"},
        set(),
    ),
    "adapt": (
        "{model} {files} --out {out} --task {task} --json {json}",
        {"model": "model/", "files": "a.txt", "task": "a.safetensors"},
        {"out": "out.safetensors", "json": "out.json"},
        {"device", "parameters", "lr"},
    ),
    "task info": (
        "{file} --model {model}",
        {"file": "a.safetensors", "model": "model/"},
        {},
        set(),
    ),
    "task merge": (
        "{files} --out {out}",
        {"files": "a.safetensors"},
        {"out": "out.safetensors"},
        {"weights"},
    ),
    "eval --compare": (
        "{a} {b} --json {json}",
        {"a": "a.json", "b": "b.json"},
        {"json": "out.json"},
        set(),
    ),
    "bench": (
        "--json {json}",
        {},
        {"json": "out.json"},
        {"preset", "parts", "train", "decode", "peers", "dtype", "device"},
    ),
    "app": (
        "--codec {codec} --reporter {reporter} --model {model}",
        {"codec": "codec/", "reporter": "reporter/", "model": "model/"},
        {},
        {"host", "device"},
    ),
    "config": ("tiny --out {out}", {}, {"out": "out.toml"}, {"name"}),
    "generate": (
        "{model} --prompt a --task {task}",
        {"model": "model/", "task": "a.safetensors"},
        {},
        {"prompt", "device", "parameters", "lr"},
    ),
    "mri simulate": ("{volume} --out {out}", {"volume": "head.h5"}, {"out": "out.h5"}, set()),
    "mri reconstruct": (
        "{scan} --out {out} --codec {codec} --json {json} --noise-covariance {noise_covariance}",
        {"scan": "scan.cfl", "noise_covariance": "noise.npy", **CODEC},
        {"out": "out/", "json": "out.json"},
        {"kind", "method", "adapt_parameters", "formats", "slices", "device", *READING},
    ),
    "mri evaluate": (
        "{scans} --codec {codec} --json {json} --noise-covariance {noise_covariance}",
        {"scans": "head.h5", "noise_covariance": "noise.npy", **CODEC},
        {"json": "out.json"},
        {"kind", "slices", "device", *READING},
    ),
    "mri report": (
        "{scan} --out {out} --codec {codec}",
        {"scan": "scan.cfl", **CODEC},
        {"out": "out/"},
        {"kind", "device", *READING},
    ),
    "mri train": (
        '{config} --run.out {run} --data.train ["{train}"] --data.valid ["{valid}"] '
        "--data.reports {reports} --codec.weights {weights} --run.initial {initial}",
        {
            "config": "mri.toml",
            "train": "a.npy",
            "valid": "b.npy",
            "reports": "reports.jsonl",
            "weights": "model/",
            "initial": "codec/",
        },
        {"run": "out/"},
        {"ctx"},
    ),
}
FILES = (
    *(
        "a.txt",
        "hay.txt",
        "a.safetensors",
        "head.h5",
        "scan.cfl",
        "scan.hdr",
        "a.npy",
        "b.npy",
        "noise.npy",
    ),
    "reports.jsonl",
)
FOLDERS = {
    "model": ("config.json", "model.safetensors", "tokenizer.json"),
    "codec": ("config.json", "model.safetensors"),
    "teacher": ("config.json", "model.safetensors"),
    "checkpoint": ("state.json",),
    "tokenizer": ("tokenizer.json",),
    "shards": ("meta.json",),
    "others": ("meta.json",),
    "tasks": ("copa.jsonl",),
}


REASONS = (
    "the input",
    "holds something else than",
    "give a new or empty folder",
    "is a file; give",
    "is a folder; give",
    "must be a file name",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with inputs of every kind; none is good enough to be worked on."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in FILES:
        Path(name).write_text(f"the user's {name}")
    for name in ("a.json", "b.json"):
        Path(name).write_text("{\n}\n")
    Path("language.toml").write_text("[data]\n[run]\nsteps = 1\n")
    Path("mri.toml").write_text("[data]\n[run]\nsteps = 1\n")
    for folder, names in FOLDERS.items():
        Path(folder).mkdir()
        for name in names:
            (Path(folder) / name).write_text("{\n}\n")
    return work


def _contents(folder: Path) -> dict[str, Any]:
    """Every file, folder and link below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else (path.is_dir(), path.is_symlink())
        for path in sorted(folder.rglob("*"))
    }


def _refused(
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Calls the program, which must refuse in one line and leave everything as it is."""
    before = _contents(folder)
    monkeypatch.setattr(sys, "argv", ["nirvana", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    err = capsys.readouterr().err
    assert exit_.value.code == 2, err
    assert err.count("\n") == 1
    assert _contents(folder) == before
    return err


def _arguments(command: str, **given: str) -> list[str]:
    line, inputs, outputs, _ = CASES[command]
    paths = {name: path.rstrip("/") for name, path in {**inputs, **outputs}.items()} | given
    return [*command.split(), *(word.format(**paths) for word in line.split())]


PAIRS = [
    pytest.param(command, output, given, id=f"{command}: {output} on {given}")
    for command, (_, inputs, outputs, _) in CASES.items()
    for output in outputs
    for given in inputs
]


def _spellings(path: str) -> Iterator[str]:
    """Other names of a file or folder."""
    yield path
    yield os.path.abspath(path)
    yield f"tasks/../{path}"
    yield f"./{path}"
    suffix = Path(path).suffix
    os.symlink(path, f"symbolic{suffix}")
    yield f"symbolic{suffix}"
    os.symlink(".", "here")
    yield f"here/{path}"
    if Path(path).is_file():
        os.link(path, f"hard{suffix}")
        yield f"hard{suffix}"


@pytest.mark.parametrize(("command", "output", "given"), PAIRS)
def test_an_output_is_no_input(command, output, given, place, monkeypatch, capsys):
    path = CASES[command][1][given].rstrip("/")
    if given == "task_data":
        path += "/copa.jsonl"  # the folder itself may hold other things
    for spelling in _spellings(path):
        err = _refused(_arguments(command, **{output: spelling}), place, monkeypatch, capsys)
        assert any(reason in err for reason in REASONS), err
        assert str(Path(spelling)) in err or str(place) in err


@pytest.mark.parametrize(("command", "output", "given"), PAIRS)
def test_an_output_lies_in_no_input_and_contains_none(
    command, output, given, place, monkeypatch, capsys
):
    path = CASES[command][1][given].rstrip("/")
    suffix = Path(CASES[command][2][output]).suffix
    # Of the other two, single files are read, beside which there is room.
    if (Path(path).is_dir() and given not in ("task_data", "source")) or command == "export":
        for inside in (f"{path}/new{suffix}", f"{path}/a/b/new{suffix}"):
            err = _refused(_arguments(command, **{output: inside}), place, monkeypatch, capsys)
            assert "lies in the input" in err, err
    if not suffix and output != "run":  # a run adds to its folder and replaces none of the others
        above = Path("above")
        above.mkdir()
        Path(path).rename(above / path)
        elsewhere = {given: f"above/{path}", output: "above"}
        err = _refused(_arguments(command, **elsewhere), place, monkeypatch, capsys)
        assert "give a new or empty folder" in err or "contains the input" in err, err


@pytest.mark.parametrize("command", CASES)
def test_nothing_else_is_replaced(command, place, monkeypatch, capsys):
    """A folder, a pipe, and a file that the command has not written."""
    Path("work.old").mkdir()
    Path("work.old/thesis.tex").write_text("years of work")
    for output, path in CASES[command][2].items():
        suffix = Path(path).suffix
        os.mkfifo(f"{output}{suffix}")
        Path(f"thesis{suffix}").write_text("years of work")
        for other in ("work.old", f"{output}{suffix}", f"thesis{suffix}"):
            if output != "run":
                _refused(_arguments(command, **{output: other}), place, monkeypatch, capsys)


@pytest.mark.parametrize("name", ["scan.hdr", "scan.cfl"])
def test_either_file_of_a_pair_is_an_input(name, place, monkeypatch, capsys):
    for file in ("scan.hdr", "scan.cfl"):
        Path(file).write_text("{\n")  # as if it were a result
        arguments = ["mri", "evaluate", name, "--codec", "codec", "--json", file]
        assert "is the input" in _refused(arguments, place, monkeypatch, capsys)


@pytest.mark.parametrize("json", ["out", "out/metrics.json", "here/out/a/b.json"])
def test_two_outputs_do_not_overlap(json, place, monkeypatch, capsys):
    os.symlink(".", "here")
    arguments = _arguments("mri reconstruct", json=json)
    assert "overlap" in _refused(arguments, place, monkeypatch, capsys)


def _callbacks(group: typer.Typer, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{prefix}{command.name or command.callback.__name__}", command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from _callbacks(inner.typer_instance, f"{prefix}{inner.name} ")


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation."""
    if typing.get_origin(annotation) in (typing.Union, UnionType, list, tuple, typing.Annotated):
        inner = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Annotated:
            inner = inner[:1]
        return set().union(*map(_kinds, inner))
    return {annotation}


def test_every_path_of_every_command_is_in_these_tests():
    commands = dict(_callbacks(app))
    assert set(commands) == {name for name in CASES if "--" not in name}
    for name, callback in commands.items():
        hints = typing.get_type_hints(callback, include_extras=True)
        paths = {
            parameter
            for parameter in inspect.signature(callback).parameters
            if not _kinds(hints[parameter]) <= {int, float, bool, type(None)}
        }
        _, inputs, outputs, others = CASES[name]
        settings = {"run", "train", "valid", "reports", "weights", "initial", "teacher"}
        configured = name.endswith(("train", "distill"))
        known = {*inputs, *outputs} - (settings if configured else set())
        assert paths == {*known, *others}, name
