"""The training loop of language models and MRI specialists, which differ only in their `Task`."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch

from nirvana.config import changed_keys, from_dict, to_dict
from nirvana.errors import InputError
from nirvana.files import check_outputs, sole_use, write_json
from nirvana.train import checkpoint
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.distributed import ProcessContext, init_distributed
from nirvana.train.metrics import MetricsLog, finite_or_none
from nirvana.train.optim import build_optimizer, stable_steps
from nirvana.train.task import Task
from nirvana.train.trainer import Trainer, seed_generators

# A terminal, a scheduler and torchrun may each forward the same signal within this time.
SIGNAL_GRACE_SECONDS = 3.0
STOP, UNREADABLE = 1, 2  # reasons to end the run; the largest of all processes applies to all
DECAY_KEYS = ("run.steps", "optim.decay_share", "optim.min_lr")  # no effect in the stable phase

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
        InputError: for a run folder that is in use, weights in `run.initial` that do not fit, a
            checkpoint of another run, data that are damaged or can no longer be read, a full disk,
            or a loss that was not finite for `run.most_skipped` steps in a row.
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
    # Checkpoints hold no frozen parameters: those come from the initial weights each time.
    if run.initial and (_has_frozen(task) or not (resume and checkpoint.has_checkpoint(out))):
        task.initialize(run.initial)
    _verify(task, processes)
    processes.barrier()  # all have checked the folder before the main process writes into it
    with sole_use(out) if processes.is_main else contextlib.nullcontext(), _disk_errors(out):
        return _fit(task, optim, run, config, resume, processes, log, accept_changes)


class TrainingConfig(Protocol):
    """A configuration of a training, whatever else it has."""

    @property
    def optim(self) -> OptimConfig:
        """Settings of the optimiser."""
        ...

    @property
    def run(self) -> RunConfig:
        """Settings of the run."""
        ...


C = TypeVar("C", bound=TrainingConfig)


def fit_configured(
    config: C,
    make_task: Callable[[C, torch.device], Task],
    resume: bool,
    accept_changes: bool = False,
) -> Outcome:
    """Trains what a checked configuration describes, in one process or under torchrun.

    Args:
        config: a dataclass of `nirvana.config`.
        make_task: builds the task on the device of this process.
        resume: see `fit`.
        accept_changes: see `fit`.

    Returns:
        How the run ended.

    Raises:
        InputError: see `fit`; or the machine has no such device.
    """
    with init_distributed(config.run.device) as processes:
        torch.manual_seed(config.run.seed)
        return fit(
            make_task(config, processes.device),
            config.optim,
            config.run,
            to_dict(config),
            resume,
            processes,
            accept_changes=accept_changes,
        )


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
    optimizer = build_optimizer(parameters, optim, task.undecayed, task.matrices())
    trainer = Trainer(task, optim, run, parameters, optimizer, processes)
    stable = stable_steps(optim, run.steps)
    done, replaced = 0, []
    if resume:
        found, replaced = _resumable(out, task, optim, run, config, processes, log, accept_changes)
        if found is not None:
            checkpoint.restore(found, task.model, parameters, optimizer, processes.size == 1)
            done = found.step
            trainer.skipped = trainer.zero + found.skipped
    if processes.is_main:
        write_json(out / "config.json", config)
    writer = checkpoint.Writer(
        out,
        task.model,
        parameters,
        optimizer,
        config,
        run.keep_checkpoints,
        processes,
        stable,
        replaced,
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
                if _diverged(last, run):
                    break
            else:
                log.advance(done)
            if _due(done, run.checkpoint_interval) or done in (stable, run.steps):
                writer.save(done, task.position(done), int(trainer.skipped))
                saved = done
                trainer.restart_clock()
        if trainer.num_steps:
            last = _log_progress(task, trainer, log, done, None, False)
        if saved != done:
            writer.save(done, task.position(done), int(trainer.skipped))
        log.status(f"step {done}: writing the checkpoint")
    folder = checkpoint.folder_of(out, done)
    if _diverged(last, run):
        raise InputError(
            f"the loss or gradient was not finite for {last['most_skipped_in_row']} steps in a row "
            f"before step {done}, {last['skipped']} in all; none of them changed the weights, "
            f"saved in {folder}. Lower optim.lr, lengthen optim.warmup_steps or use "
            "run.precision = float32, then continue with --resume --accept-changes"
        )
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


def _has_frozen(task: Task) -> bool:
    trained = {id(parameter) for _, parameter in task.trainable()}
    return any(id(parameter) not in trained for parameter in task.model.parameters())


def _verify(task: Task, processes: ProcessContext) -> None:
    """Verifies the data on each machine; an error in one process ends all."""
    failure = None
    if processes.local_rank == 0:
        try:
            task.verify()
        except InputError as error:
            failure = error
    if processes.all_reduce_max(failure is not None):
        raise failure or InputError("another process found damaged data")


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
    validation if `validating`; neither of the two once the run has diverged."""
    line = trainer.metrics(done)
    if not _diverged(line, trainer.run):
        with _evaluation_mode(task, trainer, done):
            if batch is not None:
                line |= task.observe(batch)
            if validating:
                log.status(f"step {done}: validating")
                line["valid"] = task.validate()
                log.write_samples(done, task.samples())
    line = finite_or_none(line)
    log.write(line)
    trainer.restart_clock()
    return line


