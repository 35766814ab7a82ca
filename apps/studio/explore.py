"""Explore: a map of the index to move and zoom, where prompts that mean much the same lie together."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from textcond.apps.errors import one_line

from . import markup
from .draw_tab import DrawTab
from .drawing import Stopped
from .find import Found, shown, thumbnail
from .map_view import map_view
from .maps import IndexMap, Maps, Progress
from .shared import MAX_PROMPT, QUIET, Studio, follow_prompt, log

NEIGHBOURS = 6
MOST_ROWS = 100
HINT = "Drag moves it, the wheel or two fingers zoom; a click on a dot shows its picture."
NOTHING = markup.heading("No prompt is chosen", "Click a dot, or one of the prompts below.")
OPEN_FIRST = (
    "() => { document.querySelector('#tabs button[role=tab]').click();"
    "document.querySelector('#prompt').scrollIntoView({behavior: 'smooth', block: 'nearest'}) }"
)


def explore_tab(studio: Studio, drawn: DrawTab, tab: gr.Tab) -> None:
    """Lay it out in the tab that is open, and wire it; prompt and encoder are those of the first tab."""
    engine, side = studio.engine, drawn.side
    settings = side.settings
    maps = Maps(studio.folder / "maps")

    def points(key: Any) -> dict[str, Any] | None:
        known = maps.ready.get(str(key))
        return known.packed() if known else None

    def rows(wanted: Any) -> dict[str, dict[str, str]]:
        """Texts and picture files of rows, by number: `[key, numbers]` comes from the page, or from anyone."""
        match wanted:
            case [str(key), [*numbers]] if known := maps.ready.get(key):
                numbers = [number for number in numbers[:MOST_ROWS] if has(known, number)]
                found = zip(numbers, known.rows(numbers))
                return {
                    str(number): {"text": hit.text, "path": str(thumbnail(hit, studio.rows))}
                    for number, hit in found
                    if hit is not None
                }
        return {}

    gr.HTML(markup.heading("Explore the index", "Prompts that this encoder finds alike lie close together."))
    with gr.Row():
        with gr.Column(scale=7, min_width=320):
            prompt = gr.Textbox(
                label="Your prompt",
                placeholder="its place on the map",
                max_lines=3,
                max_length=MAX_PROMPT,
                elem_id="explore-prompt",
            )
            with gr.Row(elem_id="explore-bar"):
                status = gr.HTML(elem_id="explore-status")
                cancel = gr.Button("Cancel", size="sm", visible=False, min_width=80, scale=0, elem_id="explore-cancel")
            view = map_view(points, rows)
        with gr.Column(scale=4, min_width=280):
            picture = gr.Image(
                show_label=False,
                type="filepath",
                format="png",
                interactive=False,
                height=220,
                buttons=["fullscreen"],
                visible=False,
                elem_id="explore-picture",
            )
            card = gr.HTML(NOTHING, elem_id="explore-card")
            use = gr.Button("Use this prompt", variant="primary", visible=False, elem_id="explore-use")
            near_head = gr.HTML(elem_id="explore-head")
            gallery = gr.Gallery(
                show_label=False,
                columns=3,
                height="auto",
                object_fit="contain",
                allow_preview=False,
                interactive=False,
                buttons=[],
                visible=False,
                elem_id="explore-near",
                elem_classes="tiles",
            )
    opened, found, chosen = gr.State(""), gr.State([]), gr.State(None)

    def key_of(request: gr.Request) -> str:
        return f"map-{request.session_hash}"  # a drawing of the same page goes on, and is stopped apart

    def begin(request: gr.Request) -> None:
        studio.prepare(key_of(request))

    def cancel_map(request: gr.Request) -> None:
        studio.stop(key_of(request))

    def open_map(request: gr.Request, encoder: str) -> Iterator[dict]:
        yield {status: markup.bar(0, "Reading the index …")}
        with studio.stoppable(key_of(request)) as signal:
            try:
                for event in maps.follow(engine.finder(encoder), signal):
                    if isinstance(event, Progress):
                        yield {status: told(event), cancel: gr.update(visible=True)}
                    else:
                        yield {
                            view: gr.HTML(value=event.key, picked=-1, near={}),
                            opened: event.key,
                            status: f"{len(event.ids):,} prompts. {HINT}",
                            cancel: gr.update(visible=False),
                        }
            except Stopped:
                yield {status: "Cancelled: open the tab again for the map.", cancel: gr.update(visible=False)}
            except Exception as error:
                log(error)
                yield {status: markup.alas(one_line(error)), cancel: gr.update(visible=False)}

    def place(key: str, text: str, encoder: str) -> dict:
        known = maps.ready.get(key)
        if known is None:
            return {near_head: gr.skip()}
        if not text.strip():
            return {view: gr.HTML(prompt={}, near={}), near_head: "", gallery: gr.update(visible=False), found: []}
        try:
            hits = engine.finder(encoder).search(text, NEIGHBOURS)
        except Exception as error:
            log(error)
            return {near_head: markup.heading("Nearest prompts", one_line(error), alas=True)}
        at, numbers = known.place(hits)
        where = {} if at is None else {"key": key, "at": at}
        return {
            view: gr.HTML(prompt=where, near=where and where | {"rows": numbers}),
            near_head: markup.heading("Nearest to your prompt", "It lies where most of them do, the nearer the more."),
        } | tiles(hits)

    def tiles(hits: list) -> dict:
        pictures, found_rows = shown(hits, studio.rows, "dense")
        return {gallery: gr.update(value=pictures, visible=True), found: found_rows}

    def pick_dot(key: str, encoder: str, event: gr.SelectData) -> dict:
        known = maps.ready.get(key)
        if known is None or event.value != key or not has(known, event.index):
            return {card: gr.skip()}
        return pick(known, event.index, encoder)

    def pick_tile(key: str, encoder: str, near: list[Found], event: gr.SelectData) -> dict:
        known = maps.ready.get(key)
        number = known and known.places.get(near[event.index].id)
        return {card: gr.skip()} if number is None else pick(known, number, encoder)

    def pick(known: IndexMap, number: int, encoder: str) -> dict:
        (hit,) = known.rows([number])
        if hit is None:
            return {
                card: markup.heading("That prompt is gone", "The index was changed: open the tab again.", alas=True)
            }
        try:
            hits = engine.finder(encoder).similar(hit.id, NEIGHBOURS)
        except Exception as error:
            log(error)
            return {near_head: markup.heading("Nearest prompts", one_line(error), alas=True)}
        near = {"key": known.key, "at": known.points[number].tolist(), "rows": known.place(hits)[1]}
        return {
            view: gr.HTML(picked=number, near=near),
            picture: gr.update(value=thumbnail(hit, studio.rows), visible=True),
            card: described(hit.text, hit.metadata),
            use: gr.update(visible=True),
            chosen: Found(hit.id, hit.text, hit.metadata),
            near_head: markup.heading("Nearest to it", "By the same encoder."),
        } | tiles(hits)

    def use_it(row: Found | None) -> dict:
        return {settings.prompt: gr.skip()} if row is None else side.use(row.text, row.metadata)

    placed = [view, near_head, gallery, found]
    picked = [*placed, picture, card, use, chosen]
    begun = follow_prompt(tab, settings.prompt, prompt).then(begin, queue=False, **QUIET)
    shown_map = begun.then(
        open_map, settings.encoder, [view, opened, status, cancel], concurrency_limit=80, concurrency_id="map", **QUIET
    )
    shown_map.then(place, [opened, prompt, settings.encoder], placed, **QUIET)
    prompt.change(
        place, [opened, prompt, settings.encoder], placed, concurrency_limit=4, trigger_mode="always_last", **QUIET
    )
    cancel.click(cancel_map, queue=False, **QUIET)
    view.select(pick_dot, [opened, settings.encoder], picked, **QUIET)
    gallery.select(pick_tile, [opened, settings.encoder, found], picked, **QUIET)
    use.click(use_it, chosen, [settings.prompt, settings.negative, settings.seed, side.fresh], **QUIET).then(
        None, js=OPEN_FIRST, api_visibility="private"
    )


def has(known: IndexMap, number: Any) -> bool:
    """Whether that is the number of a row: a page may send anything."""
    return isinstance(number, int) and 0 <= number < len(known.ids)


def told(progress: Progress) -> str:
    """A bar with what is done now and how long it takes."""
    left = "" if progress.seconds is None else f" · {markup.seconds(progress.seconds)} left"
    return markup.bar(progress.share, f"Drawing the map, the first time only. {progress.what}{left}")


def described(text: str, metadata: dict[str, Any]) -> str:
    """A row's text and its metadata."""
    said = {name: value for name, value in metadata.items() if isinstance(value, str | int | float) and value != ""}
    rows = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd><bdi>{html.escape(str(value))}</bdi></dd>"
        for name, value in said.items()
    )
    return f'<p class="text"><bdi>{html.escape(text)}</bdi></p><dl>{rows}</dl>'
