"""The rooms of the page, by their callbacks, without a browser."""

import json
import threading
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("gradio", reason="needs the extra app")

import gradio as gr

from helpers.app_rooms import CHOICE, WINDOW, Rooms
from nirvana.adapt.adaptation import adapt_documents
from nirvana.adapt.config import config_of
from nirvana.app import report_work, scan_work, text_work
from nirvana.app.config import AppConfig
from nirvana.app.text_room import ADAPTED, FROZEN, ROOM
from nirvana.errors import InputError
from nirvana.generate.text import generate_text, prompt_tokens
from nirvana.model.assets import load_language_model
from nirvana.mri.adapt.adaptation import ADAPTED as ADAPTED_CODEC
from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.io import read_scan
from nirvana.mri.methods import NIRVANA
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.pipeline import reconstruct
from nirvana.mri.results import TARGET
from nirvana.packaged import resolve

PROMPT = "The patients were randomly assigned to two groups, <b>${1+1}</b>."


def result_of(rooms: Rooms, tab: str) -> scan_work.ScanResult:
    return scan_work.result_of(rooms.page.sessions.of(tab))


def test_a_scan_is_reconstructed_as_by_the_package(rooms, scan_file, small_codec):
    rooms.upload("a", scan_file)
    html, slider, scores, about, _ = rooms.reconstruct("a", NIRVANA, slices="2")
    result = result_of(rooms, "a")
    assert list(result.shown) == [TARGET, "zero-filled", NIRVANA]
    assert slider["maximum"] == result.num_slices == 2
    mask = Sampling("equispaced", 4.0, 0.08).mask(48, 0).numpy()
    scan = read_scan(scan_file)
    expected = reconstruct(scan.kspace * mask, mask, codec=small_codec)
    np.testing.assert_allclose(result.shown[NIRVANA], expected[1:3], rtol=1e-4, atol=1e-6)
    assert html.count("<img") == 5  # three images and two errors
    assert "this slice: SSIM" in html
    assert scores.count("<tr>") == 3
    assert "small: 2 slices of 40 x 48" in about
    shares = [share for share, _ in rooms.shown]
    assert shares == sorted(shares)
    assert any("Nirvana, slices: 2 of 2" in text for _, text in rooms.shown)


def test_a_codec_adapts_to_the_scan(rooms, scan_file, small_codec):
    rooms.upload("a", scan_file)
    html, *_ = rooms.reconstruct("a", ADAPTED_CODEC, slices="2")
    result = result_of(rooms, "a")
    assert list(result.shown) == [TARGET, "zero-filled", ADAPTED_CODEC]
    mask = Sampling("equispaced", 4.0, 0.08).mask(48, 0).numpy()
    scan = read_scan(scan_file)
    kspace = scan.kspace[1:3] * mask
    expected = reconstruct(kspace, mask, codec=small_codec, adapt=ScanAdaptConfig())
    np.testing.assert_allclose(result.shown[ADAPTED_CODEC], expected, rtol=1e-3, atol=1e-5)
    assert html.count("<img") == 5
    shares = [share for share, _ in rooms.shown]
    assert shares == sorted(shares)
    assert any("Nirvana, adapted, steps: " in text for _, text in rooms.shown)


def test_a_scan_as_measured_needs_no_method(rooms, scan_file):
    rooms.upload("a", scan_file)
    choice = ("equispaced", "as measured", *CHOICE[2:])
    rooms.call("reconstruct", "a", [NIRVANA], "0", *WINDOW, *choice)
    assert list(result_of(rooms, "a").shown) == ["Fourier"]
    with pytest.raises(gr.Error, match=r"center fraction 0\.9"):
        rooms.call("reconstruct", "a", [], "0", *WINDOW, "equispaced", "4", 0.9, *CHOICE[3:])


