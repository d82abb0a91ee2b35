"""The program as a shell starts it: start-up, help, completion, wrong options, packaged names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import nirvana
from nirvana.cli import app
from nirvana.packaged import config_names, packaged, packaged_config
from nirvana.progress import ProgressLines

HEAVY = ("torch", "transformers", "numpy", "matplotlib")
RUN = """
import sys
from nirvana.cli import main
sys.argv = ["nirvana", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *(name for name in {heavy} if name in sys.modules), file=sys.stderr)
"""


def start(
    *arguments: object, stdin: str | bytes = b"", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m nirvana` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "nirvana", *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env={**os.environ, "COLUMNS": "80", **environment},
        timeout=240,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def commands(group: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, and every group of commands, as its words."""
    group = get_command(app) if group is None else group
    found = [path]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_fits_80_columns(path):
    done = start(*path, "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Usage: ")
    assert max(map(len, lines)) <= 80
    # No summary is cut short and no box is drawn; "cuda:1 ..." is a list that goes on.
    cut = [line for line in lines[1:] if line.endswith("...") and "cuda:" not in line]
    assert not cut
    assert not set(done.stdout) & set("│─╭╰┃━…")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nope", "No such option: --nope"),
        ("trian", "Did you mean 'train'"),
        ("generate tiny --promt a", "No such option: --promt"),
        ("generate tiny", "Missing option '--prompt'"),
        ("generate nowhere --prompt a", "no language model 'nowhere'"),
        ("generate tiny --prompt a --device gpu", "device 'gpu' cannot be used"),
        ("generate tiny --prompt a --top-p 2", "--top-p = 2.0 must be"),
        ("eval tiny", "nothing to score"),
        ("eval tiny --task arc_easy", "--task arc_easy is a file of task parameters"),
        ("mri reconstruct", "Usage: nirvana mri reconstruct [OPTIONS]"),
        ("eval nowhere --data /dev/null", "no language model 'nowhere'"),
        ("bench --peers nobody", "--peers 'nobody' is unknown"),
        ("bench --steps 0", "--steps = 0 must be"),
        ("bench --dtype float16", "--dtype 'float16' is unknown"),
        ("train none.toml", "none.toml: no such configuration file; the packaged ones are"),
        ("train tiny --run.stepz 3", "did you mean run.steps?"),
        ("train tiny --optim.lr -1", "optim.lr = -1.0 must be above 0"),
        ("mri train none.toml", "none.toml: no such configuration file"),
        ("mri reconstruct a.h5 --ot b", "No such option: --ot"),
        ("config huge", "no packaged configuration 'huge'; they are 1.3b"),
        ("config --out a.toml", "--out needs a NAME"),
    ],
)
def test_wrong_options_are_refused_at_once(arguments, message):
    """In one line and with exit code 2, within a second of processor time and without torch."""
    before = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(heavy=HEAVY), *arguments.split()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seconds = os.times().children_user - before
    *error, imported = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(error) == 1
    assert message in error[0]
    assert imported.strip() == "imported:"
    assert seconds < 1


def test_commands_without_arguments_print_their_help():
    for path in ((), ("mri",), ("data",)):
        done = start(*path)
        assert done.returncode == 2
        assert "Commands:" in done.stderr + done.stdout


def test_version():
    for program in ([sys.executable, "-m", "nirvana"], [Path(sys.executable).with_name("nirvana")]):
        done = subprocess.run([*program, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"nirvana {nirvana.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    """The script is printed, and what it calls completes commands and names."""
    done = start("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_NIRVANA_COMPLETE" in done.stdout or "_COMPLETE" in done.stdout


def test_completion_of_words():
    code = "import sys; sys.argv[0] = 'nirvana'; from nirvana.cli import main; main()"
    for words, expected in (("nirvana tr", "train"), ("nirvana train qu", "quickstart")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "_NIRVANA_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(words.count(" ")),
            },
        )
        assert done.stdout.split() == [expected], done.stderr


def test_the_prompt_from_the_standard_input():
    options = ("--max-new-tokens", 4, "--seed", 3, "--device", "cpu")
    given = start("generate", "tiny", "--prompt", "The court\nheld", *options)
    piped = start("generate", "tiny", "--prompt", "-", *options, stdin="The court\nheld\n")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == given.stdout
    for wrong, message in ((b"", "--prompt is empty"), (b"\xff", "not UTF-8")):
        done = start("generate", "tiny", "--prompt", "-", stdin=wrong)
        assert done.returncode == 2
        assert message in done.stderr


def test_configurations_are_listed_and_written(tmp_path):
    listed = start("config")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == config_names()
    assert max(map(len, listed.stdout.splitlines())) <= 80
    out = tmp_path / "my.toml"
    assert start("config", "tiny", "--out", out).returncode == 0
    assert out.read_text() == packaged_config("tiny").read_text() == start("config", "tiny").stdout
    again = start("config", "tiny", "--out", out)
    assert again.returncode == 2
    assert "exists; remove it first" in again.stderr


def test_packaged_names_stand_for_tokenizers_and_shards(tmp_path, monkeypatch):
    from nirvana.data.shards import TokenShards
    from nirvana.data.tokenizer import tokenizer_folder

    monkeypatch.chdir(tmp_path)
    assert tokenizer_folder("tiny") == packaged("tiny")
    assert tokenizer_folder("quickstart/train") == packaged("quickstart") / "train" / "tokenizer"
    for split in ("train", "valid"):
        shards = TokenShards(f"quickstart/{split}")
        shards.verify()
        assert shards.vocab_size == 1024
    with pytest.raises(nirvana.InputError, match="not token shards"):
        TokenShards("../assets/quickstart/train")
    # A folder of the user's comes first.
    (tmp_path / "tiny").mkdir()
    with pytest.raises(nirvana.InputError, match="not a tokenizer"):
        tokenizer_folder("tiny")


def test_quickstart(tmp_path):
    """Trains at once with what ships: progress from the first step, and a model that generates."""
    out = tmp_path / "run"
    few = ["--run.steps", 12, "--run.log_interval", 6, "--data.context_length", 64]
    few += ["--data.valid_documents", 1, "--data.sample_prompts", "[]"]
    done = start("train", "quickstart", "--run.out", out, *few)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "step 1/12"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] < 7.2
    written = start("generate", out / "model", "--prompt", "The old man", "--max-new-tokens", 3)
    assert written.returncode == 0, written.stderr
    assert start("export", out, tmp_path / "exported").returncode == 0


def test_progress_is_plain_lines_where_the_output_is_a_file(capfd):
    with ProgressLines("{task.description}", interval=0) as progress:
        task = progress.add_task("reading", total=3)
        progress.advance(task)
        progress.update(task, completed=3)
        progress.update(task, completed=3)
    with ProgressLines("{task.description}", interval=1e9) as progress:
        task = progress.add_task("slow", total=3)
        for _ in range(3):
            progress.advance(task)
        progress.add_task("of unknown length")
    err = capfd.readouterr().err
    expected = ["reading: 0/3", "reading: 1/3", "reading: 3/3", "slow: 0/3", "slow: 3/3"]
    assert err.splitlines() == [*expected, "of unknown length"]


@pytest.mark.parametrize("module", ["fcntl", "resource", "termios"])
def test_the_program_needs_no_module_of_unix_alone(module):
    """As on Windows, where they do not exist."""
    code = f"import sys; sys.modules[{module!r}] = None; import nirvana.cli; nirvana.cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
