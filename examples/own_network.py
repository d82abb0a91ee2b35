"""A network of one's own around one Nirvana layer, trained to recall.

    python examples/own_network.py

A row holds pairs of a key and a value, then one of the keys; the answer is that key's value.
"""

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


if __name__ == "__main__":
    torch.manual_seed(0)
    network = Network(KEYS + VALUES, 64)
    for steps in (0, 100, 200):
        train(network, steps)
        print(f"{accuracy(network):6.1%} right after {steps} more steps")
