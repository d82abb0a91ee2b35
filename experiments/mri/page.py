"""Writes RESULTS.md of the MRI study from its rows.

python -m experiments.mri.page [--results FILE ...] [--out FILE]
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.common.program import make_parser, write_page
from experiments.common.results import Row, read_rows
from experiments.common.tables import show_p, table
from experiments.mri import prose
from experiments.mri.methods import CLASSICAL, SMOOTH
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.statistics import (
    Interval,
    differences,
    holm,
    means_by,
    signed_rank_test,
    t_interval,
    t_test,
)

HERE = Path(__file__).parent
REFERENCE = "nirvana"
BACKBONES = ("none", "transformer", "gated_deltanet", "nirvana-without-trigger")
OTHERS = (*CLASSICAL, "unet", "e2e-varnet")
METRICS = {"psnr": "{:.2f}", "ssim": "{:.4f}", "nmse": "{:.4f}"}
GROUPS = ("unseen people", "contrast medium", "inverted contrast", "measured head", "measured knee")
MEASURED = ("measured head", "measured knee")
COMPARED = (
    ("unseen people", "equispaced 4x"),
    ("unseen people", "equispaced 8x"),
    ("inverted contrast", "equispaced 4x"),
)
LEVEL = 0.05
BUDGET = (
    "method",
    "seed",
    "trained parameters",
    "frozen",
    "steps",
    "slices seen",
    "training, s",
    "slices/s",
    "training, GiB",
    "a slice of 320 x 320, 16 coils: alone / of eight",
    "weights, MB",
    "device",
)


def person(volume: str) -> str:
    """The person of a volume, which is named <person>_<contrast>."""
    return volume.rpartition("_")[0]


class Scores:
    """One metric on one group of scans and mask: method -> seed -> volume -> score."""

    def __init__(self, rows: Iterable[Row], group: str, mask: str, metric: str) -> None:
        found: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
        for row in rows:
            scans = [x for x in row["volumes"] if (x["group"], x["mask"]) == (group, mask)]
            if scans:
                found[row["method"]][row["seed"]] = {x["volume"]: x[metric] for x in scans}
        self.found = dict(found)

    def by_person(self, method: str) -> dict[str, float]:
        """Person -> mean over the person's volumes of the mean over runs."""
        runs = self.found.get(method, {}).values()
        volumes = [(name, value) for run in runs for name, value in run.items()]
        # All runs have the same volumes, so that their order of averaging does not matter.
        return means_by([person(name) for name, _ in volumes], [value for _, value in volumes])

    def by_run(self, method: str) -> dict[int, float]:
        """Seed -> mean over people."""
        found = {}
        for seed, run in self.found.get(method, {}).items():
            people = means_by([person(name) for name in run], [*run.values()])
            found[seed] = float(np.mean([*people.values()]))
        return found

    def volumes(self) -> set[str]:
        return {name for runs in self.found.values() for run in runs.values() for name in run}


@dataclass(frozen=True)
class Gain:
    """What the reference gains over a method in PSNR on one group of scans and mask."""

    method: str
    place: tuple[str, str]
    by_person: np.ndarray
    by_run: np.ndarray
    p: float = 1.0  # of the t test, see `gains`
    corrected: float = 1.0  # by Holm, over the question

    @property
    def over_people(self) -> Interval:
        return t_interval(self.by_person)


def gains(rows: Sequence[Row], methods: Sequence[str], over_runs: bool) -> list[Gain]:
    """All comparisons of a question, corrected together.

    Args:
        rows: of the study.
        methods: that the reference is compared with.
        over_runs: whether the unit of the test is the training run. Otherwise it is the person,
            and p is the larger one of both units for a method that was trained several times.
    """
    found: list[Gain] = []
    for place in COMPARED:
        scores = Scores(rows, *place, "psnr")
        for method in methods:
            people = differences(scores.by_person(REFERENCE), scores.by_person(method))
            runs = differences(scores.by_run(REFERENCE), scores.by_run(method))
            if len(people) > 1 and (len(runs) > 1 or not over_runs):
                p_runs = t_test(runs) if len(runs) > 1 else 0.0
                p = p_runs if over_runs else max(t_test(people), p_runs)
                found.append(Gain(method, place, people, runs, p))
    corrected = holm([gain.p for gain in found])
    return [
        Gain(gain.method, gain.place, gain.by_person, gain.by_run, gain.p, float(p))
        for gain, p in zip(found, corrected, strict=True)
    ]


