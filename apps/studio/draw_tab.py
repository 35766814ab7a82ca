"""Generate | Find, side by side, and what happens between them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from textcond.apps.errors import one_line
from textcond.apps.generation import prompt_length
from textcond.apps.metadata import Parameters, read_parameters, usual_encoder

from . import markup
from .drawing import Stopped, drawing
from .find import APPEND, NEIGHBOURS, SIMILAR, TITLE, appended, find_side, shown, told
from .generate import Generate, generate_side, read, several, unsaid
from .history import Made
from .links import link, read_link
from .pictures import check_picture
from .shared import DRAWING, QUIET, SEEDS, Studio, log
from .snippet import snippet
from .stars import SCRIPT, STAR

SHOW_PROMPT = "() => document.querySelector('#prompt').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
# A State keeps to the server; a token and the address are what the browser has.
OPENED = "(token, _) => [token, location.hash.slice(1)]"
ADDRESS = "(link) => { history.replaceState(null, '', link ? '#' + link : location.pathname) }"


@dataclass
class DrawTab:
    """What other tabs may use.

    Attributes:
        side: the settings on the left.
        token: of the visitor's history.
        keep, outputs: what takes a picture into the history of the visitor with that token, and shows it with its
            settings; and the components that it changes.
    """

    side: Generate
    token: gr.BrowserState
    keep: Callable[[str, Made], dict]
    outputs: list[Any]


def draw_tab(studio: Studio, page: gr.Blocks) -> DrawTab:
    """Lay it out in the tab that is open, and wire it."""
    engine = studio.engine
    token = gr.BrowserState("", storage_key="textcond-studio", secret="textcond-studio")
    address = gr.Textbox(visible="hidden", elem_id="address")
    star = gr.Textbox(visible="hidden", elem_id="star")
    made, current = gr.State([]), gr.State(None)
    present = gr.HTML(elem_id="loaded")
    with gr.Row(elem_id="draw"):
        with gr.Column(scale=7, min_width=320):
            side = generate_side(studio)
        with gr.Column(scale=5, min_width=320):
            found = find_side()
    settings = side.settings
    buttons = [side.generate, side.surprise, side.stop]
    with_picture = [side.similar, side.save]

    def find(text: str, chosen: str, mode: str) -> Iterator[dict]:
        loaded = {present: markup.loaded(engine.name, engine.place)}
        if not studio.takes(chosen):  # another page has loaded a pipeline that it does not fit
            chosen = usual_encoder(engine.name)
            loaded |= settings.encoders(studio)
        try:
            if not engine.can_find(chosen):
                yield loaded | {found.head: markup.heading(TITLE, "Reading the prompts with this encoder …")}
            finder = engine.finder(chosen)
            if text.strip():
                tiles, rows = shown(finder.search(text, NEIGHBOURS, mode), studio.rows, mode)
                line = told(finder, mode)
            else:
                tiles, rows = shown(finder.sample(NEIGHBOURS), studio.rows, None)
                line = f"{len(finder):,} are here: click one, or write your own."
            yield loaded | {
                found.gallery: gr.update(value=tiles, selected_index=None),
                found.rows: rows,
                found.head: markup.heading(TITLE, line),
                side.length: markup.length(prompt_length(finder.encoder.tokenizer, text)),
            }
        except Exception as error:
            log(error)
            failed = markup.heading(TITLE, one_line(error), alas=True)
            yield loaded | {found.gallery: [], found.rows: [], found.head: failed, side.length: ""}

    def click(rows: list, how: str, text: str, chosen: str, event: gr.SelectData) -> dict:
        row = rows[event.index]
        if how == SIMILAR:
            hits = engine.finder(chosen).similar(row.id, NEIGHBOURS)
            return similar_rows(hits, f"Similar to “{row.text[:60]}”.")
        if how == APPEND:
            return {settings.prompt: appended(text, row.text)}
        return side.use(row.text, row.metadata)

    def similar_rows(hits: list, line: str) -> dict:
        tiles, rows = shown(hits, studio.rows, "dense")
        tiles = gr.update(value=tiles, selected_index=None)
        return {found.gallery: tiles, found.rows: rows, found.head: markup.heading("Similar", line)}

    def similar_to_made(picture: Made | None, chosen: str) -> dict:
        if picture is None:
            return {found.head: markup.heading(TITLE, "Make a picture first.")}
        try:
            with Image.open(picture.path) as image:
                hits, by = engine.finder(chosen).like(image, picture.parameters.prompt, NEIGHBOURS)
            return similar_rows(hits, f"To the picture, by {by}.")
        except Exception as error:
            log(error)
            return {found.head: markup.heading(TITLE, one_line(error), alas=True)}

    def lock(request: gr.Request) -> dict:
        studio.prepare(request.session_hash)
        return {button: gr.update(interactive=button is side.stop) for button in buttons}

    def unlock(request: gr.Request) -> dict:
        busy = studio.busy(request.session_hash)  # with what was asked for meanwhile
        return {button: gr.update(interactive=(button is side.stop) == busy) for button in buttons}

    def halt(request: gr.Request) -> None:
        studio.stop(request.session_hash)  # the drawing tells when it has stopped

    def show_made(pictures: list[Made]) -> dict:
        tiles = [(item.path, STAR * item.favourite + told_of(item.parameters)) for item in pictures]
        return {
            made: pictures,
            side.made_head: gr.update(visible=bool(pictures)),
            side.history: gr.update(value=tiles, selected_index=None, visible=bool(pictures)),
        }

    def toggle_star(visitor: str, name: str) -> dict:
        if not name:
            return {star: gr.skip()}
        history = studio.history(visitor)
        try:
            history.star(name)
        except ValueError as error:
            return {star: "", side.status: markup.alas(one_line(error))}
        return {star: ""} | show_made(history.pictures())

    def show_current(picture: Made, took: float | None = None) -> dict:
        values = {
            current: picture,
            side.picture: picture.path,
            side.status: markup.made(picture.parameters, took),
            side.code: snippet(picture.parameters),
            side.used: markup.used(picture.parameters),
            address: link(picture.parameters),
        }
        mixed = picture.parameters.retrieval.get("mode") in ("expand", "blend")
        values |= {side.without: gr.update(interactive=mixed), side.slider: gr.update(visible=False)}
        return values | {button: gr.update(interactive=True) for button in with_picture}

    def run(
        request: gr.Request, visitor: str, another: bool, count: int, last: Made | None, *values: Any
    ) -> Iterator[dict]:
        began, pictures = time.monotonic(), []
        history = studio.history(visitor)
        yield {
            side.status: markup.bar(0, "Drawing …" if engine.ready else "Loading the model, the first time only …"),
            token: history.token,
        }
        with studio.stoppable(request.session_hash) as signal:
            try:
                first = read(studio, values, secrets.randbelow(SEEDS) if another else None)
                first = engine.retrieved(first)
                yield {side.used: markup.used(first)}
                jobs = several(first, int(count))
                for event in drawing(engine, jobs, history, signal, studio.line):
                    if isinstance(event, Made):
                        pictures.append(event)
                        took, began = time.monotonic() - began, time.monotonic()
                        yield (
                            show_current(event, took)
                            | {settings.seed: event.parameters.seed, token: history.token}
                            | show_made(history.pictures())
                        )
                        continue
                    what = f"Picture {len(pictures) + 1} of {len(jobs)} · " if len(jobs) > 1 else ""
                    preview = getattr(event, "preview", None)
                    yield {side.status: markup.progress(event, what)} | ({side.picture: preview} if preview else {})
            except Stopped:
                back = pictures[-1] if pictures else last
                yield {side.status: "Stopped.", side.picture: back.path if back else None}
            except Exception as error:
                log(error)
                back = pictures[-1] if pictures else last
                yield {side.status: markup.alas(one_line(error)), side.picture: back.path if back else None}
                raise gr.Error(one_line(error), duration=None, print_exception=False) from error

    def draw_without(request: gr.Request, visitor: str, picture: Made) -> Iterator[dict]:
        was = picture.parameters
        plain = replace(was, prompt=was.retrieval.get("prompt", was.prompt), retrieval={})
        history = studio.history(visitor)
        with studio.stoppable(request.session_hash) as signal:
            try:
                for event in drawing(engine, [plain], history, signal, studio.line):
                    if isinstance(event, Made):
                        slider = gr.update(value=(picture.path, event.path), visible=True)
                        yield {side.slider: slider, side.status: markup.made(was)} | show_made(history.pictures())
                    else:
                        yield {side.status: markup.progress(event, "Without them · ")}
            except Stopped:
                yield {side.status: "Stopped."}
            except Exception as error:
                log(error)
                yield {side.status: markup.alas(one_line(error))}

    def restore(pictures: list[Made], event: gr.SelectData) -> dict:
        return bring_back(pictures[event.index])

    def keep(visitor: str, picture: Made) -> dict:
        history = studio.history(visitor)
        kept = history.adopt(picture)
        return {token: history.token} | bring_back(kept) | show_made(history.pictures())

    def bring_back(picture: Made) -> dict:
        return show_current(picture) | settings.show(picture.parameters, studio) | {side.fresh: False}

    def open_picture(path: str | None, chosen: str) -> dict:
        """Settings of a picture that was made here or by a web UI; any other picture becomes a query."""
        if path is None:
            return {side.status: gr.skip()}
        try:
            check_picture(Path(path))
            try:
                parameters = read_parameters(path)
            except ValueError:
                finder = engine.finder(chosen)
                if not finder.sees:
                    raise
                with Image.open(path) as image:
                    return similar_rows(finder.like(image, "", NEIGHBOURS)[0], "To the picture that you opened.")
            values = settings.show(parameters, studio) | {side.fresh: False}
            told = f"Settings restored: {Path(path).name}"
            if parameters.pipeline != engine.name:
                told += f", which {parameters.pipeline} made; {engine.name} is loaded"
            if changed := unsaid(parameters, studio):
                told += f". Changed: {changed}"
            return values | {side.status: markup.plain(told)}
        except Exception as error:
            reason = one_line(error).replace(str(path), Path(path).name)
            return {side.status: markup.alas(reason)}

    def save(picture: Made | None) -> dict:
        try:
            if not studio.trusted:
                raise ValueError("only who runs this server writes into its index")
            count = engine.save(picture.path, picture.parameters)
            return {side.status: f"Saved: the index holds {count:,} prompts."}
        except Exception as error:
            log(error)
            return {side.status: markup.alas(one_line(error))}

    def random_prompt() -> str:
        try:
            return engine.finder().sample(1)[0].text
        except Exception as error:
            log(error)
            raise gr.Error(one_line(error), print_exception=False) from error

    def opened(visitor: str, wanted: str) -> dict:
        history = studio.history(visitor)
        pictures = history.pictures()
        values: dict[Any, Any] = {token: history.token} | show_made(pictures) | settings.encoders(studio)
        try:
            parameters = read_link(wanted, usual_encoder(engine.name))
        except ValueError as error:
            return values | {side.status: markup.alas(one_line(error))}
        if parameters is None:
            return values
        same = next((one for one in pictures if link(one.parameters) == wanted), None)
        if same:  # it knows a prompt that is too long for a link, too
            return values | bring_back(same)
        return values | settings.show(parameters, studio) | {side.fresh: False}

    finding: dict[str, Any] = {
        "fn": find,
        "inputs": [settings.prompt, settings.encoder, found.mode],
        "outputs": [found.gallery, found.rows, found.head, side.length, settings.encoder, present],
        "concurrency_limit": 4,
        "trigger_mode": "always_last",
        **QUIET,
    }
    row_outputs = [found.gallery, found.rows, found.head]
    current_outputs = [
        current, side.picture, side.status, side.code, side.used, address, side.without, side.slider, *with_picture
    ]  # fmt: skip
    made_outputs = [made, side.made_head, side.history]
    restored = [*settings.inputs, side.fresh]

    page.load(
        opened, [token, address], list(dict.fromkeys([token, *made_outputs, *current_outputs, *restored])),
        js=OPENED, queue=False, **QUIET,
    )  # fmt: skip
    gr.on([page.load, settings.prompt.change, settings.encoder.change, found.mode.change], **finding)
    found.gallery.select(
        click,
        [found.rows, found.click, settings.prompt, settings.encoder],
        [settings.prompt, settings.negative, settings.seed, side.fresh, *row_outputs],
        **QUIET,
    ).then(None, js=SHOW_PROMPT, api_visibility="private")
    drawn = {
        "fn": run,
        "inputs": [token, side.fresh, side.count, current, *settings.inputs],
        "outputs": [token, settings.seed, *current_outputs, *made_outputs],
        **DRAWING,
    }
    asked = gr.on([side.generate.click, settings.prompt.submit], lock, None, buttons, queue=False, **QUIET)
    chance = side.surprise.click(lock, None, buttons, queue=False, **QUIET).then(
        random_prompt, None, settings.prompt, **QUIET
    )
    chance.failure(unlock, None, buttons, queue=False, **QUIET)
    for ended in (asked.then(**drawn), chance.success(**drawn)):
        ended.success(unlock, None, buttons, queue=False, **QUIET)
        ended.failure(unlock, None, buttons, queue=False, **QUIET)
    plain = side.without.click(lock, None, buttons, queue=False, **QUIET).then(
        draw_without, [token, current], [side.slider, side.status, *made_outputs], **DRAWING
    )
    plain.then(unlock, None, buttons, queue=False, **QUIET)
    side.stop.click(halt, queue=False, **QUIET)
    side.reuse.click(lambda: False, None, side.fresh, queue=False, **QUIET)
    side.similar.click(similar_to_made, [current, settings.encoder], row_outputs, **QUIET)
    side.save.click(save, current, side.status, concurrency_limit=1, **QUIET)
    side.restore.upload(
        open_picture, [side.restore, settings.encoder], [side.status, *restored, *row_outputs], **QUIET
    ).then(None, js=SHOW_PROMPT, api_visibility="private")
    outputs = list(dict.fromkeys([*current_outputs, *restored]))
    side.history.select(restore, made, outputs, **QUIET).then(None, js=SHOW_PROMPT, api_visibility="private")
    star.change(toggle_star, [token, star], [star, side.status, *made_outputs], queue=False, **QUIET)
    page.load(None, js=SCRIPT, api_visibility="private")
    address.change(None, address, None, js=ADDRESS, api_visibility="private")
    return DrawTab(side, token, keep, [token, *outputs, *made_outputs])


def told_of(parameters: Parameters) -> str:
    """What stands below a picture of the history."""
    return f"{parameters.prompt or '(empty prompt)'} · {parameters.seed}"
