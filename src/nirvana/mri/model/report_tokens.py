"""Reports as tokens: the text that a backbone reads after an image, and the tokens to predict."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.data.tokenizer import text_encoder
from nirvana.errors import InputError
from nirvana.ops.cross_entropy import IGNORE

PROMPT = "Report:"
LENGTHS = 32  # text is padded to multiples of it: kernels are tuned or compiled for every length


class ReportTokens:
    """Reports as [BOS, prompt, blank, report, EOS], the form of the documents that the backbone was
    trained on.

    The blank is part of the report's first token, as in any text; a prompt that ended with a blank
    would be followed by tokens that no text has there.

    Args:
        tokenizer: the backbone's.
        prompt: the text before every report.
        longest: number of tokens to which a report is cut; None does not cut it.

    Attributes:
        before: the tokens before every report.
        end: the token after it.

    Raises:
        InputError: the tokenizer has no BOS or EOS.
    """

    def __init__(self, tokenizer: Any, prompt: str = PROMPT, longest: int | None = None):
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise InputError("reports need a tokenizer with a BOS and an EOS token")
        self._encode = text_encoder(tokenizer)
        self._longest = longest
        self.before: list[int] = [tokenizer.bos_token_id, *self._encode([prompt])[0]]
        self.end: int = tokenizer.eos_token_id

    def __call__(self, reports: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and labels of a batch of reports.

        Args:
            reports: B texts.
            device: of the results.

        Returns:
            Ids, int64 `[B, M]`, padded at the end to a multiple of `LENGTHS`, and labels, int64
            `[B, M]`: the token after each position, `IGNORE` where that is the prompt's or padding.
        """
        texts = [ids[: self._longest] for ids in self._encode([f" {report}" for report in reports])]
        first_label = len(self.before) - 1
        length = len(self.before) + max(map(len, texts))
        length += -length % LENGTHS
        ids = torch.full((len(texts), length), self.end)
        labels = torch.full((len(texts), length), IGNORE)
        for row, text in enumerate(texts):
            document = torch.tensor([*self.before, *text, self.end])
            ids[row, : len(document) - 1] = document[:-1]
            labels[row, first_label : len(document) - 1] = document[first_label + 1 :]
        return ids.to(device), labels.to(device)


def report_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch of reports.

    Args:
        logits: `[B, M, vocabulary]`.
        labels: int64 `[B, M]`, of `ReportTokens`.

    Returns:
        A scalar, in nats for each token with a label.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
