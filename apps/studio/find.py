"""The right side: what the index holds near the prompt, near one of its rows, or near a picture."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

if TYPE_CHECKING:
    from textcond import Hit
    from textcond.apps.finder import Finder

NEIGHBOURS = 12
TILE = (214, 211, 209)
TITLE = "Nearest prompts"
MODES = [("meaning", "dense"), ("words", "lexical"), ("both", "hybrid")]
USE, APPEND, SIMILAR = "use", "append", "similar"


@dataclass(frozen=True)
class Found:
    """A row on the page: what a click on it needs."""

    id: str
    text: str
    metadata: dict[str, Any]


@dataclass
class Find:
    """The right side of the page."""

    head: gr.HTML
    mode: gr.Radio
    click: gr.Radio
    gallery: gr.Gallery
    rows: gr.State


def find_side() -> Find:
    """Lay it out, in the column that is open."""
    head = gr.HTML(elem_id="found-head")
    with gr.Row(elem_id="find-options"):
        mode = gr.Radio(MODES, value="hybrid", label="Near in", min_width=150, elem_id="mode")
        click = gr.Radio(
            [("uses it", USE), ("appends", APPEND), ("finds similar", SIMILAR)],
            value=USE,
            label="A click",
            min_width=150,
            elem_id="click",
        )
    gallery = gr.Gallery(
        show_label=False,
        columns=3,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="found",
        elem_classes="tiles",
    )
    return Find(head, mode, click, gallery, gr.State([]))


def shown(hits: Sequence[Hit], folder: Path, mode: str | None) -> tuple[list[tuple[Path, str]], list[Found]]:
    """What the gallery shows of `hits` in the order that `mode` gave, or None for no order; and their rows."""
    tiles = [(thumbnail(hit, folder), caption(hit, mode)) for hit in hits]
    return tiles, [Found(hit.id, hit.text, hit.metadata) for hit in hits]


def caption(hit: Hit, mode: str | None) -> str:
    """The text of a row, behind its cosine or BM25 score if it is ordered by one."""
    if mode in (None, "hybrid"):
        return hit.text
    return f"{hit.score:.2f} · {hit.text}"


def told(finder: Finder, mode: str) -> str:
    """What the order means."""
    by = {
        "dense": "by the same encoder",
        "lexical": "by the words they share",
        "hybrid": "by the same encoder and by words",
    }
    return f"of {len(finder):,}, {by[mode]}."


def appended(prompt: str, text: str) -> str:
    """A prompt with the parts of `text` behind it that it does not have yet."""
    have = {part.strip().casefold() for part in prompt.split(",")}
    new = [part.strip() for part in text.split(",") if part.strip() and part.strip().casefold() not in have]
    return ", ".join([*([prompt.rstrip(" ,")] if prompt.strip() else []), *new])


def thumbnail(row: Hit, folder: Path) -> Path:
    """The file of a row's picture, written into `folder` when it is first shown; a plain tile for a row without one."""
    path = folder / f"row-{hashlib.sha256(str(row.id).encode()).hexdigest()[:24]}.png"
    if not path.exists():
        partial = path.with_suffix(f".{secrets.token_hex(4)}")
        (row.image or Image.new("RGB", (8, 8), TILE)).save(partial, "PNG")
        partial.replace(path)
    return path
