"""`nirvana eval`: a language model's figures on text, tasks and recall; two models compared."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from nirvana.cli.adapt import (
    AdaptOption,
    ChunkOption,
    ParametersOption,
    StepSizesOption,
    StepsOption,
    TaskOption,
    adapt_config,
    require_adapt,
)
from nirvana.cli.console import DeviceOption, JsonOption, output
from nirvana.data.hub import local_path
from nirvana.errors import InputError
from nirvana.files import check_outputs, finite, replaceable_file, writable_json, write_json
from nirvana.packaged import folder_of, resolve
from nirvana.progress import ProgressLines

RECALL = ("s_niah_1", "s_niah_2", "s_niah_3", "mqar")
LENGTHS = "1024,2048,4096,8192,16384,32768"
NUM_PROBLEMS = 100  # of each recall task and length, unless --limit is given
PNG = b"\x89PNG"
HAYSTACK = Path("text/novels/test.jsonl.xz")  # within NIRVANA_DATA


def _trace_output(path: Path | None) -> Path | None:
    return path and writable_json(path)


def _picture_output(path: Path | None) -> Path | None:
    return path and replaceable_file(path, lambda head: head.startswith(PNG), "a picture")


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder, or the name of a packaged model.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text file, FILE or DOMAIN=FILE; give it again for more files."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Names with commas between: local benchmarks (arc_easy, lambada ...), s_niah_1 to "
            "s_niah_3, mqar, or hub:NAME for a task of lm-eval (hub:longbench)."
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two results of --json: B - A with 95 % intervals. Needs no MODEL."),
    ] = None,
    json: JsonOption = None,
    device: DeviceOption = "auto",
    limit: Annotated[
        int | None, typer.Option(help="Documents of each file, questions of each task at most.")
    ] = None,
    trigger: Annotated[bool, typer.Option(help="Let the Trigger take its steps.")] = True,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Folder of the local benchmarks' files; else NIRVANA_DATA/benchmarks."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of s_niah and mqar problems.")] = LENGTHS,
    haystack: Annotated[
        Path | None,
        typer.Option(help=f"Text file of s_niah_2 and 3; else NIRVANA_DATA/{HAYSTACK}."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of an mqar problem.")] = 8,
    batch_size: Annotated[
        int, typer.Option(help="Questions, or documents with --adapt, read at once.")
    ] = 8,
    adapt: AdaptOption = False,
    task: TaskOption = None,
    parameters: ParametersOption = None,
    chunk: ChunkOption = None,
    steps: StepsOption = None,
    lr: StepSizesOption = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Also write what --adapt did, by layer and position (JSON).",
            callback=_trace_output,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Also draw it, the mean over documents (PNG).", callback=_picture_output),
    ] = None,
) -> None:
    """Bits per byte and perplexity on text files, tasks, and recall over long contexts.

    "unigram" is the entropy of a file's own single bytes: the least that any model of them pays.
    Docs: docs/evaluation.md.
    """
    if compare is not None:
        if model is not None or data or tasks:
            raise InputError("--compare A B takes two results and nothing else: no MODEL or data")
        check_outputs({"--json": json}, compare)
        _compare(*compare, json)
        return
    if model is None:
        raise InputError("which model? nirvana eval MODEL --data FILE, or --compare A.json B.json")
    if not data and not tasks:
        note = "" if task is None else f"; --task {task} is a file of task parameters"
        raise InputError(f"nothing to score: give --data FILE or --tasks NAMES{note}")
    for name, value in (("limit", limit), ("pairs", pairs), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"--{name} = {value} must be at least 1")
    options = {"parameters": parameters, "chunk": chunk, "steps": steps, "lr": lr}
    require_adapt(adapt, **options, trace=trace, picture=picture)
    if adapt and (tasks or not data):
        raise InputError("--adapt reads texts: give --data FILE, and --tasks in a call of its own")
    plan = _plan(tasks or [], task_data, lengths, pairs, haystack)
    files = _domains(data or [])
    read = [folder_of(model), *map(local_path, files.values()), *plan.files, plan.haystack, task]
    check_outputs({"--json": json, "--trace": trace, "--picture": picture}, read)
    folder = resolve(model)
    config = adapt_config(folder, parameters, chunk, steps, lr) if adapt else None
    if picture is not None:
        import matplotlib  # noqa: F401  (a missing package is reported before any work)

    from nirvana.adapt.task import load_task
    from nirvana.config import to_dict
    from nirvana.device import choose_device
    from nirvana.model.assets import load_language_model
    from nirvana.model.trigger import without_trigger

    learned = None if task is None else load_task(task)
    loaded, tokenizer = load_language_model(folder, choose_device(device))
    results: dict[str, Any] = {"model": model, "limit": limit, "trigger": trigger}
    if config is not None:
        results["adapt"] = to_dict(config)
    if task is not None:
        results["task"] = str(task)
    with ExitStack() as modes:
        if not trigger:
            modes.enter_context(without_trigger(loaded))
        if learned is not None and config is None:
            modes.enter_context(learned.applied(loaded))
        if files:
            reader, traces = _reader(config, learned, batch_size, trace or picture)
            results |= _read_texts(loaded, tokenizer, files, limit, reader)
            _write_traces(traces, results, trace, picture)
        if tasks:
            found = _recall(loaded, tokenizer, plan, pairs, limit or NUM_PROBLEMS)
            if plan.local or plan.hub:
                from nirvana.evaluate.harness import run_tasks

                found |= run_tasks(
                    loaded, tokenizer, plan.local, plan.hub, task_data, limit, batch_size
                )
            _show_tasks(found)
            results["tasks"] = found
    if json is not None:
        write_json(json, finite(results))


def _reader(config: Any, task: Any, batch_size: int, traced: Path | None) -> tuple[Any, list[Any]]:
    """What scores documents, and the list to which it adds a trace of each."""
    traces: list[Any] = []
    if config is None:
        from nirvana.evaluate.perplexity import read_scores

        return read_scores, traces
    from nirvana.evaluate.adapted import read_adapted_scores

    observe = None if traced is None else traces.append
    options = {"config": config, "task": task, "batch_size": batch_size, "observe": observe}
    return partial(read_adapted_scores, **options), traces


def _write_traces(
    traces: Sequence[Any], results: Mapping[str, Any], trace: Path | None, picture: Path | None
) -> None:
    if trace is not None:
        names = [name for name, file in results["files"].items() for _ in range(file["documents"])]
        documents = [
            {"file": name, **each.to_dict()} for name, each in zip(names, traces, strict=True)
        ]
        write_json(trace, finite({"adapt": results["adapt"], "documents": documents}))
    if picture is not None:
        from nirvana.adapt.trace import draw_trace

        draw_trace(traces, picture)


@dataclass
class _Plan:
    """What --tasks names, checked."""

    local: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    hub: list[str] = field(default_factory=list)
    recall: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    haystack: Path | None = None


def _plan(
    tasks: Sequence[str], folder: Path | None, lengths: str, pairs: int, haystack: Path | None
) -> _Plan:
    from nirvana.evaluate.tasks import TASKS, benchmark_folder, task_file

    plan = _Plan()
    for name in dict.fromkeys(name.strip() for each in tasks for name in each.split(",")):
        if name.startswith("hub:") and len(name) > 4:
            plan.hub.append(name.removeprefix("hub:"))
        elif name in RECALL:
            plan.recall.append(name)
        elif name in TASKS:
            plan.files.append(task_file(name, benchmark_folder(folder)))
            plan.local.append(name)
        else:
            known = ", ".join([*TASKS, *RECALL])
            raise InputError(f"no task {name!r}; known are {known}, and hub:NAME for lm-eval's")
    if plan.local or plan.hub:
        import lm_eval  # noqa: F401  (a missing package is reported before any work)
    if plan.recall:
        try:
            plan.lengths = [int(length) for length in lengths.split(",")]
        except ValueError:
            raise InputError(f"--lengths = {lengths} must be numbers: 1024,2048") from None
        least = 1 + 4 * pairs if "mqar" in plan.recall else 1
        for length in plan.lengths:
            if length < least:
                raise InputError(f"--lengths: {length} must be at least {least}")
    if {"s_niah_2", "s_niah_3"} & set(plan.recall):
        plan.haystack = _haystack(haystack)
    return plan


def _haystack(path: Path | None) -> Path:
    import os

    from nirvana.data.documents import kind_of

    if path is None:
        data = os.environ.get("NIRVANA_DATA")
        if not data:
            raise InputError(
                "s_niah_2 and 3 need a text: give --haystack FILE, or set NIRVANA_DATA"
            )
        path = Path(data) / HAYSTACK
    kind_of(path)
    return path


def _domains(data: Sequence[str]) -> dict[str, str]:
    """Name -> file of each "FILE" or "NAME=FILE"; a file is its own name."""
    files: dict[str, str] = {}
    for each in data:
        name, equals, path = each.partition("=")
        if not equals or Path(each).is_file():
            name = path = each
        if not name or not path:
            raise InputError(f"--data {each}: must be FILE or DOMAIN=FILE")
        if name == "total" or name in files:
            raise InputError(f"--data {each}: the name {name} is taken; choose another")
        files[name] = path
    return files


def _read_texts(
    model: Any, tokenizer: Any, files: Mapping[str, str], limit: int | None, reader: Any
) -> dict[str, Any]:
    """Prints the figures of text files; returns them as the results' "files" and "total"."""
    import math

    from nirvana.data.documents import read_documents
    from nirvana.evaluate.perplexity import Score, byte_entropy, read_files

    scores = read_files(model, tokenizer, files, limit, progress=True, reader=reader)
    unigram = {
        name: byte_entropy(islice(read_documents(path), limit)) for name, path in files.items()
    }
    total = sum((score.total for score in scores.values()), Score())
    table = Table(
        Column("file", overflow="fold"),
        "bits per byte",
        "unigram",
        "perplexity",
        "documents",
        "bytes",
    )
    for name, score in [*((name, each.total) for name, each in scores.items()), ("total", total)]:
        table.add_row(
            name,
            f"{score.bits_per_byte:.4f}",
            f"{unigram[name]:.4f}" if name in unigram else "",
            f"{score.perplexity:.2f}",
            f"{score.documents:,}",
            f"{score.bytes:,}",
        )
    output().print(table)
    starts = sorted({start for each in scores.values() for start in each.positions})
    table = Table("tokens", *scores, title="bits per byte by position in the document")
    for start in starts:
        found = [each.positions.get(start, Score()) for each in scores.values()]
        cells = [f"{score.bits_per_byte:.4f}" if score.bytes else "" for score in found]
        table.add_row(f"from {start:,}", *cells)
    output().print(table)
    return {
        "files": {
            name: {
                **each.total.to_dict(),
                "byte_unigram": unigram[name],
                "positions": [
                    {"from": start, **score.to_dict()} for start, score in each.positions.items()
                ],
                "each": {
                    "bits": [score.nats / math.log(2) for score in each.documents],
                    "bytes": [score.bytes for score in each.documents],
                    "sha256": each.sha256,
                },
            }
            for name, each in scores.items()
        },
        "total": total.to_dict(),
    }