def test_every_result_is_downloaded_in_every_format(rooms, scan_file):
    rooms.upload("a", scan_file)
    rooms.reconstruct("a", NIRVANA)
    result = result_of(rooms, "a")
    files = [
        Path(file) for file in rooms.call("write_files", "a", ["NIfTI", "HDF5", "DICOM", "PNG"])
    ]
    names = [file.name for file in files]
    assert names[:3] == ["all-results.zip", "panel.png", "metrics.json"]
    for name, own in (("zero-filled", "zero-filled"), (NIRVANA, "nirvana")):
        volume = result.shown[name]
        nifti: Any = nibabel.load(next(file for file in files if file.name == f"{own}.nii.gz"))
        values = np.asarray(nifti.dataobj)
        assert sorted(values.shape) == sorted(volume.shape)
        assert values.max() == pytest.approx(volume.max(), rel=1e-5)
        with h5py.File(next(file for file in files if file.name == f"{own}.h5")) as file:
            np.testing.assert_array_equal(file["reconstruction"], volume)
        with zipfile.ZipFile(next(f for f in files if f.name == f"{own}-dicom.zip")) as archive:
            assert len(archive.namelist()) == 5
    metrics = json.loads(files[2].read_text())
    assert metrics["scan"] == "small.h5"
    assert [row["method"] for row in metrics["results"]] == ["zero-filled", NIRVANA]
    with zipfile.ZipFile(files[0]) as archive:
        held = set(archive.namelist())
    assert {
        "metrics.json",
        "nirvana/reconstruction.nii.gz",
        "zero-filled/reconstruction.h5",
    } <= held
    again = rooms.call("write_files", "a", ["PNG"])
    assert [Path(file).name for file in again] == ["all-results.zip", "panel.png", "metrics.json"]
    assert not files[3].exists()
    with pytest.raises(gr.Error, match="names none"):
        rooms.call("write_files", "a", [])


def test_sessions_see_their_own_files_alone(rooms, scan_file, tmp_path):
    other = tmp_path / "other.h5"
    other.write_bytes(scan_file.read_bytes())
    rooms.upload("a", scan_file)
    rooms.upload("b", other)
    failures = []

    def work(tab: str) -> None:
        try:
            for _ in range(3):
                rooms.reconstruct(tab, slices="1")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(tab,)) for tab in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert result_of(rooms, "a").found.prepared.path.stem == "small"
    assert result_of(rooms, "b").found.prepared.path.stem == "other"
    first = rooms.page.sessions.of("a")
    assert first.folder != rooms.page.sessions.of("b").folder
    files = [Path(each) for each in rooms.call("write_files", "a", ["HDF5"])]
    assert all(first.folder in file.parents for file in files)
    rooms.page.close(SimpleNamespace(session_hash="a"))  # type: ignore[arg-type]
    assert not first.folder.exists()
    assert result_of(rooms, "b").shown
    with pytest.raises(InputError, match="nothing was reconstructed"):
        result_of(rooms, "a")
    with pytest.raises(InputError, match="the page was closed"):
        first.new_folder("late")


def test_an_upload_replaces_the_one_before(rooms, scan_file, tmp_path):
    rooms.upload("a", scan_file)
    rooms.reconstruct("a", slices="1")
    other = tmp_path / "other.h5"
    other.write_bytes(scan_file.read_bytes())
    cleared, name = rooms.upload("a", other)
    assert cleared is None
    assert "<b>other.h5</b>" in name
    session = rooms.page.sessions.of("a")
    held = [file.name for file in session.folder.rglob("*") if file.is_file()]
    assert held == ["other.h5"]
    assert not session.results
    assert "example" in rooms.call("scan_example", "a")


def test_the_copies_of_the_server_go_with_the_session(rooms, scan_file):
    rooms.upload("a", scan_file)
    copies = list(rooms.root.rglob("small.h5"))
    assert len(copies) == 2
    rooms.page.close(SimpleNamespace(session_hash="a"))  # type: ignore[arg-type]
    assert scan_file.exists()
    assert list(rooms.root.iterdir()) == []


def test_the_same_upload_of_another_tab_stays(rooms, scan_file):
    """The server gives files of equal content one place; the later one replaces the first."""
    rooms.upload("a", scan_file)
    (place,) = rooms.page.sessions.of("a").cached
    later = place.with_suffix(".later")
    later.write_bytes(scan_file.read_bytes())
    later.replace(place)
    rooms.page.close(SimpleNamespace(session_hash="a"))  # type: ignore[arg-type]
    assert place.exists()
    rooms.call("scan_upload", "b", [str(place)])
    rooms.reconstruct("b", slices="1")


