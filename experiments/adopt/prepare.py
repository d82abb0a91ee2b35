"""Writes what the study needs beside the teacher: untrained models and token shards.

python -m experiments.adopt.prepare --teacher SMOLLM2.gguf --data DATA
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.common.program import make_parser
from nirvana.data.shards import tokenize
from nirvana.errors import script
from nirvana.files import check_outputs
from nirvana.model.adopt import adopt

FOLDER = Path(__file__).parent / "data"
DOMAINS = ("general", "novels", "biomed", "law", "finance")
MODELS = ("window", "both", "linear")
"""The untrained models: the teacher with the window, the hybrid, and linear branches alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("experiments.adopt.prepare", __doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="a folder or a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="with text/DOMAIN/train.jsonl.xz")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    check_outputs({"--out": options.out}, [options.teacher, options.data])
    for branches in MODELS:
        if not (options.out / "models" / branches).is_dir():
            window = None if branches == "linear" else options.window
            adopt(options.teacher, options.out / "models" / branches, branches, window)
    for domain in options.domains:
        shards = options.out / "shards" / domain
        if not shards.is_dir():
            text = options.data / "text" / domain / "train.jsonl.xz"
            tokenize([text], shards, options.out / "models" / "both", 0, options.workers)
        print(shards)
    return 0


if __name__ == "__main__":
    script(main)
