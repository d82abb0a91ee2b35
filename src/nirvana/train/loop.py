"""The one training loop: language models and MRI specialists differ only in their `Task`."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.train import checkpoint
from nirvana.train.config import OptimConfig, RunConfig, changed_keys
from nirvana.train.metrics import MetricsLog
from nirvana.train.optim import build_optimizer, learning_rate

MOST_SKIPPED = 5  # steps in a row without a finite loss that end a run


class Task(Protocol):
    """What a training is about: a model, its data and its loss.

    Attributes:
        model: lies on its device; its trained parameters and buffers go into checkpoints.
        unit: what throughput counts, in the plural: "tokens", "samples".
        units_per_step: how many of them one optimiser step reads.
    """

    model: nn.Module
    unit: str
    units_per_step: int

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters to train, named as in `model`, in a fixed order."""
        ...

    def loss(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of one micro batch, and scalars to log (detached, on the device).

        A function of `step` (from 0) and `micro` (0..accumulation-1), of the weights and of
        torch's random generators alone: then a resumed run goes on as if it had not stopped.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Figures to log; called in eval mode without gradients."""
        ...

    def compile(self) -> None:
        """Compiles what is worth it; called once, on CUDA."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the trained model into `folder`, which does not exist yet or is replaced."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # updates done
    finished: bool  # False when a signal stopped it before its last step
    last: dict[str, Any]  # the last line of metrics.jsonl


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA when there is one, else the CPU.

    Raises:
        InputError: for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def fit(
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    config: dict[str, Any],
    resume: bool,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Trains `task` to `run.steps`; writes everything into the folder `run.out`.

    There: `config.json`, `metrics.jsonl` (a line for every log, validation and last step),
    `tensorboard/` when tensorboard is installed, `checkpoints/`, and at the end `model/`.
    SIGINT and SIGTERM end the run after the current step, with a checkpoint. A step whose loss or
    gradient is not finite changes nothing and is counted.

    Args:
        config: resolved configuration, saved with the run and in its checkpoints.
        resume: go on from the newest checkpoint, or begin when there is none.
        say: takes each message to the user; None prints to standard error.

    Raises:
        InputError: for a run folder that is in use, a checkpoint of another model, or a loss that
            was not finite for `MOST_SKIPPED` steps in a row.
    """
    out = Path(run.out)
    log = MetricsLog(out, run.steps, task.unit, say)
    if not resume and out.exists() and any(out.iterdir()):
        raise InputError(
            f"{out}: holds a run already; give --resume to continue it, or another "
            "folder as --run.out"
        )
    device = next(iter(task.model.parameters())).device
    on_cuda = device.type == "cuda"
    if not on_cuda and run.precision == "bf16":
        log.say("note: bf16 is for CUDA; this run computes in float32")
    if run.compile and on_cuda:
        task.compile()
    elif run.compile:
        log.say("note: compilation is for CUDA; this run is not compiled")
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=on_cuda and run.precision == "bf16"
    )
    parameters = list(task.trainable())
    optimizer = build_optimizer(parameters, optim)
    start = _resume(out, task, parameters, optimizer, config, log) if resume else 0
    write_json(out / "config.json", config)
    trainer = _Trainer(task, optim, run, parameters, optimizer, autocast, device)
    last: dict[str, Any] = {}
    done = start
    task.model.train()
    with log.open(start), _signals() as stopped:
        for done in range(start + 1, run.steps + 1):
            trainer.step(done - 1)
            ending = done == run.steps or stopped()
            validating = _due(done, run.validation_interval) or done == run.steps
            if done % run.log_interval == 0 or validating or ending:
                last = trainer.report(done)
                _refuse_divergence(last, done, out)
                if validating:
                    log.status(f"step {done}: validating")
                    last["valid"] = _validate(task, autocast, device)
                    trainer.restart_clock()
                log.write(last)
            if _due(done, run.checkpoint_interval) or ending:
                folder = checkpoint.save(
                    out, done, task.model, parameters, optimizer, config, run.keep_checkpoints
                )
                trainer.restart_clock()
            if ending:
                break
    if done < run.steps:
        log.say(f"stopped after step {done}; saved in {folder}; continue with --resume")
        return Outcome(done, False, last)
    task.model.eval()
    task.export(out / "model")
    log.say(f"done: {done} steps; the model is in {out / 'model'}")
    return Outcome(done, True, last)


