"""The pipeline: which one, where it runs, and what it expects of a text encoder."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Iterator

import gradio as gr

from textcond.apps.engine import Engine
from textcond.apps.errors import one_line
from textcond.apps.loading import DTYPES, devices

from . import markup
from .draw_tab import DrawTab
from .drawing import POLL, Stopped
from .shared import MAX_GUIDANCE, QUIET, Studio, log

AUTOMATIC = "automatic"


def loading(
    engine: Engine, name: str, device: str | None, dtype: str | None, stop: threading.Event
) -> Iterator[tuple[float, str]]:
    """Load another pipeline in a thread of its own: yield (share that is loaded, what comes next).

    Raises:
        Stopped: `stop` was set; the thread ends at the next part, and the present pipeline stays.
        Exception: whatever the loading raised.
    """
    events: queue.SimpleQueue[tuple[float, str] | BaseException | None] = queue.SimpleQueue()

    def on_progress(share: float, what: str) -> None:
        if stop.is_set():
            raise Stopped
        events.put((share, what))

    def work() -> None:
        try:
            engine.load(name, device, dtype, on_progress)
            events.put(None)
        except BaseException as error:  # it is raised again where the events are read
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                event = events.get(timeout=POLL)
            except queue.Empty:
                if stop.is_set():
                    raise Stopped from None
                continue
            if isinstance(event, BaseException):
                raise event
            if event is None:
                return
            yield event
    finally:
        stop.set()


def models_tab(studio: Studio, drawn: DrawTab, tab: gr.Tab) -> None:
    """Lay it out in the tab that is open, and wire it."""
    engine, settings = studio.engine, drawn.side.settings
    present = gr.HTML(elem_id="present")
    with gr.Row(visible=studio.trusted):
        name = gr.Textbox(
            label="Pipeline",
            placeholder="reference, a diffusers folder, or a hub id",
            info="a folder with model_index.json, or OWNER/NAME on the hub; only safetensors are read",
            scale=5,
            min_width=260,
            elem_id="pipeline",
        )
        device = gr.Dropdown(
            label="Device", choices=[AUTOMATIC, *devices()], value=AUTOMATIC, min_width=110, elem_id="device"
        )
        dtype = gr.Dropdown(
            label="Precision", choices=[AUTOMATIC, *DTYPES], value=AUTOMATIC, min_width=110, elem_id="dtype"
        )
    with gr.Row(visible=studio.trusted):
        load = gr.Button("Load", variant="primary", scale=3, min_width=120, elem_id="load")
        cancel = gr.Button("Cancel", interactive=False, scale=1, min_width=80, elem_id="cancel")
    status = gr.HTML(elem_id="load-status")
    contracts = gr.HTML(elem_id="contracts")
    buttons = [load, cancel]

    def key(request: gr.Request) -> str:
        return f"load-{request.session_hash}"  # a drawing of the same page goes on, and is stopped apart

    def lock(request: gr.Request) -> dict:
        studio.prepare(key(request))
        return {load: gr.update(interactive=False), cancel: gr.update(interactive=True)}

    def unlock() -> dict:
        return {load: gr.update(interactive=True), cancel: gr.update(interactive=False)}

    def halt(request: gr.Request) -> None:
        studio.stop(key(request))

    def load_pipeline(request: gr.Request, wanted: str, where: str, precision: str) -> Iterator[dict]:
        yield {status: markup.bar(0, "Loading …")}
        with studio.stoppable(key(request)) as signal:
            try:
                if not studio.trusted:
                    raise ValueError("the model is chosen by who runs this server")
                before = engine.name
                chosen = [None if value == AUTOMATIC else value for value in (where, precision)]
                for share, what in loading(engine, wanted.strip() or engine.name, *chosen, signal):
                    yield {status: markup.bar(share, f"Loading: {what}")}
                values = {status: "Loaded."} | described()
                if engine.name != before:
                    guidance = min(MAX_GUIDANCE, max(1.0, engine.guidance))
                    values |= settings.encoders(studio) | {settings.guidance: guidance}
                yield values
            except Stopped:
                yield {status: markup.plain(f"Cancelled: {engine.name} stays.")}
            except Exception as error:
                log(error)
                yield {status: markup.alas(one_line(error))}

    def described() -> dict:
        if not engine.ready:
            return {present: markup.heading(engine.name, "is being loaded"), contracts: ""}
        told = "".join(f"<pre>{html.escape(str(contract))}</pre>" for contract in engine.contracts())
        return {
            present: markup.heading(engine.name, engine.place),
            contracts: f"<h2>What the pipeline expects of a text encoder</h2>{told}",
        }

    asked = gr.on([load.click, name.submit], lock, None, buttons, queue=False, **QUIET)
    done = asked.then(
        load_pipeline,
        [name, device, dtype],
        [status, present, contracts, settings.encoder, settings.guidance],
        concurrency_limit=2,
        **QUIET,
    )
    done.then(unlock, None, buttons, queue=False, **QUIET)
    cancel.click(halt, queue=False, **QUIET)
    tab.select(described, None, [present, contracts], **QUIET)
