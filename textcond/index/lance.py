"""The embedded store: LanceDB tables in a folder, or in memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from filelock import FileLock

from textcond.files import write_mark
from textcond.folders import read_json

from .filters import Condition, Filter, conditions
from .lexical import document_terms
from .store import Row, check_ids, first_of_equal, metadata_json

INFO, LOCK = "index.json", ".lock"
TABLES = ("rows", "pictures")
# From this many rows on, `optimize` builds an ANN index: an exact search takes about a millisecond
# for every 1,000 rows of width 384.
ANN_ROWS = 20_000
RECALL = 0.98
# The longest that a reader in another process is thought to take over one version.
KEEP_VERSIONS = timedelta(minutes=10)
# Every search opens all the pieces that the writes since the last `optimize` have left.
MOST_PIECES = 100
# Ids go into the text of a query, which a parser reads; a million would not be one.
IDS_AT_ONCE = 1000
LARGEST = sys.float_info.max  # SQL has no word for infinity


class LanceStore:
    """Rows in LanceDB: vectors as float16, words under a full-text index, each different picture once.

    Writers of several processes take turns by a lock file, which the operating system releases if one is killed; a
    write is visible when LanceDB has renamed its manifest into place, whole or not at all. Readers need no lock and see
    every write that returned before they asked.

    Args:
        path: a folder, made by `set_info` if it is not there; None keeps everything in memory.
        keep_versions: how old a version must be for `optimize` to remove it, as readers may still be at it.
    """

    most = None

    def __init__(self, path: str | Path | None = None, keep_versions: timedelta = KEEP_VERSIONS):
        self.path = None if path is None else Path(path).expanduser()
        self._keep_versions = keep_versions
        self._info: dict[str, Any] = {}
        self._tables: dict[str, Any] = {}
        self._threads = RLock()
        self._turn = nullcontext() if self.path is None else FileLock(self.path / LOCK)
        if self.path is not None and self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file: an index is a folder")
        # LanceDB connects when it is first needed: that makes a folder, and takes a second to import
        self._connection: Any = None

    def info(self) -> dict[str, Any]:
        """What was last given to `set_info`, by any process."""
        if self.path is None:
            return dict(self._info)
        return read_json(self.path / INFO) if (self.path / INFO).exists() else {}

    def is_unfinished(self) -> bool:
        """Whether the folder holds nothing but what a `set_info` that was killed may have left."""
        own = {LOCK, *(f"{name}.lance" for name in TABLES)}
        return all(entry.name in own or entry.match(".textcond-*.partial") for entry in self.path.iterdir())

    def set_info(self, info: dict[str, Any]) -> None:
        """Keep `info`, and make the tables if this is the first time.

        Raises:
            FileExistsError: if there are tables without info that a `set_info` that was killed cannot have left.
        """
        with self._writing():
            if not self.info():
                self._make_tables(info["dim"])
            if self.path is None:
                self._info = dict(info)
            else:
                write_mark(self.path / INFO, info)

    def upsert(self, rows: Sequence[Row]) -> None:
        """Write rows; the pictures come first, so that no row that is visible lacks its own."""
        import pyarrow as pa

        if not rows:
            return
        metadata = [metadata_json(row) for row in rows]
        with self._writing():
            names = [None if row.image is None else _picture_name(row.image) for row in rows]
            pictures = {name: row.image for name, row in zip(names, rows) if name is not None}
            if pictures:
                content = pa.table(
                    {"name": list(pictures), "content": pa.array(list(pictures.values()), pa.large_binary())}
                )
                self._table("pictures").merge_insert("name").when_not_matched_insert_all().execute(content)
            table = self._table("rows")
            dim = table.schema.field("vector").type.list_size
            vectors = np.stack([row.vector for row in rows]).astype(np.float16)
            content = pa.table(
                {
                    "id": [row.id for row in rows],
                    "text": [row.text for row in rows],
                    "words": [" ".join(document_terms(row.text)) for row in rows],
                    "metadata": metadata,
                    "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
                    "picture": pa.array(names, pa.string()),
                }
            )
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(content)
            if table.stats()["fragment_stats"]["num_fragments"] > MOST_PIECES:
                self._compact()

    def delete(self, ids: Sequence[str] | None, filter: Filter | None) -> int:
        """Remove rows; their pictures go when `optimize` finds that no row has them."""
        check_ids(ids or ())
        parts = [None] if ids is None else [ids[at : at + IDS_AT_ONCE] for at in range(0, len(ids), IDS_AT_ONCE)]
        wheres = [_where(filter, part) for part in parts]
        count = 0
        with self._writing():
            for where in wheres:
                found = self._table("rows").count_rows(where)
                if found:
                    self._table("rows").delete(where or "true")
                count += found
        return count

    def count(self, filter: Filter | None) -> int:
        """How many rows pass the filter."""
        where = _where(filter)
        with self._told("read"):
            return self._table("rows").count_rows(where)

    def dense(
        self, vector: np.ndarray, k: int, filter: Filter | None, exact: bool, *, vectors: bool = False
    ) -> list[tuple[Row, float]]:
        """The nearest rows by cosine; equal cosines in the order of ids, as far as `first_of_equal` looks."""
        return self._dense(vector, k, filter, None if exact else self.info().get("ann"), vectors)

    def _dense(
        self, vector: np.ndarray, k: int, filter: Filter | None, ann: dict[str, Any] | None, vectors: bool = False
    ) -> list[tuple[Row, float]]:
        where = _where(filter)

        def search(limit: int) -> list[tuple[Row, float]]:
            query = self._table("rows").search(np.asarray(vector, np.float32)).distance_type("cosine")
            if ann is None:
                query = query.bypass_vector_index()
            else:
                # the factor is for ten rows: of more, as many are compared by their whole vectors anyway
                factor = math.ceil(10 * ann["refine_factor"] / max(limit, 10))
                query = query.nprobes(ann["nprobes"]).refine_factor(factor)
            return [(row, 1 - distance) for row, distance in self._found(query, "_distance", limit, where, vectors)]

        with self._told("read"):
            return first_of_equal(search, k)

    def lexical(
        self, tokens: Sequence[str], k: int, filter: Filter | None, *, vectors: bool = False
    ) -> list[tuple[Row, float]]:
        """The rows of largest BM25; equal scores in the order of ids, as far as `first_of_equal` looks."""
        from lancedb.query import MatchQuery

        if not tokens:
            return []
        where = _where(filter)

        def search(limit: int) -> list[tuple[Row, float]]:
            query = self._table("rows").search(MatchQuery(" ".join(tokens), "words"), query_type="fts")
            return self._found(query, "_score", limit, where, vectors)

        with self._told("read"):
            return first_of_equal(search, k, common=True)

    def _found(self, query: Any, score: str, k: int, where: str | None, vectors: bool) -> list[tuple[Row, float]]:
        if where:
            query = query.where(where)
        content = query.select([*_columns(vectors), score]).limit(k).to_arrow()
        return list(zip(self._rows(content, False), content[score].to_pylist()))

    def get(self, ids: Sequence[str], *, vectors: bool, images: bool) -> list[Row]:
        """The rows that are there, in the order of `ids`."""
        check_ids(ids)
        found: dict[str, Row] = {}
        for at in range(0, len(ids), IDS_AT_ONCE):
            with self._told("read"):
                query = self._table("rows").search().where(_where(None, ids[at : at + IDS_AT_ONCE]))
                content = query.select(_columns(vectors)).to_arrow()
            found |= {row.id: row for row in self._rows(content, images)}
        return [found[id] for id in ids if id in found]

    def scan(self, filter: Filter | None, *, batch: int, vectors: bool, images: bool) -> Iterator[list[Row]]:
        """Every row, of the version that was the newest at the start."""
        import pyarrow as pa

        where = _where(filter)
        with self._told("read"):
            query = self._table("rows").search().select(_columns(vectors))
            if where:
                query = query.where(where)
            for content in query.to_batches(batch):
                for at in range(0, content.num_rows, batch):
                    yield self._rows(pa.table(content.slice(at, batch)), images)

    def optimize(self) -> None:
        """Compact the files, drop pictures of no row and versions that none reads, and index what was added.

        From `ANN_ROWS` rows on an IVF index is made. A query reads as many of its partitions as a recall@10 of at least
        `RECALL` takes, measured against exact search with 100 queries that lie between two rows each.
        """
        with self._writing():
            self._drop_lost_pictures()
            self._compact()
            for part in self.path.glob(".textcond-*.partial") if self.path else ():
                part.unlink(missing_ok=True)
            if self._table("rows").count_rows() >= ANN_ROWS:
                self._index_vectors()

    def stats(self) -> dict[str, Any]:
        """The size of things."""
        with self._told("read"):
            rows, pictures = self._table("rows").count_rows(), self._table("pictures").count_rows()
            pieces = self._table("rows").stats()["fragment_stats"]["num_fragments"]
        size = None
        if self.path is not None:
            size = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        return {
            "store": "lancedb",
            "rows": rows,
            "pictures": pictures,
            "bytes": size,
            "pieces": pieces,
            "ann": self.info().get("ann"),
        }

    def close(self) -> None:
        """Let go of the tables."""
        self._tables.clear()
        self._connection = None

    def _database(self) -> Any:
        import lancedb

        with self._threads:
            if self._connection is None:
                # zero: every read looks for what other processes have written
                self._connection = lancedb.connect(
                    "memory://" if self.path is None else self.path, read_consistency_interval=timedelta(0)
                )
            return self._connection

    def _table(self, name: str) -> Any:
        with self._threads:
            if name not in self._tables:
                if self.path is not None and not (self.path / f"{name}.lance").is_dir():
                    raise FileNotFoundError(f"{self.path} holds no {name}.lance: it is damaged, build the index again")
                self._tables[name] = self._database().open_table(name)
            return self._tables[name]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
        with self._threads, self._turn, self._told("write"):
            yield

    @contextmanager
    def _told(self, deed: str) -> Iterator[None]:
        """Tell what LanceDB reports, pages of it, in one sentence."""
        try:
            yield
        except (FileExistsError, FileNotFoundError):
            raise
        except (RuntimeError, OSError, ValueError) as error:
            text = str(error)
            place = self.path or "the index in memory"
            if any(sign in text for sign in ("os error 28", "os error 27", "No space left", "File too large")):
                raise OSError(
                    f"cannot write {place} (no space left): free some, then give the same command again; "
                    "what was written before is kept"
                ) from error
            short = re.sub(r"\s+", " ", re.split(r", (?:/|rust/|\S+\.rs)", text)[0])[:300]
            raise OSError(f"cannot {deed} {place} ({short}): if its files are damaged, build it again") from error

    def _rows(self, content: Any, images: bool) -> list[Row]:
        names = content["picture"].to_pylist()
        pictures = self._pictures({name for name in names if name is not None}) if images else {}
        rows = [
            Row(id, text, json.loads(metadata), image=pictures.get(name), has_image=name is not None)
            for id, text, metadata, name in zip(
                content["id"].to_pylist(), content["text"].to_pylist(), content["metadata"].to_pylist(), names
            )
        ]
        if "vector" in content.column_names and rows:
            flat = content["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors = flat.reshape(len(rows), -1).astype(np.float32)
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            for row, vector in zip(rows, vectors):
                row.vector = vector
        return rows

    def _pictures(self, names: set[str]) -> dict[str, bytes]:
        if not names:
            return {}
        with self._told("read"):
            found = self._table("pictures").search().where(_one_of("name", sorted(names))).to_arrow()
        return dict(zip(found["name"].to_pylist(), found["content"].to_pylist()))

    def _drop_lost_pictures(self) -> None:
        used = set(
            self._table("rows")
            .search()
            .where("picture is not null")
            .select(["picture"])
            .to_arrow()["picture"]
            .to_pylist()
        )
        stored = self._table("pictures").search().select(["name"]).to_arrow()["name"].to_pylist()
        lost = sorted(set(stored) - used)
        for at in range(0, len(lost), IDS_AT_ONCE):
            self._table("pictures").delete(_one_of("name", lost[at : at + IDS_AT_ONCE]))

    def _compact(self) -> None:
        for name in TABLES:
            self._table(name).optimize(cleanup_older_than=self._keep_versions)

    def _index_vectors(self) -> None:
        from lancedb.index import IvfSq

        table = self._table("rows")
        if not any("vector" in index.columns for index in table.list_indices()):
            table.create_index("vector", config=IvfSq(distance_type="cosine"))
        sample = self._queries(100)
        exact = [{row.id for row, _ in self.dense(vector, 10, None, exact=True)} for vector in sample]
        nprobes, recall = 8, 0.0
        while recall < RECALL and nprobes < 4096:
            nprobes *= 2
            ann = {"kind": "IVF_SQ", "nprobes": nprobes, "refine_factor": 4}
            found = [{row.id for row, _ in self._dense(vector, 10, None, ann)} for vector in sample]
            recall = float(np.mean([len(one & other) / len(one) for one, other in zip(exact, found)]))
        self.set_info(self.info() | {"ann": ann | {"recall": round(recall, 4)}})

    def _queries(self, count: int) -> np.ndarray:
        """Vectors `(count, dim)` like those that are searched for: each between two rows, so that it is none itself."""
        table = self._table("rows")
        places = np.random.default_rng(0).integers(0, table.count_rows(), 2 * count)
        # offsets that come twice give one row
        found = self._rows(table.take_offsets(sorted(set(places.tolist()))).select(_columns(True)).to_arrow(), False)
        vectors = np.stack([row.vector for row in found])
        vectors = vectors + np.roll(vectors, len(vectors) // 2, axis=0)
        return vectors[:count] / np.linalg.norm(vectors[:count], axis=1, keepdims=True)

    def _make_tables(self, dim: int) -> None:
        import pyarrow as pa
        from lancedb.index import FTS, BTree

        string = pa.string()
        schemas = {
            "rows": pa.schema(
                [
                    pa.field("id", string, nullable=False),
                    pa.field("text", string, nullable=False),
                    pa.field("words", string, nullable=False),
                    pa.field("metadata", pa.json_(string), nullable=False),
                    pa.field("vector", pa.list_(pa.float16(), dim), nullable=False),
                    pa.field("picture", string),
                ]
            ),
            "pictures": pa.schema([pa.field("name", string), pa.field("content", pa.large_binary())]),
        }
        database = self._database()
        old = [name for name in TABLES if name in database.table_names()]
        for name in old:
            if not self._is_leftover(name, schemas[name].names):
                raise FileExistsError(
                    f"{self.path or 'the index in memory'} holds {name}.lance, which has rows or is another's, and no "
                    f"{INFO}: put that back, or choose another folder"
                )
        for name in old:
            database.drop_table(name)
        for name, schema in schemas.items():
            self._tables[name] = database.create_table(name, schema=schema)
        whole_words = FTS(
            base_tokenizer="whitespace",
            lower_case=False,
            stem=False,
            remove_stop_words=False,
            ascii_folding=False,
            max_token_length=None,
        )
        self._tables["rows"].create_index("words", config=whole_words)
        self._tables["rows"].create_index("id", config=BTree())
        self._tables["pictures"].create_index("name", config=BTree())

    def _is_leftover(self, name: str, columns: list[str]) -> bool:
        """Whether a table is what an attempt that was killed before its info was written may have left."""
        folder = None if self.path is None else self.path / f"{name}.lance"
        if folder and not any(folder.glob("_versions/*.manifest")):  # it was not made to the end
            files = [file for file in folder.rglob("*") if not file.is_dir()]
            return all(file.parent.name in ("_transactions", "_versions") for file in files)
        table = self._database().open_table(name)
        return table.schema.names == columns and table.count_rows() == 0


def _picture_name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _columns(vectors: bool) -> list[str]:
    return ["id", "text", "metadata", "picture"] + (["vector"] if vectors else [])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _one_of(column: str, values: Sequence[str]) -> str:
    return f"{column} IN ({', '.join(map(_quoted, values))})" if values else "false"


def _where(filter: Filter | None, ids: Sequence[str] | None = None) -> str | None:
    """Return a filter over metadata as SQL, and that the id is one of `ids`; None if there is nothing to ask."""
    parts = [_sql(condition) for condition in conditions(filter)]
    if ids is not None:
        parts.append(_one_of("id", ids))
    return " AND ".join(f"({part})" for part in parts) or None


def _sql(condition: Condition) -> str:
    """Return a condition as SQL over the JSON text of the value, which tells strings from numbers and truth values."""
    path = f"$.{json.dumps(condition.field, ensure_ascii=False)}"
    text = f"json_extract(metadata, {_quoted(path)})"
    number = f"TRY_CAST({text} AS DOUBLE)"
    if condition.values:
        return _equals_one(text, number, condition.values)

    def bounded(bound: str, limit: Any) -> str:
        sign = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}[bound]
        if isinstance(limit, str):
            # by JSON path: the text would compare with the escapes of quotes and control characters
            wanted = _quoted(f"{path} ? (@ {sign} {json.dumps(limit, ensure_ascii=False)})")
            return f"{text} LIKE '\"%' AND json_exists(metadata, {wanted})"
        return f"{number} {sign} {_double(limit)}"

    return " AND ".join(f"({bounded(bound, limit)})" for bound, limit in condition.bounds)


def _equals_one(text: str, number: str, values: Sequence[Any]) -> str:
    """Return that a value equals one of `values`: a list of each kind, as a parser descends into every OR."""
    # a double would round a large seed
    as_text = [isinstance(value, bool | str) or (isinstance(value, int) and abs(value) > 2**53) for value in values]
    texts = [json.dumps(value, ensure_ascii=False) for value, one in zip(values, as_text) if one]
    numbers = [_double(value) for value, one in zip(values, as_text) if not one and value is not None]
    parts = []
    if None in values:
        parts.append(f"{text} IS NULL")
        texts.append("null")
    if texts:
        parts.append(_one_of(text, texts))
    if numbers:
        parts.append(f"{number} IN ({', '.join(numbers)})")
    return " OR ".join(f"({part})" for part in parts)


def _double(value: int | float) -> str:
    return f"CAST({float(min(max(value, -LARGEST), LARGEST))!r} AS DOUBLE)"
