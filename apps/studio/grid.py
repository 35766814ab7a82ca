"""A grid of pictures: one prompt, one or two settings that change from column to column and from row to row."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
from PIL import Image

from textcond.apps.errors import one_line
from textcond.apps.metadata import write_png

from . import markup
from .axes import FIELDS, NOTHING, WORDS, cells, example, read_axis
from .draw_tab import DrawTab
from .drawing import Stopped, drawing
from .explore import OPEN_FIRST
from .generate import read
from .grid_view import grid_value, grid_view
from .history import Made
from .shared import DRAWING, MAX_CELLS, MAX_PROMPT, QUIET, Studio, follow_prompt, log
from .sheet import sheet

NUMBERS = "Values are parted by commas; numbers may be ranges: 2-8, or with a step 2-8(2)."
REPLACED = "Of prompt words the first is what the others replace; a comma within one needs quotes."


def grid_tab(studio: Studio, drawn: DrawTab, tab: gr.Tab) -> None:
    """Lay it out in the tab that is open, and wire it; what no side goes through is as on the first tab."""
    engine, settings = studio.engine, drawn.side.settings
    gr.HTML(markup.heading("Grid", "One prompt, the settings of the first tab, and one or two that change."))
    prompt = gr.Textbox(label="Prompt", max_lines=4, max_length=MAX_PROMPT, elem_id="grid-prompt")
    with gr.Row():
        sides = [_side(name, what, studio) for name, what in (("Columns", "steps"), ("Rows", "guidance"))]
    gr.HTML(f'<p class="quiet">{NUMBERS} {REPLACED} At most {MAX_CELLS} pictures.</p>', elem_id="grid-help")
    with gr.Row():
        start = gr.Button("Draw the grid", variant="primary", scale=3, min_width=120, elem_id="grid")
        stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="grid-stop")
    status = gr.HTML(elem_id="grid-status")
    view = grid_view()
    with gr.Row():
        download = gr.DownloadButton(
            "Download as one picture", size="sm", visible=False, scale=0, min_width=200, elem_id="grid-download"
        )
    pictures = gr.State([])
    buttons = [start, stop]

    def key(request: gr.Request) -> str:
        return f"grid-{request.session_hash}"  # what the other tabs do goes on, and is stopped apart

    def lock(request: gr.Request) -> dict:
        studio.prepare(key(request))
        return {start: gr.update(interactive=False), stop: gr.update(interactive=True)}

    def unlock(request: gr.Request) -> dict:
        busy = studio.busy(key(request))
        return {start: gr.update(interactive=not busy), stop: gr.update(interactive=busy)}

    def halt(request: gr.Request) -> None:
        studio.stop(key(request))

    def draw_grid(
        request: gr.Request, visitor: str, text: str, across: str, columns: str, down: str, rows: str, *values: Any
    ) -> Iterator[dict]:
        yield {status: markup.bar(0, "Loading …"), download: gr.update(visible=False)}
        began, history = time.monotonic(), studio.grids(visitor)
        with studio.stoppable(key(request)) as signal:
            try:
                sides = read_axis(across, columns, studio), read_axis(down, rows, studio)
                jobs = cells(replace(read(studio, values), prompt=text or ""), *sides)
                jobs = [engine.retrieved(job) for job in jobs]
                labels = [side.labels() for side in sides]
                made: list[Made] = []
                yield {view: grid_value(*labels, []), pictures: []}
                for event in drawing(engine, jobs, history, signal, studio.line):
                    if isinstance(event, Made):
                        made.append(event)
                        yield {view: grid_value(*labels, [one.path for one in made]), pictures: [*made]}
                    else:
                        yield {status: markup.progress(event, f"Picture {len(made) + 1} of {len(jobs)} · ")}
                path = history.new_folder() / "grid.png"
                write_png(path, sheet([Image.open(one.path) for one in made], *labels), made[0].parameters)
                took = markup.seconds(time.monotonic() - began)
                told = f"{len(made)} pictures in {took}. A click on one uses its settings."
                yield {status: told, download: gr.update(value=path, visible=True)}
            except Stopped:
                yield {status: "Stopped."}
            except Exception as error:
                log(error)
                yield {status: markup.alas(one_line(error))}

    def pick(made: list[Made], visitor: str, event: gr.SelectData) -> dict:
        if event.index not in range(len(made)):
            return {settings.prompt: gr.skip()}
        return drawn.keep(visitor, made[event.index])  # the next grid takes the place of this one

    follow_prompt(tab, settings.prompt, prompt)
    for what, values in sides:
        what.input(
            lambda chosen: gr.update(value=example(chosen, studio), interactive=chosen != NOTHING),
            what, values, queue=False, **QUIET,
        )  # fmt: skip
    boxes = [box for side in sides for box in side]
    asked = gr.on(
        [start.click, prompt.submit, *(values.submit for _, values in sides)], lock, None, buttons, queue=False, **QUIET
    )
    done = asked.then(
        draw_grid,
        [drawn.token, prompt, *boxes, *settings.inputs],
        [status, view, download, pictures],
        **DRAWING,
    )
    done.then(unlock, None, buttons, queue=False, **QUIET)
    stop.click(halt, queue=False, **QUIET)
    view.select(pick, [pictures, drawn.token], drawn.outputs, **QUIET).success(
        None, js=OPEN_FIRST, api_visibility="private"
    )


def _side(name: str, what: str, studio: Studio) -> tuple[gr.Dropdown, gr.Textbox]:
    with gr.Column(min_width=300), gr.Row():
        chosen = gr.Dropdown(
            label=name, choices=[*FIELDS, WORDS, NOTHING], value=what, min_width=150, elem_id=f"grid-{name.lower()}"
        )
        values = gr.Textbox(
            label="Values",
            value=example(what, studio),
            placeholder="red, blue, green",
            max_length=MAX_PROMPT,
            scale=2,
            min_width=160,
            elem_id=f"grid-{name.lower()}-values",
        )
    return chosen, values
