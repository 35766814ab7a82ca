"""Prompts and their pictures, found by meaning, by words, or by both."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from textcond.folders import atomic_folder

from .filters import INTEGERS, Filter, check_unicode, conditions
from .fusion import NearTexts, maximal_marginal_relevance, reciprocal_rank_fusion
from .lance import INFO, LOCK, LanceStore
from .lexical import query_terms
from .store import Row, Store
from .stored_pictures import Picture, picture_bytes, stored_picture

if TYPE_CHECKING:
    from textcond.encoder import TextEncoder

FORMAT = "textcond-prompt-index"
VERSION = 2
LONGEST_QUERY = 10_000  # characters: no encoder reads more, and a longer one is a mistake
BATCH = 1000
PICTURES = 16  # that are read from a store at a time
Mode = Literal["hybrid", "dense", "lexical"]


@dataclass
class Hit:
    """A row that was found, with its score, its rank on each side (from 1; None where that side did not find it).

    The score is a cosine in dense search, BM25 in lexical search, a sum of reciprocal ranks in hybrid search, and 0
    where nothing was asked.
    """

    id: str
    score: float
    text: str
    metadata: dict[str, Any]
    dense_rank: int | None = None
    lexical_rank: int | None = None
    _read_image: Callable[[], bytes | None] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def image(self) -> Image.Image | None:
        """The row's picture, read when first asked for; None if it has none."""
        content = self.image_file()
        return None if content is None else stored_picture(content, self.id)

    def image_file(self) -> bytes | None:
        """The row's picture as the file's content that was stored; None if it has none."""
        return self._read_image() if self._read_image else None


class _Pictures:
    """The pictures of the rows of one answer, read from the store some at a time: one by one takes ten times longer."""

    def __init__(self, store: Store):
        self._store = store
        self._ids: list[str] = []
        self._read: dict[str, bytes | None] = {}

    def hit(self, row: Row) -> Hit:
        """The row as a hit, without a score."""
        if not row.has_image:
            return Hit(row.id, 0.0, row.text, row.metadata)
        place = len(self._ids)
        self._ids.append(row.id)
        return Hit(row.id, 0.0, row.text, row.metadata, _read_image=lambda: self._content(place))

    def _content(self, place: int) -> bytes | None:
        if self._ids[place] not in self._read:
            asked = self._ids[place : place + PICTURES]
            self._read.update({row.id: row.image for row in self._store.get(asked, vectors=False, images=True)})
        return self._read.pop(self._ids[place], None)


