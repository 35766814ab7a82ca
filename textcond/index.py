"""Prompts and their pictures, found by meaning: exact cosine search over encoded texts."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from .encoder import TextEncoder
from .folders import atomic_folder, check_safetensors, read_json, write_json

FORMAT = "textcond-prompt-index"
VERSION = 1
VECTORS, ROWS, CONFIG, IMAGES = "vectors.safetensors", "rows.jsonl", "config.json", "images.zip"
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
# the exact scores decide among rows whose float32 products differ by no more than rounding can
ROUNDING = 1e-5


@dataclass
class Hit:
    """A row that was found: its place in the index, its cosine to the query, its text, metadata and picture."""

    id: int
    score: float
    text: str
    metadata: dict[str, Any]
    _read_image: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def image(self) -> Image.Image | None:
        """The row's picture, read when first asked for; None if it has none."""
        return self._read_image() if self._read_image else None


@dataclass
class _Row:
    text: str
    metadata: dict[str, Any]
    image: "Image.Image | Path | str | None"  # in memory, a file, or a name in the index's images.zip


class PromptIndex:
    """An index of texts with metadata and pictures, searched by text or vector with the encoder that made it.

    Vectors are rounded to float16 when they are added: cosines move by less than 0.001, the stored index is half as
    large, and an index gives the same answers before saving and after opening. Search is exact, in float32.

    Args:
        encoder: encodes what is added as documents, and what is searched for as queries.
    """

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self._rows: list[_Row] = []
        self._chunks: list[np.ndarray] = []
        self._weights_hash: str | None = None
        self._archive: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        texts: Iterable[str],
        metadata: Sequence[dict[str, Any] | None] | None = None,
        images: Sequence["Image.Image | str | Path | None"] | None = None,
        *,
        show_progress_bar: bool = False,
    ) -> None:
        """Encode texts and append them, each with its metadata and picture. All of them are added, or none.

        Args:
            texts: the texts; a generator is read to its end.
            metadata: a dict of JSON values for each text, or None.
            images: a PIL image, an image file or None for each text. Files are read again when the index is saved.
            show_progress_bar: show the encoder's progress.

        Raises:
            TypeError: for a single string, or metadata that is not a dict of JSON values.
            ValueError: if the lists differ in length.
            FileNotFoundError: for an image file that is not there.
        """
        if isinstance(texts, str):
            raise TypeError("add takes a list of texts: put the one text in a list")
        texts = list(texts)
        metadata = [None] * len(texts) if metadata is None else list(metadata)
        images = [None] * len(texts) if images is None else list(images)
        for name, values in (("metadata", metadata), ("images", images)):
            if len(values) != len(texts):
                raise ValueError(f"{len(texts)} texts with {len(values)} {name}: give one for each text, or None")
        rows = [
            _Row(text, _checked_metadata(values, position), _checked_image(image))
            for position, (text, values, image) in enumerate(zip(texts, metadata, images))
        ]
        if self._weights_hash is None:
            self._weights_hash = self.encoder.weights_hash()
        vectors = self.encoder.encode(texts, kind="document", show_progress_bar=show_progress_bar)
        self._chunks.append(_unit(vectors.astype(np.float16)))
        self._rows += rows

    def search(self, query: str | np.ndarray, k: int = 10, kind: str | None = "query") -> list[Hit]:
        """Return the `k` rows nearest to a query by cosine, best first; rows of equal score in the order of adding.

        Args:
            query: a text, or a vector `(dim,)` of the index's encoder.
            k: how many; fewer come back from an index that has fewer.
            kind: the prompt that the encoder puts before a text.

        Raises:
            ValueError: for k below 1, or a vector of another width or without a direction.
        """
        if k < 1:
            raise ValueError(f"k={k}: ask for at least 1 result")
        vector = self.encoder.encode(query, kind=kind) if isinstance(query, str) else np.asarray(query, np.float32)
        if vector.shape != (self.encoder.dim,):
            raise ValueError(
                f"the query has shape {vector.shape}, the index holds vectors of shape ({self.encoder.dim},)"
            )
        if not (np.isfinite(vector).all() and vector.any()):
            raise ValueError("the query vector is zero or not finite: it has no direction to compare")
        vector = _unit(vector[None])[0]
        vectors = self._vectors()
        scores = vectors @ vector
        k = min(k, len(scores))
        if k == 0:
            return []
        smallest = np.partition(scores, len(scores) - k)[len(scores) - k]
        near = np.flatnonzero(scores >= smallest - ROUNDING)
        # a matrix product may sum equal rows in different orders; one reduction a row gives equal rows equal scores
        exact = (vectors[near].astype(np.float64) * vector).sum(axis=1)
        best = np.argsort(-exact, kind="stable")[:k]
        return [self._hit(int(near[index]), float(exact[index])) for index in best]

    def rows(self) -> list[Hit]:
        """Return every row in the order of adding, with score 0: nothing was asked."""
        return [self._hit(row_id, 0.0) for row_id in range(len(self))]

    def save(self, path: str | Path) -> None:
        """Write the index as a folder, complete or not at all: vectors, rows, pictures, and what encoder they need.

        An encoder that was loaded from a folder inside the index or beside it is named by its relative path, so that
        the two can be moved together.

        Raises:
            ValueError: if the encoder's weights changed since rows were added.
        """
        path = Path(path).expanduser()
        weights_hash = self.encoder.weights_hash()
        if self._weights_hash not in (None, weights_hash):
            raise ValueError("the encoder changed after rows were added: add them again to a new index")
        with atomic_folder(path, owned=(VECTORS, ROWS, CONFIG, IMAGES)) as new:
            names = self._write_images(new / IMAGES)
            with open(new / ROWS, "w", encoding="utf-8") as file:
                for row, name in zip(self._rows, names):
                    content = {"text": row.text, "metadata": row.metadata} | ({"image": name} if name else {})
                    file.write(json.dumps(content, ensure_ascii=False) + "\n")
            save_file({"vectors": self._vectors().astype(np.float16)}, new / VECTORS)
            write_json(
                new / CONFIG,
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "rows": len(self),
                    "dim": self.encoder.dim,
                    "vectors": "float16",
                    "encoder": _encoder_name(self.encoder, path),
                    "encoder_dtype": str(self.encoder.dtype).removeprefix("torch."),
                    "weights_hash": weights_hash,
                },
            )

    @classmethod
    def open(cls, path: str | Path, encoder: TextEncoder | None = None) -> "PromptIndex":
        """Open a saved index, with the encoder that it names or with an equal one that is already loaded.

        Raises:
            FileNotFoundError: if there is no index, or the encoder that it names is gone.
            ValueError: for another encoder, another version, or damaged content, by file and line.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"no index folder {path}: build one with PromptIndex(encoder).add(...) and save")
        config = read_json(path / CONFIG)
        if config.get("format") != FORMAT:
            raise ValueError(f"{path} is not a prompt index: its {CONFIG} says format {config.get('format')!r}")
        if config.get("version") != VERSION:
            raise ValueError(
                f"{path} has index version {config.get('version')!r}, this release reads {VERSION}: "
                "build the index again, or use the release that wrote it"
            )
        absent = [key for key in ("rows", "dim", "encoder", "encoder_dtype", "weights_hash") if key not in config]
        if absent:
            raise ValueError(f"{path / CONFIG} lacks {', '.join(absent)}: build the index again")
        index = cls(encoder if encoder is not None else _load_encoder(config, path))
        index._check_encoder(config, path)
        index._weights_hash = config["weights_hash"]

        if not (path / VECTORS).exists():
            raise FileNotFoundError(f"{path} holds no {VECTORS}: build the index again")
        check_safetensors(path / VECTORS)
        vectors = load_file(path / VECTORS).get("vectors")
        if vectors is None or vectors.shape != (config["rows"], config["dim"]):
            raise ValueError(
                f"{path / VECTORS} does not hold the {config['rows']} vectors of width {config['dim']} "
                f"that {CONFIG} names: build the index again"
            )
        index._chunks = [_unit(vectors)]
        if (path / IMAGES).exists():
            try:
                index._archive = zipfile.ZipFile(path / IMAGES)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path / IMAGES} is damaged ({error}): build the index again") from error
        pictures = set(index._archive.namelist()) if index._archive else set()
        index._rows = _read_rows(path / ROWS, pictures)
        if len(index._rows) != config["rows"]:
            raise ValueError(
                f"{path / ROWS} has {len(index._rows)} rows, {CONFIG} says {config['rows']}: build the index again"
            )
        return index

    def _vectors(self) -> np.ndarray:
        """Return all unit vectors `(rows, dim)` as one float32 matrix."""
        if len(self._chunks) != 1:
            self._chunks = [np.concatenate([np.empty((0, self.encoder.dim), np.float32), *self._chunks])]
        return self._chunks[0]

    def _hit(self, row_id: int, score: float) -> Hit:
        row = self._rows[row_id]
        read = None if row.image is None else lambda: _decoded(self._image_bytes(row.image)[0])
        if isinstance(row.image, Image.Image):
            read = row.image.copy
        return Hit(row_id, score, row.text, row.metadata, read)

    def _image_bytes(self, image: "Image.Image | Path | str") -> tuple[bytes, str]:
        """Return a picture as a file's bytes and suffix: as given, or as PNG for a picture in memory."""
        if isinstance(image, Path):
            return image.read_bytes(), image.suffix.lower()
        if isinstance(image, str):
            return self._archive.read(image), Path(image).suffix
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue(), ".png"

    def _write_images(self, file: Path) -> list[str | None]:
        """Store each different picture once, under a name made from its content; return every row's name."""
        names: list[str | None] = [None] * len(self)
        if all(row.image is None for row in self._rows):
            return names
        known: dict[Any, str] = {}
        written: set[str] = set()
        # pictures are compressed already, and a stored entry is read in one piece
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for position, row in enumerate(self._rows):
                if row.image is None:
                    continue
                key = id(row.image) if isinstance(row.image, Image.Image) else row.image
                if key not in known:
                    content, suffix = self._image_bytes(row.image)
                    known[key] = f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
                    if known[key] not in written:
                        # a fixed date, so that the same index is the same bytes
                        archive.writestr(zipfile.ZipInfo(known[key]), content)
                        written.add(known[key])
                names[position] = known[key]
        return names

    def _check_encoder(self, config: dict[str, Any], path: Path) -> None:
        if self.encoder.dim != config["dim"]:
            raise ValueError(
                f"{path} holds {config['dim']}-wide vectors, the encoder gives {self.encoder.dim}: "
                f"open it with {config['encoder'] or 'the encoder that built it'}, or build it again with this encoder"
            )
        if self.encoder.weights_hash() != config["weights_hash"]:
            raise ValueError(
                f"{path} was built with another encoder, or with other weights, prompts or dtype of it: open it with "
                f"{config['encoder'] or 'the encoder that built it'} in {config['encoder_dtype']}, "
                "or build it again with this encoder"
            )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return rows `(n, dim)` as float32 of unit length; zeros stay zeros."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _decoded(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def _checked_metadata(values: dict[str, Any] | None, position: int) -> dict[str, Any]:
    if values is None:
        return {}
    try:
        if isinstance(values, dict) and json.loads(json.dumps(values)) == values:
            return values
    except (TypeError, ValueError):
        pass
    raise TypeError(f"metadata {position} is not a dict of JSON values: {values!r:.80}")


