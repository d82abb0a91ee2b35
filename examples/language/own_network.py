"""
A network of your own
=====================

``NirvanaLayer`` mixes the tokens of a row as an attention layer does, and needs nothing else of a
model. Here a network of one layer learns to recall: a row holds pairs of a key and a value, then
one of the keys; the answer is that key's value.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana import NirvanaLayer

KEYS, VALUES, PAIRS = 12, 12, 4


def recall(rows: int) -> tuple[Tensor, Tensor]:
    """Questions `[rows, 2 PAIRS + 1]`, keys 0 to 11 and values 12 to 23, and answers `[rows]`."""
    keys = torch.rand(rows, KEYS).argsort(1)[:, :PAIRS]
    values = torch.randint(KEYS, KEYS + VALUES, (rows, PAIRS))
    place = torch.randint(PAIRS, (rows, 1))
    pairs = torch.stack([keys, values], dim=2).flatten(1)
    return torch.cat([pairs, keys.gather(1, place)], dim=1), values.gather(1, place)[:, 0]


# %%
# The network and its training
# ----------------------------
# The layer initialises itself. Several of them can share one bank, and hand the fast parameters
# from one to the next: the guide on building shows how.


class Network(nn.Module):
    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(tokens, dim), nn.Linear(dim, tokens)
        self.norm, self.mix = nn.RMSNorm(dim), NirvanaLayer(dim, num_heads=2, sliding_window=8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.mix(self.norm(x)).y)


def train(network: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(steps):
        questions, answers = recall(64)
        F.cross_entropy(network(questions)[:, -1], answers).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    questions, answers = recall(1000)
    return (network(questions)[:, -1].argmax(1) == answers).float().mean().item()


# %%
# Learn
# -----
# Guessing among the values is right in one of twelve rows, and among those that the row holds in
# one of four.

torch.manual_seed(0)
network = Network(KEYS + VALUES, 64)
steps, reached = [0], [accuracy(network)]
for _ in range(10):
    train(network, 20)
    steps.append(steps[-1] + 20)
    reached.append(accuracy(network))
    print(f"{steps[-1]:4} steps: {reached[-1]:6.1%} right")

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.plot(steps, reached, "o-", color="#0072b2", label="the network")
axes.axhline(1 / PAIRS, color="#d55e00", linestyle="--", label="any value of the row")
axes.set(xlabel="steps of 64 rows", ylabel="answers that are right", ylim=(0, 1.02))
axes.legend(frameon=False)
plt.show()
