"""The examples, as notebooks from top to bottom, and what they claim."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.forks import Forks
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.io import write_scan
from nirvana.mri.physics.masks import sampling_mask

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

# Run as a last cell of the example's notebook.
CHECKS = {
    "domains/signals.py": """
        few = {kind: decibels(train(kind, 1), TRAINED) for kind in kinds}
        assert all(results[kind][0] > few[kind] + 2 for kind in kinds), (few, results)
    """,
    "language/adopt_a_transformer.py": """
        assert untrained[:32].max() < 1e-4 < untrained[32:].mean()
        assert all(sum(each[-3:]) < sum(each[:3]) for each in losses.values()), losses
    """,
    "language/first_text.py": """
        assert second.sum() < 0.8 * first.sum()
        assert kept(64) < kept(256) == kept(512)
    """,
    "language/own_network.py": """
        assert reached[0] < 0.2
        assert reached[-1] > 0.9, reached
    """,
    "language/task_file.py": """
        assert mean[1] < mean[0] - 0.1 and better > 0.8 * len(test), (mean, better)
        assert second.bits_per_byte < first.bits_per_byte
        assert sum(changed) > sum(plain) and min(changed) > 0.98 * min(plain), (plain, changed)
        assert scores(test) == before  # outside of `applied` the model is what it was
    """,
    "language/train_a_small_model.py": """
        assert outcome.finished
        assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
        assert model.config.vocab_size == len(tokenizer)
    """,
    "language/trigger_on_a_document.py": """
        assert bits.mean() < bits_without.mean()
        assert len(traces) == 6
        assert all(trace.loss_after.mean() < trace.loss_before.mean() for trace in traces)
    """,
    "mri/compare_methods.py": """
        psnr = {row["method"]: row["psnr"] for row in rows}
        assert sorted(psnr, key=psnr.get) == ["zero-filled", "SENSE", "L1-wavelet", "Nirvana"], psnr
        assert file.stat().st_size > 100_000
    """,
    "mri/first_report.py": """
        chances = [each.finding for each in found.readings.values()]
        assert max(range(5), key=chances.__getitem__) == 2, chances
        assert reading.facts.side == "left", reading.text
    """,
    "mri/first_scan.py": """
        psnr = {name: score(target, results[name])["psnr"] for name in ("zero-filled", "Nirvana")}
        assert psnr["Nirvana"] > psnr["zero-filled"] + 5, psnr
    """,
    "mri/own_kspace.py": """
        distance = lambda image: float(((image - full) ** 2).sum() / (full**2).sum())
        assert distance(images) < 0.3 * distance(folded), (distance(images), distance(folded))
        # The picture is the phantom, its rows and columns exchanged, in its place.
        strength = np.linalg.norm(sensitivities, axis=-1)
        expected = (phantom * strength).T
        assert np.abs(full[0] - expected).mean() < 0.02, np.abs(full[0] - expected).mean()
    """,
    "mri/train_a_codec.py": """
        assert gain > 2, gain
        assert valid[-1]["valid"]["psnr"] > valid[-1]["valid"]["zero_filled_psnr"] + 2
    """,
}


def test_every_example_is_checked():
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")} == set(CHECKS)


def notebook(path: Path) -> Any:
    """The notebook that the site offers for an example."""
    import nbformat
    from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
    from sphinx_gallery.notebook import jupyter_notebook
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    _, blocks = split_code_and_text_blocks(path)
    made = jupyter_notebook(blocks, copy.deepcopy(DEFAULT_GALLERY_CONF), path.parent)
    return nbformat.reads(json.dumps(made), as_version=4)


KERNEL = "language/first_text.py"

# What a kernel does with a notebook's cells, without the seconds in which each kernel imports.
SHELL = """
import os, sys
import matplotlib
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib_inline.backend_inline import configure_inline_support
os.chdir(FOLDER)
shell, pictures = InteractiveShell.instance(), 0
matplotlib.use("module://matplotlib_inline.backend_inline")
configure_inline_support(shell, "inline")
for cell in CELLS:
    with capture_output() as captured:
        result = shell.run_cell(cell)
    if not result.success:
        sys.exit(captured.stdout + captured.stderr)
    pictures += sum("image/png" in output.data for output in captured.outputs)
print(pictures)
"""


@pytest.fixture(scope="module")
def shell():
    """Runs cells in a fork of a process that has imported what most examples import."""
    with Forks("IPython", "matplotlib.pyplot", "nirvana.train.language", "nirvana.mri") as forks:

        def call(cells, folder):
            code = f"CELLS, FOLDER = {cells!r}, {str(folder)!r}\n{SHELL}"
            (status,), output = forks.run(code, seconds=850)
            assert status == 0, output
            return int(output.splitlines()[-1])

        yield call


def in_a_kernel(book, folder):
    """Runs a notebook as Jupyter does."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")
    client = nbclient.NotebookClient(
        book, timeout=850, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on two busy cores
@pytest.mark.parametrize("name", sorted(CHECKS))
def test_an_example_runs_as_a_notebook(name, request, tmp_path):
    """One of them in a kernel of Jupyter, the cells of the others in IPython's shell, which is what
    a kernel runs them in."""
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
    pytest.importorskip("sphinx_gallery", reason="needs the extra docs")
    pytest.importorskip("IPython", reason="needs the extra docs")
    book = notebook(EXAMPLES / name)
    nbformat.validate(book)
    lines = [line.removeprefix(" " * 8) for line in CHECKS[name].splitlines()]
    book.cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
    if name == KERNEL:
        pictures = in_a_kernel(book, tmp_path)
    else:
        cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
        pictures = request.getfixturevalue("shell")(cells, tmp_path)
    assert pictures, "an example shows a picture"


def test_the_documentation_shows_the_network_of_ones_own():
    """The network and its training, 15 lines, as they are in the example."""
    text = (EXAMPLES / "language" / "own_network.py").read_text()
    page = (ROOT / "docs" / "building.md").read_text()
    core = text[text.index("class Network") : text.index("@torch.no_grad")]
    lines = [line for line in core.splitlines() if line.strip()]
    assert len(lines) == 15
    block = page[page.index("    class Network") :].splitlines()
    shown = [line[4:] for line in block if line.strip()][:15]
    assert shown == lines


def readme(words: str) -> str:
    """The example in README that holds these words."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (found,) = (block for block in blocks if words in block)
    return found


def test_the_readmes_example_of_mri_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, columns = np.mgrid[-1:1:96j, -1:1:80j]
    head = np.clip(1.2 - rows**2 - columns**2, 0, 1).astype(np.float32)
    scan = simulate_scan(np.stack([head] * 2), "head", 0, Simulation(num_coils=2), (5.0, 2.0, 2.0))
    mask = sampling_mask("equispaced", 80, 4, 0.1, seed=0).numpy()
    write_scan(
        tmp_path / "scan.h5", replace(scan, kspace=scan.kspace * mask, mask=mask, target=None)
    )
    monkeypatch.chdir(tmp_path)
    code = readme("nirvana.mri")
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(code, names)
    assert (names["images"].shape, names["images"].dtype) == ((2, 96, 80), np.complex64)
    assert len(capsys.readouterr().out.splitlines()) == 2
