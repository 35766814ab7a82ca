"""The studio: a prompt is drawn on the left, and what the same encoder finds for it stands on the right."""

from __future__ import annotations

import errno
import html
import os
import queue
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from PIL import Image

from .engine import Engine
from .errors import debugging, one_line
from .generation import REFERENCE_GUIDANCE, PromptLength, prompt_length
from .loading import find_pipeline
from .metadata import NATIVE, REFERENCE, Parameters, write_png
from .quiet import quiet_libraries
from .theme import CSS, THEME

if TYPE_CHECKING:
    from textcond import Hit

FIRST_PORT, LAST_PORT = 7860, 7959
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SEEDS = 2**32
MAX_PROMPT, MAX_STEPS, MAX_GUIDANCE = 100_000, 60, 15.0
OTHER_GUIDANCE = 7.0
NEIGHBOURS, HISTORY = 12, 24
TILE = (214, 211, 209)

SHOW_PROMPT = "() => document.querySelector('#prompt').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
HEAD = """<div id="head"><h1>text<i>cond</i> studio</h1>
<p>One encoder conditions the picture and finds the prompts beside it.</p></div>"""


class Stopped(Exception):
    """The person pressed Stop, or left."""


@dataclass(frozen=True)
class Made:
    """A picture of this session and what made it."""

    path: Path
    parameters: Parameters


@dataclass(frozen=True)
class Step:
    """One denoising step is done; `preview` is a picture file now and then."""

    done: int
    total: int
    preview: Path | None


def drawing(engine: Engine, parameters: Parameters, folder: Path, stop: threading.Event) -> Iterator[Step | Made]:
    """Draw in a thread of its own: yield each step, then the picture. The files lie in a new folder in `folder`.

    Raises:
        Stopped: `stop` was set.
        Exception: whatever the drawing raised.
    """
    events: queue.SimpleQueue[Step | Made | BaseException] = queue.SimpleQueue()
    place = folder / secrets.token_hex(8)
    place.mkdir()

    def on_step(done: int, total: int, preview: Callable[[], Image.Image | None]) -> None:
        if stop.is_set():
            raise Stopped
        path = None
        if done % 2 == 0 and done < total and (image := preview()) is not None:
            path = place / f"step-{done}.png"
            image.save(path)
        events.put(Step(done, total, path))

    def work() -> None:
        try:
            image, made = engine.draw(parameters, on_step)
            name = re.sub(r"[^a-z0-9]+", "-", parameters.prompt[:40].lower()).strip("-") or "picture"
            path = place / f"{name}-{parameters.seed}.png"
            write_png(path, image, made)
            events.put(Made(path, made))
        except BaseException as error:  # it is raised again where the events are read
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                event = events.get(timeout=0.2)
            except queue.Empty:
                if stop.is_set():  # while a model is being loaded, say; the thread ends at its first step
                    raise Stopped from None
                continue
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Made):
                return
    finally:
        stop.set()


def thumbnail(row: Hit, folder: Path) -> Path:
    """The file of a row's picture, written into `folder` when it is first shown; a plain tile for a row without one."""
    path = folder / f"row-{row.id}.png"
    if not path.exists():
        partial = path.with_suffix(f".{secrets.token_hex(4)}")
        (row.image or Image.new("RGB", (8, 8), TILE)).save(partial, "PNG")
        partial.replace(path)
    return path


def nearby_encoders(folder: Path) -> list[str]:
    """Conditioning encoders in `folder` and two levels below, as paths from it."""
    found = []
    for config in sorted(chain(folder.glob("*/config.json"), folder.glob("*/*/config.json"))):
        try:
            if '"ConditioningEncoder' in config.read_text(encoding="utf-8"):
                found.append(str(config.parent.relative_to(folder)))
        except (OSError, UnicodeDecodeError):
            continue
    return found


