"""The one training loop: language models and MRI specialists differ only in their `Task`."""

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

from nirvana.errors import InputError
from nirvana.files import check_outputs, sole_use, write_json
from nirvana.train import checkpoint
from nirvana.train.config import OptimConfig, RunConfig, changed_keys
from nirvana.train.metrics import MetricsLog
from nirvana.train.optim import build_optimizer
from nirvana.train.step import Trainer, seed_generators
from nirvana.train.task import Task
from nirvana.train.world import World

ECHO = 3.0  # seconds in which a terminal, a scheduler and torchrun may all pass one signal on
STOP, UNREADABLE = 1, 2  # what a process may tell the others before a step

# Settings that change neither the weights nor what they are trained on; the data themselves are
# compared by `Task.position`.
FREE = (
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


# What a run writes into its folder.
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

    step: int  # updates done
    finished: bool  # False when a signal stopped it before its last step
    last: dict[str, Any]  # the last line of metrics.jsonl


def check_run(
    out: str | Path, config_path: str | Path | None, inputs: Iterable[str | Path | None]
) -> None:
    """Refuses a folder `run.out` in which a run would write over what it reads.

    Args:
        config_path: the file of the configuration; the run's own config.json is none of its inputs.
        inputs: data, weights and whatever else it begins with.

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
    world: World,
    say: Callable[[str], None] | None = None,
    accept_changes: bool = False,
) -> Outcome:
    """Trains `task` to `run.steps`; writes everything into the folder `run.out`.

    There: `config.json`, `metrics.jsonl` (a line for every log, validation and last step),
    `samples.jsonl`, `tensorboard/` when tensorboard is installed, `checkpoints/`, and at the end
    `model/`. SIGINT and SIGTERM, to any process, end the run after the current step, with a
    checkpoint. A step whose loss or gradient is not finite changes nothing and is counted.

    Args:
        config: resolved configuration, saved with the run and in its checkpoints.
        resume: go on from the newest checkpoint, or begin when there is none.
        world: the processes that train together; all of them call this.
        say: takes each message to the user; None prints to standard error.
        accept_changes: resume although settings or data are not those of the checkpoint.

    Raises:
        InputError: for a run folder that is in use, a checkpoint of another run, data that vanish,
            a full disk, or a loss that was not finite for `run.most_skipped` steps in a row.
    """
    out = Path(run.out)
    log = MetricsLog(out, run.steps, task.unit, say, active=world.first, wandb=run.wandb)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder as --run.out")
    if not resume and out.exists() and any(file.name != ".lock" for file in out.iterdir()):
        raise InputError(
            f"{out}: holds a run already; give --resume to continue it, or another "
            "folder as --run.out"
        )
    world.wait()  # until all have looked: the first will write there
    with sole_use(out) if world.first else contextlib.nullcontext(), _disk_errors(out):
        return _fit(task, optim, run, config, resume, world, log, accept_changes)


def _fit(
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    config: dict[str, Any],
    resume: bool,
    world: World,
    log: MetricsLog,
    accept_changes: bool,
) -> Outcome:
    out = Path(run.out)
    on_cuda = world.device.type == "cuda"
    if not on_cuda and run.precision == "bf16":
        log.say("note: bf16 is for CUDA; this run computes in float32")
    if run.compile and not on_cuda:
        log.say("note: compilation is for CUDA; this run is not compiled")
    task.prepare(world, run.compile and on_cuda)
    parameters = list(task.trainable())
    optimizer = build_optimizer(parameters, optim)
    trainer = Trainer(task, optim, run, parameters, optimizer, world)
    done = 0
    if resume:
        found = _newest(out, task, config, world, log, accept_changes)
        if found is not None:
            checkpoint.restore(found, task.model, parameters, optimizer, world.size == 1)
            done = found.step
            trainer.skipped = trainer.zero + found.skipped
    if world.first:
        write_json(out / "config.json", config)
    writer = checkpoint.Writer(
        out, task.model, parameters, optimizer, config, run.keep_checkpoints, world
    )
    last: dict[str, Any] = {}
    saved = done if done else None
    failure: InputError | None = None
    verdict = 0
    if world.first:
        task.begin(out)
    task.model.train()
    with _signals() as stopped, log.open(done), writer:
        while done < run.steps:
            batches, failure = _read(task, done, trainer.mine)
            verdict = world.worst(UNREADABLE if failure else STOP if stopped() else 0)
            if verdict:
                break
            trainer.step(done, batches)
            done += 1
            validating = _due(done, run.validation_interval) or done == run.steps
            if done % run.log_interval == 0 or validating:
                last = _tell(task, trainer, log, done, batches[-1], validating)
            else:
                log.advance(done)
            if _due(done, run.checkpoint_interval) or done == run.steps:
                writer.save(done, task.position(done), int(trainer.skipped))
                saved = done
                trainer.restart_clock()
        if trainer.num_steps:
            last = _tell(task, trainer, log, done, None, False)
        if saved != done:
            writer.save(done, task.position(done), int(trainer.skipped))
        log.status(f"step {done}: writing the checkpoint")
    folder = checkpoint.folder_of(out, done)
    if done < run.steps:
        if failure is not None:
            raise InputError(f"{failure}; saved in {folder}: mend it, then continue with --resume")
        if verdict == UNREADABLE:
            raise InputError(f"another process could not read its data; saved in {folder}")
        log.say(f"stopped after step {done}; saved in {folder}; continue with --resume")
        return Outcome(done, False, last)
    if world.first:
        task.model.eval()
        task.export(out / "model")
    world.wait()
    log.say(f"done: {done} steps; the model is in {out / 'model'}")
    return Outcome(done, True, last)


def _read(task: Task, step: int, mine: range) -> tuple[list[Any], InputError | None]:
    """This process's batches of a step, or why there are none."""
    try:
        return [task.batch(step, micro) for micro in mine], None
    except InputError as error:
        return [], error


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _tell(
    task: Task, trainer: Trainer, log: MetricsLog, done: int, batch: Any, validating: bool
) -> dict[str, Any]:
    """Logs the steps since the last time, what the model does with `batch` (None: nothing), and a
    validation."""
    line = trainer.report(done)
    if line["most_skipped_in_row"] >= trainer.run.most_skipped:
        raise InputError(
            f"the loss or gradient was not finite for {line['most_skipped_in_row']} steps in a row "
            f"before step {done}, {line['skipped']} in all; nothing of them entered the weights. "
            "Lower optim.lr, lengthen optim.warmup_steps or use run.precision = float32, then "
            f"continue the run in {trainer.run.out} with --resume --accept-changes"
        )
    with _watching(task, trainer, done):
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
def _watching(task: Task, trainer: Trainer, done: int) -> Iterator[None]:
    """Eval mode without gradients; leaves no trace, so that no interval changes a result."""
    task.model.eval()
    seed_generators(trainer.run.seed, done)
    # Documents have all lengths: compiled blocks would be compiled anew for every one of them.
    with torch.no_grad(), trainer.autocast(), torch.compiler.set_stance("force_eager"):
        yield
    task.model.train()


def _newest(
    out: Path,
    task: Task,
    config: dict[str, Any],
    world: World,
    log: MetricsLog,
    accept_changes: bool,
) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint, if it is one of this configuration and these data."""
    found = world.same(checkpoint.latest(out) if world.first else None)
    if found is None:
        log.say(f"no checkpoint in {out} yet: beginning at step 0")
        return None
    plain = json.loads(json.dumps([config, task.position(found.step)]))
    changes = [
        *changed_keys(found.config, plain[0]),
        *changed_keys(found.position, plain[1], "position."),
    ]
    for change in changes:
        if accept_changes or change.startswith(FREE):
            log.say(f"note: changed since the checkpoint: {change}")
        else:
            raise InputError(
                f"{found.folder} is of another run, {change} (there -> here); give the setting or "
                "data of then, or --accept-changes to go on with those of now"
            )
    log.say(f"continuing after step {found.step} from {found.folder}")
    return found


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A full disk is told in one line, whichever file met it."""
    try:
        yield
    except OSError as error:
        if error.errno in checkpoint.FULL:
            raise checkpoint.no_room(Path(error.filename or out), error) from error
        raise


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came; one that comes later than
    `ECHO` after the first acts as always."""
    received: list[float] = []
    before: dict[int, Any] = {}

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > ECHO:
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
