"""The drawing of a map: a canvas to move and zoom, with a legend below; `map.js` draws it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gradio as gr

TEMPLATE = """
<div class="stage">
  <canvas tabindex="0" role="application" aria-label="Map of the prompts: arrows move it, plus and minus zoom, 0 shows
    all of it, Enter opens the prompt in the middle"></canvas>
  <div class="here" hidden><span>your prompt</span></div>
  <div class="tip" hidden><img alt=""><p></p><small></small></div>
  <div class="tools" hidden>
    <button type="button" data-do="in" title="Zoom in" aria-label="Zoom in">+</button>
    <button type="button" data-do="out" title="Zoom out" aria-label="Zoom out">−</button>
    <button type="button" data-do="all" title="Show all" aria-label="Show all">⤢</button>
    <button type="button" data-do="prompt" title="Go to your prompt" aria-label="Go to your prompt" hidden>◎</button>
  </div>
</div>
<div class="legend" hidden>
  <div class="by" role="group" aria-label="Coloured by"></div>
  <div class="values" role="group" aria-label="Shown"></div>
</div>
"""

CSS = """
  .stage {
    position: relative; height: min(62vh, 620px); min-height: 320px; overflow: hidden;
    border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
    background: var(--block-background-fill);
  }
  canvas { position: absolute; inset: 0; width: 100%; height: 100%; cursor: grab; touch-action: none; display: block; }
  canvas.held { cursor: grabbing; }
  canvas.over { cursor: pointer; }
  canvas:focus { outline: none; }
  canvas:focus-visible { outline: 2px solid var(--primary-500); outline-offset: -2px; border-radius: var(--radius-lg); }
  [hidden] { display: none !important; }
  .here {
    position: absolute; left: 0; top: 0; width: 18px; height: 18px; margin: -9px 0 0 -9px; pointer-events: none;
    border: 3px solid var(--primary-600); border-radius: 50%;
    box-shadow: 0 0 0 2px var(--block-background-fill), 0 0 0 7px rgb(234 88 12 / .22);
  }
  .here span {
    position: absolute; left: 50%; top: 21px; transform: translateX(-50%); white-space: nowrap; font-size: .74rem;
    line-height: 1; font-weight: 600; padding: .22rem .5rem; border-radius: 99px; color: white;
    background: var(--primary-600);
  }
  .tip {
    position: absolute; left: 0; top: 0; max-width: 240px; pointer-events: none; padding: .5rem .6rem; z-index: 2;
    display: grid; grid-template-columns: auto 1fr; gap: .1rem .6rem; align-items: center;
    background: var(--background-fill-primary); color: var(--body-text-color); border-radius: var(--radius-md);
    border: 1px solid var(--border-color-primary); box-shadow: 0 4px 18px rgb(0 0 0 / .16);
  }
  .tip img { grid-row: span 2; width: 56px; height: 56px; border-radius: 6px; object-fit: contain; background: white; }
  .tip img:not([src]) { visibility: hidden; }
  .tip p {
    margin: 0; font-size: .82rem; line-height: 1.3; unicode-bidi: plaintext; overflow: hidden; overflow-wrap: anywhere;
    display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
  }
  .tip small { font-size: .74rem; color: var(--body-text-color-subdued); }
  .tools {
    position: absolute; right: 10px; top: 10px; display: flex; flex-direction: column; overflow: hidden;
    border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
    background: var(--background-fill-primary);
  }
  .tools button { width: 34px; height: 34px; font-size: 1.05rem; line-height: 1; color: var(--body-text-color); }
  .tools button + button { border-top: 1px solid var(--border-color-primary); }
  .tools button:hover { background: var(--background-fill-secondary); }
  .tools button:focus-visible { outline: 2px solid var(--primary-500); outline-offset: -2px; }
  .legend { display: flex; flex-wrap: wrap; gap: .35rem .9rem; margin-top: .55rem; font-size: .82rem; }
  .by, .values { display: flex; flex-wrap: wrap; gap: .15rem; align-items: center; }
  .values { margin-left: -.55rem; }
  .by { gap: .3rem; color: var(--body-text-color-subdued); }
  .legend button {
    display: inline-flex; align-items: center; gap: .35rem; padding: .16rem .55rem; border-radius: 99px;
    border: 1px solid transparent; color: var(--body-text-color); line-height: 1.3;
  }
  .legend button:focus-visible { outline: 2px solid var(--primary-500); }
  .by button[aria-pressed=true] {
    border-color: var(--border-color-primary); background: var(--block-background-fill);
  }
  .values button:hover { background: var(--background-fill-secondary); }
  .values button[aria-pressed=false] { opacity: .38; }
  .values i { width: .68rem; height: .68rem; border-radius: 50%; flex: none; }
  .values small { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
  @media (max-width: 600px) { .stage { height: 56vh; } .tip { max-width: 200px; } }
"""


def map_view(points: Callable, rows: Callable) -> gr.HTML:
    """The component; its value is the key of a map.

    `picked` is the number of a row, or -1; `prompt` has the `key` of a map and a point on it, `at`; `near` has these
    and the numbers of neighbours, `rows`; both are empty where there is nothing to show. The event `select` tells the
    number of a row that was clicked, and the key.

    Args:
        points: what the page calls with a key for what is to be drawn.
        rows: what the page calls with a key and numbers of rows for their texts and pictures.
    """
    return gr.HTML(
        "",
        html_template=TEMPLATE,
        css_template=CSS,
        js_on_load=(Path(__file__).parent / "map.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        server_functions=[points, rows],
        picked=-1,
        prompt={},
        near={},
        elem_id="map",
    )
