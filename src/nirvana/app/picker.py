"""The choice of a scan, which the rooms of scans and of reports have in common."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nirvana.app.page import VIEW_EVENT, Page
from nirvana.app.sessions import Session
from nirvana.app.uploads import receive
from nirvana.mri.io import ReadOptions
from nirvana.mri.io.options import parse_read_options
from nirvana.mri.physics.masks import MASK_KINDS, Sampling

AS_MEASURED = "as measured"
ACCELERATIONS = (AS_MEASURED, "2", "3", "4", "5", "6", "8", "10")
EXAMPLE = "the example: echo-planar images of a real brain, of which a scan is simulated"
FORMATS = (
    "fastMRI or ISMRMRD HDF5, Siemens .dat, BART .cfl with .hdr, .mat, .npy, .npz; volumes .nii, "
    ".nii.gz, .npy"
)


def name_of(session: Session) -> str:
    """What the rooms read now, as HTML."""
    name = EXAMPLE if session.scan is None else session.scan.name
    return f'<p class="note">Scan: <b>{html.escape(name)}</b></p>'


@dataclass(frozen=True)
class Picker:
    """Components that choose a scan and how it is read.

    Attributes:
        name: shows what is read.
        sampling: kind of mask, acceleration, centre fraction and seed.
        reading: see `parse_read_options`.
    """

    name: gr.HTML
    sampling: list[Any]
    reading: list[Any]

    @property
    def inputs(self) -> list[Any]:
        """All that `parse` takes, in its order."""
        return [*self.sampling, *self.reading]


def parse(values: Sequence[Any]) -> tuple[Sampling | None, int, ReadOptions]:
    """The values of `Picker.inputs` as sampling, seed and options of reading.

    Raises:
        InputError: an option cannot be understood.
    """
    kind, acceleration, center, seed, *texts = values
    centre, phase_encode, axes, variable, measurement, select = (
        (text or "").strip() for text in texts
    )
    sampling = None
    if acceleration != AS_MEASURED:
        sampling = Sampling(kind, float(acceleration), float(center))
    reading = parse_read_options(
        centre or "auto",
        measurement or None,
        [select] if select else [],
        phase_encode or "auto",
        variable or None,
        axes or None,
    )
    return sampling, int(seed or 0), reading


def _paths_of(files: Any) -> list[str] | None:
    """Where the server put the files of an upload."""
    return None if files is None else [file.path for file in files]


def picker(page: Page, room: str) -> Picker:
    """Lays out the choice of a scan.

    Args:
        page: what the callbacks share.
        room: its name, for the events of the API.
    """

    def on_upload(request: gr.Request, files: list[str] | None):
        with page.session(request) as session:
            receive(session, files or [], page.config.max_bytes)
            return None, name_of(session)

    def on_example(request: gr.Request):
        with page.session(request) as session:
            session.scan = None
            session.results.clear()
            return name_of(session)

    name = gr.HTML(f'<p class="note">Scan: <b>{html.escape(EXAMPLE)}</b></p>')
    upload = gr.File(
        label=f"Upload a scan, up to {page.config.max_mb} MB",
        file_count="multiple",
        type="filepath",
        height=150,
    )
    # Gradio's own would leave an empty file in its folder for each upload.
    upload.preprocess = _paths_of  # type: ignore[method-assign]
    gr.HTML(f'<p class="note">{FORMATS}</p>')
    example = gr.Button("Use the example", size="sm")
    with gr.Accordion("Undersampling of a fully sampled scan", open=True), gr.Row():
        acceleration = gr.Dropdown(ACCELERATIONS, value="4", label="Acceleration", min_width=130)
        kind = gr.Radio(list(MASK_KINDS), value="equispaced", label="Mask", min_width=130)
        center = gr.Number(0.08, label="Centre fraction", minimum=0, maximum=1, min_width=130)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=130)
    with gr.Accordion("How the file is read, where it does not state it", open=False):
        reading = [
            gr.Textbox("auto", label="Centre", info="auto, middle, corner, or ROW,COLUMN"),
            gr.Textbox("auto", label="Phase encoding", info="auto, columns or rows"),
            gr.Textbox(label="Axes", info="as row,column,coil,slice"),
            gr.Textbox(label="Variable", info="of a file with several arrays"),
            gr.Textbox(label="Measurement", info="name or number, of a file with several"),
            gr.Textbox(label="Select", info="counters, as contrast=1,repetition=0"),
        ]
    upload.upload(on_upload, upload, [upload, name], api_name=f"{room}_upload", **VIEW_EVENT)
    example.click(on_example, None, name, api_name=f"{room}_example", **VIEW_EVENT)
    return Picker(name, [kind, acceleration, center, seed], reading)


def table_html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML."""
    head = "".join(f"<th>{html.escape(each)}</th>" for each in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scores"><table><tr>{head}</tr>{body}</table></div>'


def lines_html(lines: Sequence[str]) -> str:
    """Lines as HTML."""
    return '<p class="note">' + "<br>".join(map(html.escape, lines)) + "</p>"
