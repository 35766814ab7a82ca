"""Rows in Milvus: a Milvus Lite file beside the program, or a server or cluster by its address."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import numpy as np

from textcond.bm25 import BM25Index

from .filters import Condition, Filter, Scalar, conditions
from .lexical import document_terms
from .store import Row, check_ids, first_of_equal, metadata_json

TOKEN = "MILVUS_TOKEN"
LITE_COLLECTION = "prompts"
INFO, EF = "textcond.info", "textcond.ef"  # properties of the collection
SPLIT_TOKENS = {"tokenizer": "whitespace"}  # the texts come split: the server's analyzer has only to keep them so
ESCAPES = re.compile(r"\\(?:u[0-9a-f]{4}|.)")  # as json.dumps writes them
LONGEST = 65_535  # bytes of a VARCHAR, and of a JSON value
LONGEST_ID = 1_024
MOST_FOUND = 16_384  # rows that Milvus gives of one search or query
VALUES_AT_ONCE = 8  # that are compared one after the other
REQUEST_BYTES = 32 << 20  # half of what a server takes in one message
PICTURE_PIECE = 65_532  # base64 characters: whole groups of four
CONNECT_SECONDS, CALL_SECONDS, BUILD_SECONDS = 4, 60, 7200
ANN_ROWS = 50_000
# how many rows an HNSW search keeps in view: `optimize` takes the first that finds RECALL of the true nearest ten
EFS, RECALL, SAMPLE = (64, 128, 256, 512, 1024), 0.98, 50

# one Milvus Lite engine serves all stores of a process that have its file open
_open_files: Counter[str] = Counter()
_open_lock = threading.Lock()


class MilvusStore:
    """A `Store` in a Milvus collection: an exact index, and HNSW once `optimize` finds many rows.

    - **Words.** A server of Milvus 2.5 or newer searches by its own BM25 over texts that are split here. Before that
      there is no BM25 in Milvus, and that of Milvus Lite counts words by segment, so that scores change with every
      compaction: there BM25 is kept in this process's memory (`textcond.bm25`), and made anew by the
      first search after rows changed. What another process replaces without changing the number of rows is found by
      its new words after the next change.
    - **Consistency.** A store sees its own writes at once, those of other processes within Milvus's time tick (about
      0.2 s); `count`, `scan` and `delete` wait for them.
    - **Pictures** are kept in the rows, and a server loads rows into memory: add thumbnails. A batch above 32 MB goes
      in several requests, each of which is written whole or not at all.
    - **An exact search** past an HNSW index reads all vectors; it is meant for measuring recall.

    Args:
        address: a Milvus Lite path `*.db`, made if it is not there; or `http(s)://host:port/collection`, with the
            token or `user:password` in the environment variable MILVUS_TOKEN where the server asks for one.

    Raises:
        ImportError: without pymilvus.
        ValueError: for an address of another form, or a collection that holds something else.
        OSError: if the server does not answer, or another process has the Milvus Lite file open.
    """

    most = MOST_FOUND

    def __init__(self, address: str | Path):
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ImportError("a Milvus index needs pymilvus: pip install 'pymilvus[milvus-lite]'") from error
        # it prints a traceback for every error that it also raises
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        self.address = str(address)
        self._write_lock, self._lexical_lock = threading.RLock(), threading.Lock()
        self._writes = 0
        self._lexical: tuple[tuple[int, int], list[str], BM25Index | None] | None = None
        self._file: str | None = None
        self._has_bm25 = False
        server, self._collection = _parse(self.address)
        if server is None:
            self._file = os.path.abspath(os.path.expanduser(self.address))
            self._client = _open_file(self._file)
            # a store that is dropped unclosed must not keep the file from other processes
            self._release = weakref.finalize(self, _close_file, self._file)
        else:
            try:
                self._client = MilvusClient(server, token=os.environ.get(TOKEN, ""), timeout=CONNECT_SECONDS)
                version = re.search(r"(\d+)\.(\d+)", self._client.get_server_version(timeout=CONNECT_SECONDS))
            except Exception as error:  # a client may be there while its server is not
                raise OSError(
                    f"no Milvus server answers at {server} ({_message(error)}): start it, or check the address and "
                    f"{TOKEN}"
                ) from error
            # a managed server may name the Milvus that it is compatible with, and not in a form that is agreed on
            self._has_bm25 = version is not None and tuple(map(int, version.groups())) >= (2, 5)
        try:
            self._made = self._find_collection()
        except BaseException:
            self.close()
            raise

    def info(self) -> dict[str, Any]:
        """What was last given to `set_info`; empty in a new store."""
        if not self._made and not self._find_collection():
            return {}
        with self._errors():
            description = self._client.describe_collection(self._collection, timeout=CALL_SECONDS)
        return json.loads(description["properties"].get(INFO, "{}"))

    def set_info(self, info: dict[str, Any]) -> None:
        """Keep a small JSON dict with the collection, which the first call makes, `info["dim"]` wide."""
        content = {INFO: json.dumps(info)}
        with self._write_lock, self._errors():
            if not self._made:
                self._create(info["dim"], content)
                self._made, self._ef = True, EFS[1]
            else:
                self._client.alter_collection_properties(self._collection, content, timeout=CALL_SECONDS)

    def upsert(self, rows: Sequence[Row]) -> None:
        """Write rows in place of those with the same ids; when it returns, they survive `kill -9`.

        Raises:
            ValueError: for an id, text, metadata or picture that is larger than Milvus takes.
        """
        contents = [self._content(row) for row in rows]
        with self._write_lock, self._errors():
            for request in _requests(contents):
                self._client.upsert(self._collection, request, timeout=CALL_SECONDS)
                self._writes += 1

    def delete(self, ids: Sequence[str] | None, filter: Filter | None) -> int:
        """Remove the rows that have one of the ids (if given) and pass the filter (if given); return how many."""
        check_ids(ids or ())
        removed = 0
        with self._write_lock, self._errors():
            if ids is None:
                found = [content["id"] for page in self._pages(_expression(filter), ["id"], 4096) for content in page]
            else:
                found = [content["id"] for content in self._by_ids(ids, ["id"], _expression(filter), level="Strong")]
            for part in _parts(found, 1000):
                self._client.delete(self._collection, filter=_among(part), timeout=CALL_SECONDS)
                self._writes += 1
                removed += len(part)
        return removed

    def count(self, filter: Filter | None) -> int:
        """How many rows pass the filter."""
        with self._errors():
            return self._count(_expression(filter), "Strong")

    def dense(
        self, vector: np.ndarray, k: int, filter: Filter | None, exact: bool, *, vectors: bool = False
    ) -> list[tuple[Row, float]]:
        """The k rows of largest cosine to a unit vector `(dim,)`, best first; equal ones as `first_of_equal` says.

        Raises:
            ValueError: for a k above 16,384.
        """
        _check_k(k)
        expression = _expression(filter)
        with self._errors():
            if exact and self._index_type() != "FLAT":
                return self._rows_of(self._scan_nearest(vector, k, expression), vectors)
            return self._nearest(vector, k, expression, self._ef, vectors)

    def lexical(
        self, tokens: Sequence[str], k: int, filter: Filter | None, *, vectors: bool = False
    ) -> list[tuple[Row, float]]:
        """The k rows of largest BM25 among those that share a token, best first; equal ones as `first_of_equal` says.

        Raises:
            ValueError: for a k above 16,384.
        """
        _check_k(k)
        if not tokens:
            return []
        with self._errors():
            if self._stores_words:
                query, expression = " ".join(tokens), _expression(filter)
                return first_of_equal(
                    lambda limit: self._search(query, "sparse", limit, expression, {}, vectors), k, self.most
                )
            return self._rows_of(self._lexical_in_memory(tokens, k, _expression(filter)), vectors)

    def get(self, ids: Sequence[str], *, vectors: bool, images: bool) -> list[Row]:
        """The rows that are there, in the order of `ids`."""
        check_ids(ids)
        with self._errors():
            found = {content["id"]: content for content in self._by_ids(ids, _fields(vectors, images))}
        return [_row(found[row_id]) for row_id in ids if row_id in found]

    def scan(self, filter: Filter | None, *, batch: int, vectors: bool, images: bool) -> Iterator[list[Row]]:
        """Every row that passes the filter, once, in lists of at most `batch`, in the order of their ids."""
        pages = self._pages(_expression(filter), _fields(vectors, images), min(batch, MOST_FOUND))
        while True:
            with self._errors():
                page = next(pages, None)
            if page is None:
                return
            yield [_row(content) for content in page]

    def optimize(self) -> None:
        """Seal what was written, and from 50,000 rows on replace the exact index by HNSW.

        While the index is replaced, a moment on a server and minutes in Milvus Lite, nothing can be searched.
        """
        with self._write_lock, self._errors():
            self._client.flush(self._collection, timeout=BUILD_SECONDS)
            if self._index_type() == "FLAT" and self._count("", "Strong") >= ANN_ROWS:
                index = self._client.prepare_index_params()
                parameters = {"M": 16, "efConstruction": 200}
                index.add_index("vector", index_type="HNSW", metric_type="COSINE", params=parameters)
                sample = np.array([content["vector"] for content in next(self._pages("", ["id", "vector"], SAMPLE))])
                queries = sample + np.roll(sample, 1, axis=0)  # between two rows, so that none is a row itself
                nearest = [self._nearest(query, 10, "", 0) for query in queries]
                self._client.release_collection(self._collection, timeout=CALL_SECONDS)
                try:
                    self._client.drop_index(self._collection, "vector", timeout=CALL_SECONDS)
                    self._client.create_index(self._collection, index, timeout=BUILD_SECONDS)
                finally:
                    self._load()
                self._tune(queries, nearest)
            self._client.compact(self._collection, timeout=BUILD_SECONDS)

    def stats(self) -> dict[str, Any]:
        """The store's kind, rows, bytes on disk (None for a server) and kind of ANN index (None if exact)."""
        with self._errors():
            kind = self._index_type()
        size = None
        if self._file is not None:
            size = sum(file.stat().st_size for file in Path(self._file).rglob("*") if file.is_file())
        return {
            "store": "Milvus Lite" if self._file is not None else "Milvus",
            "rows": self.count(None),
            "bytes": size,
            "ann": None if kind == "FLAT" else kind,
            "lexical": "Milvus BM25" if self._stores_words else "BM25 in memory",
        }

    def close(self) -> None:
        """Let go of the connection, and of the file for other processes."""
        if self._client is None:
            return
        self._client.close()
        self._client, self._lexical = None, None
        if self._file is not None:
            self._release()

    # -- the collection --------------------------------------------------------------------------------------------

    def _find_collection(self) -> bool:
        """Whether the collection is there; finishes one whose making was interrupted."""
        with self._errors():
            if not self._client.has_collection(self._collection, timeout=CALL_SECONDS):
                self._made = self._stores_words = False
                return False
            description = self._client.describe_collection(self._collection, timeout=CALL_SECONDS)
            fields = {field["name"] for field in description["fields"]}
            if not {"id", "text", "metadata", "facets", "picture", "vector"} <= fields:
                raise ValueError(
                    f"collection {self._collection} of {self.address} holds no prompt index: name another one"
                )
            self._stores_words, self._made = "sparse" in fields, True
            self._ef = int(description["properties"].get(EF, EFS[1]))
            indexed = {self._client.describe_index(self._collection, name).get("field_name")
                       for name in self._client.list_indexes(self._collection)}  # fmt: skip
            if "vector" not in indexed or (self._stores_words and "sparse" not in indexed):
                self._index_new()
            self._load()
        return True

    def _create(self, dim: int, properties: dict[str, str]) -> None:
        from pymilvus import DataType, Function, FunctionType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
        schema.add_field("text", DataType.VARCHAR, max_length=LONGEST)
        schema.add_field("metadata", DataType.VARCHAR, max_length=LONGEST)
        schema.add_field("facets", DataType.JSON)
        schema.add_field("has_picture", DataType.BOOL)
        schema.add_field(
            "picture", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=4096, max_length=LONGEST
        )
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        self._stores_words = self._has_bm25
        if self._stores_words:
            analysis = {"enable_analyzer": True, "analyzer_params": SPLIT_TOKENS}
            schema.add_field("words", DataType.VARCHAR, max_length=LONGEST, **analysis)
            schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
            schema.add_function(
                Function(
                    name="bm25",
                    function_type=FunctionType.BM25,
                    input_field_names=["words"],
                    output_field_names=["sparse"],
                )
            )
        self._client.create_collection(
            self._collection,
            schema=schema,
            consistency_level="Session",
            properties=properties,
            timeout=CALL_SECONDS,
        )
        self._index_new()

    def _index_new(self) -> None:
        """Give a collection without rows its indexes."""
        indexes = self._client.prepare_index_params()
        indexes.add_index("vector", index_type="FLAT", metric_type="COSINE")
        if self._stores_words:
            # the constants of textcond's own BM25, so that ranking agrees across stores
            parameters = {"bm25_k1": 1.5, "bm25_b": 0.75}
            indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params=parameters)
        # there is nothing to build yet that would have to be waited for
        self._client.create_index(self._collection, indexes, timeout=CALL_SECONDS, sync=False)
        self._load()

    def _load(self) -> None:
        self._client.load_collection(self._collection, timeout=BUILD_SECONDS)

    def _tune(self, queries: np.ndarray, nearest: list[list[tuple[Row, float]]]) -> None:
        """Keep the smallest `ef` that finds enough of the nearest rows."""
        for ef in EFS:
            found = [self._nearest(query, 10, "", ef) for query in queries]
            # by score, as rows of equal vectors may stand for each other
            same = sum(score >= true[-1][1] - 1e-6 for true, hits in zip(nearest, found) for _, score in hits)
            if same >= RECALL * sum(map(len, nearest)):
                break
        self._client.alter_collection_properties(self._collection, {EF: str(ef)}, timeout=CALL_SECONDS)
        self._ef = ef

    def _index_type(self) -> str:
        for name in self._client.list_indexes(self._collection, field_name="vector"):
            return self._client.describe_index(self._collection, name, timeout=CALL_SECONDS)["index_type"]
        return "FLAT"

    # -- rows ------------------------------------------------------------------------------------------------------

    def _content(self, row: Row) -> dict[str, Any]:
        metadata = metadata_json(row)
        facets = _facets(row.metadata)
        sizes = {"id": (_key(row.id), LONGEST_ID), "text": (row.text, LONGEST), "metadata": (metadata, LONGEST)}
        sizes["metadata"] = (max(metadata, json.dumps(facets, ensure_ascii=False), key=len), LONGEST)
        for name, (value, most) in sizes.items():
            size = len(value.encode())
            if size > most:
                raise ValueError(
                    f"row {row.id[:60]!r}: its {name} has {size:,} bytes, Milvus takes {most:,}: shorten it, or use a "
                    "folder index"
                )
        picture = base64.b64encode(row.image or b"").decode()
        content = {
            "id": _key(row.id),
            "text": row.text,
            "metadata": metadata,
            "facets": facets,
            "has_picture": row.image is not None,
            "picture": [picture[start : start + PICTURE_PIECE] for start in range(0, len(picture), PICTURE_PIECE)],
            "vector": np.asarray(row.vector, np.float32).tolist(),
        }
        if len(picture) > REQUEST_BYTES:
            raise ValueError(f"row {row.id[:60]!r}: its picture has {len(row.image):,} bytes: add a thumbnail")
        if self._stores_words:
            content["words"] = " ".join(document_terms(row.text)).encode()[:LONGEST].decode(errors="ignore")
        return content

    def _by_ids(
        self, ids: Iterable[str], fields: list[str], expression: str = "", level: str = "Session"
    ) -> Iterator[dict[str, Any]]:
        for part in _parts(list(dict.fromkeys(ids)), 1000):
            found = self._client.query(
                self._collection,
                filter=f"{_among(part)} and ({expression})" if expression else _among(part),
                output_fields=fields,
                consistency_level=level,
                timeout=CALL_SECONDS,
            )
            for content in found:
                yield content | {"id": unquote(content["id"])}

    def _pages(self, expression: str, fields: list[str], size: int) -> Iterator[list[dict[str, Any]]]:
        iterator = self._client.query_iterator(
            self._collection,
            batch_size=size,
            filter=expression,
            output_fields=fields,
            consistency_level="Strong",
            timeout=CALL_SECONDS,
        )
        try:
            while page := iterator.next():
                yield [content | {"id": unquote(content["id"])} for content in page]
        finally:
            iterator.close()

    def _count(self, expression: str, level: str) -> int:
        found = self._client.query(
            self._collection,
            filter=expression,
            output_fields=["count(*)"],
            consistency_level=level,
            timeout=CALL_SECONDS,
        )
        return int(found[0]["count(*)"])

    def _search(
        self, query: list[float] | str, field: str, k: int, expression: str, parameters: dict[str, Any], vectors: bool
    ) -> list[tuple[Row, float]]:
        found = self._client.search(
            self._collection,
            data=[query],
            anns_field=field,
            limit=k,
            filter=expression,
            output_fields=_fields(vectors, False),
            search_params={"params": parameters},
            consistency_level="Session",
            timeout=CALL_SECONDS,
        )
        return [(_row(hit["entity"] | {"id": unquote(hit["id"])}), float(hit["distance"])) for hit in found[0]]

    def _nearest(self, vector: Any, k: int, expression: str, ef: int, vectors: bool = False) -> list[tuple[Row, float]]:
        query = np.asarray(vector, np.float32).tolist()

        def search(limit: int) -> list[tuple[Row, float]]:
            return self._search(query, "vector", limit, expression, {"ef": max(ef, limit)} if ef else {}, vectors)

        return first_of_equal(search, k, self.most)

    def _rows_of(self, ranked: list[tuple[str, float]], vectors: bool) -> list[tuple[Row, float]]:
        rows = {row.id: row for row in self.get([row_id for row_id, _ in ranked], vectors=vectors, images=False)}
        return [(rows[row_id], score) for row_id, score in ranked if row_id in rows]

    def _scan_nearest(self, vector: np.ndarray, k: int, expression: str) -> list[tuple[str, float]]:
        best: list[tuple[str, float]] = []
        for page in self._pages(expression, ["id", "vector"], 4096):
            scores = np.asarray([content["vector"] for content in page], np.float32) @ np.asarray(vector, np.float32)
            best += [(content["id"], float(score)) for content, score in zip(page, scores)]
            best = sorted(best, key=lambda pair: (-pair[1], pair[0]))[:k]
        return best

    def _lexical_in_memory(self, tokens: Sequence[str], k: int, expression: str) -> list[tuple[str, float]]:
        ids, index = self._words_of_rows()
        if index is None:
            return []
        if not expression:
            rows, scores = index.search(" ".join(tokens), k)
            return [(ids[row], float(score)) for row, score in zip(rows, scores)]
        rows, scores = index.search(" ".join(tokens), len(ids))
        found: list[tuple[str, float]] = []
        for start in range(0, len(rows), 1000):
            part = [ids[row] for row in rows[start : start + 1000]]
            passing = {content["id"] for content in self._by_ids(part, ["id"], expression)}
            ranked = zip(part, scores[start : start + 1000])
            found += [(row_id, float(score)) for row_id, score in ranked if row_id in passing]
            if len(found) >= k:
                break
        return found[:k]

    def _words_of_rows(self) -> tuple[list[str], BM25Index | None]:
        """Return the ids of the rows and BM25 over their texts (None without a word), as new as the rows are."""
        with self._lexical_lock:
            state = (self._writes, self._count("", "Session"))
            if self._lexical is None or self._lexical[0] != state:
                ids: list[str] = []

                def texts() -> Iterator[str]:
                    for page in self._pages("", ["id", "text"], MOST_FOUND):
                        for content in page:
                            ids.append(content["id"])
                            yield " ".join(document_terms(content["text"]))

                try:
                    index = BM25Index(texts())
                except ValueError:  # no row has a word
                    index = None
                self._lexical = (state, ids, index)
            return self._lexical[1:]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what pymilvus raises into one sentence."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        if getattr(self, "_client", self) is None:
            raise OSError(f"the Milvus index {self.address} was closed: open it again")
        try:
            yield
        except (MilvusException, RpcError) as error:
            raise OSError(f"Milvus at {self.address}: {_message(error)}") from error


