"""How the studio looks: system fonts, a warm accent, light and dark."""

import gradio as gr

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.orange,
    secondary_hue=gr.themes.colors.orange,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    # Fonts that every system has: nothing is fetched.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_width="1px",
    block_shadow="none",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_border_width="0px",
    block_label_text_color="*neutral_500",
    block_label_text_color_dark="*neutral_400",
    block_title_text_weight="500",
    input_background_fill="white",
    input_background_fill_dark="*neutral_900",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_500",
    button_primary_text_color="white",
    button_large_text_weight="600",
    slider_color="*primary_500",
)

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
.html-container { padding: 0 !important; }
.quiet { color: var(--body-text-color-subdued); }
.alas { color: #b91c1c; }
.dark .alas { color: #fca5a5; }
#actions button { white-space: nowrap; }

#head { display: flex; align-items: baseline; gap: .2rem .8rem; flex-wrap: wrap; padding: .3rem 0 .1rem; }
#head h1 { font-size: 1.4rem; font-weight: 700; letter-spacing: -.02em; margin: 0; }
#head h1 i { font-style: normal; color: var(--primary-600); }
#head p { color: var(--body-text-color-subdued); margin: 0; }

#prompt textarea { font-size: 1.12rem; line-height: 1.5; }
#prompt textarea, #negative textarea { unicode-bidi: plaintext; }
#count { margin: -.65rem .2rem -.5rem; min-height: 1.3rem; font-size: .84rem; }
#count, #status { color: var(--body-text-color-subdued); }
#count .cut { color: #b45309; }
.dark #count .cut { color: #fbbf24; }
#count bdi { font-style: italic; }

#picture .image-container, #picture .image-frame, #picture .image-frame button { background: transparent; }
#picture img { object-fit: contain; width: 100%; height: 100%; }
#status { margin: -.5rem .2rem 0; min-height: 2.2rem; font-size: .88rem; }
#status .bar { height: 5px; border-radius: 3px; overflow: hidden; margin: .3rem 0; background: var(--neutral-200); }
.dark #status .bar, .dark #steps, .dark #guidance { --neutral-200: var(--neutral-700); }
#status .bar div { height: 100%; background: var(--primary-500); border-radius: 3px; transition: width .15s linear; }
#seeds { align-items: center; margin: -.4rem 0; }
#seeds .block { border-width: 0 !important; background: none; padding: .2rem .6rem; }

#found-head h2, #made-head h2 { font-size: 1.05rem; font-weight: 600; margin: .2rem 0 0; }
#found-head p { margin: 0; font-size: .9rem; }
#found, #made { border-width: 0 !important; background: transparent; overflow: visible !important; }
#found .grid-wrap, #made .grid-wrap { min-height: 0; max-height: none; height: auto; overflow: visible; padding: 0; }
#found .grid-container, #made .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); grid-auto-rows: auto; gap: .7rem;
}
#found .thumbnail-item, #made .thumbnail-item {
  aspect-ratio: auto; height: 100%; display: flex; flex-direction: column; background: var(--block-background-fill);
}
#found .thumbnail-item img, #made .thumbnail-item img { aspect-ratio: 1; height: auto; }
#found .caption-label, #made .caption-label {
  position: static; max-width: none; width: 100%; border: none; background: none; opacity: 1 !important;
  margin: .35rem 0 .45rem; padding: 0 .5rem; height: 2.6em; flex: none;
  font-size: .78rem; line-height: 1.3; text-align: left; color: var(--body-text-color);
  white-space: normal; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  unicode-bidi: plaintext;
}
#found .thumbnail-item:focus-visible, #made .thumbnail-item:focus-visible { outline: 2px solid var(--primary-500); }
"""