def show_gains(found: Sequence[Gain], over_runs: bool) -> str:
    """A table for every group of scans and mask."""
    text = ""
    for place in COMPARED:
        own = [gain for gain in found if gain.place == place]
        if not own:
            continue
        group, mask = place
        people = len(own[0].by_person)
        text += f"\n{group}, {mask}, simulated ({people} people):\n"
        head = ["over", "95 % t interval over people", "people ahead", "p exact"]
        head += ["95 % t interval over runs", "p over runs" if over_runs else "p", "p by Holm"]
        rows = []
        for gain in own:
            ahead = f"{int((gain.by_person > 0).sum())} of {people}"
            runs = t_interval(gain.by_run).show(2, sign=True) if len(gain.by_run) > 1 else "-"
            cells = [gain.method, gain.over_people.show(2, sign=True), ahead]
            cells += [show_p(signed_rank_test(gain.by_person)), runs]
            rows.append([*cells, show_p(gain.p), show_p(gain.corrected)])
        text += table(head, rows)
    return text


def verdict_of_backbone(found: Sequence[Gain]) -> str:
    better = [gain for gain in found if gain.corrected < LEVEL and gain.by_run.mean() > 0]
    worse = [gain for gain in found if gain.corrected < LEVEL and gain.by_run.mean() < 0]
    excluding = [gain for gain in found if t_interval(gain.by_run).excludes_zero]
    number = f"{len(excluding)} of {len(found)} t intervals over runs exclude zero"
    if not better:
        against = [gain for gain in found if gain.method == "none"]
        behind = sum(gain.by_run.mean() < 0 for gain in against)
        after = f"after correction {len(worse)} show `{REFERENCE}` to be worse and none better"
        return (
            f"**No gain is shown.** {number}; {after}. Against `none`, the codec without a "
            f"backbone, `{REFERENCE}` is behind on {behind} of {len(against)} kinds of scans."
        )
    listed = ", ".join(f"`{gain.method}` ({', '.join(gain.place)})" for gain in better)
    return f"**Shown against {listed}.** {number}; {len(worse)} are worse after correction."


def verdict_of_others(found: Sequence[Gain]) -> str:
    """What is shown, method by method, after correction."""
    shown = [gain for gain in found if gain.corrected < LEVEL and gain.by_person.mean() > 0]
    excluding = sum(gain.over_people.excludes_zero for gain in found)
    ahead = sum(gain.by_person.mean() > 0 for gain in found)
    text = (
        f"{ahead} of {len(found)} mean gains are above zero, {excluding} of {len(found)} t "
        f"intervals over people exclude zero, {len(shown)} remain after Holm's correction"
    )
    by_place = defaultdict(list)
    for gain in shown:
        by_place[", ".join(gain.place)].append(gain.method)
    listed = "; ".join(f"{place}: {', '.join(methods)}" for place, methods in by_place.items())
    return f"**Partly.** {text}" + (f" ({listed})." if listed else ".")


def measured(rows: Sequence[Row]) -> str:
    """Gains on the two measured slices, which are single figures."""
    methods = [method for method in (*CLASSICAL, *SMOOTH) if method != REFERENCE]
    columns: dict[str, dict[str, float]] = {}
    for group in MEASURED:
        for mask in masks_of(rows):
            scores = Scores(rows, group, mask, "psnr")
            own = scores.by_run(REFERENCE)
            if own:
                means = {m: scores.by_run(m) for m in methods}
                columns[f"{group.removeprefix('measured ')}, {mask}"] = {
                    m: float(np.mean([*own.values()]) - np.mean([*each.values()]))
                    for m, each in means.items()
                    if each
                }
    try:
        head, knee = columns["head, equispaced 4x"], columns["knee, equispaced 4x"]
        figures = {"head": head["bart-l1-wavelet"], "knee": knee["bart-l1-wavelet"]}
        text = prose.MEASURED.format(**figures, unet=-knee["unet"])
    except KeyError:
        return ""
    body = [
        [method, *(f"{own[method]:+.2f}" if method in own else "-" for own in columns.values())]
        for method in methods
    ]
    return text + table(["over", *columns], body)