def _parse(address: str) -> tuple[str | None, str]:
    """Return the server (None for a Milvus Lite file) and the collection that an address names."""
    if "://" not in address:
        if not address.endswith(".db"):
            raise ValueError(f"{address!r} is neither a Milvus Lite path *.db nor http://host:port/collection")
        return None, LITE_COLLECTION
    parts = urlsplit(address)
    collection = parts.path.strip("/")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{address!r} is not an address of the form http://host:port/collection")
    if parts.username:
        raise ValueError(f"give the token or user:password of Milvus in {TOKEN}, not in the address")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", collection):
        raise ValueError(
            f"{address!r} names no collection: end it with /NAME of letters, digits and _, such as {address}/prompts"
        )
    return f"{parts.scheme}://{parts.netloc}", collection


def _open_file(file: str) -> Any:
    """Return a client of the Milvus Lite engine of a file, started if this process has none."""
    from pymilvus import MilvusClient

    if os.path.isfile(file):
        raise ValueError(f"{file} is not a Milvus Lite 3 database, which is a folder: build the index again")
    if not os.path.isdir(os.path.dirname(file)):
        raise FileNotFoundError(f"no folder {os.path.dirname(file)} for the Milvus Lite file {os.path.basename(file)}")
    reasons: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            reasons.append(record.exc_info[1])
        return False

    # the engine's reason for not starting reaches its log only
    log = logging.getLogger("milvus_lite.server_manager")
    with _open_lock:
        log.addFilter(keep)
        try:
            client = MilvusClient(file, timeout=CONNECT_SECONDS)
        except Exception as error:
            reason = reasons[-1] if reasons else error
            if type(reason).__name__ == "DataDirLockedError":
                raise OSError(
                    f"another process has the Milvus Lite index {file} open: close it there, or use a folder index or "
                    "a Milvus server, which several can share"
                ) from None
            raise OSError(f"Milvus Lite cannot open {file}: {_message(reason)}") from error
        finally:
            log.removeFilter(keep)
        _open_files[file] += 1
    return client


