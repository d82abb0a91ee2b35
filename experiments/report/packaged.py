"""Reads simulated samples of the test people with the packaged reporter, at its fixed threshold.

    python -m experiments.report.prepare MRI_FOLDER brain_slices.npz
    python -m experiments.report.packaged brain_slices.npz
    python -m experiments.report.page

Adds rows of the form of `experiments.report.study` to results.jsonl.xz, one for each sample. On one
CPU core a sample takes about a second.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.program import make_parser
from experiments.common.results import append_rows, read_rows
from experiments.report.study import CENTER, Cell, Study, batches, of_role, read
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.mri.anatomy.brain_slices import load_brain_slices
from nirvana.mri.anatomy.lesions import SEQUENCES
from nirvana.mri.reports.reporter import load_reporter

RESULTS = Path(__file__).parent / "results.jsonl.xz"
NAME = "reporter"  # of the packaged model, and of its rows
SEED = 2  # of the samples


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.report.packaged", __doc__)
    parser.add_argument("brain_slices", type=Path)
    parser.add_argument("--reporter", default=NAME, help="a reporter's folder, for a test")
    parser.add_argument("--acceleration", type=float, choices=[*CENTER], default=4.0)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--at-once", type=int, default=16, help="samples read together")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    check_outputs({"--out": given.out}, [given.brain_slices])
    for name in ("samples", "at_once"):
        if getattr(given, name) < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {getattr(given, name)} must be at least 1")
    cell = Cell("wording", given.acceleration, 0)
    done = [row for row in read_rows(given.out) if row["acceleration"] == cell.acceleration]
    if done:
        raise InputError(f"{given.out} has {len(done)} rows at {cell.acceleration:g}x already")
    brains = load_brain_slices(given.brain_slices)
    test = brains.of_subjects(of_role(brains, "test"))
    device = choose_device(given.device)
    reporter = load_reporter(given.reporter, device)
    test = test.to(device)
    rows: list[dict[str, Any]] = []
    for batch in batches(Study(), test, cell.acceleration, given.samples, SEED):
        for part in batch.split(given.at_once):
            for row in read(reporter, part, cell):
                index = int(part.index[row.pop("i")])
                facts = {
                    "model": NAME,
                    **vars(cell),
                    "seed": SEED,
                    "subject": test.names[int(test.subject[index])],
                    "slice": index,
                    "sequence": SEQUENCES[int(test.sequence[index])],
                    "threshold": reporter.threshold,
                }
                rows.append(facts | row)
            print(f"{len(rows)} of {given.samples} samples", flush=True)
    append_rows(given.out, rows)


if __name__ == "__main__":
    script(main)