def _checked_image(image: "Image.Image | str | Path | None") -> "Image.Image | Path | None":
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return image if image.mode in PNG_MODES else image.convert("RGB")
    path = Path(image).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no image file {image}")
    return path


def _read_rows(file: Path, pictures: set[str]) -> list[_Row]:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}: build the index again")
    rows = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                content = json.loads(line)
                row = _Row(content["text"], content["metadata"], content.get("image"))
                if not (isinstance(row.text, str) and isinstance(row.metadata, dict)):
                    raise TypeError("text must be a string and metadata an object")
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{file} line {number} is not a row ({error!r}): build the index again") from error
            if row.image is not None and row.image not in pictures:
                raise ValueError(f"{file} line {number} names picture {row.image!r}, which {IMAGES} does not hold")
            rows.append(row)
    return rows


def _encoder_name(encoder: TextEncoder, index: Path) -> str | None:
    """Return how an index names its encoder: by its path from the index if the two move together, else as loaded."""
    name = encoder.name_or_path
    if name is None or not Path(name).expanduser().is_dir():
        return name
    folder, index = Path(name).expanduser().resolve(), index.resolve()
    if folder.is_relative_to(index.parent):
        return Path(os.path.relpath(folder, index)).as_posix()
    return str(folder)


def _load_encoder(config: dict[str, Any], index: Path) -> TextEncoder:
    import torch

    name = config["encoder"]
    if not name:
        raise ValueError(f"{index} names no encoder, as it was built with one in memory: pass encoder=")
    folder = index / name
    dtype = getattr(torch, config["encoder_dtype"])
    if folder.is_dir():
        return TextEncoder.from_pretrained(folder, dtype=dtype)
    return TextEncoder.from_pretrained(name, dtype=dtype)
