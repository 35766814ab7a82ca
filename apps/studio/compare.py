"""Encoders side by side: one prompt, one seed, and what each encoder makes of them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from textcond.apps.engine import Read
from textcond.apps.errors import one_line

from . import markup
from .draw_tab import DrawTab
from .drawing import Stopped, drawing
from .find import caption, thumbnail
from .generate import read
from .history import Made
from .shared import DRAWING, MAX_PROMPT, QUIET, Studio, follow_prompt, log

MOST = 4
NEIGHBOURS = 6


def compare_tab(studio: Studio, drawn: DrawTab, tab: gr.Tab) -> None:
    """Lay it out in the tab that is open, and wire it; what is not asked here is as on the first tab."""
    engine, settings = studio.engine, drawn.side.settings
    gr.HTML(markup.heading("Encoders side by side", "One prompt, one seed, and the settings of the first tab."))
    with gr.Row(elem_id="compare-ask"):
        prompt = gr.Textbox(
            label="Prompt", max_lines=4, max_length=MAX_PROMPT, scale=5, min_width=260, elem_id="compare-prompt"
        )
        names = gr.Dropdown(
            label="Text encoders",
            info=f"two to {MOST}",
            choices=studio.offered,
            value=studio.offered[:2],
            multiselect=True,
            max_choices=MOST,
            allow_custom_value=studio.trusted,
            scale=4,
            min_width=240,
            elem_id="compare-encoders",
        )
    with gr.Row():
        start = gr.Button("Compare", variant="primary", scale=3, min_width=120, elem_id="compare")
        stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="compare-stop")
    status = gr.HTML(elem_id="compare-status")
    pictures, texts = gr.State([]), gr.State([])
    with gr.Column(visible=False) as results:
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                slider = gr.ImageSlider(
                    show_label=False,
                    type="filepath",
                    format="png",
                    interactive=False,
                    height=420,
                    max_height=418,  # without the border, or the two pictures lie shifted against each other
                    buttons=["fullscreen"],
                    elem_id="ab",
                )
                with gr.Row():
                    left = gr.Dropdown(label="Left", min_width=120, elem_id="ab-left")
                    right = gr.Dropdown(label="Right", min_width=120, elem_id="ab-right")
            with gr.Column(scale=4, min_width=320):
                table = gr.HTML(elem_id="why")
        sides = [
            (
                gr.HTML(visible=False),
                gr.Gallery(
                    show_label=False,
                    columns=NEIGHBOURS,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=False,
                    elem_classes="tiles",
                ),
            )
            for _ in range(MOST)
        ]
    buttons = [start, stop]

    def key(request: gr.Request) -> str:
        return f"compare-{request.session_hash}"  # what the other tabs do goes on, and is stopped apart

    def lock(request: gr.Request) -> dict:
        studio.prepare(key(request))
        return {start: gr.update(interactive=False), stop: gr.update(interactive=True)}

    def unlock(request: gr.Request) -> dict:
        busy = studio.busy(key(request))
        return {start: gr.update(interactive=not busy), stop: gr.update(interactive=busy)}

    def halt(request: gr.Request) -> None:
        studio.stop(key(request))

    def draw_all(request: gr.Request, visitor: str, text: str, encoders: list[str], *values: Any) -> Iterator[dict]:
        yield {status: markup.bar(0, "Loading …"), results: gr.update(visible=False)}
        with studio.stoppable(key(request)) as signal:
            try:
                chosen = list(dict.fromkeys(encoders or []))
                if not 2 <= len(chosen) <= MOST:
                    raise ValueError(f"{len(chosen)} encoders are chosen: choose two to {MOST}")
                first = replace(read(studio, values), prompt=text or "")
                reads = []
                for name in chosen:
                    if signal.is_set():
                        raise Stopped
                    reads.append(engine.read(first.prompt, name))
                made: list[Made] = []
                jobs = [engine.retrieved(replace(first, encoder=name)) for name in chosen]
                for event in drawing(engine, jobs, studio.history(visitor), signal, studio.line):
                    if isinstance(event, Made):
                        made.append(event)
                    else:
                        what = f"{chosen[len(made)]} · " if len(made) < len(chosen) else ""
                        yield {status: markup.progress(event, what)}
                yield {status: markup.bar(1, "Looking for neighbours …")}
                named = [(short(name), name) for name in chosen]
                values_out: dict[Any, Any] = {
                    status: markup.made(made[0].parameters),
                    results: gr.update(visible=True),
                    pictures: made,
                    slider: (made[0].path, made[1].path),
                    left: gr.update(choices=named, value=chosen[0]),
                    right: gr.update(choices=named, value=chosen[1]),
                    table: why(chosen, reads),
                }
                found: list[list[str]] = []
                for (head, gallery), name in zip(sides, [*chosen, *[None] * MOST]):
                    values_out[head] = gr.update(visible=name is not None)
                    values_out[gallery] = gr.update(visible=name is not None)
                    if name is not None:
                        hits = engine.finder(name).search(text, NEIGHBOURS) if text.strip() else []
                        tiles = [(thumbnail(hit, studio.rows), caption(hit, "dense")) for hit in hits]
                        values_out[head] = gr.update(
                            value=markup.heading(short(name), "nearest prompts; a click makes one the prompt"),
                            visible=True,
                        )
                        values_out[gallery] = gr.update(value=tiles, selected_index=None, visible=True)
                        found.append([hit.text for hit in hits])
                yield values_out | {texts: found}
            except Stopped:
                yield {status: "Stopped."}
            except Exception as error:
                log(error)
                yield {status: markup.alas(one_line(error))}

    def taking(number: int) -> Callable[..., str]:
        def take(found: list[list[str]], event: gr.SelectData) -> str:
            return found[number][event.index]

        return take

    def slide(made: list[Made], one: str, other: str) -> tuple | None:
        paths = {item.parameters.encoder: item.path for item in made}
        return (paths[one], paths[other]) if {one, other} <= paths.keys() else None

    def offer(chosen: list[str]) -> dict:
        fitting = [name for name in chosen or [] if studio.takes(name)]
        return gr.update(choices=studio.offered, value=fitting or studio.offered[:2])

    follow_prompt(tab, settings.prompt, prompt)
    tab.select(offer, names, names, queue=False, **QUIET)
    asked = gr.on([start.click, prompt.submit], lock, None, buttons, queue=False, **QUIET)
    outputs = [status, results, pictures, texts, slider, left, right, table]
    outputs += [part for side in sides for part in side]
    done = asked.then(draw_all, [drawn.token, prompt, names, *settings.inputs], outputs, **DRAWING)
    done.then(unlock, None, buttons, queue=False, **QUIET)
    stop.click(halt, queue=False, **QUIET)
    for number, (_, gallery) in enumerate(sides):
        gallery.select(taking(number), texts, prompt, queue=False, **QUIET)
    gr.on([left.input, right.input], slide, [pictures, left, right], slider, queue=False, **QUIET)


def short(name: str) -> str:
    """The end of an encoder's path, or its hub id: enough to tell it from the others."""
    return "/".join(Path(name).parts[-2:])


def why(names: list[str], reads: list[Read]) -> str:
    """A table of how the encoders differ: what they read, how alike their conditionings are, how long they take."""
    rows = []
    for name, one in zip(map(short, names), reads):
        tokens = f"{one.limit:,} of {one.tokens:,}" if one.tokens > one.limit else f"{one.tokens:,}"
        cosines = "".join(f"<td>{one.cosine(other):.2f}</td>" for other in reads)
        rows.append(
            f"<tr><th>{html.escape(name)}</th><td>{tokens}</td><td>{1000 * one.seconds:.0f} ms</td>{cosines}</tr>"
        )
    heads = "".join(f"<th>{html.escape(short(name))}</th>" for name in names)
    note = "The last columns: cosine between the mean tokens that the denoiser gets. 1 is the same direction."
    return (
        f"<table><thead><tr><th></th><th>tokens read</th><th>encoding</th>{heads}</tr></thead>"
        f'<tbody>{"".join(rows)}</tbody></table><p class="quiet">{note}</p>'
    )
