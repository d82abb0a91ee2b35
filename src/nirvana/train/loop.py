"""The training loop of language models and MRI specialists, which differ only in their `Task`."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from nirvana.config import changed_keys
from nirvana.errors import InputError
from nirvana.files import check_outputs, sole_use, write_json
from nirvana.train import checkpoint
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.distributed import ProcessContext
from nirvana.train.metrics import MetricsLog
from nirvana.train.optim import build_optimizer
from nirvana.train.task import Task
from nirvana.train.trainer import Trainer, seed_generators

# A terminal, a scheduler and torchrun may each forward the same signal within this time.
SIGNAL_GRACE_SECONDS = 3.0
STOP, UNREADABLE = 1, 2  # reasons to end the run; the largest of all processes applies to all

# Settings that affect neither the weights nor the data; the data are compared by `Task.position`.
NON_SEMANTIC_KEYS = (
    "run.out",
    "run.device",
    "run.compile",
    "run.log_interval",
    "run.validation_interval",
    "run.checkpoint_interval",
    "run.keep_checkpoints",
    "run.export_precision",
    "run.most_skipped",
    "run.wandb",
    "parallel.",
    "data.train",
    "data.valid",
    "data.workers",
    "data.sample_",
)


# Files that a run writes into its folder.
RUN_FILES = (
    "checkpoints",
    "config.json",
    "metrics.jsonl",
    "model",
    "samples.jsonl",
    "tensorboard",
    "tokenizer",
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # steps done
    finished: bool  # False when a signal stopped the run before its last step
    last: dict[str, Any]  # the last line of metrics.jsonl


def check_run(
    out: str | Path, config_path: str | Path | None, inputs: Iterable[str | Path | None]
) -> None:
    """Checks that the run would not overwrite its own inputs.

    Args:
        out: `run.out`.
        config_path: file of the configuration; the run's own config.json does not count as input.
        inputs: data, weights and other files that the run reads.

    Raises:
        InputError: see `nirvana.files.check_outputs`.
    """
    own = Path(out) / "config.json"
    if config_path is not None and not (own.exists() and own.samefile(config_path)):
        inputs = [config_path, *inputs]
    check_outputs({f"run.out ({name})": Path(out) / name for name in RUN_FILES}, inputs)


def fit(
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    config: dict[str, Any],
    resume: bool,
    processes: ProcessContext,
    notify: Callable[[str], None] | None = None,
    accept_changes: bool = False,
) -> Outcome:
    """Trains `task` to `run.steps` and writes the results into the folder `run.out`.

    The folder gets `config.json`, `metrics.jsonl` (a line for every log, validation and last step),
    `samples.jsonl`, `tensorboard/` when tensorboard is installed, `checkpoints/`, and at the end
    `model/`. SIGINT and SIGTERM to any process end the run after the current step, with a
    checkpoint. A step whose loss or gradient is not finite changes no weight and is counted.

    Args:
        task: model, data and loss.
        optim: settings of the optimiser.
        run: settings of the run.
        config: resolved configuration, saved with the run and in its checkpoints.
        resume: continue from the newest checkpoint, or start when there is none.
        processes: the processes of the run; all of them call this function.
        notify: receives each message to the user; None prints to standard error.
        accept_changes: resume even if settings or data differ from those of the checkpoint.

    Returns:
        How the run ended.

    Raises:
        InputError: for a run folder that is in use, a checkpoint of another run, data that can no
            longer be read, a full disk, or a loss that was not finite for `run.most_skipped` steps
            in a row.
    """
    out = Path(run.out)
    log = MetricsLog(out, run.steps, task.unit, notify, active=processes.is_main, wandb=run.wandb)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder as --run.out")
    if not resume and out.exists() and any(file.name != ".lock" for file in out.iterdir()):
        raise InputError(
            f"{out}: holds a run already; give --resume to continue it, or another "
            "folder as --run.out"
        )
    processes.barrier()  # all have checked the folder before the main process writes into it
    with sole_use(out) if processes.is_main else contextlib.nullcontext(), _disk_errors(out):
        return _fit(task, optim, run, config, resume, processes, log, accept_changes)


def _fit(
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    config: dict[str, Any],
    resume: bool,
    processes: ProcessContext,
    log: MetricsLog,
    accept_changes: bool,
) -> Outcome:
    out = Path(run.out)
    on_cuda = processes.device.type == "cuda"
    if not on_cuda and run.precision == "bf16":
        log.notify("note: bf16 is for CUDA; this run computes in float32")
    if run.compile and not on_cuda:
        log.notify("note: compilation is for CUDA; this run is not compiled")
    task.prepare(processes, run.compile and on_cuda)
    parameters = list(task.trainable())
    optimizer = build_optimizer(parameters, optim, task.undecayed)
    trainer = Trainer(task, optim, run, parameters, optimizer, processes)
    done = 0
    if resume:
        found = _resumable(out, task, config, processes, log, accept_changes)
        if found is not None:
            checkpoint.restore(found, task.model, parameters, optimizer, processes.size == 1)
            done = found.step
            trainer.skipped = trainer.zero + found.skipped
    if processes.is_main:
        write_json(out / "config.json", config)
    writer = checkpoint.Writer(
        out, task.model, parameters, optimizer, config, run.keep_checkpoints, processes
    )
    last: dict[str, Any] = {}
    saved = done if done else None
    failure: InputError | None = None
    verdict = 0
    if processes.is_main:
        task.begin(out)
    task.model.train()
    with _signals() as stopped, log.open(done), writer:
        while done < run.steps:
            batches, failure = _read(task, done, trainer.micro_batches)
            verdict = processes.all_reduce_max(UNREADABLE if failure else STOP if stopped() else 0)
            if verdict:
                break
            trainer.step(done, batches)
            done += 1
            validating = _due(done, run.validation_interval) or done == run.steps
            if done % run.log_interval == 0 or validating:
                last = _log_progress(task, trainer, log, done, batches[-1], validating)
            if _due(done, run.checkpoint_interval) or done == run.steps:
                writer.save(done, task.position(done), int(trainer.skipped))
                saved = done
                trainer.restart_clock()
        if trainer.num_steps:
            last = _log_progress(task, trainer, log, done, None, False)
        if saved != done:
            writer.save(done, task.position(done), int(trainer.skipped))
        log.status(f"step {done}: writing the checkpoint")
    folder = checkpoint.folder_of(out, done)
    if done < run.steps:
        if failure is not None:
            raise InputError(f"{failure}; saved in {folder}: repair the data, then give --resume")
        if verdict == UNREADABLE:
            raise InputError(f"another process could not read its data; saved in {folder}")
        log.notify(f"stopped after step {done}; saved in {folder}; continue with --resume")
        return Outcome(done, False, last)
    if processes.is_main:
        task.model.eval()
        task.export(out / "model")
    processes.barrier()
    log.notify(f"done: {done} steps; the model is in {out / 'model'}")
    return Outcome(done, True, last)


def _read(task: Task, step: int, mine: range) -> tuple[list[Any], InputError | None]:
    """This process's batches of a step, or the error that reading them raised."""
    try:
        return [task.batch(step, micro) for micro in mine], None
    except InputError as error:
        return [], error


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _log_progress(
    task: Task, trainer: Trainer, log: MetricsLog, done: int, batch: Any, validating: bool
) -> dict[str, Any]:
    """Logs the steps since the last call, the task's figures on `batch` (unless None), and a
    validation if `validating`."""
    line = trainer.metrics(done)
    if line["most_skipped_in_row"] >= trainer.run.most_skipped:
        raise InputError(
            f"the loss or gradient was not finite for {line['most_skipped_in_row']} steps in a row "
            f"before step {done}, {line['skipped']} in all; none of them changed the weights. "
            "Lower optim.lr, lengthen optim.warmup_steps or use run.precision = float32, then "
            f"continue the run in {trainer.run.out} with --resume --accept-changes"
        )
    with _evaluation_mode(task, trainer, done):
        if batch is not None:
            line |= task.observe(batch)
        if validating:
            log.status(f"step {done}: validating")
            line["valid"] = task.validate()
            log.write_samples(done, task.samples())
    log.write(line)
    trainer.restart_clock()
    return line


