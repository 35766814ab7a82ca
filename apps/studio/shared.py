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

from textcond.apps.engine import Engine
from textcond.apps.errors import debugging, one_line
from textcond.apps.metadata import MULTILINGUAL, NATIVE, REFERENCE

from .history import History, forget_old
from .line import Line

SEEDS = 2**32
MAX_PROMPT, MAX_STEPS, MAX_GUIDANCE, MAX_COUNT = 100_000, 60, 15.0, 8
MAX_CELLS = 36
MIN_SIZE, MAX_SIZE = 64, 1024
MAX_UPLOAD = 16 * 2**20
# Of all events that are no part of the typed API.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Drawings wait in our own line, which tells how long; gradio's must let them all in.
DRAWING: dict[str, Any] = {"concurrency_limit": 80, "concurrency_id": "draw", **QUIET}


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
    stops: dict[str, threading.Event] = field(default_factory=dict)

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

    def stop(self, session: str) -> None:
        """Stop what that open page is doing."""
        if signal := self.stops.get(session):
            signal.set()

    def prepare(self, session: str) -> None:
        """Let that page be stopped from now on, also before its work begins."""
        self.stops[session] = threading.Event()

    @contextmanager
    def stoppable(self, session: str) -> Iterator[threading.Event]:
        """What `stop` sets while the `with` block runs."""
        signal = self.stops.setdefault(session, threading.Event())
        try:
            yield signal
        finally:
            self.stops.pop(session, None)


def log(error: BaseException) -> None:
    """Tell an error to who runs the server."""
    print(f"textcond: error: {one_line(error)}", file=sys.stderr)
    if debugging():
        traceback.print_exception(error)
