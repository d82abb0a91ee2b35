"""Benchmarks with questions in local files, as tasks of the lm-eval library.

A file is `NAME.jsonl` (also .xz, .gz, .zst) in one folder, with one question per line, in one of
these forms:

    choice   {"query", "choices": [text, ...], "gold": index}     which text continues the query?
    blank    {"context_options": [text, ...], "continuation", "gold": index}
                                                                  which text precedes it?
    last     {"text"}                                             is the last word predicted?
    verdict  {"context", "continuation": yes, no or maybe}        which answer follows?

"acc" selects the most likely choice, "acc_norm" the most likely per character. All tasks are
zero-shot. The prompts are the texts of the file.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana.data.documents import read_records
from nirvana.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst")
ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class LocalTask:
    """One benchmark: the name of its file without suffix, and the form of a line."""

    file: str
    form: Callable[[dict[str, Any], str], dict[str, Any]]
    cue: str = ""  # appended to the question, before the choices

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Reads the questions of a file.

        Args:
            path: the file.

        Returns:
            The fields of each question that `CONFIGS` refers to.

        Raises:
            InputError: for a line of another form, or a file without questions.
        """
        questions = []
        for where, record in read_records(path):
            try:
                questions.append(self.form(record, self.cue))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                raise InputError(f"{where}: {FORMS[self.form]}") from None
        if not questions:
            raise InputError(f"{path}: holds no question")
        return questions


def _choice(record: dict[str, Any], cue: str) -> dict[str, Any]:
    choices = [str(choice).strip() for choice in record["choices"]]
    query = record["query"].rstrip() + cue
    return {"query": query, "choices": choices, "gold": _index(record["gold"], choices)}


def _blank(record: dict[str, Any], cue: str) -> dict[str, Any]:
    contexts = [context.rstrip() + cue for context in record["context_options"]]
    continuation = record["continuation"].strip()
    gold = _index(record["gold"], contexts)
    return {"contexts": contexts, "continuation": continuation, "gold": gold}


def _last(record: dict[str, Any], cue: str) -> dict[str, Any]:
    query, space, target = record["text"].rstrip().rpartition(" ")
    if not space:
        raise ValueError("a single word")
    return {"query": query + cue, "target": " " + target}  # lm-eval expects the space here


def _verdict(record: dict[str, Any], cue: str) -> dict[str, Any]:
    choices = ["yes", "no", "maybe"]
    gold = choices.index(record["continuation"].strip())
    return {"query": record["context"].rstrip() + cue, "choices": choices, "gold": gold}


def _index(gold: Any, choices: list[str]) -> int:
    if type(gold) is not int or not 0 <= gold < len(choices) or len(choices) < 2:
        raise ValueError("no such choice")
    return gold


FORMS: dict[Callable[..., Any], str] = {
    _choice: 'must have "query", two or more "choices", and the index of the right one in "gold"',
    _blank: 'must have two or more "context_options", "continuation", and an index in "gold"',
    _last: 'must have a "text" of two words or more',
    _verdict: 'must have "context", and yes, no or maybe in "continuation"',
}

_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [_ACCURACY, {**_ACCURACY, "metric": "acc_norm"}],
}
# The task configuration of lm-eval for each form.
CONFIGS: dict[Callable[..., Any], dict[str, Any]] = {
    _choice: _CHOICES,
    _verdict: _CHOICES,
    _blank: {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",  # lm-eval's convention for choices before the continuation
        "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
        "metric_list": [_ACCURACY],
    },
    _last: {
        "output_type": "loglikelihood",
        "doc_to_text": "query",
        "doc_to_target": "target",
        "metric_list": [
            _ACCURACY,
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
}

TASKS = {
    "arc_challenge": LocalTask("arc_challenge", _choice, ANSWER),
    "arc_easy": LocalTask("arc_easy", _choice, ANSWER),
    "boolq": LocalTask("boolq", _choice, ANSWER),
    "copa": LocalTask("copa", _choice),
    "hellaswag": LocalTask("hellaswag", _choice),
    "lambada": LocalTask("lambada_openai", _last),
    "medmcqa": LocalTask("medmcqa", _choice),
    "medqa": LocalTask("medqa_en", _choice),
    "openbook_qa": LocalTask("openbook_qa", _choice),
    "piqa": LocalTask("piqa", _choice, ANSWER),
    "pubmed_qa": LocalTask("pubmed_qa_labeled", _verdict),
    "social_iqa": LocalTask("socialiqa", _choice),
    "winogrande": LocalTask("winogrande", _blank),
}


def answers(question: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """Lists the possible answers to a question, worded as in lm-eval.

    Args:
        question: an item of `LocalTask.read`.

    Returns:
        (context, continuation) of each answer, and the index of the right one.
    """
    if "choices" in question:
        return [(question["query"], " " + each) for each in question["choices"]], question["gold"]
    if "contexts" in question:
        then = " " + question["continuation"]
        return [(context, then) for context in question["contexts"]], question["gold"]
    return [(question["query"], question["target"])], 0


def answer_tokens(
    encode: Callable[[list[str]], list[list[int]]], context: str, continuation: str
) -> tuple[list[int], int]:
    """Encodes context and continuation together.

    A token that spans the boundary counts to the continuation. So does white space at the end of
    the context, which tokenizers join to the following word.

    Args:
        encode: see `nirvana.data.tokenizer.text_encoder`.
        context: may be empty.
        continuation: not empty.

    Returns:
        The tokens, without BOS, and the index of the continuation's first token.
    """
    stem = context.rstrip()
    whole = encode([stem + context[len(stem) :] + continuation])[0]
    before = encode([stem])[0] if stem else []
    shared = 0
    while shared < min(len(before), len(whole) - 1) and before[shared] == whole[shared]:
        shared += 1
    return whole, shared


def benchmark_folder(folder: str | Path | None) -> Path:
    """Finds the folder of the benchmark files.

    Args:
        folder: the folder; None: `benchmarks` in the folder that `NIRVANA_DATA` names.

    Returns:
        The folder, which exists.

    Raises:
        InputError: when there is none.
    """
    if folder is None:
        data = os.environ.get("NIRVANA_DATA")
        if not data:
            raise InputError(
                "local tasks need the folder of their files: give --task-data, or set NIRVANA_DATA "
                "to the folder above benchmarks/"
            )
        folder = Path(data) / "benchmarks"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of benchmark files")
    return Path(folder)


def task_file(name: str, folder: Path) -> Path:
    """Finds the file of a task.

    Args:
        name: one of `TASKS`.
        folder: see `benchmark_folder`.

    Returns:
        The first existing file among those of `SUFFIXES`.

    Raises:
        InputError: when the folder has none.
    """
    paths = [folder / f"{TASKS[name].file}{suffix}" for suffix in SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise InputError(f"{paths[0]} (or .xz, .gz, .zst): no such file, which task {name} needs")
    return path


def task_config(name: str, folder: Path) -> dict[str, Any]:
    """Reads the questions of a task and builds its configuration for lm-eval's task manager.

    Args:
        name: one of `TASKS`.
        folder: see `benchmark_folder`.

    Returns:
        The configuration.

    Raises:
        InputError: for a file that is missing or of another form.
    """
    from datasets import Dataset

    task = TASKS[name]
    questions = Dataset.from_list(task.read(task_file(name, folder)))
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": questions},
        "test_split": "test",
        "target_delimiter": " ",
        "num_fewshot": 0,
        **CONFIGS[task.form],
    }
