"""The command line: `nirvana COMMAND`."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from nirvana.cli import bench, convert, demo, evaluate, language, mri, report
from nirvana.errors import InputError

app = typer.Typer(
    name="nirvana",
    help="Nirvana: a language model that adapts to every sample, and MRI on its frozen backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Which extra brings a module that a command may miss.
EXTRAS = {
    **dict.fromkeys(
        ("h5py", "matplotlib", "monai", "nibabel", "pydicom", "scipy", "sigpy", "skimage"), "mri"
    ),
    **dict.fromkeys(("datasets", "pyarrow", "tensorboard", "zstandard"), "train"),
    "lm_eval": "eval",
}

# Typer carries a click of its own; an installed click's exceptions would not be these.
UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app.command("demo")(demo.demo)
app.command("convert")(convert.convert)
mri.app.command("report")(report.report)
app.add_typer(mri.app, name="mri")
app.add_typer(language.data_app, name="data")
app.command("train", context_settings=language.TRAIN_CONTEXT)(language.train)
app.command("export")(language.export)
app.command("eval")(evaluate.evaluate)
app.command("generate")(language.generate)
app.command("bench")(bench.bench)


def main() -> None:
    """Runs the program. Exit codes: 0 done, 2 the user's input is wrong, 1 our fault."""
    warnings.showwarning = _note(warnings.showwarning)
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        code = _refuse(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        code = _refuse(f"this needs {error.name}: pip install 'nirvana[{extra}]'")
    except UsageError as error:
        code = _refuse(error.format_message())  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    if code == 130:  # typer makes this code of Ctrl-C itself
        Console(stderr=True).print("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _note(show: Callable[..., None]) -> Callable[..., None]:
    """Shows our own warnings as one line to the user, others as ever."""

    def one_line(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"nirvana: note: {message}", file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    return one_line


def _refuse(message: str) -> int:
    if message:  # a command without arguments has printed its help instead
        print(f"nirvana: {' '.join(message.split())}", file=sys.stderr)
    return 2