def build(engine: Engine, folder: Path, *, encoders: list[str], typed_encoders: bool) -> gr.Blocks:
    """The page.

    Args:
        engine: draws and finds.
        folder: takes the pictures made here.
        encoders: offered beside the pipeline's own.
        typed_encoders: whether any folder or hub id may be typed, which lets a visitor load models.
    """
    gr.set_static_paths(folder)  # served from where they are, metadata and all, and not copied
    stops: dict[str, threading.Event] = {}
    usual_guidance = REFERENCE_GUIDANCE if engine.name == REFERENCE else OTHER_GUIDANCE

    with gr.Blocks(title="textcond studio", analytics_enabled=False) as page:
        gr.HTML(HEAD)
        found_texts, made = gr.State([]), gr.State([])
        with gr.Row():
            with gr.Column(scale=7, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="red apple, twemoji style, on a blue background",
                    max_lines=5,
                    max_length=MAX_PROMPT,
                    autofocus=True,
                    elem_id="prompt",
                )
                count = gr.HTML(elem_id="count")
                with gr.Row(elem_id="actions"):
                    generate = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_id="generate")
                    stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="stop")
                    surprise = gr.Button("Surprise me", scale=2, min_width=130, elem_id="surprise")
                with gr.Row():
                    with gr.Column(scale=4, min_width=280):
                        picture = gr.Image(
                            label="Picture",
                            show_label=False,
                            format="png",
                            type="filepath",
                            interactive=False,
                            height=380,
                            buttons=["download", "fullscreen"],
                            placeholder="The picture appears here.",
                            elem_id="picture",
                        )
                        status = gr.HTML(elem_id="status")
                    with gr.Column(scale=3, min_width=220):
                        negative = gr.Textbox(
                            label="Negative prompt",
                            placeholder="what to keep out",
                            max_lines=3,
                            max_length=MAX_PROMPT,
                            elem_id="negative",
                        )
                        seed = gr.Number(
                            label="Seed", value=0, precision=0, minimum=0, maximum=SEEDS - 1, elem_id="seed"
                        )
                        with gr.Row(elem_id="seeds"):
                            fresh = gr.Checkbox(
                                label="Random", value=True, container=False, min_width=90, elem_id="random"
                            )
                            reuse = gr.Button("Reuse seed", size="sm", min_width=90, elem_id="reuse")
                        steps = gr.Slider(1, MAX_STEPS, value=20, step=1, label="Steps", elem_id="steps")
                        guidance = gr.Slider(
                            1,
                            MAX_GUIDANCE,
                            value=usual_guidance,
                            step=0.5,
                            label="Guidance",
                            elem_id="guidance",
                        )
                        encoder = gr.Dropdown(
                            label="Text encoder",
                            info="a folder or hub id may be typed" if typed_encoders else None,
                            choices=[("native", NATIVE), *((name, name) for name in encoders)],
                            value=NATIVE,
                            allow_custom_value=typed_encoders,
                            elem_id="encoder",
                        )
                made_head = gr.HTML(elem_id="made-head")
                history = gr.Gallery(
                    show_label=False,
                    columns=8,
                    fit_columns=False,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=False,
                    elem_id="made",
                )
            with gr.Column(scale=5, min_width=320):
                found_head = gr.HTML(_found_head(), elem_id="found-head")
                found = gr.Gallery(
                    show_label=False,
                    columns=3,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="found",
                )
        buttons = [generate, surprise, stop]

        def find(text: str, chosen: str) -> Iterator[dict]:
            try:
                if not engine.can_find(chosen):
                    yield {found_head: _found_head("Reading the prompts with this encoder …")}
                finder = engine.finder(chosen)
                if text.strip():
                    hits = finder.search(text, k=NEIGHBOURS)
                    rows = [(hit, f"{hit.score:.2f} · {hit.text}") for hit in hits]
                    told = f"of {len(finder):,}, by the same encoder. Click one to use it."
                else:
                    rows = [(hit, hit.text) for hit in finder.sample(NEIGHBOURS)]
                    told = f"{len(finder):,} are here: click one, or write your own."
                yield {
                    found: [(thumbnail(hit, folder), caption) for hit, caption in rows],
                    found_texts: [hit.text for hit, _ in rows],
                    found_head: _found_head(told),
                    count: _count(prompt_length(finder.encoder.tokenizer, text)),
                }
            except Exception as error:
                _log(error)
                yield {found: [], found_texts: [], found_head: _found_head(one_line(error), alas=True), count: ""}

        def use(texts: list[str], event: gr.SelectData) -> str:
            return texts[event.index]

        def lock(request: gr.Request) -> dict:
            stops[request.session_hash] = threading.Event()
            return {button: gr.update(interactive=button is stop) for button in buttons}

        def unlock() -> dict:
            return {button: gr.update(interactive=button is not stop) for button in buttons}

        def run(
            text: str,
            unwanted: str,
            number: int | None,
            another: bool,
            count_of_steps: int,
            scale: float,
            chosen: str,
            shown: list[Made],
            request: gr.Request,
        ) -> Iterator[dict]:
            signal = stops.setdefault(request.session_hash, threading.Event())
            began = time.monotonic()
            waiting = "Drawing …" if engine.ready else "Loading the model, the first time only …"
            yield {status: _bar(0, waiting)}
            try:
                parameters = Parameters(
                    prompt=text,
                    negative_prompt=unwanted,
                    seed=secrets.randbelow(SEEDS) if another or number is None else int(number),
                    num_inference_steps=int(count_of_steps),
                    guidance_scale=float(scale),
                    pipeline=engine.name,
                    encoder=chosen,
                )
                for event in drawing(engine, parameters, folder, signal):
                    if isinstance(event, Made):
                        shown = [event, *shown]
                        for old in shown[HISTORY:]:
                            shutil.rmtree(old.path.parent, ignore_errors=True)
                        shown = shown[:HISTORY]
                        yield {
                            picture: event.path,
                            seed: parameters.seed,
                            status: _made(event.parameters, time.monotonic() - began),
                            made: shown,
                            made_head: "<h2>Made in this session</h2>",
                            history: gr.update(value=_thumbnails(shown), visible=True),
                        }
                    else:
                        told = _bar(event.done / event.total, f"Step {event.done} of {event.total}")
                        yield {status: told} | ({picture: event.preview} if event.preview is not None else {})
            except Stopped:
                back = {picture: shown[0].path if shown else None}
                yield {status: "Stopped."} | back
            except Exception as error:
                _log(error)
                yield {status: f'<span class="alas" role="alert">{html.escape(one_line(error))}</span>'}
                raise gr.Error(one_line(error), duration=None, print_exception=False) from error
            finally:
                stops.pop(request.session_hash, None)

        def halt(request: gr.Request) -> None:
            if signal := stops.get(request.session_hash):
                signal.set()  # the drawing tells when it has stopped

        def restore(shown: list[Made], event: gr.SelectData) -> dict:
            chosen = shown[event.index]
            was = chosen.parameters
            return {
                picture: chosen.path,
                prompt: was.prompt,
                negative: was.negative_prompt,
                seed: was.seed,
                fresh: False,
                steps: was.num_inference_steps,
                guidance: was.guidance_scale,
                encoder: was.encoder,
                status: _made(was),
            }

        def random_prompt() -> str:
            try:
                return engine.finder().sample(1)[0].text
            except Exception as error:
                _log(error)
                raise gr.Error(one_line(error), print_exception=False) from error

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        finding: dict[str, Any] = {
            "fn": find,
            "inputs": [prompt, encoder],
            "outputs": [found, found_texts, found_head, count],
            "concurrency_limit": 4,
            "trigger_mode": "always_last",
            **quiet,
        }
        gr.on([page.load, prompt.change, encoder.change], **finding)
        found.select(use, found_texts, prompt, **quiet).then(None, js=SHOW_PROMPT, api_visibility="private")
        drawn = {
            "fn": run,
            "inputs": [prompt, negative, seed, fresh, steps, guidance, encoder, made],
            "outputs": [picture, seed, status, made, made_head, history],
            "concurrency_limit": 1,
            "concurrency_id": "draw",
            **quiet,
        }
        asked = gr.on([generate.click, prompt.submit], lock, None, buttons, queue=False, **quiet)
        chance = surprise.click(lock, None, buttons, queue=False, **quiet).then(random_prompt, None, prompt, **quiet)
        chance.failure(unlock, None, buttons, queue=False, **quiet)
        for ended in (asked.then(**drawn), chance.then(**drawn)):
            ended.success(unlock, None, buttons, queue=False, **quiet)
            ended.failure(unlock, None, buttons, queue=False, **quiet)
        stop.click(halt, queue=False, **quiet)
        reuse.click(lambda: False, None, fresh, queue=False, **quiet)
        controls = [picture, prompt, negative, seed, fresh, steps, guidance, encoder, status]
        history.select(restore, made, controls, **quiet).then(None, js=SHOW_PROMPT, api_visibility="private")
    return page


