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
.gradio-container, .gradio-container main {
  max-width: 1240px !important; margin: 0 auto !important; width: 100% !important;
}
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
#seed input, #width input, #height input { border: 1px solid var(--border-color-primary); }
#head #shade { margin-left: auto; font-size: 1.1rem; line-height: 1; padding: .2rem .4rem; }
#loaded { margin: -.5rem 0 -.4rem; font-size: .84rem; }
#count { margin: -.65rem .2rem -.5rem; min-height: 1.3rem; font-size: .84rem; }
#count, #status { color: var(--body-text-color-subdued); }
#count .cut { color: #b45309; }
.dark #count .cut { color: #fbbf24; }
#count bdi { font-style: italic; }

#picture .image-container, #picture .image-frame, #picture .image-frame button { background: transparent; }
#picture img { object-fit: contain; width: 100%; height: 100%; }
#status { margin: -.5rem .2rem 0; min-height: 2.2rem; font-size: .88rem; }
.dark input[type=range] { --neutral-200: var(--neutral-700); }
#seeds { align-items: center; margin: -.4rem 0; }
#seeds .block { border-width: 0 !important; background: none; padding: .2rem .6rem; }

.tiles { border-width: 0 !important; background: transparent; overflow: visible !important; }
.tiles .grid-wrap { min-height: 0; max-height: none; height: auto; overflow: visible; padding: 0; }
.tiles .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); grid-auto-rows: auto; gap: .7rem;
}
.tiles .thumbnail-item {
  aspect-ratio: auto; height: 100%; display: flex; flex-direction: column; background: var(--block-background-fill);
}
.tiles .thumbnail-item img { aspect-ratio: 1; height: auto; }
.tiles .caption-label {
  position: static; max-width: none; width: 100%; border: none; background: none; opacity: 1 !important;
  margin: .35rem 0 .45rem; padding: 0 .5rem; height: 2.6em; flex: none;
  font-size: .78rem; line-height: 1.3; text-align: left; color: var(--body-text-color);
  white-space: normal; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  unicode-bidi: plaintext;
}
.tiles .thumbnail-item:focus-visible { outline: 2px solid var(--primary-500); }
#made-head { align-items: center; justify-content: flex-start; gap: 1.2rem; }
#made-head > * { flex: none; width: fit-content; min-width: 0 !important; border: 0 !important; background: none; }
#made .gallery-item { position: relative; }
#made .star {
  position: absolute; right: .25rem; top: .25rem; width: 1.7rem; height: 1.7rem; border-radius: 50%; line-height: 1;
  font-size: 1rem; color: var(--neutral-600); background: rgb(255 255 255 / .7); opacity: 0;
}
#made .gallery-item:hover .star, #made .star:focus-visible, #made .star[aria-pressed=true] { opacity: 1; }
#made .star:hover, #made .star[aria-pressed=true] { color: var(--primary-600); }
#made .star:focus-visible { outline: 2px solid var(--primary-500); }
@media (hover: none) { #made .star { opacity: 1; } }
body:has(#only-stars input:checked) #made .gallery-item:not(:has(.star[aria-pressed=true])) { display: none; }
#tabs > .tab-wrapper { margin-bottom: .4rem; }
#with-picture, #with-picture button { white-space: nowrap; }
#with-picture { gap: .5rem; }
#more, #as-code { background: transparent; }
#find-options { gap: 0; margin: -.35rem 0 -.25rem; flex-direction: column; align-items: flex-start; }
#find-options > *, #find-options .form {
  border: 0; background: none; box-shadow: none; flex: none; gap: .2rem 1.4rem; min-width: 0 !important;
}
#find-options .block { padding: 0; display: flex; align-items: center; gap: .5rem; border: 0; background: none; }
#find-options .block > span, #find-options [data-testid="block-info"] {
  margin: 0; font-size: .82rem; color: var(--body-text-color-subdued); white-space: nowrap;
}
#find-options .wrap { gap: .1rem; flex-wrap: wrap; }
#find-options label {
  padding: .14rem .55rem; font-size: .82rem; border-radius: 99px; background: none; box-shadow: none;
  border: 1px solid transparent; gap: 0; white-space: nowrap;
}
#find-options label.selected { border-color: var(--border-color-primary); background: var(--block-background-fill); }
#find-options label span { margin: 0; }
#find-options input { position: absolute; opacity: 0; pointer-events: none; }
#find-options label:has(input:focus-visible) { outline: 2px solid var(--primary-500); }
#compare-status, #grid-status, #load-status {
  color: var(--body-text-color-subdued); font-size: .88rem; min-height: 1.6rem;
}
#explore-bar { align-items: center; gap: .6rem; margin: -.4rem 0 -.5rem; }
#explore-status { flex: 1; color: var(--body-text-color-subdued); font-size: .88rem; min-height: 1.6rem; }
#explore-picture img { object-fit: contain; width: 100%; height: 100%; }
#explore-card .text { font-size: 1.05rem; line-height: 1.45; margin: 0 0 .4rem; overflow-wrap: anywhere; }
#explore-card dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .9rem; margin: 0; font-size: .84rem; }
#explore-card dt { color: var(--body-text-color-subdued); }
#explore-card dd { margin: 0; overflow-wrap: anywhere; }
.bar { height: 5px; border-radius: 3px; overflow: hidden; margin: .3rem 0; background: var(--neutral-200); }
.dark .bar { background: var(--neutral-700); }
.bar div { height: 100%; background: var(--primary-500); border-radius: 3px; transition: width .15s linear; }
h2 { font-size: 1.05rem; font-weight: 600; margin: .2rem 0 0; }
h2 + p { margin: 0; font-size: .9rem; }
#why table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
#why th, #why td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--border-color-primary); }
#why table, #why tr { border: 0; }
#why th, #why td { border-width: 0 0 1px; }
#why { overflow-x: auto; }
#contracts pre {
  white-space: pre-wrap; font-size: .84rem; padding: .7rem .9rem; margin: .5rem 0; border-radius: 8px;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
}
@media (max-width: 700px) {
  /* what is found comes right below the picture: both columns are laid out as one */
  #draw { flex-direction: column; flex-wrap: nowrap; }
  #draw > .column { display: contents; }
  #found-head, #find-options, #found { order: 1; }
  #head p { order: 1; flex-basis: 100%; }
  #more, #retrieval, #made-head, #made, #as-code { order: 2; }
  #tabs .tab-wrapper button { padding: 0 .4rem !important; font-size: .84rem !important; }
  #why th, #why td { padding: .35rem .3rem; font-size: .78rem; }
}
body.dropping::after {
  content: "Drop a picture: its settings come back"; position: fixed; inset: 12px; z-index: 1000; display: grid;
  place-items: center; border: 3px dashed var(--primary-500); border-radius: 16px; font-size: 1.3rem;
  background: color-mix(in srgb, var(--body-background-fill) 85%, transparent);
  pointer-events: none;
}
"""