def _recall(
    model: Any, tokenizer: Any, plan: _Plan, pairs: int, num_problems: int
) -> dict[str, dict[str, Any]]:
    """Name@length -> the figures of the recall tasks, in the form of `run_tasks`."""
    from nirvana.data.documents import read_documents
    from nirvana.data.tokenizer import text_encoder
    from nirvana.evaluate.mqar import make_mqar
    from nirvana.evaluate.niah import make_niah
    from nirvana.evaluate.recall import answer_all

    bos = tokenizer.bos_token_id
    if plan.recall and bos is None:
        raise InputError("the model's tokenizer has no BOS token, with which every text begins")
    encode = text_encoder(tokenizer)
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    found = {}
    with ProgressLines("{task.description}") as progress:
        for name in plan.recall:
            for length in plan.lengths:
                progress.add_task(f"{name}: {num_problems} problems of {length:,} tokens")
                try:
                    if name == "mqar":
                        problems = make_mqar(bos, words, length, pairs, num_problems)
                    else:
                        text = read_documents(plan.haystack) if plan.haystack else ()
                        task = int(name[-1])
                        problems = make_niah(task, encode, bos, length, num_problems, text)
                    recall = answer_all(model, problems)
                except ValueError as error:
                    raise InputError(f"{name}: {error}") from None
                found[f"{name}@{length}"] = {
                    "figures": {"acc": recall.accuracy, "acc_stderr": recall.error},
                    "each": {"metric": "acc", "points": recall.points, "sha256": recall.sha256},
                }
    return found


