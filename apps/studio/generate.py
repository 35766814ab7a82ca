"""The left side: the prompt, its settings, and the picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import gradio as gr

from textcond.apps.generation import REFERENCE_GUIDANCE
from textcond.apps.metadata import REFERENCE, Parameters, usual_encoder
from textcond.apps.schedulers import SCHEDULERS, known_scheduler

from .shared import MAX_COUNT, MAX_GUIDANCE, MAX_PROMPT, MAX_SIZE, MAX_STEPS, MIN_SIZE, PAGE_SEEDS, Studio

OTHER_GUIDANCE = 7.0
OWN = "own"
OFF, STRENGTH = "off", 0.3
USES = [("off", OFF), ("shown", "suggest"), ("expand the prompt", "expand"), ("blend in", "blend")]


@dataclass
class Settings:
    """The components that decide a picture, in the order in which events get their values."""

    prompt: gr.Textbox
    negative: gr.Textbox
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    encoder: gr.Dropdown
    width: gr.Number
    height: gr.Number
    scheduler: gr.Dropdown
    neighbours: gr.Radio
    strength: gr.Slider

    @property
    def inputs(self) -> list[Any]:
        """All of them."""
        return list(vars(self).values())

    def show(self, parameters: Parameters, studio: Studio) -> dict[Any, Any]:
        """The values with which the components say `parameters`, or what comes near, see `sayable`."""
        said, scale = sayable(parameters, studio), parameters.guidance_scale
        return {
            self.prompt: parameters.retrieval.get("prompt", parameters.prompt),
            self.negative: parameters.negative_prompt,
            self.seed: said.seed,
            self.steps: said.num_inference_steps,
            self.guidance: gr.skip() if scale is None else said.guidance_scale,
            self.encoder: gr.update(choices=studio.offered, value=said.encoder),
            self.width: said.width or 0,
            self.height: said.height or 0,
            self.scheduler: said.scheduler or OWN,
            self.neighbours: parameters.retrieval.get("mode", OFF),
            self.strength: parameters.retrieval.get("strength", STRENGTH),
        }

    def encoders(self, studio: Studio) -> dict[Any, Any]:
        """The encoders of the pipeline that is loaded, its usual one chosen."""
        return {self.encoder: gr.update(choices=studio.offered, value=usual_encoder(studio.engine.name))}


def sayable(parameters: Parameters, studio: Studio) -> Parameters:
    """The nearest to `parameters` that the page can say: within its limits, with what is offered here."""
    encoder, scale = parameters.encoder, parameters.guidance_scale
    return replace(
        parameters,
        seed=parameters.seed % PAGE_SEEDS,
        num_inference_steps=min(parameters.num_inference_steps, MAX_STEPS),
        guidance_scale=None if scale is None else min(MAX_GUIDANCE, max(1.0, scale)),
        encoder=encoder if studio.takes(encoder) else usual_encoder(studio.engine.name),
        width=parameters.width and min(MAX_SIZE, max(MIN_SIZE, parameters.width)),
        height=parameters.height and min(MAX_SIZE, max(MIN_SIZE, parameters.height)),
        scheduler=known_scheduler(parameters.scheduler),
    )


def unsaid(parameters: Parameters, studio: Studio) -> str:
    """What `sayable` changes: "steps 1000 to 60", comma-separated; empty for nothing."""
    was, said = asdict(parameters), asdict(sayable(parameters, studio))
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "scheduler": "sampler"}
    if said["scheduler"] and "Karras" not in was["scheduler"]:
        said["scheduler"] = was["scheduler"]  # another name for the same
    changed = [name for name in was if was[name] != said[name]]
    return ", ".join(f"{names.get(name, name)} {was[name]} to {said[name] or 'the default'}" for name in changed)


def read(studio: Studio, values: tuple, seed: int | None = None) -> Parameters:
    """The parameters that the values of `Settings.inputs` say.

    Raises:
        ValueError: a number is out of range.
    """
    prompt, negative, number, steps, guidance, encoder, width, height, scheduler, mode, strength = values
    for name, size in (("width", width), ("height", height)):
        if size and size < MIN_SIZE:
            raise ValueError(f"{name} {size} is too small: choose {MIN_SIZE} to {MAX_SIZE} pixels, or 0")
    return Parameters(
        prompt=prompt or "",
        negative_prompt=negative or "",
        seed=int(number or 0) if seed is None else seed,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        width=int(width) if width else None,
        height=int(height) if height else None,
        pipeline=studio.engine.name,
        # another page may have loaded a pipeline that an encoder chosen here does not fit
        encoder=encoder if encoder and studio.takes(encoder) else usual_encoder(studio.engine.name),
        scheduler=None if scheduler in (None, OWN) else scheduler,
        retrieval={} if mode == OFF else {"mode": mode, "strength": float(strength)},
    )


def several(first: Parameters, count: int) -> list[Parameters]:
    """The same with one seed after the other."""
    return [replace(first, seed=(first.seed + number) % PAGE_SEEDS) for number in range(count)]


@dataclass
class Generate:
    """The left side of the page."""

    settings: Settings
    fresh: gr.Checkbox
    count: gr.Slider
    length: gr.HTML
    generate: gr.Button
    stop: gr.Button
    surprise: gr.Button
    restore: gr.UploadButton
    reuse: gr.Button
    picture: gr.Image
    status: gr.HTML
    similar: gr.Button
    save: gr.Button
    code: gr.Code
    used: gr.HTML
    without: gr.Button
    slider: gr.ImageSlider
    made_head: gr.Row
    history: gr.Gallery

    def use(self, text: str, metadata: dict[str, Any]) -> dict[Any, Any]:
        """The values that take over a row of the index: its prompt, and what it says of negative prompt and seed."""
        values: dict[Any, Any] = {self.settings.prompt: text}
        if isinstance(negative := metadata.get("negative_prompt"), str):
            values[self.settings.negative] = negative
        if isinstance(seed := metadata.get("seed"), int) and not isinstance(seed, bool):
            values |= {self.settings.seed: seed % PAGE_SEEDS, self.fresh: False}
        return values


def generate_side(studio: Studio) -> Generate:
    """Lay it out, in the column that is open."""
    guidance = REFERENCE_GUIDANCE if studio.engine.name == REFERENCE else OTHER_GUIDANCE
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="red apple, twemoji style, on a blue background",
        max_lines=5,
        max_length=MAX_PROMPT,
        autofocus=True,
        elem_id="prompt",
    )
    length = gr.HTML(elem_id="count")
    with gr.Row(elem_id="actions"):
        generate = gr.Button("Generate", variant="primary", scale=3, min_width=120, elem_id="generate")
        stop = gr.Button("Stop", interactive=False, scale=1, min_width=70, elem_id="stop")
        surprise = gr.Button("Surprise me", scale=2, min_width=110, elem_id="surprise")
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
                elem_id="picture",
            )
            status = gr.HTML(elem_id="status")
            with gr.Row(elem_id="with-picture"):
                similar = gr.Button("Find similar", size="sm", min_width=90, interactive=False, elem_id="similar")
                save = gr.Button(
                    "Save to index", size="sm", min_width=90, interactive=False, visible=studio.trusted, elem_id="save"
                )
                restore = gr.UploadButton(
                    "Open a picture", size="sm", min_width=90, file_types=["image"], elem_id="restore"
                )
        with gr.Column(scale=3, min_width=220):
            negative = gr.Textbox(
                label="Negative prompt",
                placeholder="what to keep out",
                max_lines=3,
                max_length=MAX_PROMPT,
                elem_id="negative",
            )
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=PAGE_SEEDS - 1, elem_id="seed")
            with gr.Row(elem_id="seeds"):
                fresh = gr.Checkbox(label="Random", value=True, container=False, min_width=90, elem_id="random")
                reuse = gr.Button("Reuse seed", size="sm", min_width=90, elem_id="reuse")
            steps = gr.Slider(1, MAX_STEPS, value=20, step=1, label="Steps", elem_id="steps")
            scale = gr.Slider(1, MAX_GUIDANCE, value=guidance, step=0.5, label="Guidance", elem_id="guidance")
            encoder = gr.Dropdown(
                label="Text encoder",
                info="a folder or hub id may be typed" if studio.trusted else None,
                choices=studio.offered,
                value=usual_encoder(studio.engine.name),
                allow_custom_value=studio.trusted,
                elem_id="encoder",
            )
    with gr.Accordion("Size, sampler, how many", open=False, elem_id="more"), gr.Row():
        width, height = (
            gr.Number(
                label=name,
                info="0: the model's own",
                value=0,
                precision=0,
                minimum=0,
                maximum=MAX_SIZE,
                step=8,
                min_width=90,
                elem_id=name.lower(),
            )
            for name in ("Width", "Height")
        )
        scheduler = gr.Dropdown(
            label="Sampler",
            choices=[("default", OWN), *((one.removesuffix("Scheduler"), one) for one in SCHEDULERS)],
            value=OWN,
            min_width=160,
            elem_id="scheduler",
        )
        count = gr.Slider(1, MAX_COUNT, value=1, step=1, label="Pictures", min_width=130, elem_id="pictures")
    with gr.Accordion("Neighbours in the picture", open=False, elem_id="retrieval"):
        with gr.Row():
            neighbours = gr.Radio(USES, value=OFF, label="The nearest prompts", min_width=220, elem_id="neighbours")
            strength = gr.Slider(0, 1, value=STRENGTH, step=0.05, label="Strength", min_width=140, elem_id="strength")
        used = gr.HTML(elem_id="used")
        without = gr.Button("Same seed without them", size="sm", interactive=False, elem_id="without")
        slider = gr.ImageSlider(
            label="Left with the neighbours, right without",
            type="filepath",
            format="png",
            interactive=False,
            height=380,
            max_height=378,  # without the border, or the two pictures lie shifted against each other
            buttons=[],
            visible=False,
            elem_id="with-without",
        )
    with gr.Row(visible=False, elem_id="made-head") as made_head:
        gr.HTML("<h2>Made by you</h2>")
        # What it hides is in the style sheet.
        gr.Checkbox(label="Only favourites", container=False, scale=0, min_width=140, elem_id="only-stars")
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
        elem_classes="tiles",
    )
    with gr.Accordion("The picture as diffusers code", open=False, elem_id="as-code"):
        code = gr.Code(
            value="# appears with the first picture",
            language="python",
            show_label=False,
            interactive=False,
            buttons=["copy"],
            elem_id="code",
        )
    settings = Settings(prompt, negative, seed, steps, scale, encoder, width, height, scheduler, neighbours, strength)
    return Generate(
        settings, fresh, count, length, generate, stop, surprise, restore, reuse, picture, status, similar, save, code,
        used, without, slider, made_head, history,
    )  # fmt: skip
