"""Short trainings, adaptation to measured scans and time, at a size that takes seconds."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.common.results import append_rows, read_rows
from experiments.mri import (
    adaptation,
    measured,
    measured_page,
    measured_tables,
    peers,
    short_page,
    short_trainings,
    study,
)
from experiments.mri import speed as speed_program
from experiments.mri.methods import MEASURED, PEERS, SHORT, recipe_of, tiny
from experiments.mri.study import SAMPLINGS, classical
from nirvana.config import to_dict
from nirvana.errors import InputError
from nirvana.model.backbone import load_backbone
from nirvana.mri.classical.peers import (
    BartSettings,
    GrappaSettings,
    Peers,
    SenseSettings,
    WaveletSettings,
    chosen_peers,
)
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import PROPERTIES, REALISTIC, Simulation
from nirvana.mri.model.checkpoint import save_codec
from nirvana.mri.model.codec import CodecModel


@pytest.fixture
def scans(tmp_path: Path, head_slices: np.ndarray) -> Path:
    scan = simulate_scan(head_slices[1:2, 8:72, 8:72], "head", 1, Simulation(2, noise=(1e-3, 1e-3)))
    np.savez(tmp_path / "scans.npz", head=np.asarray(scan.kspace))
    return tmp_path / "scans.npz"


@pytest.fixture
def archive(tmp_path: Path, head_slices: np.ndarray) -> Path:
    eight_bits = np.round(head_slices[:2, 8:88:2, 4:124:2] * 255).astype(np.uint8)
    maps = np.ones((3, 8, 8), np.complex64)
    arrays = {"train/a_T1": eight_bits, "test/b_T1": eight_bits, "coils/array": maps}
    np.savez_compressed(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """A codec whose zero-initialised layers have values, unlike one of random weights."""
    torch.manual_seed(0)
    model = CodecModel(tiny(MEASURED["codec"]), None)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    save_codec(model, tmp_path / "codec")
    return tmp_path / "codec"


def test_every_property_of_the_simulation_is_left_out_once():
    groups = dict(short_trainings.VARIANTS)
    assert groups.pop("nothing") == ()
    assert set(groups.pop("everything")) == {*PROPERTIES, "arrays"}
    counts = Counter(name for names in groups.values() for name in names)
    # The range of contrasts is nearly that of a plain scan.
    assert counts == Counter({*PROPERTIES, "arrays"} - {"gamma"})


def test_models_of_the_short_trainings_have_about_as_many_parameters():
    counts = {
        name: CodecModel(config, load_backbone(config.backbone, config.weights)).num_trained
        for name, config in SHORT.items()
    }
    assert max(counts.values()) < 1.05 * min(counts.values()), counts


def test_variants_of_the_short_codec_differ_in_one_thing():
    codec, recipe = SHORT["short-codec"], recipe_of("short-codec")
    for name in ("ssdu", "points", "sizes"):
        assert SHORT[f"short-codec-{name}"] == codec
    assert replace(recipe_of("short-codec-ssdu"), stage=recipe.stage) == recipe
    assert recipe_of("short-codec-ssdu").stage.loss == "ssdu"
    assert replace(recipe_of("short-codec-points"), points=0.0) == recipe
    assert recipe_of("short-codec-points").points > 0
    assert replace(recipe_of("short-codec-sizes"), sizes=recipe.sizes) == recipe
    sides = [side for size in recipe_of("short-codec-sizes").sizes for side in size]
    assert (min(sides), max(sides)) == (96, 320)
    assert recipe_of("short-codec-prompts") == recipe
    tokens = [SHORT[name] for name in ("short-tokens", "short-random", "short-pretrained")]
    changed = [replace(each, backbone="none", weights="default") for each in tokens]
    assert changed == [tokens[0]] * 3
    assert [(each.backbone, each.weights) for each in tokens] == [
        ("none", "default"),
        ("nirvana", "random"),
        ("nirvana", "default"),
    ]


def test_short_trainings_leave_out_what_they_name(scans: Path, archive: Path, tmp_path: Path):
    results = tmp_path / "rows.jsonl"

    def run(method: str, without: str, *more: object) -> None:
        given = ["--method", method, "--without", without, "--steps", 2, "--tiny"]
        given += ["--data", archive, "--scans", scans, "--masks", 1, "--device", "cpu"]
        given += ["--out", tmp_path / "runs", "--results", results, *more]
        short_trainings.main(list(map(str, given)))

    run("short-codec", "nothing", "--simulated")
    run("short-codec", "nothing", "--seed", 1)
    run("short-codec", "fine_phase")
    run("short-codec", "everything")
    run("short-codec", "everything")  # done already
    run("short-e2e-varnet", "nothing")
    rows = read_rows(results)
    left_out = ["nothing", "nothing", "fine_phase", "everything", "nothing"]
    assert [row["without"] for row in rows] == left_out
    whole, other_seed, no_phase, plain, varnet = rows
    realistic = to_dict(REALISTIC)
    simulated = [row["config"]["simulation"] for row in (whole, no_phase, plain)]
    expected = [realistic, {**realistic, "fine_phase": (0.0, 0.0)}, to_dict(Simulation())]
    for found, right in zip(simulated, expected, strict=True):
        assert {name: _plain(x) for name, x in right.items()} == found
    assert (whole["config"]["arrays"], plain["config"]["arrays"]) == (["coils/array"], [])
    # Every training is another one, also that of another seed.
    scores = [row["scans"][0]["psnr"] for row in rows]
    assert len(set(scores)) == len(scores)
    assert len(whole["scans"]) == 2 * len(SAMPLINGS) + len(measured.POINTS)
    assert "volumes" in whole
    assert "volumes" not in other_seed

    text = short_page.page(rows)
    mask = next(iter(SAMPLINGS))
    difference = short_page.mean_psnr(plain, "head", mask) - short_page.mean_psnr(
        whole, "head", mask
    )
    assert f"| everything | all of them | 1 | {difference:+.2f} |" in text
    means = [short_page.mean_psnr(row, "head", mask) for row in (whole, other_seed)]
    assert f"| short-codec | {np.mean(means):.2f} (" in text
    lattice = next(iter(measured.POINTS))
    points = [short_page.mean_psnr(row, "head", lattice) for row in (whole, other_seed)]
    assert f"| short-codec | {np.mean(points):.2f} (" in text.partition("head, masks of points")[2]
    assert f"| short-e2e-varnet | {short_page.mean_psnr(varnet, 'head', mask):.2f} (" in text
    spread = f"{np.std(means, ddof=1):.2f}"
    assert f"| standard deviation over seeds, nothing left out | 2 | {spread} |" in text
    longer = {**plain, "training": {**plain["training"], "steps": 3}}
    with pytest.raises(InputError, match=r"trainings of \[2, 3\] steps"):
        short_page.page([*rows, longer])


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_adaptation_is_scored_before_and_after(scans: Path, codec: Path, tmp_path: Path):
    results = tmp_path / "adaptation.jsonl"

    def run(method: str, *more: object) -> None:
        given = ["--method", method, "--codec", codec, "--scans", scans, "--masks", 1]
        given += ["--samplings", "equispaced 4x", "--device", "cpu", "--results", results]
        adaptation.main(list(map(str, [*given, *more])))

    run("codec", "--steps", 0)
    run("codec", "--steps", 0)  # done already
    run("scratch", "--scratch", 4, "--lr", 3e-3)
    rows = read_rows(results)
    names = [(row["method"], row["parameters"], row["direction"]) for row in rows]
    assert names == [
        (*each, direction)
        for each in (("codec", "all"), ("scratch", "all"))
        for direction in ("columns", "rows")
    ]
    assert all(row["before"] == row["after"] for row in rows[:2])  # without a step
    for row in rows[2:]:
        kept = row["record"]["kept"]
        assert (row["before"] == row["after"]) == (kept == 0)
        assert (row["record"]["low"] > 0) == (kept > 0)
    # Random weights are others than the codec's.
    assert rows[2]["before"] != rows[0]["before"]

    rows[3]["after"]["psnr"] = rows[3]["before"]["psnr"] - 0.3
    rows[2]["after"]["psnr"] = rows[2]["before"]["psnr"] + 0.5
    text = measured_tables.adaptation(rows)
    before = np.mean([row["before"]["psnr"] for row in rows[2:]])
    assert f"| head | equispaced 4x | {before:.2f} | +0.10 | -0.30 |" in text


def test_time_and_memory_are_measured(codec: Path, tmp_path: Path):
    results = tmp_path / "speed.jsonl"
    given = ["--codec", codec, "--side", 32, "--coils", 2, "--slices", 3, "--repeats", 1]
    speed_program.main(list(map(str, [*given, "--device", "cpu", "--results", results])))
    (row,) = read_rows(results)
    assert row["seconds"] > 0
    assert row["seconds_in_volume"] > 0
    assert row["memory_gib"] is None
    assert 0.05 < row["process_gib"] < 64
    milliseconds = f"{1000 * row['seconds']:.0f}"
    assert f"| 32 x 32, 2 | {milliseconds} |" in measured_tables.speed([row])


def test_the_page_has_the_sections_whose_rows_are_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"no measured\.jsonl"):
        measured_page.page(tmp_path)
    rows = read_rows(measured_page.HERE / "measured.jsonl")
    append_rows(tmp_path / "measured.jsonl", rows)
    assert "Time and memory" not in measured_page.page(tmp_path)
    seconds = {"seconds": 0.0534, "seconds_in_volume": 0.0262, "slices": 8, "process_gib": 1.0}
    where = {"device": "a GPU", "threads": 8, "memory_gib": 4.28, "torch": "2.11"}
    row = {"method": "codec", "side": 320, "coils": 16, **seconds, **where}
    append_rows(tmp_path / "speed.jsonl", [row])
    expected = "| codec | a GPU | 320 x 320, 16 | 53 | 26 (8) | 4.3 | 2.11 |"
    assert expected in measured_page.page(tmp_path)


def test_gains_on_simulated_people_are_those_of_the_rows():
    codec_rows = read_rows(measured_page.HERE / "study-rows.jsonl")
    text = measured_tables.simulated(codec_rows)

    def mean(row: dict, group: str, mask: str) -> float:
        chosen = (each for each in row["volumes"] if (each["group"], each["mask"]) == (group, mask))
        return float(np.mean([each["psnr"] for each in chosen]))

    (codec_row,) = (row for row in codec_rows if row["method"] == "codec")
    mask = "equispaced 4x"
    # One measured slice each, so that the mean over people is that of the slice.
    head = text.partition("\nmeasured head:\n")[2].partition("\n\n\n")[0]
    assert f"| codec | {mean(codec_row, 'measured head', mask):.2f} (" in head
    before = [row for row in read_rows(measured_tables.SMOOTH_ROWS) if row["method"] == "nirvana"]
    expected = np.mean([mean(row, "measured head", mask) for row in before])
    assert f"| codec packaged before | {expected:.2f} (" in head


def test_two_trainings_have_an_interval_and_one_has_none():
    figures = {
        "codec": (40.0, 42.0),
        "codec-again": (38.0, 40.0),
        "bart-l1-wavelet-best": (35.0, 36.0),
    }
    rows = [
        {"method": name, "mask": mask, "psnr": psnr}
        for name, values in figures.items()
        for mask in SAMPLINGS
        for psnr in values
    ]
    text = measured_tables.repeated(rows)
    # t of one degree of freedom is 12.71 at 95 %; the means are 41 and 39.
    assert "| equispaced 4x | 41.00 | 39.00 | 40.00 (27.29 to 52.71) | 35.50 |" in text
    one = [row for row in rows if row["method"] != "codec-again"]
    assert measured_tables.repeated(one) == ""


def test_one_person_has_no_interval():
    (codec_row,) = (
        row
        for row in read_rows(measured_page.HERE / "study-rows.jsonl")
        if row["method"] == "codec"
    )
    people = [row for row in codec_row["volumes"] if row["group"] == "unseen people"]
    one = {**codec_row, "volumes": [row for row in people if row["volume"] == people[0]["volume"]]}
    with_others = {row["group"]: row for row in codec_row["volumes"]}
    one["volumes"] += [
        row
        for row in codec_row["volumes"]
        if row["group"] != "unseen people" and row["volume"] == with_others[row["group"]]["volume"]
    ]
    gains = measured_tables.simulated([one]).partition("Gain of the codec")[2]
    (line,) = (line for line in gains.splitlines() if line.startswith("| equispaced 4x"))
    mean, least = line.split("|")[2:4]
    assert mean.strip() == least.strip()


def test_every_peer_has_a_method_and_values_that_are_tried():
    starts = {name: start for name, start in vars(Peers(4.0)).items() if name != "acceleration"}
    assert starts.keys() == PEERS.keys()
    for start in starts.values():
        for name, values in peers.OPTIONS[type(start)].items():
            assert type(getattr(start, name)) is type(values[0])


def test_best_settings_of_a_peer_are_searched_on_a_scan(scans: Path, monkeypatch):
    """From the package's settings on, and never to worse ones."""
    given = list(peers.measured_problems(scans, 4.0))
    assert len(given) == 2 * 2  # directions, kinds of mask
    monkeypatch.setitem(peers.OPTIONS, GrappaSettings, {"regularisation": (1.0, 100.0)})
    start = GrappaSettings(regularisation=0.01)
    entry = peers.chosen(given, 4.0, {"grappa": start})
    assert entry["psnr_of_start"]["grappa"] == peers.mean_psnr(
        classical("grappa", 1, lambda _: start), given
    )
    assert entry["psnr"]["grappa"] > entry["psnr_of_start"]["grappa"]
    assert entry["grappa"]["regularisation"] in (1.0, 100.0)
    row = {"method": "codec", "mask": "random 4x", "mask_seed": 0, "psnr": 40.0}
    text = measured_tables.best_peers({"chosen": [entry]}, [row, {**row, "mask_seed": 1}])
    assert f"| {entry['psnr']['grappa']:.2f} | 40.00 | kernel" in text


