"""What clients send and get: the OpenAI embeddings protocol, and search in a prompt index."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, WithJsonSchema, model_validator

MAX_INPUTS = 2048  # texts of one request, as at OpenAI
MAX_CHARACTERS = 32_768  # of one text; what the encoder reads of it ends far before
MAX_IDS = 10_000
MAX_WIDTH = 65_536


def _text(value: Any, name: str = "the text") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}: send a string")
    if not value.strip():
        raise ValueError(f"{name} is empty: send at least one word")
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(value):,} characters, more than {MAX_CHARACTERS:,}: send less")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode (half of a surrogate pair): send well-formed text") from None
    return value


def _texts(value: Any) -> list[str]:
    """One text or a list of them; what is wrong is told of the first that is wrong."""
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list):
        raise ValueError(f"the input is {_kind(value)}: send a string or a list of strings")
    if not value:
        raise ValueError("the input is an empty list: send at least one text")
    if isinstance(value[0], int | list) and not isinstance(value[0], bool):
        raise ValueError("the input holds token ids, which belong to another model's tokenizer: send text")
    if len(value) > MAX_INPUTS:
        raise ValueError(f"the input has {len(value):,} texts, more than {MAX_INPUTS:,}: send them in parts")
    return [_text(text, f"text {number}") for number, text in enumerate(value)]


def _kind(value: Any) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[
    list[str],
    BeforeValidator(_texts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_INPUTS}]}
    ),
]
Ids = Annotated[list[str], Field(max_length=MAX_IDS)]
Filter = Annotated[
    dict[str, Any],
    Field(
        description="Over metadata; all must hold: "
        '`{"style": "noto", "language": ["ja", "de"], "steps": {"gte": 20, "lt": 50}}`.'
    ),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbeddingsRequest(_Request):
    """`POST /v1/embeddings`, as OpenAI has it, and `kind`."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Only the encoder's own width.")
    kind: str | None = Field(None, description="`query` or `document`: puts the encoder's prompt before each text.")
    user: str | None = Field(None, description="Not used.")


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class Usage(BaseModel):
    """Tokens that the encoder read, prompts and special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """The vectors in the order of the texts."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage
    truncated: list[int] = Field(description="Which texts were longer than the encoder reads.")


class Model(BaseModel):
    """The encoder behind the server."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "textcond"
    dimensions: int
    max_tokens: int | None


class Models(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class SearchRequest(_Request):
    """`POST /search`: exactly one of `text`, `image`, `vector` and `id`."""

    text: Text | None = None
    image: str | None = Field(None, description="A picture file in base64, or a data: address of one.")
    vector: list[FiniteFloat] | None = Field(None, max_length=MAX_WIDTH)
    id: str | None = Field(None, description="A row of the index, to find what is near it.")
    k: int = Field(10, ge=1, le=1000)
    mode: Literal["hybrid", "dense", "lexical"] = "hybrid"
    filter: Filter | None = None
    diversity: float = Field(0.0, ge=0, le=1)
    collapse: bool = Field(True, description="Leave out near-duplicates.")
    images: bool = Field(False, description="Send the hits' pictures.")

    @model_validator(mode="after")
    def _one_query(self) -> SearchRequest:
        given = [name for name in ("text", "image", "vector", "id") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"send exactly one of text, image, vector and id, got {' and '.join(given) or 'none'}")
        return self


class FoundRow(BaseModel):
    """One hit, best first."""

    id: str
    score: float
    text: str
    metadata: dict[str, Any]
    dense_rank: int | None
    lexical_rank: int | None
    image: str | None = Field(description="The stored file in base64, if pictures were asked for and the row has one.")


class SearchAnswer(BaseModel):
    """What `PromptIndex.search` found."""

    hits: list[FoundRow]


class AddRequest(_Request):
    """`POST /add`: texts, and for each of them metadata, a picture and an id, or null."""

    texts: Texts
    metadata: list[dict[str, Any] | None] | None = None
    images: list[str | None] | None = Field(None, description="Picture files in base64.")
    ids: list[str] | None = None
    replace: bool = Field(False, description="Put rows in place of those with the same ids, which are else refused.")


class AddAnswer(BaseModel):
    """The rows' ids in the order of the texts."""

    ids: list[str]


class DeleteRequest(_Request):
    """`POST /delete`: rows by id, or all that pass a filter."""

    ids: Ids | None = None
    filter: Filter | None = None

    @model_validator(mode="after")
    def _something(self) -> DeleteRequest:
        if not self.ids and not self.filter:
            raise ValueError("send ids or a filter that says which rows to delete")
        return self


class DeleteAnswer(BaseModel):
    """How many rows are gone."""

    deleted: int


class Health(BaseModel):
    """`GET /health`."""

    status: Literal["ok"] = "ok"
    model: str
