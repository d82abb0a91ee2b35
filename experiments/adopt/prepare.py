"""Writes what the study needs: the teacher, the untrained models, and token shards.

python -m experiments.adopt.prepare --teacher SMOLLM2.gguf --data DATA
"""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.common.program import make_parser
from nirvana.data.documents import read_documents
from nirvana.data.shards import tokenize
from nirvana.errors import script
from nirvana.files import atomic_file, atomic_folder, check_outputs
from nirvana.model.adopt import adopt, load_teacher, write_tokenizer

FOLDER = Path(__file__).parent / "data"
DOMAINS = ("general", "novels", "biomed", "law", "finance")
MODELS = ("window", "both", "linear")
"""The untrained models: the teacher with the window, the hybrid, and linear branches alone."""
TEACHER = "teacher"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("experiments.adopt.prepare", __doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="a folder or a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="with text/DOMAIN/train.jsonl.xz")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--megabytes", type=float, help="text of a domain at most, from its start")
    options = parser.parse_args(arguments)
    check_outputs({"--out": options.out}, [options.teacher, options.data])
    models = options.out / "models"
    if not (models / TEACHER).is_dir():
        _save_teacher(options.teacher, models / TEACHER)
    for branches in MODELS:
        if not (models / branches).is_dir():
            window = None if branches == "linear" else options.window
            adopt(models / TEACHER, models / branches, branches, window)
    for domain in options.domains:
        shards = options.out / "shards" / domain
        if not shards.is_dir():
            text = options.data / "text" / domain / "train.jsonl.xz"
            if options.megabytes is not None:
                text = _beginning(text, options.out / "text" / f"{domain}.jsonl", options.megabytes)
            counts = tokenize([text], shards, models / "both")
            print(f"{shards}: {counts.tokens:,} tokens", flush=True)
    return 0


def _save_teacher(source: Path, out: Path) -> None:
    """Writes a teacher as a folder, which loads much faster than a GGUF file."""
    found = load_teacher(source)
    if found.gguf is not None:  # its weights are dequantised
        found.model.hf_quantizer.remove_quantization_config(found.model)  # type: ignore[operator]
    with atomic_folder(out) as partial:
        found.model.save_pretrained(partial)
        write_tokenizer(found, partial)


def _beginning(source: Path, out: Path, megabytes: float) -> Path:
    """Writes the first documents of a file, at least one, up to a size."""
    left = megabytes * 1e6
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as partial, open(partial, "w", encoding="utf-8") as file:
        for text in read_documents(source):
            file.write(json.dumps({"text": text}) + "\n")
            left -= len(text.encode())
            if left <= 0:
                break
    return out


if __name__ == "__main__":
    script(main)
