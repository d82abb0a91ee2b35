"""The layout of the room of scans."""

from typing import Any

import gradio as gr

from nirvana.app import scan_work
from nirvana.app.page import PROGRESS, VIEW_EVENT, WORK_EVENT, Page
from nirvana.app.picker import lines_html, name_of, parse, picker, table_html
from nirvana.app.pictures import Window
from nirvana.mri.adapt.adaptation import ADAPTED
from nirvana.mri.io.options import parse_slices
from nirvana.mri.methods import GRAPPA, NIRVANA, SENSE, WAVELET

METHODS = [NIRVANA, ADAPTED, WAVELET, SENSE, GRAPPA]
FORMATS = {"NIfTI": "nifti", "HDF5": "hdf5", "DICOM": "dicom", "PNG": "png"}


def scan_room(page: Page) -> None:
    """Lays out the room and connects it.

    Args:
        page: what the callbacks share.
    """

    def on_reconstruct(request: gr.Request, progress: Any = PROGRESS, *values: Any):
        methods, slices, window, choice = *values[:2], Window(*values[2:7]), values[7:]
        with page.work(request, progress) as (session, watch):
            sampling, seed, reading = parse(choice)
            wanted = scan_work.ScanRequest(
                methods, sampling, seed, parse_slices(slices.strip()), reading
            )
            result = scan_work.reconstruct(session, page.models, wanted, watch)
            middle = result.num_slices // 2 + 1
            return (
                scan_work.slice_html(result, middle, window),
                gr.update(maximum=max(2, result.num_slices), value=middle),
                table_html(*scan_work.table_of(result)),
                lines_html(scan_work.describe(result)),
                None,
            )

    def on_view(request: gr.Request, number: float, *window: float):
        with page.session(request) as session:
            if scan_work.ROOM not in session.results:
                return gr.skip()
            return scan_work.slice_html(scan_work.result_of(session), int(number), Window(*window))

    def on_write(request: gr.Request, progress: Any = PROGRESS, *values: Any):
        (formats,) = values
        with page.work(request, progress) as (session, watch):
            names = ",".join(FORMATS[each] for each in formats)
            return [str(path) for path in scan_work.write_files(session, names, watch)]

    def on_stop(request: gr.Request) -> None:
        with page.session(request) as session:
            session.stop.set()

    def on_enter(request: gr.Request):
        with page.session(request) as session:
            return name_of(session)

    with gr.Tab("Scan", id="scan") as tab, gr.Row():
        with gr.Column(scale=1, min_width=300):
            choice = picker(page, "scan")
            methods = gr.CheckboxGroup(
                METHODS, value=[NIRVANA, WAVELET], label="Methods, beside zero-filled"
            )
            slices = gr.Textbox(
                "4", label="Slices", info="a number in the middle, 0 for all, or FIRST:LAST"
            )
            with gr.Row():
                start = gr.Button("Reconstruct", variant="primary", min_width=110)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=320):
            pictures = gr.HTML('<p class="note">Press Reconstruct.</p>', min_height=200)
            with gr.Row():
                number = gr.Slider(1, 2, 1, step=1, label="Slice", min_width=150)
                level = gr.Slider(0, 150, 50, step=1, label="Level, % of white", min_width=150)
                width = gr.Slider(1, 200, 100, step=1, label="Window, % of white", min_width=150)
            with gr.Row():
                zoom = gr.Slider(1, 8, 1, step=0.25, label="Zoom", min_width=150)
                row = gr.Slider(0, 100, 50, step=1, label="Zoom at height, %", min_width=150)
                column = gr.Slider(0, 100, 50, step=1, label="Zoom at width, %", min_width=150)
            scores = gr.HTML()
            about = gr.HTML()
            with gr.Accordion("Download the results", open=False):
                formats = gr.CheckboxGroup(list(FORMATS), value=list(FORMATS), label="Formats")
                write = gr.Button("Write the files")
                files = gr.File(label="Files", file_count="multiple", interactive=False)
    window = [level, width, zoom, row, column]
    start.click(
        on_reconstruct,
        [methods, slices, *window, *choice.inputs],
        [pictures, number, scores, about, files],
        api_name="reconstruct",
        show_progress_on=pictures,
        **WORK_EVENT,
    )
    for slider in (number, *window):
        slider.change(on_view, [number, *window], pictures, api_name="scan_view", **VIEW_EVENT)
    write.click(on_write, formats, files, api_name="write_files", **WORK_EVENT)
    stop.click(on_stop, None, None, api_name="scan_stop", **VIEW_EVENT)
    tab.select(on_enter, None, choice.name, api_name="scan_enter", **VIEW_EVENT)
