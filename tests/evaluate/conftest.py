"""A tokenizer and stand-in models whose behaviour is known exactly."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from nirvana.data.tokenizer import load_tokenizer, train_tokenizer
from nirvana.model.cache import CACHE_FIELD, in_output

VOCABULARY = 280


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("The cat sat on the mat. " * 9)
    train_tokenizer([folder / "a.txt"], folder / "tokenizer", VOCABULARY)
    return load_tokenizer(folder / "tokenizer")


class Inductor(nn.Module):
    """Foretells what followed the longest earlier match of the latest tokens: what a perfect
    reader of a context does, without access to any answer. It sees `window` tokens back."""

    def __init__(self, window=10**9, order=12):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.window, self.order = window, order

    def next(self, seen):
        seen = seen[-self.window :]
        for size in range(min(self.order, len(seen) - 1), 0, -1):
            suffix = seen[-size:]
            for at in range(len(seen) - size - 1, -1, -1):
                if seen[at : at + size] == suffix:
                    return seen[at + size]
        return 0

    def forward(self, input_ids, use_cache=True, logits_to_keep=0, **cache):
        past = cache.get(CACHE_FIELD) or []
        new = input_ids[0].tolist()
        seen = past + new
        kept = min(logits_to_keep, len(new)) or len(new)
        logits = torch.zeros(1, kept, VOCABULARY)
        for place in range(kept):
            stop = len(seen) - kept + place + 1
            logits[0, place, self.next(seen[:stop])] = 50.0
        return CausalLMOutputWithPast(logits=logits, **in_output(seen))


class Guesser(nn.Module):
    """Draws what comes next from `choices`, alike."""

    def __init__(self, choices):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.choices = torch.tensor(choices)

    def forward(self, input_ids, use_cache=True, logits_to_keep=0, **cache):
        kept = min(logits_to_keep, input_ids.shape[1]) or input_ids.shape[1]
        logits = torch.full((1, kept, VOCABULARY), -100.0)
        logits[0, :, self.choices] = torch.rand(kept, len(self.choices))
        return CausalLMOutputWithPast(logits=logits, **in_output([]))


@pytest.fixture
def inductor():
    return Inductor


@pytest.fixture
def guesser():
    return Guesser