def test_sessions_are_limited_and_closed_when_idle(small_codec, tmp_path):
    config = AppConfig(codec=str(small_codec), max_sessions=2, idle_minutes=1.0)
    rooms = Rooms(config, tmp_path / "root")
    sessions = rooms.page.sessions
    for tab in "ab":
        rooms.call("scan_enter", tab)
    with pytest.raises(gr.Error, match="2 people use this page"):
        rooms.call("scan_enter", "c")
    old = sessions.of("a")
    old.used -= 61
    rooms.call("scan_enter", "c")
    assert old.closed
    assert not old.folder.exists()
    assert len(sessions) == 2


def test_work_is_stopped_by_time_and_by_the_user(rooms, scan_file, monkeypatch):
    rooms.upload("a", scan_file)
    session = rooms.page.sessions.of("a")
    monkeypatch.setattr(rooms, "_show", lambda share, desc: session.stop.set())
    with pytest.raises(gr.Error, match="stopped"):
        rooms.reconstruct("a")
    assert not session.results
    monkeypatch.undo()
    rooms.reconstruct("a")  # the next work is not stopped
    hasty = AppConfig(max_seconds=1e-9)
    monkeypatch.setattr(rooms.page, "config", hasty)
    with pytest.raises(gr.Error, match="stopped after 1e-09 seconds, the limit of --max-seconds"):
        rooms.reconstruct("a")
    with pytest.raises(gr.Error, match="stopped after"):
        rooms.call("continue", "a", PROMPT, [FROZEN], 400, 0.8, 0.95, 0)
    with pytest.raises(gr.Error, match="stopped after"):
        rooms.call("colour", "a", PROMPT, [ADAPTED], "loss")


def test_a_scan_that_is_too_large_is_refused(rooms, tmp_path):
    large = tmp_path / "large.npy"
    np.save(large, np.ones((64, 96, 96), np.float32))  # 2.25 MiB, and 36 with eight coils
    rooms.upload("a", large)
    with pytest.raises(gr.Error, match=r"^'large.npy: a scan of 8 coils .* takes 36 MiB"):
        rooms.reconstruct("a")
    rooms.reconstruct("a", slices="2")
    huge = tmp_path / "huge.h5"
    huge.write_bytes(bytes(9 * 2**20))
    with pytest.raises(gr.Error, match=r"huge.h5 has 9.0 MiB; this page takes at most 8"):
        rooms.upload("a", huge)


def test_a_fault_of_the_program_shows_nothing_of_it(rooms, scan_file, monkeypatch, caplog):
    rooms.upload("a", scan_file)
    monkeypatch.setattr(scan_work, "compare_methods", lambda *_: 1 / 0)
    with pytest.raises(gr.Error, match="a fault of the program") as raised:
        rooms.reconstruct("a")
    assert "division" not in str(raised.value)
    assert "ZeroDivisionError" in caplog.text  # in the terminal


@pytest.fixture(scope="module")
def language():
    return load_language_model("tiny")


def test_tokens_have_the_models_losses(rooms, language):
    first, second = rooms.call("colour", "a", PROMPT, [FROZEN, ADAPTED], "loss")
    traces = rooms.page.sessions.of("a").results[ROOM]
    model, tokenizer = language
    tokens = prompt_tokens(tokenizer, PROMPT)
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        output = model(ids, output_trigger=True)
    nll = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none")
    frozen = traces[FROZEN]
    np.testing.assert_allclose(frozen.loss, nll, atol=1e-4)
    gates = torch.stack([each.gates[0, 1:].mean(-1) for each in output.trigger]).mean(0)
    np.testing.assert_allclose(frozen.gate, gates, atol=1e-6)
    steps = torch.stack([each.change[0, 1:] for each in output.trigger]).mean(0)
    np.testing.assert_allclose(frozen.step, steps, atol=1e-6)
    scores, _ = adapt_documents(model, [tokens], config_of(resolve("tiny")))
    np.testing.assert_allclose(traces[ADAPTED].loss, scores[0], atol=1e-4)
    assert traces[ADAPTED].step != frozen.step
    assert first.count("<mark") == len(tokens) - 1
    assert "&lt;" in first
    assert "<b>" not in first
    assert "scored before the token taught" in second
    by_gate, _ = rooms.call("text_view", "a", "gate")
    assert by_gate != first
    assert rooms.call("text_view", "b", "gate") == ("", "")