def _close_file(file: str) -> None:
    from milvus_lite.server_manager import server_manager_instance

    with _open_lock:
        _open_files[file] -= 1
        if not _open_files[file]:
            del _open_files[file]
            server_manager_instance.release_server(file)


def _message(error: BaseException) -> str:
    text = getattr(error, "message", None) or getattr(error, "details", lambda: "")() or str(error)
    return " ".join(str(text).split())[:300]


def _check_k(k: int) -> None:
    if k > MOST_FOUND:
        raise ValueError(f"k={k:,}: Milvus gives at most {MOST_FOUND:,} rows of a search")


def _fields(vectors: bool, images: bool) -> list[str]:
    return ["id", "text", "metadata", "has_picture"] + ["vector"] * vectors + ["picture"] * images


def _row(content: dict[str, Any]) -> Row:
    row = Row(content["id"], content["text"], json.loads(content["metadata"]), has_image=content["has_picture"])
    if "vector" in content:
        row.vector = np.asarray(content["vector"], np.float32)
    if row.has_image and "picture" in content:
        row.image = base64.b64decode("".join(content["picture"]))
    return row


def _parts(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _requests(contents: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Split rows into requests that a server takes: one, unless the pictures are large."""
    request: list[dict[str, Any]] = []
    size = 0
    for content in contents:
        own = 4 * len(content["vector"]) + sum(map(len, content["picture"]))
        own += 4 * len(content["text"]) + 6 * len(content["metadata"])
        if request and size + own > REQUEST_BYTES:
            yield request
            request, size = [], 0
        request.append(content)
        size += own
    if request:
        yield request


# -- filters -------------------------------------------------------------------------------------------------------
# Milvus versions differ in how JSON values of other kinds, null, and lists of values compare. So metadata is kept as
# text, and beside it "facets": every value under a name with its kind, of which ==, bounds and `exists` suffice.


def _facets(metadata: dict[str, Any]) -> dict[str, Any]:
    facets: dict[str, Any] = {}
    for field, value in metadata.items():
        if value is not None:
            kind = _kind(value)
            facets[_facet(kind, field)] = True if kind == "other" else _number(value) if kind == "number" else value
    return facets


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "other"


def _facet(kind: str, field: str) -> str:
    # a JSON pointer knows "/" and "~", and quotes are escaped differently in every version
    return f"{kind}:{quote(field, safe='').replace('~', '%7E')}"


def _number(value: int | float) -> int | float:
    """Return a number that Milvus can read: 64 bits, and finite."""
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    largest = sys.float_info.max
    return float(min(max(value, -largest), largest))


def _expression(filter: Filter | None) -> str:
    """Return a filter as a Milvus expression; empty if it asks for nothing."""
    return " and ".join(f"({_condition(condition)})" for condition in conditions(filter))


def _condition(condition: Condition) -> str:
    if condition.values:
        return " or ".join(_equals_one(condition.field, condition.values))
    signs = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
    return " and ".join(
        f"{_path(_kind(limit), condition.field)} {signs[bound]} {_literal(limit)}" for bound, limit in condition.bounds
    )


def _equals_one(field: str, values: Sequence[Scalar]) -> Iterator[str]:
    """Expressions, of which one holds if the field equals one of the values."""
    if None in values:
        kinds = ("truth", "number", "string", "other")
        yield "(" + " and ".join(f"not (exists {_path(kind, field)})" for kind in kinds) + ")"
    for kind in ("truth", "number", "string"):
        path = _path(kind, field)
        alike = sorted({value for value in values if value is not None and _kind(value) == kind})
        if len(alike) > VALUES_AT_ONCE:
            yield f"(exists {path} and ({_halved(path, alike)}))"
        elif alike:
            yield _halved(path, alike)


def _halved(path: str, values: list[Any]) -> str:
    """That a value is one of many in their order, found by halving: Milvus Lite knows no `in` for JSON."""
    if len(values) <= VALUES_AT_ONCE:
        return " or ".join(f"{path} == {_literal(value)}" for value in values)
    half = len(values) // 2
    low, high = _halved(path, values[:half]), _halved(path, values[half:])
    middle = _literal(values[half])
    return f"({path} < {middle} and ({low})) or ({path} >= {middle} and ({high}))"


def _path(kind: str, field: str) -> str:
    return f'facets["{_facet(kind, field)}"]'


def _literal(value: str | int | float | bool) -> str:
    text = json.dumps(_number(value) if _kind(value) == "number" else value, ensure_ascii=False)
    # Milvus Lite knows the escapes of JSON for quotes, backslashes and white space only; other characters need none
    return ESCAPES.sub(lambda match: match[0] if match[0][1] in '\\"nrt' else json.loads(f'"{match[0]}"'), text)


def _among(ids: Sequence[str]) -> str:
    return f"id in {json.dumps([_key(row_id) for row_id in ids], ensure_ascii=False)}"


def _key(row_id: str) -> str:
    """Return an id without what needs escaping: pymilvus writes ids into expressions as they are."""
    return re.sub(r'["\\%\x00-\x1f]', lambda match: f"%{ord(match[0]):02X}", row_id)
