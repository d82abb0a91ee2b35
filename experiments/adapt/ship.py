"""Writes the settings that the packaged model `tiny` adapts with, `adapt.json`.

    python -m experiments.adapt.ship [--results FILE] --out FILE

Of the settings with one step size for each group and those with one for each tensor, the better on
validation documents of domains that were not trained on, among those that lose at most `MOST_WORSE`
percent in every domain that was.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.adapt.conditions import MOST_WORSE
from experiments.adapt.data import RESULTS
from experiments.adapt.parts import VALIDATED
from experiments.common.program import make_parser
from experiments.common.results import read_rows
from nirvana.errors import InputError, script
from nirvana.files import check_outputs, writable_json, write_json


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.adapt.ship", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    check_outputs({"--out": options.out}, [options.results])
    writable_json(options.out)
    kinds = ("chosen", VALIDATED)
    rows = [
        row
        for row in read_rows(options.results)
        if row["part"] == "select"
        and row["name"]["model"] == "tiny"
        and row["name"]["kind"] in kinds
        and row["scale"]["documents"] is None
    ]
    if {row["name"]["kind"] for row in rows} != {*kinds}:
        raise InputError(f"{options.results} lacks rows of {' and '.join(kinds)}")
    for row in rows:
        print(f"{row['name']['kind']}: {row['figure']:+.2f} %, seen {row['worst']:+.2f} % at worst")
    harmless = [row for row in rows if row["worst"] <= MOST_WORSE]
    if not harmless:
        raise InputError(f"every setting loses more than {MOST_WORSE} % in a domain that was seen")
    best = min(harmless, key=lambda row: row["figure"])
    write_json(options.out, best["config"])
    print(f"{options.out}: {best['name']['kind']}")


if __name__ == "__main__":
    script(main)
