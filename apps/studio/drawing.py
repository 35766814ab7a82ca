"""Drawing in a thread of its own, told step by step, and stopped within one."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textcond.apps.metadata import Parameters, write_png

from .history import PREVIEW, History, Made
from .line import Line, Pace

if TYPE_CHECKING:
    from PIL.Image import Image

    from textcond.apps.engine import Engine

POLL = 0.2


class Stopped(Exception):
    """The person pressed Stop, or left."""


@dataclass(frozen=True)
class Waiting:
    """So many are served before, which takes about so many seconds."""

    ahead: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """One denoising step is done; `preview` is a picture file now and then, `seconds` are left for all pictures."""

    done: int
    total: int
    preview: Path | None
    seconds: float = 0.0


def drawing(
    engine: Engine, jobs: Sequence[Parameters], history: History, stop: threading.Event, line: Line
) -> Iterator[Waiting | Step | Made]:
    """Draw one picture after another, each when its turn comes: yield each step, and each picture as it is made.

    Raises:
        Stopped: `stop` was set.
        Exception: whatever the drawing raised; ValueError for a line that is full.
    """
    left = threading.Event()
    work = [job.num_inference_steps * engine.share(job) for job in jobs]
    try:
        for number, job in enumerate(jobs):
            # a turn for each, so that who wants many does not keep the others waiting
            with line.place(work[number], later=sum(work[number + 1 :])) as place:
                while (before := place.ahead())[0]:
                    yield Waiting(*before)
                    if stop.wait(POLL):
                        raise Stopped
                yield from _one(engine, job, history, lambda: stop.is_set() or left.is_set(), Pace(place))
    finally:
        left.set()


def _one(
    engine: Engine, parameters: Parameters, history: History, stopped: Callable[[], bool], pace: Pace
) -> Iterator[Step | Made]:
    events: queue.SimpleQueue[Step | Made | BaseException] = queue.SimpleQueue()
    folder, share = history.new_folder(), engine.share(parameters)

    def on_step(done: int, total: int, preview: Callable[[], Image | None]) -> None:
        if stopped():
            raise Stopped
        seconds, path = pace.step(share), None
        if done % 2 == 0 and done < total and (image := preview()) is not None:
            path = folder / f"{PREVIEW}{done}.png"
            image.save(path)
        events.put(Step(done, total, path, seconds))

    def work() -> None:
        try:
            image, made = engine.draw(parameters, on_step)
            path = folder / f"{_name(parameters.prompt)}-{parameters.seed}.png"
            write_png(path, image, made)
            events.put(Made(path, made))
        except BaseException as error:  # it is raised again where the events are read
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            event = events.get(timeout=POLL)
        except queue.Empty:
            if stopped():  # while a model is being loaded, say; the thread ends at its first step
                raise Stopped from None
            continue
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Made):
            history.added(event)
            yield event
            return
        yield event


def _name(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt[:40].lower()).strip("-") or "picture"
