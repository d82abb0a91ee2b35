"""Reports as tokens: what a backbone reads after an image, and what it is to predict."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.data.tokenizer import text_encoder
from nirvana.errors import InputError
from nirvana.ops.cross_entropy import IGNORE

PROMPT = "Report:"
LENGTHS = 32  # text is padded to multiples of it: kernels are tuned, or compiled, for every length


class ReportTargets:
    """Reports as [BOS, prompt, blank, report, EOS]: a document, as the backbone learned them.

    The blank belongs to the report's first word, as in any text; a prompt that ended with one would
    be followed by words that no text has there.

    Args:
        tokenizer: the backbone's.
        prompt: what the backbone reads before every report.
        longest: tokens after which a report is cut off; None leaves it whole.

    Attributes:
        before: the tokens before every report.
        end: the token after it.

    Raises:
        InputError: for a tokenizer without BOS or EOS.
    """

    def __init__(self, tokenizer: Any, prompt: str = PROMPT, longest: int | None = None):
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise InputError("reports need a tokenizer with a BOS and an EOS token")
        self._encode = text_encoder(tokenizer)
        self._longest = longest
        self.before: list[int] = [tokenizer.bos_token_id, *self._encode([prompt])[0]]
        self.end: int = tokenizer.eos_token_id

    def __call__(self, reports: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """
        Returns: ids `[B, M]`, padded at the end, and labels `[B, M]`: the token after each place;
            `IGNORE` where that is the prompt's or padding.
        """
        texts = [ids[: self._longest] for ids in self._encode([f" {report}" for report in reports])]
        asked_from = len(self.before) - 1
        length = len(self.before) + max(map(len, texts))
        length += -length % LENGTHS
        ids = torch.full((len(texts), length), self.end)
        labels = torch.full((len(texts), length), IGNORE)
        for row, text in enumerate(texts):
            document = torch.tensor([*self.before, *text, self.end])
            ids[row, : len(document) - 1] = document[:-1]
            labels[row, asked_from : len(document) - 1] = document[asked_from + 1 :]
        return ids.to(device), labels.to(device)


def report_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens asked: logits `[B, M, vocabulary]` and labels
    `[B, M]` of `ReportTargets`."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
