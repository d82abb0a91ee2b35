"""Trains one of the equal models of the study and writes it as a folder.

python -m experiments.adapt.control --variant transformer --out FOLDER
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.adapt.data import FOLDER, load_data
from experiments.common.program import make_parser
from experiments.language.single_run import configuration, train
from experiments.language.variants import PEERS, SIZES, Budget
from nirvana.device import choose_device
from nirvana.errors import script
from nirvana.files import atomic_folder, replaceable_folder
from nirvana.train.distributed import ProcessContext
from nirvana.train.language import LanguageTask

FILES = ("config.json", "generation_config.json", "model.safetensors", "token*", "*.jinja")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.adapt.control", __doc__)
    parser.add_argument("--variant", choices=[*PEERS], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--size", choices=[*SIZES], default="tiny")
    parser.add_argument("--tokens", type=int, default=48_000_000)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    out = replaceable_folder(options.out, FILES)
    device = choose_device(options.device)
    budget = Budget(options.size, options.tokens, options.context, options.rows)
    shards = load_data(options.data).shards
    assert shards is not None  # the whole data are read
    config = configuration(options.variant, 0, "A", budget, shards, device)
    torch.manual_seed(0)
    task = LanguageTask(config, device)
    compiled = device.type == "cuda" and not options.no_compile
    _, figures = train(
        task, config, ProcessContext(device), compiled, lambda line: print(line, flush=True)
    )
    with atomic_folder(out) as folder:
        task.model.save_pretrained(folder)  # type: ignore[operator]
        task.tokenizer.save_pretrained(folder)
    print(f"{out}: loss {figures['losses'][-1][1]}")


if __name__ == "__main__":
    script(main)