class PromptIndex:
    """Texts with metadata and pictures in a store, searched with the encoder that made their vectors.

    An index in memory is `PromptIndex(encoder)`; `create` and `open` give one whose every change is on disk when the
    call returns.

    Args:
        encoder: encodes what is added as documents, and what is searched for as queries. If it has `encode_image`
            (pictures to vectors `(n, dim)` in the same space), pictures can be searched for, and rows may be pictures
            without a text.
        store: an opened store; None is a new one in memory.

    Raises:
        ValueError: if the store holds the vectors of another encoder.
    """

    def __init__(self, encoder: TextEncoder, store: Store | None = None):
        self._prepare(store or LanceStore(), None, encoder)
        if not self._info:
            self._info = _description(encoder, None)
            self.store.set_info(self._info)
        self._check_encoder(encoder)

    @classmethod
    def create(cls, path: str | Path, encoder: TextEncoder) -> PromptIndex:
        """Make a new index at `path`: a folder, or what `open` says.

        Raises:
            FileExistsError: if there is an index already, or a folder that holds something else.
        """
        store = store_at(path)
        if store.info():
            raise FileExistsError(f"there is an index at {path} already: open it, or choose another place")
        if isinstance(store, LanceStore) and store.path.is_dir() and not store.is_unfinished():
            raise FileExistsError(f"{path} is a folder that holds other files: choose a new one")
        store.set_info(_description(encoder, path))
        return cls.open(path, encoder)

    @classmethod
    def open(cls, path: str | Path, encoder: TextEncoder | None = None) -> PromptIndex:
        """Open an index: a folder (LanceDB), a `*.db` file or `http(s)://host:port/collection` (Milvus).

        Args:
            encoder: the one that the index was made with, if it is in memory already; else the index loads the one that
                it names, when a text is first to be encoded.

        Raises:
            FileNotFoundError: if there is no index.
            ValueError: for another encoder or a newer version.
        """
        if not _is_address(path) and not Path(path).expanduser().exists():
            raise FileNotFoundError(
                f"there is no index at {path}: check the path, or make one (PromptIndex.create, textcond index build)"
            )
        index = cls.__new__(cls)
        index._prepare(store_at(path), path, encoder)
        if not index._info:
            raise FileNotFoundError(f"{path} holds no prompt index ({INFO} is missing): make it again")
        if encoder is not None:
            index._check_encoder(encoder)
        return index

    def _prepare(self, store: Store, path: str | Path | None, encoder: TextEncoder | None) -> None:
        self.store = store
        self._path = path
        self._encoder = encoder
        self._info = store.info()
        if self._info:
            _check_info(self._info, "the index" if path is None else str(path))

    @property
    def encoder(self) -> TextEncoder:
        """The encoder of the index, loaded when first asked for.

        Raises:
            FileNotFoundError: if the encoder that the index names is gone.
            ValueError: if the index names none, or its weights have changed.
        """
        if self._encoder is None:
            try:
                encoder = _load_encoder(self._info, self._path)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"the encoder of {self._path or 'this index'} is gone ({error}): open the index with it from where "
                    "it is now, or make its vectors anew with `textcond index rebuild`"
                ) from error
            self._check_encoder(encoder)
            self._encoder = encoder
        return self._encoder

    @property
    def dim(self) -> int:
        """The width of the vectors."""
        return self._info["dim"]

    def __len__(self) -> int:
        return self.count()

    def count(self, filter: Filter | None = None) -> int:
        """How many rows pass a filter over metadata, see `textcond.index.filters.conditions`."""
        return self.store.count(filter)

    def add(
        self,
        texts: Iterable[str],
        metadata: Sequence[dict[str, Any] | None] | None = None,
        images: Sequence[Picture | None] | None = None,
        ids: Sequence[str] | None = None,
        *,
        vectors: np.ndarray | None = None,
        show_progress_bar: bool = False,
    ) -> list[str]:
        """Encode texts and keep them, each with its metadata and picture: all of them or none.

        When it returns, the rows survive whatever happens to the process.

        Args:
            texts: the texts; a generator is read to its end.
            metadata: a dict of JSON values for each text, or None.
            images: for each text a PIL image, an image file, an encoded picture as bytes, or None.
            ids: new names; by default a hash of text and metadata, under which an equal row is kept once.
            vectors: `(n, dim)`, when the texts are encoded already.
            show_progress_bar: show the encoder's progress.

        Returns:
            The ids of the rows, in the order of the texts.

        Raises:
            TypeError: for a single string, or metadata that is not a dict of JSON values.
            ValueError: for lists of different lengths, a row without text, an id that is there, a damaged picture.
            FileNotFoundError: for an image file that is not there.
            OSError: for a full disk; nothing is added.
        """
        rows = self._new_rows(texts, metadata, images, ids)
        present = {row.id for row in self.store.get([row.id for row in rows], vectors=False, images=False)}
        if ids is not None and present:
            raise ValueError(f"there is a row {min(present)!r} already: use upsert to replace it, or give another id")
        self._write(rows, present, vectors, show_progress_bar)
        return [row.id for row in rows]

    def upsert(
        self,
        texts: Iterable[str],
        metadata: Sequence[dict[str, Any] | None] | None = None,
        images: Sequence[Picture | None] | None = None,
        ids: Sequence[str] | None = None,
        *,
        vectors: np.ndarray | None = None,
        show_progress_bar: bool = False,
    ) -> list[str]:
        """Like `add`, and replace the rows whose ids are there."""
        rows = self._new_rows(texts, metadata, images, ids)
        self._write(rows, set(), vectors, show_progress_bar)
        return [row.id for row in rows]

    def delete(self, ids: Sequence[str] | None = None, *, filter: Filter | None = None) -> int:
        """Remove the rows with these ids, or those that pass the filter, or both must hold; return how many.

        Raises:
            ValueError: if neither is given; `delete(filter={})` is everything.
        """
        if ids is None and filter is None:
            raise ValueError("delete what? give ids, or a filter; filter={} is every row")
        if isinstance(ids, str):
            raise TypeError("delete takes a list of ids: put the one id in a list")
        return self.store.delete(None if ids is None else list(dict.fromkeys(ids)), filter)

    def search(
        self,
        query: str | Image.Image | np.ndarray | None = None,
        k: int = 10,
        *,
        id: str | None = None,
        mode: Mode = "hybrid",
        filter: Filter | None = None,
        diversity: float = 0.0,
        collapse: bool = True,
    ) -> list[Hit]:
        """Return the k best rows for a query, best first; equal scores in the order of ids.

        Args:
            query: a text, a picture (if the encoder reads pictures), or a vector `(dim,)`.
            k: how many; fewer come back if there are fewer, or if most are alike.
            id: a row's, in place of a query: what is like it, without itself.
            mode: "dense" is by meaning, "lexical" by shared words, "hybrid" fuses the two by reciprocal ranks; a
                picture or a vector has no words, so that its hybrid search is dense.
            filter: over metadata, see `textcond.index.filters.conditions`.
            diversity: from 0, the best rows, to 1, the most different ones (maximal marginal relevance).
            collapse: of rows with nearly the same text keep the best one.

        Raises:
            ValueError: for k below 1, an empty or huge query, a vector of another width or without a direction.
            KeyError: for an id that is not there.
        """
        if k < 1:
            raise ValueError(f"k={k}: ask for at least 1 result")
        most = self.store.most or sys.maxsize
        if k > most:
            raise ValueError(f"k={k:,}: this store gives at most {most:,} rows")
        if mode not in ("hybrid", "dense", "lexical"):
            raise ValueError(f"mode {mode!r} is unknown: use hybrid, dense or lexical")
        if not 0 <= diversity <= 1:
            raise ValueError(f"diversity={diversity}: give a number from 0 to 1")
        conditions(filter)
        vector, tokens = self._asked(query, id, mode)
        wanted = k if diversity == 0 else max(4 * k, 20)
        # fusion can put first what is low in both lists; one list needs rows to spare for near-duplicates alone
        if vector is not None and tokens is not None:
            least = max(50, 3 * wanted)
        else:
            least = max(20, 2 * wanted) if collapse else wanted
        depth = min(least + (id is not None), most)
        varied = diversity > 0
        while True:
            dense = [] if vector is None else self.store.dense(vector, depth, filter, exact=False, vectors=varied)
            lexical = [] if tokens is None else self.store.lexical(tokens, depth, filter, vectors=varied)
            hits, vectors = self._hits(dense, lexical, wanted, id, collapse)
            exhausted = len(dense) < depth and len(lexical) < depth
            if len(hits) >= wanted or exhausted or depth > 16 * least or depth == most:
                break
            depth = min(4 * depth, most)  # many near-duplicates
        if varied:
            chosen = maximal_marginal_relevance(np.array([hit.score for hit in hits]), vectors, k, diversity)
            hits = [hits[place] for place in chosen]
        return hits[:k]

    def get(self, ids: Sequence[str]) -> list[Hit]:
        """Return the rows with these ids, in their order; those that are not there are left out."""
        if isinstance(ids, str):
            raise TypeError("get takes a list of ids: put the one id in a list")
        pictures = _Pictures(self.store)
        return [pictures.hit(row) for row in self.store.get(list(ids), vectors=False, images=False)]

    def rows(self, filter: Filter | None = None) -> Iterator[Hit]:
        """Every row that passes a filter, in the store's order."""
        for rows in self.store.scan(filter, batch=BATCH, vectors=False, images=False):
            yield from map(_Pictures(self.store).hit, rows)

    def stats(self) -> dict[str, Any]:
        """What the store says of its size, and which encoder the index needs."""
        return self.store.stats() | {
            key: self._info[key] for key in ("dim", "encoder", "encoder_dtype", "weights_hash")
        }

    def optimize(self) -> None:
        """Make the store fast and small after many changes: see its own `optimize`."""
        self.store.optimize()

    def save(self, path: str | Path) -> None:
        """Write a copy of the whole index; as a folder, it is complete or not at all, and replaces an index there.

        An encoder that was loaded from a folder inside the index or beside it is named by its relative path, so that
        the two can be moved together.

        Raises:
            ValueError: if the encoder's weights changed since rows were added, or `path` is the index itself.
        """
        if self._encoder is not None and self._encoder.weights_hash() != self._info["weights_hash"]:
            raise ValueError("the encoder changed after rows were added: add them again to a new index")
        if self._path is not None and _same_place(path, self._path):
            raise ValueError(f"{path} is the index itself, which keeps what is added at once: save to another place")
        info = self._info | {"encoder": _moved_name(self._info["encoder"], self._path, path)}
        if not isinstance(store_at(path), LanceStore):
            copy = store_at(path)
            if copy.info():
                raise FileExistsError(f"there is an index at {path} already: choose another place")
            _copy(self.store, copy, info)
            return
        with atomic_folder(path, owned=("*.lance", INFO, LOCK)) as folder:
            # nobody else is in the new folder: no old version is to be kept for a reader, and no writer waits
            _copy(self.store, LanceStore(folder, keep_versions=timedelta(milliseconds=1)), info)
            (folder / LOCK).unlink()

    def rebuild(self, path: str | Path, encoder: TextEncoder, *, show_progress_bar: bool = False) -> PromptIndex:
        """Make an index at `path` of the same rows with the vectors of another encoder, and return it.

        If it was stopped half-way, the same call goes on: rows that are there as they are here are not encoded again.

        Raises:
            ValueError: if `path` is this index itself, or holds one of yet another encoder or with other rows.
        """
        if self._path is not None and _same_place(path, self._path):
            raise ValueError(f"{path} is the index itself, which stays as it is: choose another place")
        target = store_at(path)
        if not target.info():
            PromptIndex.create(path, encoder)
        index = PromptIndex.open(path, encoder)
        for rows in index.store.scan(None, batch=BATCH, vectors=False, images=False):
            known = {row.id for row in self.store.get([row.id for row in rows], vectors=False, images=False)}
            if foreign := [row.id for row in rows if row.id not in known]:
                raise ValueError(
                    f"{path} holds the row {foreign[0]!r}, which is not in {self._path or 'this index'}: choose "
                    "another place, or remove it"
                )
        with tqdm(total=len(self), desc="encoding", unit=" rows", disable=not show_progress_bar) as progress:
            for rows in self.store.scan(None, batch=BATCH, vectors=False, images=True):
                made = {row.id: row for row in index.store.get([row.id for row in rows], vectors=False, images=False)}
                done = {row.id for row in rows if row.id in made and _alike(row, made[row.id])}
                index._write(rows, done, None, False)
                progress.update(len(rows))
        index.optimize()
        return index

    def _new_rows(
        self,
        texts: Iterable[str],
        metadata: Sequence[dict[str, Any] | None] | None,
        images: Sequence[Picture | None] | None,
        ids: Sequence[str] | None,
    ) -> list[Row]:
        """Check what is to be added and return it as rows without vectors."""
        if isinstance(texts, str):
            raise TypeError("add takes a list of texts: put the one text in a list")
        texts = list(texts)
        columns = {"metadata": metadata, "images": images, "ids": ids}
        for name, values in columns.items():
            if values is not None and len(values) != len(texts):
                raise ValueError(f"{len(texts)} texts with {len(values)} {name}: give one for each text, or None")
        reads_pictures = self._encoder is None or hasattr(self._encoder, "encode_image")
        encoded: dict[Any, bytes] = {}  # one picture given for many rows is read once
        rows = []
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"a text is a string, got {type(text).__name__} at place {place}")
            check_unicode(text, f"text {place}")
            values = _checked_metadata(None if metadata is None else metadata[place], place)
            picture = None if images is None else images[place]
            if not text.strip() and (picture is None or not reads_pictures):
                raise ValueError(f"text {place} is empty: leave the row out, or give it a text")
            content = None
            if picture is not None:
                key = picture if isinstance(picture, bytes | str | Path) else id(picture)
                if key not in encoded:
                    encoded[key] = picture_bytes(picture)
                content = encoded[key]
            name = content_id(text, values, content) if ids is None else ids[place]
            if not isinstance(name, str) or not name:
                raise TypeError(f"an id is a string that is not empty, got {name!r} at place {place}")
            check_unicode(name, f"id {place}")
            rows.append(Row(name, text, values, image=content, has_image=content is not None))
        if ids is not None and len(set(ids)) < len(rows):
            twice = next(name for place, name in enumerate(ids) if name in ids[:place])
            raise ValueError(f"id {twice!r} is given twice: give every row its own")
        return rows

    def _write(self, rows: Sequence[Row], present: set[str], vectors: np.ndarray | None, progress: bool) -> None:
        """Give rows their vectors and store them, each id once, without those that are present."""
        places = {row.id: place for place, row in enumerate(rows) if row.id not in present}
        new = [rows[place] for place in places.values()]
        if vectors is not None:
            vectors = np.asarray(vectors, np.float32)
            if vectors.shape != (len(rows), self.dim):
                raise ValueError(f"vectors have shape {vectors.shape}, {len(rows)} rows need ({len(rows)}, {self.dim})")
            vectors = vectors[list(places.values())]
        elif new:
            vectors = self._encoded(new, progress)
        if not new:
            return
        lengths = np.linalg.norm(vectors, axis=1)
        if not (np.isfinite(lengths).all() and lengths.all()):
            worst = new[int(np.argmin(np.nan_to_num(lengths, nan=0, posinf=0)))]
            raise ValueError(f"the vector of {worst.text!r:.60} is zero or not finite: it has no direction to compare")
        for row, vector in zip(new, vectors / lengths[:, None]):
            row.vector = vector
        self.store.upsert(new)

    def _encoded(self, rows: Sequence[Row], progress: bool) -> np.ndarray:
        """The vectors `(n, dim)` of rows: of the text, or of the picture of a row that has no text."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        with_text = [place for place, row in enumerate(rows) if row.text.strip()]
        if with_text:
            texts = [rows[place].text for place in with_text]
            vectors[with_text] = self.encoder.encode(texts, kind="document", show_progress_bar=progress)
        pictures = [place for place, row in enumerate(rows) if not row.text.strip()]
        if pictures:
            vectors[pictures] = self._image_vectors(
                [stored_picture(rows[place].image, rows[place].id) for place in pictures]
            )
        return vectors

    def _image_vectors(self, images: list[Image.Image]) -> np.ndarray:
        if not hasattr(self.encoder, "encode_image"):
            raise ValueError("the encoder of this index reads no pictures: use a text, or index with a CLIP model")
        return self.encoder.encode_image(images)

    def _asked(
        self, query: str | Image.Image | np.ndarray | None, id: str | None, mode: Mode
    ) -> tuple[np.ndarray | None, list[str] | None]:
        """Return a query's unit vector and its words; None is a side that is not to be asked."""
        if (query is None) == (id is None):
            raise ValueError("search needs a query or an id, one of the two")
        if id is not None:
            found = self.store.get([id], vectors=True, images=False)
            if not found:
                raise KeyError(f"there is no row {id!r}")
            text, vector = found[0].text, found[0].vector
        elif isinstance(query, str):
            if not query.strip():
                raise ValueError("the query is empty: give it at least one word")
            if len(query) > LONGEST_QUERY:
                raise ValueError(f"the query has {len(query):,} characters, at most {LONGEST_QUERY:,} are searched for")
            check_unicode(query, "the query")
            text, vector = query, None if mode == "lexical" else self.encoder.encode(query, kind="query")
        else:
            if mode == "lexical":
                raise ValueError("a picture or a vector has no words: search with mode='dense'")
            text = None
            vector = (
                self._image_vectors([query])[0] if isinstance(query, Image.Image) else np.asarray(query, np.float32)
            )
        if mode == "lexical":
            return None, query_terms(text)
        if vector.shape != (self.dim,):
            raise ValueError(f"the query has shape {vector.shape}, the index holds vectors of shape ({self.dim},)")
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not np.isfinite(length) or length == 0:
            raise ValueError("the query vector is zero or not finite: it has no direction to compare")
        tokens = None if mode == "dense" or text is None else query_terms(text)
        return (vector / length).astype(np.float32), tokens

    def _hits(
        self,
        dense: list[tuple[Row, float]],
        lexical: list[tuple[Row, float]],
        k: int,
        asked: str | None,
        collapse: bool,
    ) -> tuple[list[Hit], np.ndarray]:
        """Fuse what was found and leave near-duplicates out, until there are k; with the vectors of those."""
        rows = {row.id: row for row, _ in (*dense, *lexical)}
        dense_ranks = {row.id: rank for rank, (row, _) in enumerate(dense, start=1)}
        lexical_ranks = {row.id: rank for rank, (row, _) in enumerate(lexical, start=1)}
        if dense and lexical:
            ranked = reciprocal_rank_fusion([list(dense_ranks), list(lexical_ranks)])
        else:
            ranked = [(row.id, score) for row, score in dense or lexical]
        near, hits, vectors = NearTexts(), [], []
        pictures = _Pictures(self.store)
        for id, score in ranked:
            row = rows[id]
            if id == asked or (collapse and not near.add(row.text)):
                continue
            hit = pictures.hit(row)
            hit.score = score
            hit.dense_rank, hit.lexical_rank = dense_ranks.get(id), lexical_ranks.get(id)
            hits.append(hit)
            vectors.append(row.vector)
            if len(hits) == k:
                break
        return hits, np.array(vectors)

    def _check_encoder(self, encoder: TextEncoder) -> None:
        info, place = self._info, self._path or "the index"
        mend = f"open it with {info['encoder'] or 'the encoder that built it'}"
        if encoder.dim != info["dim"]:
            raise ValueError(
                f"{place} holds {info['dim']}-wide vectors, the encoder gives {encoder.dim}: {mend}, or make "
                "its vectors anew with `textcond index rebuild`"
            )
        if encoder.weights_hash() != info["weights_hash"]:
            raise ValueError(
                f"{place} was built with another encoder, or with other weights, prompts or dtype of it: {mend} in "
                f"{info['encoder_dtype']}, or make its vectors anew with `textcond index rebuild`"
            )


