"""The application behind `textcond serve`: its routes put together, and what it answers when one of them fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from textcond.apps.errors import one_line

from .batching import BatchedEncoder, Batcher
from .embeddings import embedding_routes
from .errors import Refusal
from .gate import Gate
from .messages import Health
from .metrics import CONTENT_TYPE, Metrics
from .search import search_routes

if TYPE_CHECKING:
    from textcond import PromptIndex, TextEncoder

SEARCHES = 64  # threads that search at a time; most of them wait for the encoder


def create_app(
    encoder: TextEncoder,
    index: PromptIndex | None = None,
    *,
    model: str,
    writable: bool = False,
    api_key: str | None = None,
    queue: int = 256,
    batch_tokens: int | None = None,
    batch_wait: float = 0.002,
) -> FastAPI:
    """Return the application; when its lifespan ends, what is in work has been answered and the encoder's thread ends.

    Args:
        encoder: what encodes for everybody; only the application may use it from now on.
        index: what `/search` looks in, made with `encoder`; None serves embeddings alone.
        model: the name by which clients ask for the encoder.
        writable: whether clients may add rows and delete them.
        api_key: what clients must send as a bearer token; None lets everybody in.
        queue: requests that may wait or be worked on; one more is refused at once with 503.
        batch_tokens, batch_wait: as for `Batcher`.
    """
    metrics = Metrics()
    batcher = Batcher(encoder, batch_tokens=batch_tokens, wait=batch_wait, metrics=metrics)
    threads = ThreadPoolExecutor(SEARCHES, "textcond-search")
    if index is not None:
        from textcond import PromptIndex

        index = PromptIndex(BatchedEncoder(batcher), index.store)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        threads.shutdown()
        batcher.stop()

    app = FastAPI(
        title="textcond",
        summary="Embeddings and prompt search by the text encoder that conditions the pictures.",
        lifespan=lifespan,
        docs_url=None,  # the pages that FastAPI makes fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(embedding_routes(batcher, model))
    app.include_router(search_routes(index, threads, writable=writable))

    @app.get("/health")
    async def health() -> Health:
        """Whether requests are answered; needs no key."""
        if not batcher.alive:
            raise Refusal(503, "the encoder's thread has ended: start the server again")
        return Health(model=model)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def scrape() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    paths = {*app.openapi()["paths"], app.openapi_url}
    app.add_middleware(Gate, queue=queue, api_key=api_key, metrics=metrics, paths=paths)
    _answer_errors(app, paths)
    return app


def _answer_errors(app: FastAPI, paths: set[str]) -> None:
    @app.exception_handler(Refusal)
    async def refuse(_: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> Response:
        return Refusal(400, _first_mistake(error.errors()[0])).response()

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path}: use one of {', '.join(sorted(paths))}"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}: see {app.openapi_url}"
        return Refusal(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)  # its traceback goes to the server's log
    async def fail(_: Request, error: Exception) -> Response:
        return Refusal(500, one_line(error)).response()


def _first_mistake(error: dict[str, Any]) -> str:
    """One sentence about the first thing that is wrong with a body."""
    place = [part for part in error["loc"] if part != "body"]
    field = ".".join(str(part) for part in place)
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if not place:
        if error["type"] == "value_error":
            return error["msg"].removeprefix("Value error, ")
        return "the body is no JSON object: send one, with Content-Type: application/json"
    if error["type"] == "extra_forbidden":
        return f"unknown field {field!r}: take it out"
    if error["type"] == "missing":
        return f"the field {field!r} is missing"
    return f"{field}: {error['msg'].removeprefix('Value error, ')}"
