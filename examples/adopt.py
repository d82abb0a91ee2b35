"""Adopts a Transformer and distils it, on a CPU in under two minutes.

    python examples/adopt.py                       # a small random teacher
    python examples/adopt.py --teacher FOLDER      # or one on the disk: a folder or a .gguf file

Beside the window branch, which is the teacher's attention, the result has a linear branch. It
starts at zero and learns the teacher's attention, layer by layer, then the teacher's distribution.
The same steps with settings in a file: `nirvana adopt` and `nirvana distill`.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana.data.tokenizer import copy_tokenizer
from nirvana.model.adopt import adopt
from nirvana.packaged import packaged
from nirvana.train.distill import distill

SHARDS = packaged("quickstart")


def random_teacher(folder: Path) -> Path:
    """A Llama with random weights that knows the tokens of the packaged text."""
    meta = json.loads((SHARDS / "train" / "meta.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=meta["vocab_size"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(SHARDS / "train" / "tokenizer", folder)
    return folder


def stage(name: str, teacher: Path, initial: Path, shards: Path, out: Path, steps: int) -> None:
    """One stage, on rows of four windows; prints the loss of its first and last steps."""
    settings = {
        "distill.teacher": teacher,
        "distill.stage": name,
        "data.train.text": shards,
        "data.context_length": 128,
        "data.batch_size": 4,
        "optim.lr": 0.005,
        "optim.weight_decay": 0.0,
        "optim.warmup_steps": 5,
        "run.initial": initial,
        "run.out": out,
        "run.steps": steps,
        "run.log_interval": 1,
        "run.compile": "false",
    }
    config = out.with_suffix(".toml")
    config.write_text("")
    distill(config, [f"--{key}={value}" for key, value in settings.items()])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(x["loss"] for x in part) / 3 for part in (lines[:3], lines[-3:]))
    print(f"{name}: loss {first:.3f} -> {last:.3f}")


def main(teacher: Path | None, shards: Path, steps: int) -> None:
    """Adopts, then distils in two stages."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        found = teacher or random_teacher(folder / "teacher")
        report = adopt(found, folder / "adopted", "both", window=32, sinks=1)
        print(f"mapped: {report['mapped parameters']:,} of {report['parameters']:,} parameters")
        stage("attention", found, folder / "adopted", shards, folder / "1", steps)
        stage("logits", found, folder / "1", shards, folder / "2", steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", type=Path, help="a folder or a .gguf file")
    parser.add_argument("--shards", type=Path, help="token shards of the teacher's tokenizer")
    parser.add_argument("--steps", type=int, default=40, help="of each stage")
    given = parser.parse_args()
    if (given.teacher is None) != (given.shards is None):
        parser.error("--teacher and --shards go together: shards hold the teacher's tokens")
    main(given.teacher, given.shards or SHARDS / "train", given.steps)