def store_at(address: str | Path) -> Store:
    """Return the store that an address names, whether or not there is an index in it."""
    if _is_address(address) or str(address).endswith(".db"):
        from .milvus import MilvusStore

        return MilvusStore(str(address))
    return LanceStore(address)


def _is_address(path: str | Path) -> bool:
    return str(path).startswith(("http://", "https://"))


def _copy(source: Store, target: Store, info: dict[str, Any]) -> None:
    target.set_info({key: value for key, value in info.items() if key != "ann"})
    for rows in source.scan(None, batch=BATCH, vectors=True, images=True):
        target.upsert(rows)
    target.optimize()
    target.close()


def _description(encoder: TextEncoder, path: str | Path | None) -> dict[str, Any]:
    """What is stored beside the rows, to know the encoder again."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "dim": encoder.dim,
        "encoder": _moved_name(encoder.name_or_path, None, path),
        "encoder_dtype": str(encoder.dtype).removeprefix("torch."),
        "weights_hash": encoder.weights_hash(),
        "kinds": ["document", "query"],
    }


def _check_info(info: dict[str, Any], place: str) -> None:
    if info.get("format") != FORMAT:
        raise ValueError(f"{place} is not a prompt index: it says format {info.get('format')!r}")
    if info.get("version") != VERSION:
        raise ValueError(
            f"{place} has index version {info.get('version')!r}, this release reads {VERSION}: "
            "build the index again, or use the release that wrote it"
        )
    absent = [key for key in ("dim", "encoder", "encoder_dtype", "weights_hash") if key not in info]
    if absent:
        raise ValueError(f"{place} does not say its {', '.join(absent)}: build the index again")


def _moved_name(name: str | None, old: str | Path | None, new: str | Path | None) -> str | None:
    """Return how an index at `new` names its encoder: by its path from the index if the two move together.

    Args:
        name: a hub id, or a folder's path, relative to the index at `old` if there is one.
    """
    if name is None:
        return None
    folder = Path(name).expanduser() if old is None or _is_address(old) else Path(old).expanduser() / name
    if not folder.is_dir():
        return name
    folder = folder.resolve()
    if new is None or _is_address(new):
        return str(folder)
    new = Path(new).expanduser().resolve()
    return Path(os.path.relpath(folder, new)).as_posix() if folder.is_relative_to(new.parent) else str(folder)


def _load_encoder(info: dict[str, Any], path: str | Path | None) -> TextEncoder:
    import torch

    from .image_text import load_encoder

    name = info["encoder"]
    if not name:
        raise ValueError(f"{path} names no encoder, as it was built with one in memory: pass encoder=")
    folder = Path(name) if path is None or _is_address(path) else Path(path).expanduser() / name
    dtype = getattr(torch, info["encoder_dtype"])
    return load_encoder(folder if folder.is_dir() else name, dtype=dtype)


def content_id(text: str, metadata: dict[str, Any], picture: bytes | None) -> str:
    """A hash of text and metadata, and of the picture of a row that is nothing else."""
    content = json.dumps([text, metadata], ensure_ascii=False, sort_keys=True).encode()
    if not text.strip() and picture is not None:
        content += picture
    return hashlib.sha256(content).hexdigest()[:24]


def _checked_metadata(values: dict[str, Any] | None, place: int) -> dict[str, Any]:
    if values is None:
        return {}
    try:
        content = json.dumps(values, allow_nan=False, ensure_ascii=False)
        read = json.loads(content, parse_int=_kept_integer)
    except (TypeError, ValueError, RecursionError):
        content = read = None
    if not isinstance(values, dict) or read != values:
        raise TypeError(f"metadata {place} is not a dict of JSON values, its integers of 64 bits: {values!r:.80}")
    check_unicode(content, f"metadata {place}")
    return values


def _kept_integer(digits: str) -> int:
    value = int(digits)
    if value not in INTEGERS:
        raise ValueError(f"{digits:.40} has more than 64 bits")
    return value


def _same_place(path: str | Path, other: str | Path) -> bool:
    return Path(path).expanduser().resolve() == Path(other).expanduser().resolve()


def _alike(row: Row, made: Row) -> bool:
    return (row.text, row.metadata, row.has_image) == (made.text, made.metadata, made.has_image)
