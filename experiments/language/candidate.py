"""Compares the model of another recipe with the packaged `tiny` on the validation text.

    nirvana train configs/tiny.toml --run.out runs/bank-8 --model.bank_size 8 ...
    python -m experiments.language.candidate runs/bank-8 --data DATA

RUN is the folder of a training on as many tokens as the packaged model's; DATA holds
`text/<domain>/valid.jsonl.xz`. Adds a line to candidates.jsonl, with the bits of every document,
which the results page shows. A better candidate is packaged with `experiments.language.ship`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.program import make_parser
from experiments.common.results import append_row
from experiments.language.data import CANDIDATES, trained_tokens
from experiments.language.variants import DOMAINS
from nirvana.config import load_config
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.evaluate.perplexity import read_files
from nirvana.files import check_outputs
from nirvana.model.assets import load_language_model
from nirvana.train.config import LanguageConfig


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.language.candidate", __doc__)
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=CANDIDATES)
    parser.add_argument(
        "--limit", type=int, help="documents of each file; the result is not recorded"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of the code, for the record")
    options = parser.parse_args(arguments)
    texts = [options.data / "text" / domain / "valid.jsonl.xz" for domain in DOMAINS]
    check_outputs({"--results": options.results}, [options.run, *texts])
    device = choose_device(options.device)
    row = {
        "commit": options.commit,
        **compare_with_packaged(options.run, options.data, options.limit, device),
    }
    if options.limit is None:
        append_row(options.results, row)
    for domain, found in row["domains"].items():
        total = sum(found["bytes"])
        packaged, candidate = (sum(found[name]) / total for name in ("packaged", "candidate"))
        print(f"{domain}: packaged {packaged:.4f}, candidate {candidate:.4f} bits per byte")


def compare_with_packaged(run: Path, data: Path, limit: int | None, device: Any) -> dict[str, Any]:
    """The recipe, and by domain the bytes of every document and its bits by both models.

    Raises:
        InputError: for an unfinished run, or one of another number of tokens.
    """
    config, packaged = (
        load_config(LanguageConfig, path)
        for path in (run / "config.json", Path(__file__).parents[2] / "configs" / "tiny.toml")
    )
    tokens, wanted = trained_tokens(config), trained_tokens(packaged)
    if tokens != wanted:
        raise InputError(
            f"{run} was trained on {tokens:,} tokens, the packaged model on {wanted:,}"
        )
    files = {domain: data / "text" / domain / "valid.jsonl.xz" for domain in DOMAINS}
    domains: dict[str, dict[str, list[float]]] = {domain: {} for domain in DOMAINS}
    for name, source in (("packaged", "tiny"), ("candidate", run / "model")):
        model, tokenizer = load_language_model(source, device)
        for domain, score in read_files(model, tokenizer, files, limit, progress=True).items():
            documents = score.documents
            domains[domain]["bytes"] = [each.bytes for each in documents]
            bits = [each.nats / np.log(2) for each in documents]
            domains[domain][name] = [round(float(each), 3) for each in bits]
    return {"model": config.model.fields, "seed": config.run.seed, "tokens": tokens} | {
        "domains": domains
    }


if __name__ == "__main__":
    script(main)
