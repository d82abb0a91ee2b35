"""The page in Chromium: every room by mouse and by keyboard, at two sizes of the window."""

import os
import runpy
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import pytest

# Where a browser is named, as continuous integration does, what is missing is an error.
if not os.environ.get("NIRVANA_CHROMIUM"):
    pytest.importorskip("gradio", reason="needs the extra app")
    pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install 'nirvana[dev]'"
    )

from nirvana.app.config import AppConfig
from nirvana.app.server import served
from nirvana.mri.data.example import example_volume

BROWSER = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "figures" / "app.py"))
pytestmark = [
    pytest.mark.skipif(
        BROWSER["program"]() is None, reason="needs Chromium (Debian's package chromium) or Chrome"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]
SIZES = {"desktop": (1400, 900), "telephone": (390, 800)}
PATIENCE = 800_000  # ms; one busy core may serve the page and the browser


@pytest.fixture(scope="module")
def address(small_codec: Path) -> Iterator[str]:
    with served(AppConfig(codec=str(small_codec), max_mb=8), port=0) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with BROWSER["started"]() as started:
        yield started


@pytest.fixture(params=SIZES)
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tab with the page, which may load nothing from elsewhere and log no error."""
    width, height = SIZES[request.param]
    tab = browser.new_page(viewport={"width": width, "height": height})
    tab.set_default_timeout(PATIENCE)
    elsewhere: list[str] = []
    faults: list[str] = []

    def note(sent: Any) -> None:
        if not sent.url.startswith((address, "data:", "blob:")):
            elsewhere.append(sent.url)

    tab.on("request", note)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto(address)
    tab.get_by_role("button", name="Reconstruct").wait_for()
    yield tab
    tab.close()
    assert not elsewhere
    assert not faults


def within_the_window(page: Any) -> bool:
    """Whether nothing of the page must be scrolled to sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


def test_the_room_of_scans(page: Any, scan_file: Path, tmp_path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(scan_file)
    page.locator(".note b", has_text="small.h5").wait_for()
    page.get_by_label("L1-wavelet").uncheck()
    page.get_by_role("button", name="Reconstruct").click()
    page.get_by_text("error of Nirvana").wait_for()
    assert page.locator(".pictures img").count() == 5
    assert within_the_window(page)
    before = page.locator(".pictures img").nth(1).get_attribute("src")
    for label, value in (("Slice", "1"), ("Level", "30"), ("Window", "50"), ("Zoom", "3")):
        field = page.locator(f"input[type=number][aria-label*='{label}']").first
        field.fill(value)
        field.press("Tab")
        page.wait_for_function(
            "before => document.querySelectorAll('.pictures img')[1].src !== before", arg=before
        )
        before = page.locator(".pictures img").nth(1).get_attribute("src")
    page.get_by_role("button", name="Download the results").click()
    page.get_by_role("button", name="Write the files").click()
    link = page.locator("a[download='all-results.zip']")
    with page.expect_download() as download:
        link.click()
    archive = tmp_path / "all.zip"
    download.value.save_as(archive)
    with zipfile.ZipFile(archive) as held:
        assert "nirvana/reconstruction.nii.gz" in held.namelist()
    page.get_by_role("button", name="Use the example").first.click()
    page.get_by_text("the example: echo-planar").first.wait_for()


def test_a_hostile_upload_is_one_line_in_the_page(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "<img src=x onerror=document.title=1>.h5"
    file.write_bytes(b"no scan")
    page.locator("input[type=file]").first.set_input_files(file)
    page.locator(".note b", has_text="onerror").wait_for()
    page.get_by_role("button", name="Reconstruct").click()
    page.get_by_text("is not an HDF5 file").wait_for()
    assert str(tmp_path) not in page.content()
    assert "nirvana-app-" not in page.get_by_text("is not an HDF5 file").inner_text()
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "Nirvana"


def test_the_room_of_text_by_keyboard(page: Any) -> None:
    page.get_by_role("tab", name="Scan").focus()
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.wait_for()
    written = "A text of {{value}} ${1+1} <b>tokens</b>"
    for _ in range(3):  # a room that is still being drawn puts its first prompt back
        prompt.focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(written)
        page.wait_for_timeout(500)
        if prompt.input_value() == written:
            break
    count = page.locator("input[type=number][aria-label*='Tokens to write']")
    count.fill("8")
    start = page.get_by_role("button", name="Continue the text")
    start.focus()
    page.keyboard.press("Enter")
    for label in ("Continuation, the model as it is", "Continuation, the model adapted"):
        page.wait_for_function(
            "label => [...document.querySelectorAll('label')].some(each => "
            "each.innerText.includes(label) && each.querySelector('textarea').value)",
            arg=label,
        )
    show = page.get_by_role("button", name="Colour the prompt's tokens")
    show.focus()
    page.keyboard.press("Space")
    page.locator(".tokens mark").first.wait_for()
    text = page.locator(".tokens").first.inner_text()
    assert text == written
    for kind in ("gate", "step"):
        page.get_by_role("radio", name=kind).focus()
        page.keyboard.press("Space")
        page.get_by_text(f"{kind}, mean over").first.wait_for()
    assert within_the_window(page)


def test_the_room_of_reports(page: Any, tmp_path: Path) -> None:
    whole: Any = nibabel.load(example_volume())
    nibabel.save(whole.slicer[32:96, 16:80, 10:13, :1], tmp_path / "three.nii")  # all take longer
    page.get_by_role("tab", name="Report").click()
    page.locator("input[type=file]").nth(1).set_input_files(tmp_path / "three.nii")
    page.locator(".note b:visible", has_text="three.nii").wait_for()
    page.get_by_label("Slices to read").fill("1")
    page.get_by_role("button", name="Write the report").click()
    page.get_by_text("Probability of a finding").wait_for()
    report = page.get_by_label("Report", exact=True)
    assert "Slice 2: " in report.input_value()
    threshold = page.locator("input[type=range]:visible").first
    threshold.focus()
    page.keyboard.press("Home")
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(each => each.value.includes('lobe'))"
    )
    page.get_by_role("button", name="Map the evidence").click()
    page.get_by_text("log-odds of a finding").wait_for()
    assert page.locator(".pictures img:visible").count() == 2
    assert within_the_window(page)


def test_a_closed_tab_leaves_nothing(browser: Any, address: str, scan_file: Path) -> None:
    root = Path(os.environ["GRADIO_TEMP_DIR"])
    tab = browser.new_page()
    tab.goto(address)
    tab.locator("input[type=file]").first.set_input_files(scan_file)
    tab.locator(".note b", has_text="small.h5").wait_for()
    assert [file for file in root.rglob("small.h5") if file.is_file()]
    tab.close()
    for _ in range(100):
        left = [file for file in root.rglob("*") if file.is_file()]
        if not left:
            break
        time.sleep(0.1)
    assert not left
