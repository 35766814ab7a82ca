"""`/search`, and where the server lets clients write `/add` and `/delete`: a prompt index for many at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from fastapi import APIRouter
from fastapi.responses import Response

from textcond.index.pictures import read_picture

from .errors import Refusal
from .messages import AddAnswer, AddRequest, DeleteAnswer, DeleteRequest, SearchAnswer, SearchRequest
from .pictures import picture_file, picture_text

if TYPE_CHECKING:
    from textcond import Hit, PromptIndex

DECODED = 2  # pictures in memory at a time: a small file may be hundreds of megabytes decoded
Result = TypeVar("Result")


def search_routes(index: PromptIndex | None, threads: Executor, *, writable: bool) -> APIRouter:
    """Return the routes over `index`, whose calls run in `threads`; without an index or leave they say what to do."""
    router = APIRouter()
    writing = asyncio.Lock()  # one writer at a time, and no thread that only waits for its turn
    decoding = asyncio.Semaphore(DECODED)

    async def run(work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except (ValueError, TypeError) as error:  # what the index says of a request that it cannot follow
            raise Refusal(400, " ".join(str(error).split())) from error
        except KeyError as error:
            raise Refusal(404, str(error.args[0])) from error

    if index is None:

        @router.post("/search", include_in_schema=False)
        async def no_search() -> None:
            raise Refusal(404, "this server has no index to search: start it with --index")

    else:

        @router.post("/search", response_model=SearchAnswer)
        async def search(request: SearchRequest) -> Response:
            """Find rows by a text, a picture, a vector or another row."""
            async with decoding if request.image is not None else contextlib.nullcontext():
                body = await run(lambda: _search(index, request))
            return Response(body, media_type="application/json")

    if index is None or not writable:
        for path in ("/add", "/delete"):

            @router.post(path, include_in_schema=False)
            async def no_writing() -> None:
                raise Refusal(403, "this server takes no changes: start it with --index and --writable")

        return router

    @router.post("/add")
    async def add(request: AddRequest) -> AddAnswer:
        """Encode texts and keep them as rows; when the answer comes they are on disk."""
        async with writing:
            return AddAnswer(ids=await run(lambda: _add(index, request)))

    @router.post("/delete")
    async def delete(request: DeleteRequest) -> DeleteAnswer:
        """Remove rows."""
        async with writing:
            return DeleteAnswer(deleted=await run(lambda: index.delete(request.ids, filter=request.filter)))

    return router


def _search(index: PromptIndex, request: SearchRequest) -> str:
    query = request.text
    if request.image is not None:
        query = read_picture(picture_file(request.image))
    elif request.vector is not None:
        query = np.asarray(request.vector, np.float32)
    hits = index.search(
        query,
        request.k,
        id=request.id,
        mode=request.mode,
        filter=request.filter,
        diversity=request.diversity,
        collapse=request.collapse,
    )
    return json.dumps({"hits": [_found(hit, request.images) for hit in hits]})


def _found(hit: Hit, images: bool) -> dict:
    return {
        "id": hit.id,
        "score": float(hit.score),
        "text": hit.text,
        "metadata": hit.metadata,
        "dense_rank": hit.dense_rank,
        "lexical_rank": hit.lexical_rank,
        "image": picture_text(hit) if images else None,
    }


def _add(index: PromptIndex, request: AddRequest) -> list[str]:
    images = request.images and [
        None if image is None else picture_file(image, f"image {number}") for number, image in enumerate(request.images)
    ]
    write = index.upsert if request.replace else index.add
    return write(request.texts, metadata=request.metadata, images=images, ids=request.ids)
