"""Questions of local benchmark files as tokens, and their points, without the lm-eval library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana.data.tokenizer import text_encoder
from nirvana.evaluate.likelihood import TokenLikelihoods
from nirvana.evaluate.tasks import TASKS, answer_tokens, answers, task_file


def read_questions(
    folder: Path, name: str, tokenizer: Any, most: int | None = None
) -> list[dict[str, Any]]:
    """Reads the questions of a task, worded as in lm-eval.

    Args:
        folder: of the benchmark files.
        name: one of `nirvana.evaluate.tasks.TASKS`.
        tokenizer: with a BOS token.
        most: questions from the start of the file; None: all.

    Returns:
        {"rows": tokens of every possible answer, "starts": where each begins, "gold": index of the
        right one} of each question.

    Raises:
        InputError: for a file that is missing or of another form.
    """
    encode = text_encoder(tokenizer)
    found = []
    for question in TASKS[name].read(task_file(name, folder))[:most]:
        pairs, gold = answers(question)
        rows = [answer_tokens(encode, *pair) for pair in pairs]
        found.append(
            {
                "rows": [[tokenizer.bos_token_id, *tokens] for tokens, _ in rows],
                "starts": [first + 1 for _, first in rows],
                "gold": gold,
            }
        )
    return found


def point(question: dict[str, Any], scores: Sequence[TokenLikelihoods]) -> int:
    """Whether the right answer is the most likely one; of a single answer, whether greedy decoding
    writes it.

    Args:
        question: of `read_questions`.
        scores: of all tokens of each of its rows but the first.
    """
    after = [start - 1 for start in question["starts"]]
    if len(scores) == 1:
        return int(bool(scores[0].is_argmax[after[0] :].all()))
    totals = [float(each.nll[first:].sum()) for each, first in zip(scores, after, strict=True)]
    return int(totals.index(min(totals)) == question["gold"])


def chance(questions: Sequence[dict[str, Any]]) -> float:
    """The share of points of a guess; 0 where an answer is written."""
    choices = [len(question["rows"]) for question in questions]
    return round(sum(1 / n for n in choices) / len(choices), 4) if max(choices) > 1 else 0
