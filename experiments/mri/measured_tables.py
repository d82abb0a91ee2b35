"""Sections of the page of a codec for measured scans: simulated people, adaptation, time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.results import Row, read_rows
from experiments.common.tables import table
from experiments.mri.page import Scores
from experiments.mri.study import SAMPLINGS
from nirvana.statistics import differences, t_interval

NAMES = {
    "zero-filled": "zero-filled",
    "grappa": "GRAPPA (pygrappa)",
    "bart-sense": "SENSE (BART)",
    "l1-wavelet": "L1-wavelet (sigpy)",
    "l1-wavelet-best": "L1-wavelet (sigpy, best settings)",
    "bart-l1-wavelet": "L1-wavelet (BART)",
    "bart-l1-wavelet-best": "L1-wavelet (BART, best settings)",
    "measured-unet": "U-Net, same simulation",
    "e2e-varnet": "E2E-VarNet, same simulation",
    "measured-e2e-varnet": "E2E-VarNet, same simulation",
    "short-e2e-varnet": "E2E-VarNet, short training",
    "short-codec": "codec, short training",
    "first-codec": "codec, first adaptation",
    "first-e2e-varnet": "E2E-VarNet, first adaptation",
    "scratch": "codec's parts, random weights",
    "previous-codec": "codec packaged before",
    "codec": "codec",
    "codec-again": "codec, trained again",
}
TRAININGS = ("codec", "codec-again")
PEER_NAMES = ("grappa", "bart-sense", "l1-wavelet-best", "bart-l1-wavelet-best")

# The study of codecs trained on smooth phase, whose test scans and masks are the same; its
# `nirvana` is the method that was packaged before.
SMOOTH_ROWS = Path(__file__).parent / "results.jsonl"
SMOOTH_NAMES = {
    "zero-filled": "zero-filled",
    "grappa": "grappa",
    "bart-sense": "bart-sense",
    "l1-wavelet": "l1-wavelet",
    "bart-l1-wavelet": "bart-l1-wavelet",
    "nirvana": "previous-codec",
}
GROUPS = {
    "unseen people": tuple(SAMPLINGS),
    "contrast medium": tuple(SAMPLINGS),
    "inverted contrast": ("equispaced 4x",),
    "measured head": tuple(SAMPLINGS),
    "measured knee": tuple(SAMPLINGS),
}

SIMULATED = """
## The study's test: simulated people, and two measured slices of one coil

The test of [the study](../RESULTS.md): scans of smooth phase, even coils and white noise, simulated
on eight slices of each of eleven volumes of six people that no training saw, and the two measured
slices. PSNR in dB (SSIM), mean over people. "Codec packaged before" is the method `nirvana` of the
study, three trainings on scans of smooth phase; the codec was trained on scans that look measured.
"""

REPEATED = """
## The codec's two trainings

PSNR in dB, mean over both directions and three masks, of two trainings whose seeds change data and
weights. The interval is of the mean over trainings, on this slice; of two of them it is wide. "Best
peer" is the best of BART and sigpy with their best settings for this scan, and GRAPPA.
"""

BEST_PEERS = """
## BART and sigpy with the best settings for this scan

`experiments.mri.peers` on the scan itself, which no user could do: every setting varied alone until
none gains more. Mean PSNR in dB over both directions and an equispaced and a random mask each.
"""

ADAPTATION = """
## Adaptation to a scan

`experiments.mri.adaptation`: PSNR before, and what the adaptation added, in dB, over directions and
masks. "Adapted" are the scans of which hidden lines were clearly predicted better; the others keep
the codec as it was. Scans of one coil are the two slices of the study. The adaptation's settings
were chosen on these scans, so the gains do not apply to unseen ones. "First adaptation" is an
earlier scheme: 30 % of the lines hidden, one fifth set aside to decide, and the background adapted,
too. "Random weights" is the scheme of ZS-SSL: the codec's parts learn from this scan alone, 300
steps of each fold, one mask and direction of two scans; on the head the loss of the hidden lines
still fell at the end. Seconds of the other rows are those of five or six adaptations at once on one
H200.
"""

SPEED = """
## Time and memory

