"""Writes docs/evidence-mri.md from the lines that run.py left.

python experiments/mri/report.py experiments/mri/results.jsonl [--out docs/evidence-mri.md]
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from nirvana.errors import InputError, script
from nirvana.files import atomic_file, check_outputs

sys.path.insert(0, str(Path(__file__).parent))
from arms import ARMS, CLASSICAL

REFERENCE = "nirvana"
METRICS = {"psnr": "{:.2f}", "ssim": "{:.4f}", "nmse": "{:.4f}"}
GROUPS = ("unseen people", "contrast medium", "inverted contrast", "measured head", "measured knee")
SHORT = (
    ("unseen people", "equispaced 4x"),
    ("unseen people", "equispaced 8x"),
    ("inverted contrast", "equispaced 4x"),
)
Line = dict[str, Any]

METHOD = """# MRI reconstruction: what was measured

Made by `experiments/mri/report.py` from the lines of `experiments/mri/run.py`; the commands are at
the end.

**Data.** Training: slices of 20 volumes of 11 people and a template (T1, T2, FLAIR; 8 bits), none
of whom is in the test. Test: 8 middle slices of each of 11 volumes of six other people; two people
give three contrasts of them each, so volumes are not fully independent. Licences: the card of the
packaged codec.

**What is simulated**: for volumes, contrast (an exponent), smooth phase, 8 coils (birdcage or
random and smooth), noise of 0.2 to 2 % of the brightest pixel, Cartesian undersampling; training
draws 1, 4 or 8 coils. No motion, no field inhomogeneity, no correlated noise. *Contrast medium* is
a volume of a kind (T1 after contrast medium, tumour) that no training saw; *inverted contrast*
turns the test volumes' brightness over, a stand-in for an unknown sequence. *Measured head* and
*measured knee* are genuine k-space of one coil each, of which only the undersampling is simulated:
one slice each, so no spread and no test.

**Budget.** Every trained arm sees the same slices in the same order, as often as the table says,
with the same optimiser. Seeds differ in the initial weights alone: at the commits below, the
generators of the data heard the step and not the seed, which was found and mended later. The
backbone is frozen. `none` is the codec whose tokens pass no backbone;
`transformer` and `gated_deltanet` are frozen with random weights, since no trained ones of this
size are packaged, so they tell what an untrained network there does; the two Nirvanas share the
packaged `tiny`'s weights. Times taken beside other programs on the same GPU are upper bounds, or
left out.

**Classical methods** use ESPIRiT's sensitivities and were tuned at 4x on training volumes; `bart-`
are BART's own programs, the others sigpy with sensitivities of ours. At 8x
only five to ten columns are left for calibration, too few for ESPIRiT: their rows show that.

**Scores** per volume, over its slices: PSNR in dB with the volume's maximum, SSIM (scikit-image,
uniform window 7), NMSE. Mean ± standard deviation over volumes, of each the mean over the seeds
that the budget lists; p: two-sided paired Wilcoxon test against `{reference}`.
"""


def read(path: Path) -> list[Line]:
    """The finished arms.

    Raises:
        InputError: for a file that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return [json.loads(line) for line in lines if line]


