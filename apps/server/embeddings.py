"""`/v1/embeddings` and `/v1/models`, as OpenAI's clients know them."""

from __future__ import annotations

import asyncio
import base64

import orjson
from fastapi import APIRouter
from fastapi.responses import Response

from .batching import Batcher
from .errors import Refusal
from .messages import EmbeddingsAnswer, EmbeddingsRequest, Model, Models


def embedding_routes(batcher: Batcher, model: str) -> APIRouter:
    """Return the routes that serve the batcher's encoder under the name `model`."""
    router = APIRouter()
    encoder = batcher.encoder

    @router.get("/v1/models")
    async def models() -> Models:
        """List the one model there is."""
        return Models(data=[Model(id=model, dimensions=encoder.dim, max_tokens=encoder.max_length)])

    @router.post("/v1/embeddings", response_model=EmbeddingsAnswer)
    async def embeddings(request: EmbeddingsRequest) -> Response:
        """Encode texts to unit vectors; the order of the answer is the order of the texts."""
        if request.model != model:
            raise Refusal(404, f"there is no model {request.model!r}: this server has {model!r}", "model_not_found")
        if request.dimensions not in (None, encoder.dim):
            raise Refusal(
                400, f"dimensions is {request.dimensions}: the vectors of {model!r} cannot be cut from {encoder.dim}"
            )
        kinds = {"query", "document", *encoder.config.prompts}
        if request.kind is not None and request.kind not in kinds:
            raise Refusal(400, f"kind is {request.kind!r}: use one of {', '.join(sorted(kinds))}")
        encoded = await asyncio.wrap_future(batcher.submit(request.input, request.kind))
        vectors = encoded.vectors
        if request.encoding_format == "base64":
            vectors = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        answer = {
            "object": "list",
            "model": model,
            "data": [
                {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": encoded.tokens, "total_tokens": encoded.tokens},
            "truncated": encoded.truncated,
        }
        # many times faster than the standard library for float32, and it writes no more digits than they have
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    return router