class _Trainer:
    """One optimiser step after another, and sums that stay on the device between reports."""

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        run: RunConfig,
        parameters: list[tuple[str, nn.Parameter]],
        optimizer: torch.optim.AdamW,
        autocast: torch.autocast,
        device: torch.device,
    ) -> None:
        self.task, self.optim, self.steps = task, optim, run.steps
        self.parameters = [parameter for _, parameter in parameters]
        self.optimizer, self.autocast = optimizer, autocast
        self.zero = torch.zeros((), device=device)
        self.skipped, self.in_row, self.most_in_row = self.zero, self.zero, self.zero
        self._restart_sums()

    def step(self, step: int) -> None:
        """Update number `step`, from 0; the host waits for nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.optim, self.steps)
        loss = self.zero
        metrics: dict[str, Tensor] = {}
        for micro in range(self.optim.accumulation):
            with self.autocast:
                part, values = self.task.loss(step, micro)
            part = part / self.optim.accumulation
            part.backward()
            loss = loss + part.detach()
            for name, value in values.items():
                metrics[name] = metrics.get(name, self.zero) + value / self.optim.accumulation
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.optim.clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip, norm)
        finite = loss.isfinite() & norm.isfinite()
        # The fused optimiser leaves the step out, moments and counts too, where this is one.
        setattr(self.optimizer, "found_inf", (~finite).float())  # noqa: B010  (undeclared there)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._count(finite, {"loss": loss, **metrics, "gradient_norm": norm})

    def _count(self, finite: Tensor, values: dict[str, Tensor]) -> None:
        bad = (~finite).float()
        self.skipped = self.skipped + bad
        self.in_row = (self.in_row + bad) * bad
        self.most_in_row = torch.maximum(self.most_in_row, self.in_row)
        self.num_finite = self.num_finite + 1 - bad
        for name, value in values.items():
            kept = torch.where(finite, value.float(), self.zero)
            self.sums[name] = self.sums.get(name, self.zero) + kept
        self.num_steps += 1

    def report(self, done: int) -> dict[str, Any]:
        """Means over the finite steps since the last report; this waits for the device."""
        names = list(self.sums)
        counts = [self.num_finite, self.skipped, self.most_in_row]
        fetched = torch.stack([*counts, *self.sums.values()]).tolist()
        num_finite, skipped, most_in_row = fetched[:3]
        seconds = time.perf_counter() - self.started
        means = {
            n: v / num_finite if num_finite else None
            for n, v in zip(names, fetched[3:], strict=True)
        }
        line = {
            "step": done,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            f"{self.task.unit}_per_second": self.task.units_per_step * self.num_steps / seconds,
            "skipped": int(skipped),
            "most_skipped_in_row": int(most_in_row),
        }
        self._restart_sums()
        return line

    def restart_clock(self) -> None:
        """Leaves the time since the last report out of the throughput."""
        self.started = time.perf_counter()

    def _restart_sums(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_finite, self.num_steps = self.zero, 0
        self.restart_clock()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _refuse_divergence(line: dict[str, Any], step: int, out: Path) -> None:
    if line["most_skipped_in_row"] >= MOST_SKIPPED:
        raise InputError(
            f"the loss was not finite for {line['most_skipped_in_row']} steps in a row before step "
            f"{step}; nothing of them entered the weights. Lower optim.lr, lengthen "
            f"optim.warmup_steps or use run.precision = float32, then --resume the run in {out}"
        )


def _validate(task: Task, autocast: torch.autocast, device: torch.device) -> dict[str, float]:
    """Validation leaves no trace in the random generators, so its interval changes no result."""
    devices = [device] if device.type == "cuda" else []
    task.model.eval()
    # Documents have all lengths: compiled blocks would be compiled anew for every one of them.
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices=devices), torch.no_grad(), autocast, eager:
        figures = task.validate()
    task.model.train()
    return figures


def _resume(
    out: Path,
    task: Task,
    parameters: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.AdamW,
    config: dict[str, Any],
    log: MetricsLog,
) -> int:
    """Restores the newest checkpoint and tells the updates done so far."""
    newest = checkpoint.latest(out)
    if newest is None:
        log.say(f"no checkpoint in {out} yet: beginning at step 0")
        return 0
    for change in changed_keys(newest.config, json.loads(json.dumps(config))):
        log.say(f"note: changed since the checkpoint: {change}")
    checkpoint.restore(newest, task.model, parameters, optimizer)
    log.say(f"continuing after step {newest.step} from {newest.folder}")
    return newest.step


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came; a second one acts as always."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        signal.signal(number, receive)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