`experiments.mri.speed`, milliseconds: one slice alone, and each slice of a volume in one batch.
Memory is the peak of tensors on a GPU, and of the whole process on a CPU.
"""


def best_peers(found: dict[str, Any], rows: Sequence[Row]) -> str:
    """What a peer reaches with settings that were chosen on the scan.

    Args:
        found: by `experiments.mri.peers`.
        rows: of `experiments.mri.measured`, of which those of the same masks count.
    """
    body = []
    for entry in found["chosen"]:
        masks = [name for name in SAMPLINGS if name.endswith(f" {entry['acceleration']:g}x")]
        own = [row for row in rows if row["mask"] in masks and row["mask_seed"] == 0]
        codec = np.mean([row["psnr"] for row in own if row["method"] == "codec"])
        for name, start in entry["psnr_of_start"].items():
            settings = ", ".join(f"{key} {value}" for key, value in entry[name].items())
            figures = [entry["psnr"]["zero-filled"], start, entry["psnr"][name], codec]
            shown = [f"{figure:.2f}" for figure in figures]
            body.append([f"{entry['acceleration']:g}x", name, *shown, settings])
    head = ["mask", "peer", "zero-filled", "the package's settings", "its best", "codec"]
    return BEST_PEERS + table([*head, "best settings"], body)


def repeated(rows: Sequence[Row]) -> str:
    """How far the trainings of the codec differ, beside the best peer.

    Args:
        rows: of `experiments.mri.measured`, of one scan.
    """

    def mean(method: str, mask: str) -> float:
        own = [row["psnr"] for row in rows if (row["method"], row["mask"]) == (method, mask)]
        return float(np.mean(own)) if own else float("nan")

    trained = [name for name in TRAININGS if any(row["method"] == name for row in rows)]
    if len(trained) < 2:
        return ""
    body = []
    for mask in SAMPLINGS:
        figures = [mean(name, mask) for name in trained]
        peers = [mean(name, mask) for name in PEER_NAMES]
        shown = [f"{figure:.2f}" for figure in figures]
        body.append([mask, *shown, t_interval(figures).show(2), f"{np.nanmax(peers):.2f}"])
    head = [NAMES[name] for name in trained]
    return REPEATED + table(["mask", *head, "95 % t interval", "best peer"], body)


def simulated(rows: Sequence[Row]) -> str:
    """Scores on the study's simulated test people beside those of its methods.

    Args:
        rows: of `experiments.mri.study`, of the codec and its peers.
    """
    smooth = [
        {**row, "method": SMOOTH_NAMES[row["method"]]}
        for row in read_rows(SMOOTH_ROWS)
        if row["method"] in SMOOTH_NAMES
    ]
    every = [*smooth, *rows]
    methods = [name for name in NAMES if any(row["method"] == name for row in every)]
    text = SIMULATED
    for group, masks in GROUPS.items():
        found = {
            (mask, metric): Scores(every, group, mask, metric)
            for mask in masks
            for metric in ("psnr", "ssim")
        }

        def cell(method: str, mask: str, found: dict[tuple[str, str], Scores] = found) -> str:
            means = [
                float(np.mean([*found[mask, metric].by_person(method).values()]))
                for metric in ("psnr", "ssim")
            ]
            return "{:.2f} ({:.3f})".format(*means)

        people = len(found[masks[0], "psnr"].by_person("codec"))
        if not people:  # a trial of the programs scores some groups alone
            continue
        number = f" ({people} people)" if people > 1 else ""
        body = [[NAMES[method], *(cell(method, mask) for mask in masks)] for method in methods]
        text += f"\n{group}{number}:\n" + table(["method", *masks], body)
    return text + _gains(every)


def _gains(rows: Sequence[Row]) -> str:
    """The codec's gain over the one packaged before, by person."""
    group, body = "unseen people", []
    for mask in SAMPLINGS:
        scores = Scores(rows, group, mask, "psnr")
        gain = differences(scores.by_person("codec"), scores.by_person("previous-codec"))
        # A trial of the programs scores one person.
        interval = t_interval(gain).show(2, sign=True) if len(gain) > 1 else f"{gain[0]:+.2f}"
        body.append([mask, interval, f"{gain.min():+.2f}"])
    head = ["mask", "95 % t interval over people", "least gain of a person"]
    return f"\nGain of the codec over the one packaged before, dB, {group}:\n" + table(head, body)


def adaptation(rows: Sequence[Row]) -> str:
    """What adaptation adds, by method, scan and sampling."""
    settings = dict.fromkeys((row["method"], row["parameters"], row["lr"]) for row in rows)
    body = []
    for setting in settings:
        own = [row for row in rows if (row["method"], row["parameters"], row["lr"]) == setting]
        method, parameters, lr = setting
        name = [NAMES[method], f"{parameters}, {lr:g}"]
        for scan in dict.fromkeys(row["scan"] for row in own):
            of_scan = [row for row in own if row["scan"] == scan]
            for mask in SAMPLINGS:
                chosen = [row for row in of_scan if row["mask"] == mask]
                if chosen:
                    body.append([*name, scan, mask, *_adapted(chosen)])
        body.append([*name, "**all**", "", *_adapted(own)])
    head = ["method", "learned, step size", "scan", "mask", "before", "mean gain", "least gain"]
    return ADAPTATION + table([*head, "mean gain in SSIM", "adapted", "seconds"], body)


def _adapted(rows: Sequence[Row]) -> list[str]:
    """Cells of the mean before, gains, how many scans adapted, and seconds of each."""
    psnr, ssim = (
        np.array([[row[when][metric] for when in ("before", "after")] for row in rows])
        for metric in ("psnr", "ssim")
    )
    gain = psnr[:, 1] - psnr[:, 0]
    adapted = sum(row["record"]["kept"] > 0 for row in rows)
    return [
        f"{psnr[:, 0].mean():.2f}",
        f"{gain.mean():+.2f}",
        f"{gain.min():+.2f}",
        f"{(ssim[:, 1] - ssim[:, 0]).mean():+.4f}",
        f"{adapted} of {len(rows)}",
        f"{np.mean([row['seconds'] for row in rows]):.0f}",
    ]


def speed(rows: Sequence[Row]) -> str:
    """Time and memory on every device."""

    def cells(row: Row) -> list[str]:
        on_cpu = row["memory_gib"] is None
        return [
            NAMES[row["method"]],
            f"CPU, {row['threads']} threads" if on_cpu else row["device"],
            f"{row['side']} x {row['side']}, {row['coils']}",
            f"{1000 * row['seconds']:.0f}",
            f"{1000 * row['seconds_in_volume']:.0f} ({row['slices']})",
            f"{row['process_gib'] if on_cpu else row['memory_gib']:.1f}",
            row["torch"],
        ]

    head = ["codec", "device", "matrix, coils", "alone", "in a volume (slices)", "memory, GiB"]
    return SPEED + table([*head, "PyTorch"], map(cells, rows))