def serve(
    host: str = "127.0.0.1",
    port: int | None = None,
    pipeline: str = REFERENCE,
    index: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Serve the studio until Ctrl-C. The page is up before the model is: that loads meanwhile.

    Raises:
        FileNotFoundError, ValueError: the pipeline or the index does not exist.
        OSError: no port is free.
    """
    if pipeline != REFERENCE:
        find_pipeline(pipeline)
    if index is not None and not Path(index).exists():
        raise FileNotFoundError(f"there is no prompt index {index}: check the path")
    port = free_port(host, port)
    engine = Engine(pipeline, index, device, dtype)
    local = host in LOOPBACK
    with tempfile.TemporaryDirectory(prefix="textcond-studio-") as folder:
        page = build(engine, Path(folder), encoders=nearby_encoders(Path.cwd()), typed_encoders=local)
        _, address, _ = page.queue(max_size=64).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=THEME,
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size="1mb",
        )
        threading.Thread(target=_warm_up, args=(engine,), daemon=True).start()
        print(f"textcond studio: {address}  (Ctrl-C stops it)", flush=True)
        if not local:
            print(f"textcond: anyone who reaches {host} can use it", file=sys.stderr)
        try:
            page.server.thread.join()
        finally:
            page.close(verbose=False)


def free_port(host: str, port: int | None = None) -> int:
    """`port` if it is free, or without one the first free port from 7860 to 7959.

    Raises:
        OSError: it is taken, none is free, or `host` is no address of this machine.
    """
    for candidate in [port] if port else range(FIRST_PORT, LAST_PORT + 1):
        try:
            family, *_, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return candidate
        except PermissionError as error:
            raise PermissionError(f"port {candidate} is for the administrator only: choose one from 1024 up") from error
        except socket.gaierror as error:
            raise OSError(f"{host} is no address of this machine: pass --host 127.0.0.1, or 0.0.0.0") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(f"cannot listen on {host} ({error.strerror}): pass --host 127.0.0.1") from error
    if port:
        raise OSError(f"port {port} on {host} is taken: pass another --port, or leave it out for the first free one")
    raise OSError(f"no port of {FIRST_PORT} to {LAST_PORT} on {host} is free: stop what listens there, or pass --port")


def _warm_up(engine: Engine) -> None:
    quiet_libraries()
    for load in (engine.finder, engine.warm_up):
        try:
            load()
        except Exception as error:  # the first request that needs it meets it again, and tells it on the page
            _log(error)


def _log(error: BaseException) -> None:
    print(f"textcond: error: {one_line(error)}", file=sys.stderr)
    if debugging():
        traceback.print_exception(error)


def _found_head(told: str = "", *, alas: bool = False) -> str:
    return f'<h2>Nearest prompts</h2><p class="{"alas" if alas else "quiet"}">{html.escape(told) or "&nbsp;"}</p>'


def _count(length: PromptLength) -> str:
    if length.truncated:
        kept = html.escape(length.kept[-40:])
        return (
            f'<span class="cut">{length.tokens:,} of {length.limit:,} tokens: the encoder stops reading after '
            f"“…<bdi>{kept}</bdi>”</span>"
        )
    return f"{length.tokens:,} of {length.limit:,} tokens"


def _bar(done: float, told: str) -> str:
    percent = round(100 * done)
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{percent}%"></div></div><span role="status">{html.escape(told)}</span>'
    )


def _made(parameters: Parameters, seconds: float | None = None) -> str:
    parts = [
        f"seed {parameters.seed}",
        f"{parameters.num_inference_steps} steps",
        f"guidance {parameters.guidance_scale:g}",
        f"{parameters.width}×{parameters.height}",
        *([f"{seconds:.1f} s"] if seconds is not None else []),
    ]
    return f'<span role="status">{" · ".join(parts)}</span>'


def _thumbnails(shown: list[Made]) -> list[tuple[Path, str]]:
    return [(item.path, item.parameters.prompt or "(empty prompt)") for item in shown]
