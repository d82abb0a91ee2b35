"""Draws the pictures of the README: python docs/figures/readme.py [DATA]

`nirvana demo` makes those of a simulated scan, from what the dependencies carry. The picture of a
measured scan needs the file `larson_se_t1_sag_data.mat` in the folder DATA, and BART's program.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from scipy.io import loadmat

from nirvana.mri import load_codec
from nirvana.mri.data.scans import measure, target_of
from nirvana.mri.evaluate.compare import run_methods
from nirvana.mri.methods import BART, NIRVANA, comparison_methods
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.physics.pattern import sampled_share
from nirvana.mri.pipeline import as_scan
from nirvana.mri.results import TARGET, draw_middle

IMAGES = Path(__file__).parents[1] / "images"
WIDTH = 1200
MEASURED = "larson_se_t1_sag_data.mat"


def draw_demo(images: Path) -> None:
    """The simulated scan and the report of `nirvana demo`."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        subprocess.run([sys.executable, "-m", "nirvana", "demo", "--out", str(out)], check=True)
        shrink(out / "mri.png", images / "demo.png")
        shrink(out / "report.png", images / "demo-report.png")


def draw_measured(file: Path, images: Path) -> None:
    """A measured head, one coil and one slice, 4x, beside classical methods.

    Args:
        file: MATLAB file of `data`, complex `[H, W]`, fully sampled.
        images: folder of the picture.
    """
    kspace = np.asarray(loadmat(file)["data"])[None, None]
    scan = as_scan(kspace, name="measured head, one coil")
    measurement = measure(scan).undersampled(Sampling("equispaced", 4.0, 0.08), seed=0)
    methods = comparison_methods({NIRVANA: load_codec()}, also=BART["l1"])
    results = run_methods(measurement, methods)
    volumes = {name: result.images for name, result in results.items() if name != BART["l2"]}
    sampled = sampled_share(measurement.acquisition.pattern)
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "measured.png"
        draw_middle(picture, {TARGET: target_of(scan), **volumes}, scan, sampled)
        shrink(picture, images / "measured.png")


def shrink(source: Path, picture: Path) -> None:
    """Writes a picture as wide as a page."""
    image = Image.open(source).convert("RGB")
    image.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    image.save(picture, optimize=True)


if __name__ == "__main__":
    draw_demo(IMAGES)
    if len(sys.argv) > 1:
        draw_measured(Path(sys.argv[1]) / MEASURED, IMAGES)
