"""The command line: `nirvana COMMAND`."""

import errno
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nirvana import __version__
from nirvana.cli import (
    adapt,
    adopt,
    bench,
    config,
    convert,
    demo,
    distill,
    evaluate,
    language,
    local_page,
    mri,
    reconstruct,
    report,
)
from nirvana.errors import InputError


class CommandGroup(TyperGroup):
    """Lists the first sentence of each command in full, where click would cut it to one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """See click."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [
            (name, each.get_short_help_str(limit=500)) for name, each in commands.items() if each
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    cls=CommandGroup,
    name="nirvana",
    help="Nirvana: a language model that adapts to every sample, and MRI on its frozen backbone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: no boxes, at most 80 columns wide
    context_settings={"help_option_names": ["--help", "-h"]},
)

# The extra that installs a module which a command needs.
EXTRAS = {
    **dict.fromkeys(
        ("h5py", "matplotlib", "monai", "nibabel", "pydicom", "pygrappa", "scipy", "sigpy"), "mri"
    ),
    **dict.fromkeys(("skimage", "twixtools"), "mri"),
    **dict.fromkeys(("datasets", "pyarrow", "tensorboard", "zstandard"), "train"),
    "gradio": "app",
    "lm_eval": "eval",
}

# Typer carries a click of its own; an installed click's exceptions would not be these.
UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


# What the operating system answers where nothing more can be written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"nirvana {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Options that come before the command."""


app.command("demo")(demo.demo)
app.command("convert")(convert.convert)
app.command("adopt")(adopt.adopt)
mri.app.command("reconstruct")(reconstruct.reconstruct)
mri.app.command("report")(report.report)
app.add_typer(mri.app, name="mri", cls=CommandGroup)
app.add_typer(language.data_app, name="data", cls=CommandGroup)
app.command("train", context_settings=language.TRAIN_CONTEXT)(language.train)
app.command("distill", context_settings=language.TRAIN_CONTEXT)(distill.distill)
app.command("export")(language.export)
app.command("eval")(evaluate.evaluate)
app.command("generate")(language.generate)
app.command("adapt")(adapt.adapt)
app.add_typer(adapt.task_app, name="task", cls=CommandGroup)
app.command("app")(local_page.app)
app.command("bench")(bench.bench)
app.command("config")(config.config)


def main() -> None:
    """Runs the program. Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 a fault of ours."""
    warnings.showwarning = _note(warnings.showwarning)
    _print_any_character()
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        code = _refuse(str(error))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        code = _refuse(f"{error.filename or 'the output'} cannot be written: {error.strerror}")
        _drop_output()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        code = _refuse(f"this needs {error.name}: pip install 'nirvana[{extra}]'")
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message.startswith("Usage:"):  # the help of a group that was called without a command
            print(message, file=sys.stderr)
            code = 2
        else:
            code = _refuse(message + _usage_of(error))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    if code == 130:  # typer turns Ctrl-C into this code itself
        print("interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _print_any_character() -> None:
    """Escapes characters that the encoding of the output lacks, where print would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not closed, nor replaced by a calling program
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Leads the standard output nowhere, so that what could not be written is not tried again when
    the interpreter ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (AttributeError, OSError, ValueError):  # closed, or no file of the system
        pass


def _note(show: Callable[..., None]) -> Callable[..., None]:
    """Prints our own warnings (`UserWarning`) as one line, and passes others on to `show`."""

    def one_line(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"nirvana: note: {message}", file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    return one_line


def _usage_of(error: Any) -> str:
    """How a command is called, of which an argument or option is missing; else nothing."""
    if type(error).__name__ != "MissingParameter" or error.ctx is None:
        return ""
    return f" {error.ctx.get_usage()}"


def _refuse(message: str) -> int:
    print(f"nirvana: {' '.join(message.split())}", file=sys.stderr)
    return 2
