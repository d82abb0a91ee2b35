"""The layout of the room of text."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from nirvana.app import text_work
from nirvana.app.page import PROGRESS, VIEW_EVENT, WORK_EVENT, Page
from nirvana.app.sessions import Session
from nirvana.app.tokens_html import tokens_html

ROOM = "text"
PROMPT = "The magnetic resonance images of the brain show"
FROZEN, ADAPTED = "as it is", "adapted to the prompt"
COLOURS = {
    "loss": ("loss of each token", " nat"),
    "gate": ("gate, mean over the layers with a Trigger", ""),
    "step": ("the Trigger's step, mean over its layers", ""),
}
ADAPTED_NOTE = {
    "loss": "scored before the token taught",
    "gate": "after the whole prompt taught",
    "step": "after the whole prompt taught",
}


def text_room(page: Page) -> None:
    """Lays out the room and connects it.

    Args:
        page: what the callbacks share.
    """

    def on_continue(
        request: gr.Request, progress: Any = PROGRESS, *values: Any
    ) -> Iterator[tuple[str, str]]:
        prompt, variants, count, temperature, top_p, seed = values
        written = {FROZEN: "", ADAPTED: ""}
        # The work itself keeps others from the models, token by token.
        with page.session(request) as session:
            for variant in _chosen(variants):
                wanted = text_work.TextRequest(
                    *(prompt, int(count), float(temperature), float(top_p), int(seed or 0)),
                    adapt=variant == ADAPTED,
                )
                watch = page.watch(session, progress)
                for text in text_work.continue_prompt(page.models, wanted, watch):
                    written[variant] = text
                    yield written[FROZEN], written[ADAPTED]
            yield written[FROZEN], written[ADAPTED]

    def on_colour(request: gr.Request, progress: Any = PROGRESS, *values: Any):
        prompt, variants, colour = values
        with page.work(request, progress) as (session, watch):
            session.results[ROOM] = {
                variant: text_work.trace(page.models, prompt, variant == ADAPTED, watch)
                for variant in _chosen(variants)
            }
            return _coloured(session, colour)

    def on_view(request: gr.Request, colour: str):
        with page.session(request) as session:
            return _coloured(session, colour)

    def on_stop(request: gr.Request) -> None:
        with page.session(request) as session:
            session.stop.set()

    with gr.Tab("Text", id="text"), gr.Row():
        with gr.Column(scale=1, min_width=300):
            prompt = gr.Textbox(
                PROMPT, label="Prompt", lines=5, max_lines=12, max_length=text_work.MAX_CHARACTERS
            )
            variants = gr.CheckboxGroup(
                [FROZEN, ADAPTED], value=[FROZEN, ADAPTED], label="The model"
            )
            count = gr.Slider(1, text_work.MAX_NEW_TOKENS, 64, step=1, label="Tokens to write")
            with gr.Row():
                temperature = gr.Number(0.8, label="Temperature", minimum=0, min_width=90)
                top_p = gr.Number(0.95, label="Top-p", minimum=0, maximum=1, min_width=90)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
            with gr.Row():
                start = gr.Button("Continue the text", variant="primary", min_width=110)
                stop = gr.Button("Stop", min_width=80)
            show = gr.Button("Colour the prompt's tokens")
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                frozen = gr.Textbox(
                    label=f"Continuation, the model {FROZEN}", lines=6, interactive=False
                )
                adapted = gr.Textbox(
                    label=f"Continuation, the model {ADAPTED}", lines=6, interactive=False
                )
            colour = gr.Radio(
                [("loss", "loss"), ("gate", "gate"), ("the Trigger's step", "step")],
                value="loss",
                label="Colour the tokens by",
            )
            frozen_tokens, adapted_tokens = gr.HTML(), gr.HTML()
    inputs = [prompt, variants]
    start.click(
        on_continue,
        [*inputs, count, temperature, top_p, seed],
        [frozen, adapted],
        api_name="continue",
        show_progress_on=frozen,
        **WORK_EVENT,
    )
    show.click(
        on_colour,
        [*inputs, colour],
        [frozen_tokens, adapted_tokens],
        api_name="colour",
        **WORK_EVENT,
    )
    colour.change(
        on_view, colour, [frozen_tokens, adapted_tokens], api_name="text_view", **VIEW_EVENT
    )
    stop.click(on_stop, None, None, api_name="text_stop", **VIEW_EVENT)


def _chosen(variants: list[str]) -> list[str]:
    return [each for each in (FROZEN, ADAPTED) if each in variants] or [FROZEN]


def _coloured(session: Session, colour: str) -> tuple[str, str]:
    """The tokens by the model as it is, and adapted; empty where they were not computed."""
    found = session.results.get(ROOM, {})
    title, unit = COLOURS[colour]
    numbers = [each for trace in found.values() for each in getattr(trace, colour)]
    ends = (min(numbers, default=0.0), max(numbers, default=0.0))  # one scale for both
    shown = []
    for variant in (FROZEN, ADAPTED):
        trace = found.get(variant)
        if trace is None:
            shown.append("")
            continue
        note = f", {ADAPTED_NOTE[colour]}" if trace.adapted else ""
        name = f"The model {variant}: {title}{note}"
        shown.append(tokens_html(trace.pieces, getattr(trace, colour), ends, name, unit))
    return shown[0], shown[1]
