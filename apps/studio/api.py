"""The typed endpoints: for `gradio_client`, and as tools for language models over MCP."""

# No `from __future__ import annotations` here: gradio reads the return types as they are.
import secrets
import threading
from typing import Any, Literal

import gradio as gr
from gradio.data_classes import FileData

from textcond.apps.metadata import Parameters, usual_encoder

from .drawing import drawing
from .shared import MAX_GUIDANCE, MAX_PROMPT, MAX_SIZE, MAX_STEPS, MIN_SIZE, SEEDS, Studio

MAX_RESULTS, MAX_TEXTS = 100, 256
# All that was made through the API lies in one history, of which the last are kept.
API_TOKEN = "0" * 32


def add_api(studio: Studio) -> None:
    """Add the endpoints to the page that is open."""
    engine = studio.engine

    def generate(
        prompt: str,
        negative_prompt: str = "",
        seed: int = -1,
        steps: int = 20,
        guidance: float = 0.0,
        width: int = 0,
        height: int = 0,
        encoder: str = "",
        scheduler: str = "",
        neighbours: Literal["off", "expand", "blend"] = "off",
        strength: float = 0.3,
    ) -> dict[str, Any]:
        """Draw a picture of a prompt, in any language.

        Args:
            prompt: what to draw.
            negative_prompt: what to keep out of the picture.
            seed: of the first noise; -1 is a random one. The same seed gives the same picture.
            steps: denoising steps, 1 to 60.
            guidance: classifier-free guidance, 1 to 15; 0 is the pipeline's own.
            width: pixels, 64 to 1024; 0 is the pipeline's own.
            height: pixels, 64 to 1024; 0 is the pipeline's own.
            encoder: what conditions the pipeline; "native" is its own, empty the usual one, which for the reference
                model is "multilingual".
            scheduler: the sampler; empty is the pipeline's own.
            neighbours: whether the nearest prompts of the index expand this one or are blended into its conditioning.
            strength: of the neighbours, 0 to 1.

        Returns:
            The picture: a PNG whose metadata hold all parameters, named after prompt and seed.
        """
        _check("prompt", len(prompt), 0, MAX_PROMPT)
        _check("negative prompt", len(negative_prompt), 0, MAX_PROMPT)
        _check("steps", steps, 1, MAX_STEPS)
        if guidance:
            _check("guidance", guidance, 1, MAX_GUIDANCE)
        for name, size in (("width", width), ("height", height)):
            if size:
                _check(name, size, MIN_SIZE, MAX_SIZE)
        _check_encoder(studio, encoder)
        parameters = Parameters(
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=secrets.randbelow(SEEDS) if seed < 0 else seed,
            num_inference_steps=steps,
            guidance_scale=guidance or None,
            width=width or None,
            height=height or None,
            pipeline=engine.name,
            encoder=encoder or usual_encoder(engine.name),
            scheduler=scheduler or None,
            retrieval={} if neighbours == "off" else {"mode": neighbours, "strength": strength},
        )
        if parameters.retrieval:
            parameters, _ = engine.retrieved(parameters)
        *_, made = drawing(engine, [parameters], studio.history(API_TOKEN), threading.Event(), studio.line)
        # One output: of several, gradio's MCP server makes one text, and the picture is not seen.
        return FileData(path=str(made.path), orig_name=made.path.name, mime_type="image/png").model_dump()

    def search(
        query: str, k: int = 10, mode: Literal["dense", "lexical", "hybrid"] = "hybrid", encoder: str = ""
    ) -> list[dict[str, Any]]:
        """Find the prompts nearest to a query in the index, in any language.

        Args:
            query: words to look for.
            k: how many, 1 to 100.
            mode: "dense" compares the meaning, "lexical" the words, "hybrid" both.
            encoder: whose meaning; as for drawing.

        Returns:
            For each: id, score, text, metadata.
        """
        if not query.strip():
            raise gr.Error("the query is empty: pass the words to look for", print_exception=False)
        _check("k", k, 1, MAX_RESULTS)
        _check("query", len(query), 1, MAX_PROMPT)
        _check_encoder(studio, encoder)
        hits = engine.finder(encoder).search(query, k, mode)
        return [
            {"id": str(hit.id), "score": float(hit.score), "text": hit.text, "metadata": hit.metadata} for hit in hits
        ]

    def embed(texts: list[str], kind: Literal["query", "document"] = "query", encoder: str = "") -> list[list[float]]:
        """Turn texts into vectors of unit length by the encoder that conditions the pictures.

        Args:
            texts: up to 256 of them.
            kind: whether they are looked for, or looked in.
            encoder: as for drawing.

        Returns:
            A vector for each text; the dot product of two is their cosine.
        """
        _check("number of texts", len(texts), 1, MAX_TEXTS)
        _check("length of all texts", sum(map(len, texts)), 0, MAX_PROMPT)
        _check_encoder(studio, encoder)
        return engine.finder(encoder).encoder.encode(texts, kind=kind).tolist()

    gr.api(generate, api_name="generate", concurrency_limit=80, concurrency_id="draw")
    gr.api(search, api_name="search", concurrency_limit=4)
    gr.api(embed, api_name="embed", concurrency_limit=2)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise gr.Error(f"{name} is {value}: pass {least} to {most}", print_exception=False)


def _check_encoder(studio: Studio, encoder: str) -> None:
    if encoder and not studio.takes(encoder):
        choices = ", ".join(studio.offered)
        raise gr.Error(f"encoder {encoder!r} is not offered here: choose one of {choices}", print_exception=False)