def _diverged(line: dict[str, Any], run: RunConfig) -> bool:
    """Whether so many steps in a row were not finite that the run ends."""
    return line.get("most_skipped_in_row", 0) >= run.most_skipped


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
    optim: OptimConfig,
    run: RunConfig,
    config: dict[str, Any],
    processes: ProcessContext,
    log: MetricsLog,
    accept_changes: bool,
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to continue from, after checking that it is of this configuration and data:
    the newest complete one; if the run is prolonged, the newest of the stable phase. And the names
    of the newer ones, which are to be replaced."""
    found, passed_over = None, []
    if processes.is_main:
        for each in checkpoint.undamaged(out):
            if accept_changes or _in_common(each, optim, run, config):
                found = each
                break
            passed_over.append(each.folder.name)
        if passed_over and found is None:
            raise InputError(
                f"{out}: the run cannot be prolonged: no checkpoint from before the decay of the "
                "learning rate is left; give --accept-changes to continue from the newest, with a "
                "jump of the rate"
            )
    found, passed_over = processes.broadcast_object((found, passed_over))
    if found is None:
        log.notify(f"no checkpoint in {out} yet: beginning at step 0")
        return None, []
    if passed_over:
        log.notify(
            f"note: {', '.join(passed_over)} will be replaced: there the learning rate had decayed "
            "for another number of steps"
        )
    position = json.loads(json.dumps(task.position(found.step)))
    changes = [
        *_changed_settings(found, optim, run, config),
        *changed_keys(found.position, position, "position."),
    ]
    harmless = NON_SEMANTIC_KEYS + (DECAY_KEYS if optim.schedule == "wsd" else ())
    for change in changes:
        if accept_changes or change.startswith(harmless):
            log.notify(f"note: changed since the checkpoint: {change}")
        else:
            raise InputError(
                f"{found.folder} is of another run: {change} (there -> here); restore the setting "
                "or the data, or give --accept-changes to continue with the present ones"
            )
    log.notify(f"continuing after step {found.step} from {found.folder}")
    return found, passed_over


def _changed_settings(
    found: checkpoint.Checkpoint, optim: OptimConfig, run: RunConfig, config: dict[str, Any]
) -> list[str]:
    """Differences of the configurations; a setting that the run did not know has its default."""
    trees = json.loads(json.dumps([found.config, config]))
    for tree, (name, section) in product(trees, {"optim": optim, "run": run}.items()):
        for item in fields(section):
            if name in tree and item.default is not MISSING:
                tree[name].setdefault(item.name, json.loads(json.dumps(item.default)))
    return changed_keys(*trees)


def _in_common(
    found: checkpoint.Checkpoint, optim: OptimConfig, run: RunConfig, config: dict[str, Any]
) -> bool:
    """Whether a run with the present settings of the decay would have reached a checkpoint in the
    same way. Other settings are compared later, and only "wsd" has a decay of its own."""
    changes = _changed_settings(found, optim, run, config)
    if optim.schedule != "wsd" or not any(each.startswith(DECAY_KEYS) for each in changes):
        return True
    before = from_dict(type(optim), found.config["optim"], "optim")
    stable = stable_steps(before, found.config["run"]["steps"])
    return before.schedule != "wsd" or found.step <= min(stable, stable_steps(optim, run.steps))


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
