"""The grid on the page: a table of pictures to click; `grid.js` fills it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

CSS = """
  .cells { overflow-x: auto; }
  table { border-collapse: separate; border-spacing: 5px; margin: 0; }
  th { font-weight: 500; font-size: .84rem; padding: .1rem .3rem; overflow-wrap: anywhere; }
  th[scope=row] { text-align: right; max-width: 12rem; }
  th[scope=col] { vertical-align: bottom; }
  td { padding: 0; }
  button {
    display: block; width: clamp(84px, 12vw, 160px); aspect-ratio: 1; padding: 0; overflow: hidden; cursor: pointer;
    border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
    background: var(--block-background-fill);
  }
  button:disabled { cursor: default; opacity: .6; }
  button:hover:enabled, button:focus-visible { outline: 2px solid var(--primary-500); }
  img { width: 100%; height: 100%; object-fit: contain; display: block; margin: 0; }
"""


def grid_view() -> gr.HTML:
    """The component; its value is empty or what `grid_value` gives. The event `select` tells the number of a cell."""
    return gr.HTML(
        {},
        html_template='<div class="cells"></div>',
        css_template=CSS,
        js_on_load=(Path(__file__).parent / "grid.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="cells",
    )


def grid_value(columns: Sequence[str], rows: Sequence[str], made: Sequence[Path]) -> dict[str, Any]:
    """What is shown: the labels, and the pictures that are made so far, row by row."""
    missing = [None] * (len(columns) * len(rows) - len(made))
    return {"columns": list(columns), "rows": list(rows), "cells": [*map(str, made), *missing]}
