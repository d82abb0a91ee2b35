"""Photographs the rooms of the page in a browser: python docs/figures/app.py [FOLDER]

Without a folder the pictures of docs/images are made anew; in a folder each room is shown in both
sizes of the window. Needs Chromium or Chrome, see CONTRIBUTING.md.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np

IMAGES = Path(__file__).parents[1] / "images"
NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--no-sandbox",  # which root has not
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",  # small in containers
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desktop": (1280, 900), "telephone": (390, 844)}
PATIENCE = 900_000  # ms; one core may serve the page and the browser
SPOT_SLICE, SPOT_CENTRE, SPOT_RADIUS = 11, (41, 62), 3.5  # of nibabel's example, in voxels
PROMPT = (
    "The patients were randomly assigned to two groups. The first group was treated with the drug, "
    "and the second group was treated with placebo. After six months the patients of the first "
    "group had fewer seizures than the patients of the second group."
)
WRITTEN = """() => {
    const label = [...document.querySelectorAll("label")].find(
        each => each.innerText.includes("the model adapted to the prompt"));
    const before = window.written;
    window.written = label?.querySelector("textarea")?.value;
    return window.written && window.written === before;
}"""
"""In the browser: whether the last continuation is the one of the poll before."""


def program() -> str | None:
    """The browser's program: that of NIRVANA_CHROMIUM, or one on the PATH; None without one.

    Raises:
        FileNotFoundError: NIRVANA_CHROMIUM names no program.
    """
    named = os.environ.get("NIRVANA_CHROMIUM")
    if named:
        if shutil.which(named) is None:
            raise FileNotFoundError(f"NIRVANA_CHROMIUM={named} is no program")
        return named
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def started() -> Iterator[Any]:
    """A browser of playwright's, which ends with the block.

    Raises:
        FileNotFoundError: there is no browser.
    """
    from playwright.sync_api import sync_playwright

    found = program()
    if found is None:
        raise FileNotFoundError(f"no browser: install {NAMES[0]}, or name one in NIRVANA_CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=OPTIONS)
        yield browser
        browser.close()


def show_scan(page: Any, _: Path) -> None:
    """The example, by three methods."""
    page.get_by_label("Slices").first.fill("2")
    page.get_by_role("button", name="Reconstruct").click()
    page.get_by_text("error of Nirvana").wait_for()


def show_report(page: Any, folder: Path) -> None:
    """A report of a slice with a painted spot, and its evidence."""
    page.get_by_role("tab", name="Report").click()
    page.locator("input[type=file]").nth(1).set_input_files(spotted_volume(folder))
    page.locator(".note b:visible", has_text="bright_spot").wait_for()
    page.get_by_label("Slices to read").fill(f"{SPOT_SLICE}:{SPOT_SLICE + 2}")
    page.get_by_role("button", name="Write the report").click()
    page.get_by_text("Probability of a finding").wait_for()
    page.get_by_role("button", name="Map the evidence").click()
    page.get_by_text("log-odds of a finding").wait_for()


def show_text(page: Any, _: Path) -> None:
    """Both continuations of a prompt, and its tokens coloured by the Trigger's step."""
    page.get_by_role("tab", name="Text").click()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Colour the prompt's tokens").click()
    page.locator(".tokens mark").first.wait_for()
    page.get_by_role("radio", name="step").check()
    page.get_by_text("the Trigger's step, mean over").first.wait_for()
    page.get_by_role("button", name="Continue the text").click()
    page.wait_for_function(WRITTEN, polling=5000)


ROOMS: dict[str, Callable[[Any, Path], None]] = {
    "scan": show_scan,
    "report": show_report,
    "text": show_text,
}


def spotted_volume(folder: Path) -> Path:
    """nibabel's example with a bright ball in one hemisphere."""
    from nirvana.mri.data.example import example_volume

    whole: Any = nibabel.load(example_volume())
    values = np.asarray(whole.dataobj[..., 0], dtype=np.float32)
    at = np.indices(values.shape, dtype=np.float32)
    height = whole.header.get_zooms()[2] / whole.header.get_zooms()[0]
    centre = (*SPOT_CENTRE, SPOT_SLICE)
    steps = [(axis - middle) for axis, middle in zip(at, centre, strict=True)]
    distance = np.sqrt(steps[0] ** 2 + steps[1] ** 2 + (height * steps[2]) ** 2)
    share = np.clip(SPOT_RADIUS + 0.5 - distance, 0, 1)
    values += share * (np.quantile(values, 0.995) - values)
    path = folder / "bright_spot.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, whole.affine), path)
    return path


def photograph(browser: Any, address: str, room: str, files: dict[str, Path]) -> None:
    """Writes pictures of a room after its work is done.

    Args:
        browser: of `started`.
        address: of the page.
        room: of `ROOMS`.
        files: size of the window, of `SIZES` -> PNG, as long as the page.
    """
    page = browser.new_page(color_scheme="light")
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Reconstruct").wait_for()
    with TemporaryDirectory() as folder:
        ROOMS[room](page, Path(folder))
        page.evaluate("document.activeElement?.blur()")
        for name, file in files.items():
            width, height = SIZES[name]
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(2000)  # the last view, and the end of its fading
            page.screenshot(path=file, full_page=True)
    page.close()


def main(folder: Path | None) -> None:
    """Photographs every room."""
    from nirvana.app.config import AppConfig
    from nirvana.app.server import served

    with started() as browser, served(AppConfig(max_seconds=3600), port=0) as address:
        for room in ROOMS:
            files = {"desktop": IMAGES / f"app-{room}.png"}
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                files = {name: folder / f"app-{room}-{name}.png" for name in SIZES}
            photograph(browser, address, room, files)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