def masks_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(scan["mask"] for row in rows for scan in row["volumes"]))


def scores(rows: Sequence[Row]) -> str:
    """A table for every group of scans and mask."""
    text = prose.SCORES
    for group in GROUPS:
        for mask in masks_of(rows):
            found = {metric: Scores(rows, group, mask, metric) for metric in METRICS}
            volumes = found["psnr"].volumes()
            if not volumes:
                continue
            kind = "" if group in MEASURED else ", simulated"
            people = len({person(volume) for volume in volumes})
            count = f"{len(volumes)} {_plural('volume', len(volumes))}"
            count += f" of {people} {'person' if people == 1 else 'people'}"
            text += f"\n### {group}, {mask}{kind} ({count})\n"
            body = [
                [method, *(_cell(found[m].by_person(method), form) for m, form in METRICS.items())]
                for method in found["psnr"].found
            ]
            text += table(["method", "PSNR, dB", "SSIM", "NMSE"], body)
    return text


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"


def _cell(people: dict[str, float], form: str) -> str:
    values = np.array([*people.values()])
    text = form.format(values.mean())
    return text if len(values) == 1 else f"{text} ± {form.format(values.std(ddof=1))}"


def budgets(rows: Sequence[Row]) -> str:
    """Parameters, training and speed of every trained run."""
    body = []
    for row in rows:
        if "training" not in row:
            continue
        training, parameters, speed = row["training"], row["parameters"], row.get("speed")
        memory = "" if training["memory_gib"] is None else f"{training['memory_gib']:.1f}"
        once = ""
        if speed is not None:
            once = f"{1000 * speed['seconds']:.0f} / {1000 * speed['seconds_in_volume']:.0f} ms"
            if speed["memory_gib"] is not None:
                once += f", {speed['memory_gib']:.2f} GiB"
        times = [training["seconds"], training["slices_per_second"]]
        body.append(
            [
                row["method"],
                row["seed"],
                f"{parameters['trained']:,}",
                f"{parameters['frozen']:,}",
                f"{training['steps']:,}",
                f"{training['slices']:,}",
                *("" if time is None else f"{time:.0f}" for time in times),
                memory,
                once,
                f"{row['weights_bytes'] / 1e6:.2f}",
                row["device"],
            ]
        )
    text = "\n## Budget\n" + table(BUDGET, body) + "\n"
    for row in rows:
        if "training" not in row:
            seconds = np.mean([scan["seconds_per_slice"] for scan in row["volumes"]])
            text += f"- {row['method']}: {seconds:.2f} s a slice of the test on {row['device']}\n"
    return text


def commands(rows: Sequence[Row]) -> str:
    text = "\n## Commands\n\n    python -m experiments.mri.prepare DATA --out data/mri-study.npz\n"
    for row in rows:
        options = f"--method {row['method']} --seed {row['seed']}"
        if "training" in row:
            learning_rate = row["config"]["optim"]["lr"]
            options += f" --steps {row['training']['steps']} --lr {learning_rate:g}"
        text += f"    python -m experiments.mri.study {options}  # commit {row['commit'][:12]}\n"
    return text


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    order = [*CLASSICAL, *SMOOTH]
    rows = sorted(rows, key=lambda row: (order.index(row["method"]), row["seed"]))
    text = prose.HEAD + "\n## Verdicts\n"
    found = gains(rows, BACKBONES, over_runs=True)
    if found:
        text += prose.BACKBONE.format(verdict=verdict_of_backbone(found), number=len(found))
        text += show_gains(found, over_runs=True)
    text += measured(rows)
    found = gains(rows, OTHERS, over_runs=False)
    if found:
        text += prose.OTHERS.format(verdict=verdict_of_others(found), number=len(found))
        text += show_gains(found, over_runs=False)
    return text + prose.METHOD + budgets(rows) + scores(rows) + commands(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.mri.page", __doc__)
    parser.add_argument("--results", type=Path, nargs="+", default=[HERE / "results.jsonl"])
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(arguments)
    check_outputs({"--out": options.out}, options.results)
    rows = [row for path in options.results for row in read_rows(path)]
    if not rows:
        raise InputError(f"{options.results[0]} holds no rows; run experiments.mri.study first")
    write_page(options.out, page(rows))


if __name__ == "__main__":
    script(main)
