"""Measures how an adopted model adapts to documents, like `tiny` in the study of adaptation.

    python -m experiments.adopt.adaptation --model FOLDER --documents documents.json.xz

The documents are those of `experiments.adapt`, encoded anew with the model's own tokenizer. Chunk
and step size are chosen on its validation documents, as there; every finished measurement is one
row. A row that is there already is not measured again.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.adapt.conditions import choose, grid, measure_condition, swapped
from experiments.adapt.context import Context, by_domain
from experiments.adapt.data import BLOCK, FOLDER, SCORED, TOKENS, Data, Document, load_documents
from experiments.adapt.measure import FROZEN
from experiments.common.program import make_parser
from nirvana.adapt.adaptation import default_config
from nirvana.bench.measure import environment
from nirvana.data.tokenizer import aligned_encoder, load_tokenizer
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs, sha256
from nirvana.model.assets import load_language_model

ROWS = Path(__file__).parent / "adaptation.jsonl"
CHUNKS = (64, 128)
SIZES = (0.0025, 0.005, 0.01, 0.02)
"""Step sizes of norm gains; the model is twice as wide as `tiny` and far better trained, so that
smaller ones than there may be best."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    check_outputs({"--results": options.results}, [options.model, options.documents])
    device = choose_device(options.device)
    end = None if options.minutes is None else time.time() + 60 * options.minutes
    model, tokenizer = load_language_model(options.model, device)
    if device.type == "cuda":
        nn.Module.to(model, torch.bfloat16)
    if not options.graphs:
        model.register_forward_hook(lambda *_: None)  # a model with hooks is read without graphs
    data = encoded_data(load_documents(options.documents), tokenizer, options.tokens)
    identity = data.identity + sha256(options.model / "tokenizer.json")[:8]
    about = environment(device)
    about["commit"] = about["commit"] or options.commit
    about["dtype"] = str(model.dtype).removeprefix("torch.")
    context = Context(
        data=replace(data, identity=identity),
        models=options.model.parent,
        out=options.results,
        device=device,
        about=about,
        documents=options.number,
        tokens=options.tokens,
        batches=0,  # no step sizes are learned
        end=end,
    )
    name = options.name or str(options.model)
    context.loaded[name] = model, tokenizer
    measure(context, name, options.chunks, options.sizes)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("experiments.adopt.adaptation", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder of an adopted model")
    parser.add_argument("--name", help="of the model in the rows; its folder by default")
    parser.add_argument("--documents", type=Path, default=FOLDER / SCORED)
    parser.add_argument("--results", type=Path, default=ROWS)
    parser.add_argument("--number", type=int, default=8, help="documents of a domain at most")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a document at most")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="candidates")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="step sizes to try")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="CUDA graphs, on a GPU",
    )
    parser.add_argument("--minutes", type=float, help="begin no measurement later")
    parser.add_argument("--commit", help="of the code, for the record, where there is no git")
    options = parser.parse_args(arguments)
    if not BLOCK <= options.tokens <= TOKENS:
        raise InputError(f"--tokens {options.tokens} must be from {BLOCK} to {TOKENS}")
    if options.number < 2:  # a control is the task parameters of another document
        raise InputError(f"--number {options.number} must be at least 2")
    return options


def encoded_data(data: Data, tokenizer: Any, most: int) -> Data:
    """The texts that `tiny` reads in its main table, as tokens of another model.

    Args:
        data: documents in the tokens of `tiny`.
        tokenizer: of the other model.
        most: predicted tokens of a document.

    Returns:
        The documents without recall problems, whose answers are places among other tokens.

    Raises:
        InputError: for a tokenizer without BOS, and a document that is shorter than a block.
    """
    if tokenizer.bos_token_id is None:
        raise InputError("the model's tokenizer has no BOS token, with which every text starts")
    read, encode = load_tokenizer("tiny"), aligned_encoder(tokenizer)

    def encoded(document: Document) -> Document:
        text = read.decode(document.tokens[1 : TOKENS + 1], clean_up_tokenization_spaces=False)
        # The last token may hold the first bytes of a character only.
        ids, sizes = encode(text.removesuffix("\ufffd"))
        count = min(len(ids), most) // BLOCK * BLOCK
        if not count:
            raise InputError(f"a document of {len(ids)} tokens is shorter than a block of {BLOCK}")
        blocks = [sum(sizes[first : first + BLOCK]) for first in range(0, count, BLOCK)]
        return Document([tokenizer.bos_token_id, *ids[:count]], blocks, {})

    test, valid = (
        {domain: [encoded(each) for each in documents] for domain, documents in split.items()}
        for split in (data.test, data.valid)
    )
    return replace(data, test=test, valid=valid, recall={})


def measure(context: Context, name: str, chunks: Sequence[int], sizes: Sequence[float]) -> None:
    """Chooses settings, then reads the test documents: frozen, adapted, and with the controls.

    Args:
        context: with the model.
        name: of the model.
        chunks: tokens of a chunk to choose from.
        sizes: step sizes to choose from.
    """
    groups = default_config(context.model(name)).parameters
    choose(context, name, "chosen", grid(groups, chunks, sizes))
    if context.settings_row(name, "chosen") is None:
        return
    ours = context.settings(name, "chosen")
    names, documents, rows = context.flat("test")
    sizes_of = by_domain(names, [each.bytes for each in documents])
    context.measure("test", {"model": name, "condition": "bytes"}, lambda: {"bytes": sizes_of})
    measure_condition(context, names, rows, "frozen", FROZEN, model=name)
    measure_condition(context, names, rows, "chosen", ours, model=name)
    swapped(context, names, rows, ours, name)
    if groups == ("norm",):  # without a Trigger these are the chosen ones
        return
    choose(context, name, "norm", grid(("norm",), [ours.chunk], sizes))
    if context.settings_row(name, "norm") is not None:
        norm = context.settings(name, "norm")
        measure_condition(context, names, rows, "norm", norm, model=name)


if __name__ == "__main__":
    script(main)
