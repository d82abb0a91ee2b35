"""The room of reports: reads the slices of a scan, and shows one with its evidence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nirvana.app.pictures import (
    EVIDENCE_COLOURS,
    Window,
    coloured,
    figure,
    grid,
    scale_bar,
    white_of,
)
from nirvana.app.scan_work import prepare_scan
from nirvana.app.sessions import Session
from nirvana.app.work import Models, Watch
from nirvana.errors import InputError
from nirvana.mri.io import ReadOptions
from nirvana.mri.io.options import SliceRange
from nirvana.mri.model.layout import PATCH
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.reports.encode import view_of
from nirvana.mri.reports.evidence import evidence_map
from nirvana.mri.reports.localize import lobe_region
from nirvana.mri.reports.reporter import DISCLAIMER, Reading
from nirvana.mri.reports.scan_report import UNKNOWN_ORIENTATION, ScanReport, read_slices

ROOM = "report"
OUTLINE = (255, 176, 0)
OVERLAY = 0.55  # share of the colours where the evidence is strongest


@dataclass(frozen=True)
class ReportRequest:
    """What is read.

    Attributes:
        sampling: of a fully sampled scan, or None, which leaves out nothing.
        seed: of the mask, and of the simulation of a volume.
        slices: which ones are read; all means those at the heights that were trained on.
        stripped: the images show the brain without the skull.
        radiological: a scan without an orientation has the patient's right on the left.
        reading: how a file of k-space is read.
    """

    sampling: Sampling | None = field(default_factory=Sampling)
    seed: int = 0
    slices: SliceRange = field(default_factory=SliceRange)
    stripped: bool = False
    radiological: bool = False
    reading: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class ReportResult:
    """The readings of a scan, as the room shows them.

    Attributes:
        name: of the scan.
        found: the readings.
        threshold: the reporter's own.
        evidence: index of a slice -> its map, for those that were mapped.
        remarks: on the scan and on the choice of slices.
    """

    name: str
    found: ScanReport
    threshold: float
    evidence: dict[int, np.ndarray]
    remarks: tuple[str, ...] = ()


def read(session: Session, models: Models, request: ReportRequest, watch: Watch) -> ReportResult:
    """Reads slices of the session's scan, and keeps the readings in the session.

    Args:
        session: of the page.
        models: of the page.
        request: what is read.
        watch: progress and limits.

    Raises:
        InputError: the scan cannot be read, or a limit was reached.
    """
    watch.show("reading the scan")
    prepared = prepare_scan(
        *(session, models.config, request.sampling, request.seed, SliceRange(), request.reading)
    )
    view = view_of(prepared.scan, request.radiological)
    chosen, remarks = None, prepared.scan.remarks
    if request.slices != SliceRange():
        total = prepared.num_slices
        chosen = range(total)[request.slices.of(total, prepared.scan.name)]
        remarks = (*remarks, *request.slices.remarks(total))
    watch.show("loading the reporter")
    reporter = models.reporter()
    shares = {"images": (0.0, 0.3), "reports": (0.3, 1.0)}
    found = read_slices(
        *(reporter, prepared.measurement, view, chosen),
        stripped=request.stripped,
        progress=lambda part, total: watch.counter(part, total, *shares[part]),
    )
    watch.check()
    result = ReportResult(prepared.scan.name, found, reporter.threshold, {}, remarks)
    session.results[ROOM] = result
    return result


def result_of(session: Session) -> ReportResult:
    """What `read` kept.

    Raises:
        InputError: nothing yet.
    """
    if ROOM not in session.results:
        raise InputError("no report was written yet: choose a scan and press Write the report")
    return session.results[ROOM]


def map_evidence(session: Session, models: Models, number: int, watch: Watch) -> None:
    """Computes the evidence map of a slice, once.

    Args:
        session: with a result.
        models: of the page.
        number: of the slice, counted from 1.
        watch: progress and limits.

    Raises:
        InputError: there is no result, the slice was not read, or a limit was reached.
    """
    result = result_of(session)
    index = number - 1
    if index not in result.found.readings:
        raise InputError(f"slice {number} was not read; choose one of the report")
    if index not in result.evidence:
        image = result.found.combined[index]
        total = image[0].numel() // PATCH**2
        counter = watch.counter("evidence, places", total)
        result.evidence[index] = evidence_map(models.reporter(), image, counter)


def text_of(result: ReportResult, threshold: float) -> str:
    """The report of all slices at a threshold of a finding's probability, 0..1."""
    lines = [
        f"Slice {index + 1}: {reading.at_threshold(threshold).text}"
        for index, reading in result.found.readings.items()
    ]
    if not result.found.view.known:
        lines.append(UNKNOWN_ORIENTATION)
    lines += [f"{result.name}: {remark}" for remark in result.remarks]
    return "\n".join([*lines, DISCLAIMER])


