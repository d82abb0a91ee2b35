"""Writes the folder of the packaged model `tiny`: weights, tokenizer, and a card with its figures.

    python -m experiments.language.ship RUN --data DATA --out FOLDER

RUN is the folder of a training by `nirvana train configs/tiny.toml`, whose settings may have been
overridden; DATA holds `text/<domain>/test.jsonl.xz`. The card's figures are measured
here. `src/nirvana/assets/tiny` is replaced by hand: the packaged MRI codec and reporter are trained
on exactly the model that lies there, and must be trained anew with it.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.program import make_parser
from experiments.language.data import trained_tokens
from experiments.language.variants import DOMAINS
from nirvana.config import load_config
from nirvana.data.documents import read_documents
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.evaluate.perplexity import byte_entropy, read_files
from nirvana.files import atomic_folder, check_outputs, replaceable_folder
from nirvana.model.assets import load_language_model
from nirvana.model.trigger import without_trigger
from nirvana.train.config import LanguageConfig
from nirvana.train.export import RESULTS

LARGEST = 12e6  # bytes of the weights
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
MORE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

CARD = """---
library_name: nirvana
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# tiny: a Nirvana language model of {millions:.1f} M parameters

Ships with the package as the model named `tiny`: it makes the commands work at once, and it is the
frozen backbone of the packaged MRI codec and reporter. It is far too small to know facts; do not
rely on what it writes.

| | |
|---|---|
| architecture | {architecture} |
| tokenizer | byte-level BPE, {vocabulary} tokens, trained on the training files |
| weights | {dtype}, {megabytes:.1f} MB |

## Data

| domain | what | licence and source |
|---|---|---|
| general | 12 OpenStax textbooks | CC BY 4.0, "Access for free at openstax.org", at commits \
before the books' licence changed |
| novels | English novels to 1928 | public domain, computationalstylistics/100_english_novels |
| biomed | randomised-trial articles, PubMed Central | CC BY / CC0 per record, \
jayded/evidence-inference |
| law | US Courts of Appeals opinions | public domain, CourtListener texts |
| finance | Federal Reserve Beige Book, economics and finance textbooks, TAT-QA, FOMC statements | \
US government / CC BY 4.0 |

Splits are by document.

## Recipe

{steps:,} steps of {rows} x {context} tokens ({tokens:.0f} M tokens), documents packed with the
state reset between them, AdamW, learning rate {optim.lr:g} to {optim.min_lr:g}, \
{optim.warmup_steps} steps
of warm-up, weight decay {optim.weight_decay:g}, seed {seed}, {precision} autocast. Last training
loss: {loss:.3f} nats a token.

    nirvana train configs/tiny.toml {overrides}

## Figures

Bits per byte of the whole test files, every document from a fresh state. All figures are of one
training run and have no interval. The ten novels are pieces of one book. "Trigger off" is the same
model without the Trigger's steps. It was trained with them: the column shows how much it relies on
them and is no evidence that training with them helps. "unigram" is the entropy of the file's own
single bytes.

| test file | documents | unigram | bits per byte | Trigger off |
|---|---|---|---|---|
{figures}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.language.ship", __doc__)
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="documents of each file at most")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    ship(options.run, options.data, options.out, options.limit, choose_device(options.device))


def ship(run: Path, data: Path, out: Path, limit: int | None, device: Any) -> None:
    """Measures the model of a training and writes the folder `out`.

    Raises:
        InputError: for an unfinished run, weights of more than 12 MB, or missing text.
    """
    source, out = run / "model", replaceable_folder(out, RESULTS)
    files = {domain: data / "text" / domain / "test.jsonl.xz" for domain in DOMAINS}
    others = [run / "config.json", run / "metrics.jsonl"]
    check_outputs({"--out": out}, [source, *others, *files.values()])
    config = load_config(LanguageConfig, run / "config.json")
    model, tokenizer = load_language_model(source, device)
    size = (source / "model.safetensors").stat().st_size
    if size > LARGEST:
        raise InputError(f"{source}: weights of {size / 1e6:.1f} MB, more than 12: export in bf16")
    found = read_files(model, tokenizer, files, limit, progress=True)
    with without_trigger(model):
        off = read_files(model, tokenizer, files, limit, progress=True)
    rows = [
        f"| {domain} | {len(found[domain].documents)} | {byte_entropy(read_documents(file)):.2f} | "
        f"{found[domain].total.bits_per_byte:.3f} | "
        f"{off[domain].total.bits_per_byte:.3f} |"
        for domain, file in files.items()
    ]
    own, per_step = model.config, config.data.batch_size * config.optim.accumulation
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    card = CARD.format(
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        architecture=_architecture(own),
        vocabulary=own.vocab_size,
        dtype=stored["dtype"],
        megabytes=size / 1e6,
        steps=config.run.steps,
        rows=per_step,
        context=config.data.context_length,
        tokens=trained_tokens(config) / 1e6,
        optim=config.optim,
        seed=config.run.seed,
        precision=config.run.precision,
        loss=json.loads(lines[-1])["loss"],
        overrides=" ".join(
            [
                f"--run.steps {config.run.steps}",
                f"--optim.lr {config.optim.lr:g}",
                *(f"--model.{name} {value}" for name, value in config.model.fields.items()),
            ]
        ),
        figures="\n".join(rows),
    )
    with atomic_folder(out) as folder:
        for name in (*FILES, *MORE):
            if name in FILES or (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


def _architecture(own: Any) -> str:
    learned = {True: "learned", False: "fixed"}
    return (
        f"preset `tiny`: D {own.hidden_size}, {own.num_hidden_layers} layers "
        f"({own.num_prelude_layers} prelude), {own.num_attention_heads} heads of {own.head_dim}, "
        f"window {own.sliding_window}, C {own.task_dim}, R {own.bank_size}, tied head, "
        f"{own.interpolation} interpolation, gate {own.gate}, {own.trigger_gradient} gradient, "
        f"{own.trigger_step} step, step size {learned[own.trigger_lr_learnable]}, "
        f"decay {learned[own.trigger_decay_learnable]}"
    )


if __name__ == "__main__":
    script(main)