def _show_tasks(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(Column("task", overflow="fold"), "metric", "value", "± error", "questions")
    for name, task in found.items():
        number = f"{len(task['each']['points']):,}" if "each" in task else ""
        figures = task["figures"]
        for metric, value in figures.items():
            if "_stderr" not in metric:
                error = figures.get(
                    metric.replace(metric.split(" ")[0], metric.split(" ")[0] + "_stderr", 1)
                )
                table.add_row(
                    name, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", number
                )
    output().print(table)


def _compare(a: Path, b: Path, json: Path | None) -> None:
    from nirvana.evaluate.compare import compare
    from nirvana.statistics import RESAMPLES

    found = compare(a, b)
    table = Table(Column("on", overflow="fold"), "metric", "A", "B", "B - A", "95 %", "number")
    for metric, sets in found.items():
        for name, each in sets.items():
            table.add_row(
                name,
                metric,
                f"{each.a:.4f}",
                f"{each.b:.4f}",
                f"{each.difference:+.4f}",
                f"{each.low:+.4f} to {each.high:+.4f}",
                f"{each.number:,}",
            )
    output().print(f"A: {a}\nB: {b}\npaired bootstrap over documents, {RESAMPLES:,} resamples")
    output().print(table)
    if json is not None:
        differences = {
            metric: {name: each.to_dict() for name, each in sets.items()}
            for metric, sets in found.items()
        }
        write_json(json, {"a": str(a), "b": str(b), "differences": differences})
