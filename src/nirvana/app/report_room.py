"""The layout of the room of reports."""

from typing import Any

import gradio as gr

from nirvana.app import report_work
from nirvana.app.page import PROGRESS, VIEW_EVENT, WORK_EVENT, Page
from nirvana.app.picker import name_of, parse, picker, table_html
from nirvana.mri.io.options import parse_slices


def report_room(page: Page) -> None:
    """Lays out the room and connects it.

    Args:
        page: what the callbacks share.
    """

    def on_read(request: gr.Request, progress: Any = PROGRESS, *values: Any):
        slices, stripped, radiological, choice = *values[:3], values[3:]
        with page.work(request, progress) as (session, watch):
            sampling, seed, reading = parse(choice)
            wanted = report_work.ReportRequest(
                *(sampling, seed, parse_slices(slices.strip()), stripped, radiological, reading)
            )
            result = report_work.read(session, page.models, wanted, watch)
            number = result.found.most_suspicious + 1
            return (
                report_work.text_of(result, result.threshold),
                table_html(*report_work.probabilities(result)),
                gr.update(value=result.threshold),
                gr.update(maximum=max(2, len(result.found.images)), value=number),
                report_work.slice_html(result, number, result.threshold),
            )

    def on_view(request: gr.Request, threshold: float, number: float):
        with page.session(request) as session:
            if report_work.ROOM not in session.results:
                return gr.skip(), gr.skip()
            result = report_work.result_of(session)
            text = report_work.text_of(result, threshold)
            return text, report_work.slice_html(result, int(number), threshold)

    def on_evidence(request: gr.Request, progress: Any = PROGRESS, *values: Any):
        threshold, number = values
        with page.work(request, progress) as (session, watch):
            report_work.map_evidence(session, page.models, int(number), watch)
            result = report_work.result_of(session)
            return report_work.slice_html(result, int(number), threshold)

    def on_stop(request: gr.Request) -> None:
        with page.session(request) as session:
            session.stop.set()

    def on_enter(request: gr.Request):
        with page.session(request) as session:
            return name_of(session)

    with gr.Tab("Report", id="report") as tab, gr.Row():
        with gr.Column(scale=1, min_width=300):
            choice = picker(page, "report")
            slices = gr.Textbox(
                "0",
                label="Slices to read",
                info="a number in the middle, FIRST:LAST, or 0 for those at heights that were "
                "learned",
            )
            stripped = gr.Checkbox(False, label="The images show the brain without the skull")
            radiological = gr.Checkbox(
                False,
                label="A file without an orientation has the patient's right on the left",
            )
            with gr.Row():
                start = gr.Button("Write the report", variant="primary", min_width=110)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=320):
            text = gr.Textbox(label="Report", lines=6, max_lines=14, interactive=False)
            threshold = gr.Slider(
                0, 1, 0.5, step=0.005, label="A finding is reported at this probability and above"
            )
            number = gr.Slider(1, 2, 1, step=1, label="Slice")
            evidence = gr.Button("Map the evidence of this slice")
            picture = gr.HTML(min_height=200)
            table = gr.HTML()
    start.click(
        on_read,
        [slices, stripped, radiological, *choice.inputs],
        [text, table, threshold, number, picture],
        api_name="read",
        show_progress_on=text,
        **WORK_EVENT,
    )
    for slider in (threshold, number):
        slider.change(
            on_view, [threshold, number], [text, picture], api_name="report_view", **VIEW_EVENT
        )
    evidence.click(on_evidence, [threshold, number], picture, api_name="evidence", **WORK_EVENT)
    stop.click(on_stop, None, None, api_name="report_stop", **VIEW_EVENT)
    tab.select(on_enter, None, choice.name, api_name="report_enter", **VIEW_EVENT)
