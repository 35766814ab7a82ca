"""What all parts of the page share: the engine, the line before it, the visitors' folders, and what they may do."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from textcond.apps.engine import Engine
from textcond.apps.errors import debugging, one_line
from textcond.apps.metadata import MULTILINGUAL, NATIVE, REFERENCE

from .history import History, forget_old
from .line import Line

SEEDS = 2**32  # of which a random one is drawn
PAGE_SEEDS = 2**53  # a browser's numbers hold no larger ones
MAX_PROMPT, MAX_STEPS, MAX_GUIDANCE, MAX_COUNT = 100_000, 60, 15.0, 8
MAX_CELLS = 36
MIN_SIZE, MAX_SIZE = 64, 1024
MAX_UPLOAD = 16 * 2**20
# Of all events that are no part of the typed API.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Drawings wait in our own line, which tells how long; gradio's must let them all in.
DRAWING: dict[str, Any] = {"concurrency_limit": 80, "concurrency_id": "draw", **QUIET}


@dataclass
class _Work:
    """What one Stop button stops: one signal for all that runs."""

    signal: threading.Event = field(default_factory=threading.Event)
    running: int = 0


@dataclass
class Studio:
    """One server.

    Args:
        engine: draws and finds.
        folder: takes the pictures; below it everything is served to those who know its name.
        encoders: those that fit are offered beside the pipeline's own, and beside the shipped one where that fits.
        trusted: whether visitors may load models, type any folder or hub id, and write into the index.
    """

    engine: Engine
    folder: Path
    encoders: list[str] = field(default_factory=list)
    trusted: bool = False
    line: Line = field(default_factory=Line)
    _works: dict[str, _Work] = field(default_factory=dict)
    _changing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def offered(self) -> list[str]:
        """The encoders to choose from, for the pipeline that is loaded."""
        shipped = [MULTILINGUAL] if self.engine.name == REFERENCE else []
        return [NATIVE, *shipped, *filter(self.engine.may_take, self.encoders)]

    def takes(self, encoder: str) -> bool:
        """Whether a visitor may choose that encoder."""
        return encoder in self.offered or (self.trusted and encoder != MULTILINGUAL)

    def history(self, token: str | None) -> History:
        """The pictures of the visitor with that token."""
        return History(self.folder / "made", token)

    def grids(self, token: str | None) -> History:
        """The pictures of that visitor's last grid, and the grid as one of them."""
        return History(self.folder / "grids", token, kept=MAX_CELLS + 1)

    def forget_old(self) -> None:
        """Remove what visitors of long ago have made."""
        for name in ("made", "grids"):
            forget_old(self.folder / name)

    @property
    def rows(self) -> Path:
        """Folder of the pictures of found rows."""
        (rows := self.folder / "rows").mkdir(exist_ok=True)
        return rows

    def stop(self, key: str) -> None:
        """Stop all that was begun under that key, one for each of a page's Stop buttons."""
        with self._changing:
            if work := self._works.get(key):
                work.signal.set()

    def prepare(self, key: str) -> None:
        """Let the key's next work be stopped from now on, before it begins."""
        with self._changing:
            work = self._works.get(key)
            if work is None or work.signal.is_set() or not work.running:
                self._works[key] = _Work()

    @contextmanager
    def stoppable(self, key: str) -> Iterator[threading.Event]:
        """What `stop` sets while the `with` block runs."""
        with self._changing:
            work = self._works.setdefault(key, _Work())
            work.running += 1
        try:
            yield work.signal
        finally:
            with self._changing:
                work.running -= 1
                if not work.running and self._works.get(key) is work:
                    del self._works[key]

    def busy(self, key: str) -> bool:
        """Whether `stop` would stop something that runs."""
        with self._changing:
            work = self._works.get(key)
            return work is not None and work.running > 0 and not work.signal.is_set()


def follow_prompt(tab: gr.Tab, first: gr.Textbox, own: gr.Textbox) -> Any:
    """Let a tab's prompt be that of the first tab whenever it is opened, until somebody writes another into it."""
    taken = gr.State("")

    def follow(text: str, prompt: str, before: str) -> tuple[str, str]:
        return (prompt, prompt) if text in ("", before) else (text, before)

    return tab.select(follow, [own, first, taken], [own, taken], queue=False, **QUIET)


def log(error: BaseException) -> None:
    """Tell an error to who runs the server."""
    print(f"textcond: error: {one_line(error)}", file=sys.stderr)
    if debugging():
        traceback.print_exception(error)