def by_volume(lines: list[Line], group: str, mask: str, metric: str) -> dict[str, dict[str, float]]:
    """Arm -> volume -> score, the mean over seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for row in line["volumes"]:
            if (row["group"], row["mask"]) == (group, mask):
                found[line["arm"]][row["volume"]].append(row[metric])
    return {
        arm: {volume: float(np.mean(values)) for volume, values in volumes.items()}
        for arm, volumes in found.items()
    }


def cell(own: dict[str, float], reference: dict[str, float], form: str) -> str:
    """Mean ± spread, and p of the test against the reference where there is one."""
    values = np.array(list(own.values()))
    text = form.format(values.mean())
    if len(values) > 1:
        text += " ± " + form.format(values.std(ddof=1))
    _, p = paired(reference, own)
    return text if p is None else f"{text} (p {p:.2g})"


def paired(one: dict[str, float], other: dict[str, float]) -> tuple[np.ndarray, float | None]:
    """The differences one - other on the volumes of both, and p of the test, where there is one."""
    differences = np.array([one[volume] - other[volume] for volume in other if volume in one])
    if len(differences) < 2 or not differences.any():
        return differences, None
    result: Any = wilcoxon(differences)
    return differences, float(result.pvalue)


def scores(lines: list[Line]) -> list[str]:
    """A table for every group of scans and mask."""
    text = []
    masks = list(dict.fromkeys(row["mask"] for line in lines for row in line["volumes"]))
    for group in GROUPS:
        for mask in masks:
            tables = {m: by_volume(lines, group, mask, m) for m in METRICS}
            if not tables["psnr"]:
                continue
            count = max(map(len, tables["psnr"].values()))
            plural = "volume" if count == 1 else "volumes"
            text += ["", f"### {group}, {mask} ({count} {plural})", ""]
            text += ["| arm | PSNR, dB | SSIM | NMSE |", "|---|---|---|---|"]
            for arm in tables["psnr"]:
                cells = [
                    cell(table[arm], table.get(REFERENCE, {}), METRICS[metric])
                    for metric, table in tables.items()
                ]
                text.append(f"| {arm} | {' | '.join(cells)} |")
    return text


def short(lines: list[Line]) -> list[str]:
    """What the reference gains over each other arm, in PSNR, on the groups and masks of `SHORT`."""
    text = [
        "| what `nirvana` gains in PSNR, dB (p, volumes on which it is ahead) | "
        + " | ".join(f"{mask}, {group}" for group, mask in SHORT)
        + " |",
        "|---" * (1 + len(SHORT)) + "|",
    ]
    tables = [by_volume(lines, group, mask, "psnr") for group, mask in SHORT]
    for arm in tables[0]:
        if arm == REFERENCE:
            continue
        cells = [
            gain(table[arm], table[REFERENCE]) if arm in table and REFERENCE in table else ""
            for table in tables
        ]
        text.append(f"| over {arm} | {' | '.join(cells)} |")
    return text


def gain(own: dict[str, float], reference: dict[str, float]) -> str:
    """Mean difference to the reference, its p, and on how many volumes the reference is ahead."""
    differences, p = paired(reference, own)
    ahead = f"{int((differences > 0).sum())} of {len(differences)}"
    text = f"{differences.mean():+.2f}"
    return text if p is None else f"{text} (p {p:.2g}, {ahead})"


def budgets(lines: list[Line]) -> list[str]:
    """Parameters, training and speed of every trained arm."""
    text = [
        "| arm | seed | trained parameters | frozen | steps | slices seen | training, s | "
        "slices/s | training, GiB | a slice of 320 x 320, 16 coils: alone / of eight | "
        "weights, MB | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "training" not in line:
            continue
        training, parameters, speed = line["training"], line["parameters"], line.get("speed")
        memory = "" if training["memory_gib"] is None else f"{training['memory_gib']:.1f}"
        once = ""
        if speed is not None:
            once = f"{1000 * speed['seconds']:.0f} / {1000 * speed['seconds_in_volume']:.0f} ms"
            if speed["memory_gib"] is not None:
                once += f", {speed['memory_gib']:.2f} GiB"
        times = [training["seconds"], training["slices_per_second"]]
        cells = [
            line["arm"],
            str(line["seed"]),
            f"{parameters['trained']:,}",
            f"{parameters['frozen']:,}",
            f"{training['steps']:,}",
            f"{training['slices']:,}",
            *("" if time is None else f"{time:.0f}" for time in times),
            memory,
            once,
            f"{line['weights_bytes'] / 1e6:.2f}",
            line["device"],
        ]
        text.append(f"| {' | '.join(cells)} |")
    return text


def classical_speed(lines: list[Line]) -> list[str]:
    """Seconds per slice of the methods that nothing is trained for."""
    text = []
    for line in lines:
        if "training" not in line:
            seconds = np.mean([row["seconds_per_slice"] for row in line["volumes"]])
            text.append(f"- {line['arm']}: {seconds:.2f} s a slice of the test on {line['device']}")
    return text


def report(lines: list[Line]) -> str:
    """The whole document."""
    text = [
        METHOD.format(reference=REFERENCE),
        "## In short",
        "",
        *short(lines),
        "",
        "## Budget",
        "",
        *budgets(lines),
        "",
        *classical_speed(lines),
        "",
        "## Scores",
        *scores(lines),
        "",
        "## Commands",
        "",
        "    python experiments/mri/prepare.py DATA --out data/mri-study.npz",
    ]
    for line in lines:
        options = f"--arm {line['arm']} --seed {line['seed']}"
        if "training" in line:
            config = line["config"]
            options += f" --steps {line['training']['steps']} --lr {config['optim']['lr']:g}"
        text.append(f"    python experiments/mri/run.py {options}  # commit {line['commit'][:12]}")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl, one or several")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence-mri.md"))
    options = parser.parse_args()
    check_outputs({"--out": options.out}, options.results)
    lines = [line for path in options.results for line in read(path)]
    order = [*CLASSICAL, *ARMS]
    lines.sort(key=lambda line: (order.index(line["arm"]), line["seed"]))
    with atomic_file(options.out) as temporary:
        temporary.write_text(report(lines), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    script(main)
