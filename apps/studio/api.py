"""The typed endpoints: for `gradio_client`, and as tools for language models over MCP."""

# No `from __future__ import annotations` here: gradio reads the return types as they are.
import functools
import inspect
import secrets
import threading
from collections.abc import Callable
from typing import Any, Literal

import gradio as gr
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from gradio.data_classes import FileData

from textcond.apps.errors import one_line
from textcond.apps.metadata import MAX_SEED, Parameters, usual_encoder

from .drawing import drawing
from .history import Made
from .shared import MAX_GUIDANCE, MAX_PROMPT, MAX_SIZE, MAX_STEPS, MIN_SIZE, SEEDS, Studio, log

MAX_RESULTS, MAX_TEXTS = 100, 256
MAX_WAITING = 80


def add_api(studio: Studio) -> None:
    """Add the endpoints to the page that is open."""
    engine = studio.engine
    # All that is made through the API lies in one history, of which the last are kept; no page has its token.
    token = secrets.token_hex(16)
    # Who stands in the line takes none of the threads that others find with.
    waiting = CapacityLimiter(MAX_WAITING)

    @_told
    async def generate(
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
        _check_text("prompt", prompt, 0)
        _check_text("negative prompt", negative_prompt, 0)
        _check("steps", steps, 1, MAX_STEPS, int)
        _check("seed", seed, -1, MAX_SEED, int)
        _check("strength", strength, 0, 1)
        if guidance:
            _check("guidance", guidance, 1, MAX_GUIDANCE)
        for name, size in (("width", width), ("height", height)):
            if size:
                _check(name, size, MIN_SIZE, MAX_SIZE, int)
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
        stop = threading.Event()

        def draw() -> Made:
            *_, made = drawing(engine, [engine.retrieved(parameters)], studio.history(token), stop, studio.line)
            return made

        try:
            made = await run_sync(draw, abandon_on_cancel=True, limiter=waiting)
        finally:  # also if who asked takes it back
            stop.set()
        # One output: of several, gradio's MCP server makes one text, and the picture is not seen.
        return FileData(path=str(made.path), orig_name=made.path.name, mime_type="image/png").model_dump()

    @_told
    async def search(
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
        _check_text("query", query, 1)
        if not query.strip():
            raise ValueError("the query is empty: pass the words to look for")
        _check("k", k, 1, MAX_RESULTS, int)
        _check_encoder(studio, encoder)
        hits = await run_sync(lambda: engine.finder(encoder).search(query, k, mode))
        return [
            {"id": str(hit.id), "score": float(hit.score), "text": hit.text, "metadata": hit.metadata} for hit in hits
        ]

    @_told
    async def embed(
        texts: list[str], kind: Literal["query", "document"] = "query", encoder: str = ""
    ) -> list[list[float]]:
        """Turn texts into vectors of unit length by the encoder that conditions the pictures.

        Args:
            texts: up to 256 of them.
            kind: whether they are looked for, or looked in.
            encoder: as for drawing.

        Returns:
            A vector for each text; the dot product of two is their cosine.
        """
        if not isinstance(texts, list):
            raise ValueError(f"texts is {texts!r:.80}: pass a list of texts")
        _check("number of texts", len(texts), 1, MAX_TEXTS)
        for text in texts:
            _check_text("a text", text, 0)
        _check("length of all texts", sum(map(len, texts)), 0, MAX_PROMPT)
        _check_encoder(studio, encoder)
        return await run_sync(lambda: engine.finder(encoder).encoder.encode(texts, kind=kind).tolist())

    gr.api(generate, api_name="generate", concurrency_limit=MAX_WAITING, concurrency_id="draw")
    gr.api(search, api_name="search", concurrency_limit=4)
    gr.api(embed, api_name="embed", concurrency_limit=2)


def _told(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The endpoint, with what goes wrong told to who called it."""

    @functools.wraps(endpoint)
    async def told(*arguments: Any, **named: Any) -> Any:
        try:
            return await endpoint(*arguments, **named)
        except Exception as error:
            log(error)
            raise gr.Error(one_line(error), print_exception=False) from error

    told.__signature__ = inspect.signature(endpoint)
    return told


def _check(name: str, value: float, least: float, most: float, kind: type = float) -> None:
    numbers = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers) or not least <= value <= most:
        whole = "a whole number " if kind is int else ""
        raise ValueError(f"{name} is {value!r:.80}: pass {whole}from {least} to {most}")


def _check_text(name: str, value: str, least: int) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.80}: pass a text")
    if not least <= len(value) <= MAX_PROMPT:
        raise ValueError(f"{name} has {len(value):,} characters: pass {least} to {MAX_PROMPT:,}")


def _check_encoder(studio: Studio, encoder: str) -> None:
    if encoder and not (isinstance(encoder, str) and studio.takes(encoder)):
        raise ValueError(f"encoder {encoder!r:.80} is not offered here: choose one of {', '.join(studio.offered)}")