def test_a_search_replaces_the_settings_of_the_methods_it_names(scans: Path, monkeypatch):
    out = scans.with_suffix(".json")
    (chosen,) = (each for each in chosen_peers() if each.acceleration == 4.0)
    monkeypatch.setattr(peers, "ACCELERATIONS", {4.0: 0.08})
    monkeypatch.setitem(peers.OPTIONS, SenseSettings, {"iterations": (1, 10)})
    monkeypatch.setitem(peers.OPTIONS, WaveletSettings, {"iterations": (1,)})

    def search(name: str) -> dict:
        peers.main([str(scans), "--methods", name, "--out", str(out)])
        (entry,) = json.loads(out.read_text())["chosen"]
        return entry

    before = search("sense")
    after = search("l1_wavelet")
    assert "sense" in before
    assert "l1_wavelet" not in before
    assert after["sense"] == before["sense"]
    for key in ("psnr", "psnr_of_start"):
        assert after[key].pop("l1_wavelet") > 0
        assert after[key] == before[key]
    settings = WaveletSettings(**after["l1_wavelet"])
    assert settings in (chosen.l1_wavelet, replace(chosen.l1_wavelet, iterations=1))
    # Settings of other scans are no part of it, and the package's are not chosen on measured ones.
    out.write_text(json.dumps({"chosen_on": "other scans", "chosen": []}))
    with pytest.raises(InputError, match="were chosen on other scans"):
        search("sense")
    out.write_text("[]")
    with pytest.raises(InputError, match="exists and holds no settings"):
        search("sense")
    with pytest.raises(InputError, match="name a file"):
        peers.main([str(scans), "--methods", "sense"])