@contextlib.contextmanager
def _evaluation_mode(task: Task, trainer: Trainer, done: int) -> Iterator[None]:
    """Eval mode without gradients. The generators are seeded for the step, so that what is sampled
    here does not depend on the intervals."""
    task.model.eval()
    seed_generators(trainer.run.seed, done)
    # Documents differ in length: compiled blocks would be recompiled for each of them.
    with torch.no_grad(), trainer.autocast(), torch.compiler.set_stance("force_eager"):
        yield
    task.model.train()


def _resumable(
    out: Path,
    task: Task,
    config: dict[str, Any],
    processes: ProcessContext,
    log: MetricsLog,
    accept_changes: bool,
) -> checkpoint.Checkpoint | None:
    """The newest complete checkpoint, after checking that it is of this configuration and data."""
    found = processes.broadcast_object(checkpoint.latest(out) if processes.is_main else None)
    if found is None:
        log.notify(f"no checkpoint in {out} yet: beginning at step 0")
        return None
    plain = json.loads(json.dumps([config, task.position(found.step)]))
    changes = [
        *changed_keys(found.config, plain[0]),
        *changed_keys(found.position, plain[1], "position."),
    ]
    for change in changes:
        if accept_changes or change.startswith(NON_SEMANTIC_KEYS):
            log.notify(f"note: changed since the checkpoint: {change}")
        else:
            raise InputError(
                f"{found.folder} is of another run: {change} (there -> here); restore the setting "
                "or the data, or give --accept-changes to continue with the present ones"
            )
    log.notify(f"continuing after step {found.step} from {found.folder}")
    return found


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turns a full disk into an `InputError`, whichever file was being written."""
    try:
        yield
    except OSError as error:
        if error.errno in checkpoint.FULL:
            raise checkpoint.no_room(Path(error.filename or out), error) from error
        raise


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGINT or SIGTERM was received. A second signal later
    than `SIGNAL_GRACE_SECONDS` after the first has its usual effect."""
    received: list[float] = []
    before: dict[int, Any] = {}

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > SIGNAL_GRACE_SECONDS:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        signal.signal(number, receive)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
