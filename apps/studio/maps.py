"""Maps of an index: each is made once, in the background, whoever asks, and kept in a file."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textcond.files import atomic_file

from .drawing import POLL, Stopped
from .projection import METHOD, between, project

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textcond import Hit, PromptIndex
    from textcond.apps.finder import Finder

BATCH = 1000
# Maps that stay in memory, and files that stay on disk: those of an index before it changed are of no more use.
READY, KEPT = 4, 16
# New rows take their places on the map of the others, each between its neighbours, if they are so few and one in a
# hundred at most.
FEW, NEIGHBOURS = 100, 8
# A field colours the map if it has 2 to so many values; those beyond the most frequent ones share a colour.
MOST_VALUES, COLOURS = 40, 10
FIRST_FIELDS = ("style", "language")
OTHER, NONE = "other", "none"


@dataclass(frozen=True)
class Field:
    """Metadata that can colour the map.

    Attributes:
        values: by frequency.
        codes: for each row the place of its value, `(n,)` uint8.
    """

    name: str
    values: list[str]
    codes: np.ndarray


@dataclass(frozen=True)
class IndexMap:
    """Where each row of an index lies.

    Attributes:
        weights: hash of those that the rows were encoded with.
        ids: of the rows, in the order of everything else.
        points: `(n, 2)` float32, in the square from -1 to 1.
    """

    key: str
    weights: str
    index: PromptIndex
    ids: list[str]
    points: np.ndarray
    fields: list[Field]
    places: dict[str, int] = field(repr=False)

    def rows(self, numbers: Sequence[int]) -> list[Hit | None]:
        """Those rows; None for one that is gone."""
        there = {hit.id: hit for hit in self.index.get([self.ids[number] for number in numbers])}
        return [there.get(self.ids[number]) for number in numbers]

    def place(self, hits: Sequence[Hit]) -> tuple[list[float] | None, list[int]]:
        """Where something lies that has these neighbours, and their numbers; those that are new are not on the map."""
        known = [hit for hit in hits if hit.id in self.places]
        if not known:
            return None, []
        numbers = [self.places[hit.id] for hit in known]
        return between(np.array([hit.score for hit in known]), self.points[numbers]).tolist(), numbers

    def packed(self) -> dict[str, Any]:
        """What the page draws: 16-bit whole numbers for the points, bytes for the colours."""
        return {
            "points": _base64((self.points * 32767).round().astype("<i2")),
            "fields": [
                {
                    "name": one.name,
                    "values": one.values,
                    "counts": np.bincount(one.codes, minlength=len(one.values)).tolist(),
                    "codes": _base64(one.codes),
                }
                for one in self.fields
            ],
        }


@dataclass(frozen=True)
class Progress:
    """How far a map is; `seconds` are left of what is done now, None before that is known."""

    what: str
    share: float
    seconds: float | None


@dataclass
class _Job:
    """A map that is being made in a thread, and the number of those who wait for it."""

    what: str = "Reading the index"
    share: float = 0.0
    seconds: float | None = None
    waiting: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    points: np.ndarray | None = None
    error: BaseException | None = None
    began: float = 0.0

    def told(self, what: str, done: int, total: int) -> None:
        """Take in the progress of `project`."""
        if self.stop.is_set():
            raise Stopped
        now = time.monotonic()
        if what != self.what:
            self.began = now
        passed = now - self.began
        self.seconds = passed * (total - done) / done if done and passed > 1 else None
        self.what, self.share = what, done / total


class Maps:
    """The maps of one server.

    An index may be on another machine, or where nobody may write: the files lie in a folder of the studio, named after
    what they were made of.

    Args:
        folder: takes them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ready: dict[str, IndexMap] = {}
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()

    def follow(self, finder: Finder, stop: threading.Event) -> Iterator[Progress | IndexMap]:
        """Yield how far the map is, and in the end the map: at once if it was made before.

        Whoever stops listening leaves the work going on.

        Raises:
            Stopped: `stop` was set; the work ends if nobody else waits for it.
            Exception: whatever the work raised.
        """
        rows = sorted(finder.index.rows(), key=lambda row: row.id)
        if not rows:
            raise ValueError("the index is empty: save a picture into it, and it is the first on the map")
        key = _key(rows, finder.weights_hash)
        if key not in self.ready:
            points = self._read(key, len(rows))
            if points is None and (points := self._grown(finder, rows)) is not None:
                self._write(key, points)
            if points is None:
                points = yield from self._made(key, finder, [row.id for row in rows], stop)
            ids = [row.id for row in rows]
            places = {name: number for number, name in enumerate(ids)}
            made = IndexMap(key, finder.weights_hash, finder.index, ids, points, fields(rows), places)
            with self._lock:
                self.ready = dict([*self.ready.items(), (key, made)][-READY:])
        yield self.ready[key]

    def _grown(self, finder: Finder, rows: Sequence[Hit]) -> np.ndarray | None:
        """The points of a map of nearly the same rows, the new ones between their neighbours; None without one."""
        for known in reversed([*self.ready.values()]):
            new = [row.id for row in rows if row.id not in known.places]
            if known.weights == finder.weights_hash and len(new) <= min(FEW, len(rows) / 100):
                placed = {id: known.place(finder.similar(id, NEIGHBOURS))[0] for id in new}
                if all(placed.values()):
                    points = [placed.get(row.id) or known.points[known.places[row.id]] for row in rows]
                    return np.array(points, np.float32)
        return None

    def _made(
        self, key: str, finder: Finder, ids: list[str], stop: threading.Event
    ) -> Iterator[Progress]:  # and returns the points
        with self._lock:
            job = self._jobs.get(key)
            if job is None or job.stop.is_set():
                job = self._jobs[key] = _Job()
                threading.Thread(target=self._work, args=(job, key, finder, ids), daemon=True).start()
            job.waiting += 1
        try:
            while not job.ended.is_set():
                yield Progress(job.what, job.share, job.seconds)
                if stop.wait(POLL):
                    with self._lock:
                        if job.waiting == 1:
                            job.stop.set()
                    raise Stopped
        finally:
            with self._lock:
                job.waiting -= 1
        if job.error is not None:
            raise job.error
        return job.points

    def _work(self, job: _Job, key: str, finder: Finder, ids: list[str]) -> None:
        try:
            points = project(_vectors(finder.index, ids), job.told)
            self._write(key, points)
            job.points = points
        except BaseException as error:  # it is raised again where the map is waited for
            job.error = error
        finally:
            with self._lock:
                if self._jobs.get(key) is job:
                    del self._jobs[key]
            job.ended.set()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def _read(self, key: str, count: int) -> np.ndarray | None:
        """The points in the file, or None where there is none that can be used."""
        try:
            points = np.load(self._path(key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return points if points.shape == (count, 2) and np.isfinite(points).all() else None

    def _write(self, key: str, points: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path(key)) as file:
            np.save(file, points, allow_pickle=False)
        for old in sorted(self.folder.glob("*.npy"), key=lambda path: -path.stat().st_mtime)[KEPT:]:
            old.unlink(missing_ok=True)


def fields(rows: Sequence[Hit]) -> list[Field]:
    """The metadata with few values that at least half of the rows have: style and language first, then by number."""
    names = Counter(name for row in rows for name in row.metadata)
    found = []
    for name, count in names.items():
        if 2 * count < len(rows) or not (counts := _counts(name, rows)):
            continue
        values = [value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        if len(values) > COLOURS:
            values = [*values[: COLOURS - 1], OTHER]
        numbers = {value: number for number, value in enumerate(values)}
        codes = [numbers.get(_said(row.metadata.get(name)), len(values) - 1) for row in rows]
        found.append(Field(name, values, np.array(codes, np.uint8)))

    def order(one: Field) -> tuple:
        return (FIRST_FIELDS.index(one.name) if one.name in FIRST_FIELDS else len(FIRST_FIELDS), len(one.values))

    return sorted(found, key=order)


def _counts(name: str, rows: Sequence[Hit]) -> Counter[str]:
    """How often each value occurs; nothing where most rows have their own, or where they are no words."""
    counts: Counter[str] = Counter()
    for row in rows:
        value = row.metadata.get(name)
        if not (value is None or isinstance(value, str | int)):
            return Counter()
        counts[_said(value)] += 1
        if len(counts) > MOST_VALUES:
            return Counter()
    return counts if 1 < len(counts) <= len(rows) / 2 else Counter()


def _said(value: Any) -> str:
    return NONE if value is None else str(value)


def _key(rows: Sequence[Hit], weights_hash: str) -> str:
    """A name for what decides where the rows lie."""
    hashed = hashlib.sha256(f"{METHOD}\n{weights_hash}\n".encode())
    for row in rows:
        hashed.update(f"{row.id}\0{row.text}\0".encode())
    return hashed.hexdigest()[:32]


def _vectors(index: PromptIndex, ids: list[str]) -> np.ndarray:
    """Of the rows with these ids, in their order.

    Raises:
        ValueError: the index was changed meanwhile.
    """
    numbers = {name: number for number, name in enumerate(ids)}
    vectors, missing = np.empty((len(ids), index.dim), np.float32), set(ids)
    for batch in index.store.scan(None, batch=BATCH, vectors=True, images=False):
        for row in batch:
            if row.id in numbers:
                vectors[numbers[row.id]] = row.vector
                missing.discard(row.id)
    if missing:
        raise ValueError("the index was changed while it was read: open the map again")
    return vectors


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
