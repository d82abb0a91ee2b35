"""Curves of gates and fast parameters over position, and a linear probe for the domain."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

PLACES = (0, 64, 128, 256, 512, 1024, 2048)  # tokens between which a figure is averaged
DOCUMENTS = 32  # of a domain, the longest
PIECE = 512  # tokens of a sample of the probe
PIECES = 8  # of a document at most
RIDGE = 10.0  # penalty of the probe, on standardised features


def probe_trigger(model: Any, evaluation: dict[str, Any], batch_tokens: int) -> dict[str, Any]:
    """Curves of the gates and of the step's length, and how well domains separate.

    Args:
        model: with a Trigger, in eval mode.
        evaluation: what `experiments.language.prepare` wrote.
        batch_tokens: tokens read at once.

    Returns:
        "places"; "gates" and "steps": domain -> layer -> range -> [mean, its standard error over
        documents], None where no document reaches; "probe": features -> one entry for every sample
        that the probe was not fitted to: its document, and whether its domain was recognised.
    """
    texts = evaluation["text"]["test"]
    curves: dict[str, dict[str, Any]] = {"gates": {}, "steps": {}}
    for domain, documents in texts.items():
        rows = sorted((each["tokens"] for each in documents), key=len)[-DOCUMENTS:]
        seen = _read(model, [row[: PLACES[-1]] for row in rows], batch_tokens)
        for name in curves:
            curves[name][domain] = _curves(seen[name])
    return {"places": PLACES, **curves, "probe": _probe(model, texts, batch_tokens)}


@torch.no_grad()
def _read(model: Any, rows: list[list[int]], batch_tokens: int) -> dict[str, Tensor]:
    """Of all rows: "gates" and "steps" `[rows, layers, T]`, NaN behind a row's end; and means over
    a row's tokens: "fast" `[rows, 4 R]` behind the last layer, "embedded" `[rows, D]`."""
    length = max(map(len, rows))
    size = max(1, batch_tokens // length)
    parts: dict[str, list[Tensor]] = {"gates": [], "steps": [], "fast": [], "embedded": []}
    last: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *a: last.append(a[2][1]))
    try:
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            tokens = torch.zeros(len(batch), length, dtype=torch.int64)
            for place, row in enumerate(batch):
                tokens[place, : len(row)] = torch.as_tensor(row)
            tokens = tokens.to(model.device)
            traces = model(
                input_ids=tokens, use_cache=False, output_trigger=True, logits_to_keep=1
            ).trigger
            lengths = torch.tensor([len(row) for row in batch], device=tokens.device)
            beyond = torch.arange(length, device=tokens.device) >= lengths[:, None]
            gates = torch.stack([each.gates[..., 0] for each in traces], 1).float()
            steps = torch.stack([each.change for each in traces], 1).float()
            for name, values in (("gates", gates), ("steps", steps)):
                parts[name].append(values.masked_fill(beyond[:, None], float("nan")).cpu())
            embedded = model.get_input_embeddings()(tokens)
            for name, values in (("fast", last.pop().flatten(2)), ("embedded", embedded)):
                sums = values.float().masked_fill(beyond[..., None], 0).sum(1)
                parts[name].append((sums / lengths[:, None]).cpu())
    finally:
        hook.remove()
    return {name: torch.cat(values) for name, values in parts.items()}


def _curves(values: Tensor) -> list[list[list[float] | None]]:
    """Layer -> range -> mean over documents of their means there, and its standard error."""
    curves = []
    for layer in values.unbind(1):
        points: list[list[float] | None] = []
        for start, stop in pairwise(PLACES):
            means = layer[:, start:stop].nanmean(1)
            means = means[~means.isnan()]
            if len(means) < 2:
                points.append(None)
                continue
            error = float(means.std()) / len(means) ** 0.5
            points.append([round(float(means.mean()), 5), round(error, 6)])
        curves.append(points)
    return curves


def _probe(model: Any, texts: dict[str, Any], batch_tokens: int) -> dict[str, list[list[int]]]:
    """A linear probe for the domain of pieces of 512 tokens, each read from a fresh state; fitted
    to every second document and scored on the others. "embedded", the mean of the tokens'
    embeddings, is what any bag of words holds."""
    rows, owners, domains = [], [], []
    for label, documents in enumerate(texts.values()):
        for number, document in enumerate(documents[:DOCUMENTS]):
            bos, *tokens = document["tokens"]
            for start in range(0, min(len(tokens), PIECES * (PIECE - 1)), PIECE - 1):
                rows.append([bos, *tokens[start : start + PIECE - 1]])
                owners.append(number)
                domains.append(label)
    seen = _read(model, rows, batch_tokens)
    labels, owner = torch.tensor(domains), torch.tensor(owners)
    train = owner % 2 == 0
    documents = (labels * DOCUMENTS + owner)[~train].tolist()
    found = {}
    for name in ("fast", "gates", "embedded"):
        features = (seen[name].nanmean(2) if name == "gates" else seen[name]).double()
        right = ridge(features[train], labels[train], features[~train]) == labels[~train]
        found[name] = [[d, int(r)] for d, r in zip(documents, right.tolist(), strict=True)]
    return found


def ridge(known: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    """Classes of `scored` `[M, F]` by ridge regression of one-hot labels on `known` `[N, F]`; every
    class has the same weight."""
    mean, std = known.mean(0), known.std(0) + 1e-12
    known, scored = ((x - mean) / std for x in (known, scored))
    known, scored = (torch.cat([x, torch.ones(len(x), 1).to(x)], 1) for x in (known, scored))
    targets = torch.nn.functional.one_hot(labels).to(known)
    weights = (len(labels) / targets.sum(0).clamp(min=1) / targets.shape[1])[labels][:, None]
    gram = known.T @ (weights * known) + RIDGE * torch.eye(known.shape[1]).to(known)
    return (scored @ torch.linalg.solve(gram, known.T @ (weights * targets))).argmax(1)
