"""Runs another package's program, a module or a script with Nirvana's models registered.

    python -m nirvana.launch lm_eval --model hf --model_args pretrained=FOLDER ...
    python -m nirvana.launch trl sft --model_name_or_path FOLDER ...
    torchrun --nproc_per_node 8 -m nirvana.launch train.py ...
    torchrun --nproc_per_node 8 -m nirvana.launch -m trl.scripts.sft ...
    python -m nirvana.launch --task FILE transformers serve FOLDER ...

The models are registered only in a process that has imported this package; the alternative, code
beside the weights that a loader executes, is not ours. What accelerate's launcher starts on behalf
of such a program (`trl sft` starts its script so) is started through this module again.

With `--task FILE` every Nirvana model that the program loads computes with the task parameters of
that file; a model to which they do not belong is refused.
"""

import argparse
import json
import runpy
import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from nirvana._auto import after_import
from nirvana.errors import InputError

ACCELERATE = "accelerate.commands.launch"
MODEL_MODULE = "nirvana.model.nirvana"


def main() -> None:
    """Runs what the first arguments name, in this process, with the other arguments.

    These are the name of a console script, `-m` and a module, or a file, in this order.
    """
    try:
        _run(sys.argv[1:])
    except InputError as error:
        _refuse(str(error))


def _run(arguments: list[str]) -> None:
    own: list[str] = []
    if arguments[:1] == ["--task"]:
        if len(arguments) < 2 or not Path(arguments[1]).is_file():
            _refuse(f"--task {arguments[1] if len(arguments) > 1 else ''}: no such task file")
        own, arguments = arguments[:2], arguments[2:]
        after_import(MODEL_MODULE, lambda: _load_with_task(Path(own[1]).resolve()))
    after_import(ACCELERATE, lambda: _launch_through_this_module(own))
    if arguments[:1] == ["-m"]:
        _run_module(arguments[1:])
    elif script := _console_script(arguments):
        _require_batching(arguments)
        sys.argv = arguments
        sys.exit(script.load()())
    elif arguments and Path(arguments[0]).is_file():
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)  # as Python does for a script
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        _refuse(f"no program or file {arguments[0]!r}" if arguments else "no program given")


def _console_script(arguments: list[str]) -> EntryPoint | None:
    scripts = entry_points(group="console_scripts", name=arguments[0]) if arguments else ()
    return next(iter(scripts), None)


def _require_batching(arguments: list[str]) -> None:
    """Refuses a server whose batches the library cannot make of Nirvana's states. It would start,
    and answer every request with an internal error."""
    if arguments[:2] != ["transformers", "serve"] or "--continuous-batching" not in arguments:
        return
    configs = [Path(each) / "config.json" for each in arguments[2:]]
    kinds = {json.loads(each.read_bytes()).get("model_type") for each in configs if each.is_file()}
    if not kinds - {"nirvana"}:
        _refuse(
            "--continuous-batching is not possible with Nirvana's states, which transformers does "
            "not page; leave it out, or serve models of other kinds without nirvana.launch"
        )


def _run_module(arguments: list[str]) -> None:
    if not arguments:
        _refuse("-m without a module")
    try:
        found = find_spec(arguments[0])
    except ModuleNotFoundError:  # of the package that should hold it
        found = None
    if found is None:
        _refuse(f"no module {arguments[0]!r}")
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _refuse(what: str) -> NoReturn:
    usage = "python -m nirvana.launch [--task FILE] (PROGRAM | -m MODULE | FILE) ..."
    print(f"nirvana.launch: {what}; usage: {usage}", file=sys.stderr)
    sys.exit(2)


def _load_with_task(file: Path) -> None:
    """Makes `from_pretrained` add the task parameters of a file to the model that it returns."""
    model_class: Any = sys.modules[MODEL_MODULE].NirvanaForCausalLM
    load = model_class.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        from nirvana.adapt.task import load_task

        found = load(*args, **kwargs)
        load_task(file).applied(found[0] if isinstance(found, tuple) else found).add()
        return found

    model_class.from_pretrained = from_pretrained


def _launch_through_this_module(own: list[str]) -> None:
    """Makes accelerate's launcher start its script as `python -m nirvana.launch SCRIPT`, with this
    module's own options before the script."""
    launcher: Any = sys.modules[ACCELERATE]
    launch = launcher.launch_command

    def launch_command(args: argparse.Namespace) -> None:
        if not args.no_python:
            module = ["-m"] if args.module else []
            script = [*own, *module, args.training_script]
            args.training_script_args = [*script, *args.training_script_args]
            args.training_script, args.module = "nirvana.launch", True
        launch(args)

    launcher.launch_command = launch_command


if __name__ == "__main__":
    main()