@pytest.mark.parametrize(
    ("name", "key", "function", "settings"),
    [
        ("bart-l1-wavelet-best", "bart_l1", "bart_pics", BartSettings(weight=0.5)),
        ("l1-wavelet-best", "l1_wavelet", "l1_wavelet", WaveletSettings(noise_factor=0.5)),
    ],
)
def test_a_file_has_the_settings_of_the_nearest_acceleration(
    scans: Path, monkeypatch, name: str, key: str, function: str, settings
):
    file = scans.with_suffix(".json")
    entries = [{"acceleration": n, key: {**asdict(settings), "iterations": n}} for n in (4, 8)]
    file.write_text(json.dumps({"chosen": entries}))
    used = []

    def recorded(acquisition: Acquisition, *given, **_):
        used.append(given[-1])
        return acquisition.slices()

    monkeypatch.setattr(study, function, recorded)
    method = measured.tuned(name, file)
    for acceleration in (4.0, 8.0):
        ((acquisition, _), *_) = peers.measured_problems(scans, acceleration)
        assert method(acquisition).shape == (1, 64, 64)
    assert used == [replace(settings, iterations=n) for n in (4, 8)]
    file.write_text('{"chosen": [{"acceleration": 4.0}]}')
    with pytest.raises(InputError, match=f"no settings of {key}"):
        measured.tuned(name, file)
    with pytest.raises(InputError, match="--method codec is none of sense-best"):
        measured.tuned("codec", file)