def test_a_long_prompt_is_learned_from(rooms):
    """Behind the first chunk, the adapted model's losses are others."""
    text = "One, two, three, four, five. " * 40
    rooms.call("colour", "a", text, [FROZEN, ADAPTED], "loss")
    traces = rooms.page.sessions.of("a").results[ROOM]
    chunk = config_of(resolve("tiny")).chunk
    frozen, adapted = (np.array(traces[name].loss) for name in (FROZEN, ADAPTED))
    np.testing.assert_allclose(adapted[:chunk], frozen[:chunk], atol=1e-4)
    assert adapted[chunk:].mean() < frozen[chunk:].mean()


def test_a_text_is_continued_as_by_the_package(rooms, language):
    model, tokenizer = language
    tokens = prompt_tokens(tokenizer, PROMPT)
    written = generate_text(model, tokenizer, tokens, 12, seed=5)[0, len(tokens) :]
    frozen, adapted = rooms.call("continue", "a", PROMPT, [FROZEN, ADAPTED], 12, 0.8, 0.95, 5)
    assert frozen == tokenizer.decode(written, skip_special_tokens=True)
    assert adapted
    streamed = list(
        text_work.continue_prompt(
            rooms.page.models,
            text_work.TextRequest(PROMPT, 12, seed=5),
            rooms.page.watch(rooms.page.sessions.of("a")),
        )
    )
    assert len(streamed) > 3
    assert streamed[-1] == frozen
    assert all(later.startswith(earlier) for earlier, later in pairwise(streamed))


def test_a_text_that_nobody_waits_for_is_stopped(rooms):
    watch = rooms.page.watch(rooms.page.sessions.of("a"))
    pieces = text_work.continue_prompt(rooms.page.models, text_work.TextRequest(PROMPT, 512), watch)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    with rooms.page.models.in_use():  # they are free again
        pass


@pytest.mark.slow
def test_a_report_follows_its_threshold(tmp_path, monkeypatch):
    """Of the example, by the packaged reporter."""
    rooms = Rooms(AppConfig(), tmp_path / "root")
    text, table, threshold, slider, html = rooms.call("read", "a", "1", False, False, *CHOICE)
    assert text.startswith("Slice 12: ")
    assert text.endswith("not for diagnosis.")
    result = report_work.result_of(rooms.page.sessions.of("a"))
    reading = result.found.readings[11]
    assert threshold["value"] == result.threshold
    assert slider["value"] == 12
    assert f"{reading.finding:.1%}" in table
    always, marked = rooms.call("report_view", "a", 0.0, 12)
    never, plain = rooms.call("report_view", "a", 1.0, 12)
    assert reading.at_threshold(0.0).text in always
    assert reading.at_threshold(0.0).facts.finding
    assert "No focal lesion" in never
    assert marked != plain
    assert rooms.call("report_view", "a", result.threshold, 12) == (text, html)
    assert "was not read" in rooms.call("report_view", "a", 0.5, 1)[1]
    with pytest.raises(gr.Error, match="slice 1 was not read"):
        rooms.call("evidence", "a", 0.5, 1)

    def evidence_map(reporter, image, progress):
        assert reporter is rooms.page.models.reporter()
        np.testing.assert_allclose(image.norm(dim=0), result.found.images[11], rtol=1e-5)
        progress(120)
        return np.arange(120.0).reshape(12, 10)

    monkeypatch.setattr(report_work, "evidence_map", evidence_map)
    mapped = rooms.call("evidence", "a", 0.5, 12)
    assert mapped.count("<img") == 2
    assert "+1.2e+02" in mapped
    assert "places: 120 of 120" in rooms.shown[-1][1]
    assert rooms.call("evidence", "a", 0.5, 12) == mapped
    assert rooms.shown == []  # not computed again
    rooms.page.sessions.close_all()


def test_callbacks_without_results_show_nothing(rooms):
    assert rooms.call("scan_view", "a", 1, *WINDOW) == gr.skip()
    assert rooms.call("report_view", "a", 0.5, 1) == (gr.skip(), gr.skip())
    with pytest.raises(gr.Error, match="press Reconstruct"):
        rooms.call("write_files", "a", ["PNG"])
    with pytest.raises(gr.Error, match="press Write the report"):
        rooms.call("evidence", "a", 0.5, 1)