def probabilities(result: ReportResult) -> tuple[list[str], list[list[str]]]:
    """Headings and one row for each slice: the probability of a finding, and the most probable
    facts if there is one, with theirs."""
    slots = list(next(iter(result.found.readings.values())).probabilities)
    rows = []
    for index, reading in result.found.readings.items():
        tables = [reading.probabilities[slot] for slot in slots]
        best = [max(table, key=table.__getitem__) for table in tables]
        facts = [f"{each} ({table[each]:.0%})" for each, table in zip(best, tables, strict=True)]
        rows.append([str(index + 1), f"{reading.finding:.1%}", *facts])
    return ["slice", "finding", *slots], rows


def slice_html(result: ReportResult, number: int, threshold: float) -> str:
    """One slice with the lobe that its report names, and its evidence map if there is one.

    Args:
        result: of `read`.
        number: of the slice, counted from 1.
        threshold: of a finding's probability, 0..1.
    """
    found = result.found
    index = min(max(number, 1), len(found.images)) - 1
    image, white = found.images[index], white_of(found.images)
    grey = np.repeat(Window().grey(image, white)[..., None], 3, axis=2)
    sides = ("R", "L") if found.view.known else None
    reading = found.readings.get(index)
    if reading is None:
        return grid([[figure(grey, f"slice {index + 1}", "was not read", sides)]], 1)
    reading = reading.at_threshold(threshold)
    region = _region(found, index, reading)
    caption = f"{reading.text} Probability of a finding: {reading.finding:.1%}."
    pictures = [figure(_outlined(grey, region), f"slice {index + 1}", caption, sides)]
    below = ""
    if index in result.evidence:
        evidence = result.evidence[index]
        end = float(np.abs(evidence).max()) or 1.0
        pictures.append(
            figure(
                _overlay(grey, evidence, end), "evidence", "of the reporter, place by place", sides
            )
        )
        below = scale_bar(
            EVIDENCE_COLOURS,
            f"-{end:.2g}",
            f"+{end:.2g}",
            "what a place adds to the log-odds of a finding",
        )
    return grid([pictures], len(pictures), below)


def choices(result: ReportResult) -> Sequence[int]:
    """The numbers, from 1, of the slices that were read."""
    return [index + 1 for index in result.found.readings]


def _region(found: ScanReport, index: int, reading: Reading) -> np.ndarray | None:
    """The lobe that a reading names, in its slice."""
    if found.brain is None or not reading.facts.finding:
        return None
    return lobe_region(found.brain, index, reading.facts)


def _outlined(grey: np.ndarray, region: np.ndarray | None) -> np.ndarray:
    """A picture with the border of a region."""
    if region is None:
        return grey
    from scipy import ndimage

    border = region & ~ndimage.binary_erosion(region, iterations=2)
    return np.where(border[..., None], np.array(OUTLINE, np.uint8), grey)


def _overlay(grey: np.ndarray, evidence: np.ndarray, end: float) -> np.ndarray:
    """A picture under the colours of its patches, the stronger the more opaque."""
    sides = [n // m for n, m in zip(grey.shape, evidence.shape, strict=False)]
    patches = evidence.repeat(sides[0], 0).repeat(sides[1], 1)
    colours = coloured(patches, -end, end, EVIDENCE_COLOURS)
    share = OVERLAY * np.abs(patches / end)[..., None]
    return np.round((1 - share) * grey + share * colours).astype(np.uint8)
