"""The page: a heading and its tabs."""

from __future__ import annotations

import gradio as gr

from .api import add_api
from .compare import compare_tab
from .draw_tab import draw_tab
from .explore import explore_tab
from .grid import grid_tab
from .markup import HEAD
from .models import models_tab
from .shared import Studio

# Behind the first tab, in this order: a title, and what lays the tab out and wires it.
TABS = (("Compare", compare_tab), ("Grid", grid_tab), ("Explore", explore_tab), ("Models", models_tab))


def build(studio: Studio) -> gr.Blocks:
    """The page of one server."""
    gr.set_static_paths(studio.folder)  # served from where they are, metadata and all, and not copied
    day = 24 * 3600  # what was uploaded longer ago than that is removed
    with gr.Blocks(title="textcond studio", analytics_enabled=False, delete_cache=(day, day)) as page:
        gr.HTML(HEAD)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Draw & find"):
                drawn = draw_tab(studio, page)
            for title, lay_out in TABS:
                with gr.Tab(title) as tab:
                    lay_out(studio, drawn, tab)
        add_api(studio)
    return page
