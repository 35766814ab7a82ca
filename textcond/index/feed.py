"""Filling an index from files: streamed in batches, encoded by one process or many, taken up again where it stopped.

Rows that the index has already are not encoded again, so that a source that is fed twice adds nothing.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from textcond.data.rows import Problems
from textcond.duplicates import normalised
from textcond.files import remove_partials, write_mark

from .sources import THUMBNAIL, Source, SourceRow, absolute, count_rows, find_sources, read_source

if TYPE_CHECKING:
    from accelerate import PartialState

    from textcond.encoder import TextEncoder

    from .prompt_index import PromptIndex

BATCH = 1024
FORGOTTEN = 3600.0  # seconds after which an unfinished mark is nobody's; others may feed the same index
REASONS = 50  # kinds of reasons that are counted apart


@dataclass
class FeedReport:
    """What became of the rows of `feed`.

    Attributes:
        read: sound rows, in this run.
        added: of those, rows that the index did not have.
        skipped: rows that could not be used; `reasons` counts them, `first` is the first: file, line and what is wrong.
    """

    read: int = 0
    added: int = 0
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: str = ""

    def __str__(self) -> str:
        told = f"{self.added:,} rows added, {self.read - self.added:,} were there already"
        if not self.skipped:
            return told
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in list(self.reasons.items())[:5])
        return f"{told}, {self.skipped:,} skipped ({reasons}), the first: {self.first}"


class CountedProblems(Problems):
    """Problems that are skipped and counted by what is wrong, or of which the first is an error."""

    def __init__(self, on_error: Literal["raise", "skip"] = "skip"):
        super().__init__(on_error)
        self.reasons: Counter[str] = Counter()

    def bad(self, path: str | Path, line: int, error: object) -> None:
        """Raise ValueError with file and line, or count the row under its reason."""
        super().bad(path, line, error)
        # without what differs from row to row: the file, values and numbers
        reason = re.sub(
            r"\([^)]*\)|'[^']*'|\"[^\"]*\"|(?<![\w-])\d[\d,.]*", "", str(error).replace(str(path), "")[:500]
        )
        reason = " ".join(reason.split(":")[0].split()) or type(error).__name__
        self.reasons[reason if reason in self.reasons or len(self.reasons) < REASONS else "other"] += 1


def feed(
    index: PromptIndex,
    sources: str | Path | Iterable[str | Path],
    *,
    text_column: str | None = None,
    split: str | None = None,
    distinct: bool = False,
    thumbnails: int = THUMBNAIL,
    batch_size: int = BATCH,
    on_error: Literal["raise", "skip"] = "skip",
    mark: str | Path | None = None,
    show_progress_bar: bool = False,
) -> FeedReport:
    """Add the rows of files to an index, batch by batch; what was added stays when it is stopped, by whatever.

    Under `accelerate launch` or `torchrun` the first process calls this and the others `help_feed`: every process
    encodes its share of each batch, and the first alone reads and writes.

    Args:
        index: where to.
        sources: files and folders, see `textcond.index.sources`.
        text_column: the column of texts in tables; None is `text`, `prompt` or `caption`.
        split: of a datasets folder; "train" if left out.
        distinct: one row a text, case, width and spaces set aside; without it, one row a text and metadata.
        thumbnails: pixels of a thumbnail's longer side; 0 keeps no pictures.
        batch_size: rows that are encoded and written at once.
        on_error: "skip" counts rows that cannot be used, "raise" makes the first one an error with file and line.
        mark: a file that tells how far tables were read; the same call goes on from there, and at the end these
            sources are gone from it, and the file with the last.
        show_progress_bar: show rate and time left.

    Raises:
        FileNotFoundError: a source that is not there, or no picture in a folder.
        ValueError: a source of no known kind, a damaged one, no column of texts.
        OSError: the store cannot be written.
    """
    from tqdm.auto import tqdm

    paths = [sources] if isinstance(sources, (str, Path)) else list(sources)
    problems = CountedProblems(on_error)
    report = FeedReport()
    with _Encoding(index.encoder) as encoding:
        found = find_sources(paths)
        # what decides which rows come: with `thumbnails`, those whose pictures are damaged do not
        told = {"text_column": text_column, "split": split, "thumbnails": None if thumbnails else 0}
        key = "distinct" if distinct else "rows"
        key += "".join(f" {name}={value!r}" for name, value in told.items() if value is not None)
        done = _Mark(None if mark is None else Path(mark), key, paths)
        counts = (
            [count_rows(source, text_column=text_column, split=split) for source in found]
            if show_progress_bar
            else [None]
        )
        before = sum(done.after(source) for source in found)
        bar = tqdm(
            total=None if None in counts else sum(counts),
            initial=before,
            unit=" rows",
            desc="feeding",
            disable=not show_progress_bar,
        )
        rows = itertools.chain.from_iterable(
            read_source(
                source,
                problems,
                text_column=text_column,
                split=split,
                thumbnails=thumbnails,
                pictures_alone=hasattr(index.encoder, "encode_image"),
                after=done.after(source),
            )
            for source in found
        )
        with bar:
            for batch in _batches(rows, batch_size):
                if not report.read:
                    done.write([])  # before the first row, so that the index is known to be unfinished
                report.read += len(batch)
                report.added += _add(index, batch, encoding, problems, distinct)
                done.write(batch)
                # what was skipped is done, too
                bar.update(before + report.read + problems.skipped - bar.n)
        done.remove()
    report.skipped, report.first = problems.skipped, problems.first
    report.reasons = dict(problems.reasons.most_common())
    return report


def help_feed() -> None:
    """Encode the shares of a process that is not the first, with the same encoder, until that one's `feed` ends."""
    _Encoding(None).follow()


def launched() -> PartialState | None:
    """Return what accelerate knows of the processes that a launcher started, or None in a process started alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch
    from accelerate import PartialState

    atexit.register(_leave_group)
    # without a GPU, processes only find each other if they are told to be on the CPU
    return PartialState(cpu=not torch.cuda.is_available())


def _leave_group() -> None:
    """End the group of processes, whose threads else end a process at its exit with an abort."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the one that reads and writes, as all are that were started alone."""
    state = launched()
    return state is None or state.is_main_process


def row_id(text: str, metadata: dict[str, Any], distinct: bool = False) -> str:
    """Return the id under which equal rows are one; with `distinct`, rows of equal texts are."""
    from .prompt_index import content_id

    return sha256(normalised(text).encode()).hexdigest()[:24] if distinct and text else content_id(text, metadata, None)


def _batches(rows: Iterator[SourceRow], size: int) -> Iterator[list[SourceRow]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _add(index: PromptIndex, batch: list[SourceRow], encoding: _Encoding, problems: Problems, distinct: bool) -> int:
    """Add those rows of a batch that are new; return how many."""
    new = {row_id(row.text, row.metadata, distinct): row for row in reversed(batch)}
    for hit in index.get(list(new)):
        del new[hit.id]
    kept: dict[str, tuple[SourceRow, bytes | None]] = {}
    for ident, row in reversed(new.items()):
        # decoded only now: most of the work of a picture is not to be done twice
        picture = problems.attempt(row.source.path, row.number, _picture, row)
        if picture is not None:
            kept[ident] = (row, picture[0])
    for part in ({i: pair for i, pair in kept.items() if bool(pair[0].text) is told} for told in (True, False)):
        if not part:
            continue
        texts = [row.text for row, _ in part.values()]
        index.add(
            texts,
            [row.metadata for row, _ in part.values()],
            [picture for _, picture in part.values()],
            list(part),
            # a picture without a text is encoded by the index, as a picture
            vectors=encoding.encode(texts) if any(texts) else None,
        )
    return len(kept)


def _picture(row: SourceRow) -> tuple[bytes | None]:
    return (row.image() if row.image else None,)


class _Mark:
    """How far each source was read, in a file beside the index; a table that changed since is read from its start.

    Feeds with other options or sources keep their own entries. Pictures are noted as not read: to find that a
    picture's row is there takes its header alone.
    """

    def __init__(self, path: Path | None, key: str, sources: Iterable[str | Path]):
        self.path, self._key = path, key
        self._own: dict[str, list[int]] = {}
        before = self._content().get(key, {})
        for source in map(absolute, sources):
            stat = source.stat()
            *state, row = before.get(str(source), [0])
            now = [stat.st_size, stat.st_mtime_ns]
            self._own[str(source)] = [*now, row if state == now else 0]
        if path is not None:
            remove_partials(path.parent, FORGOTTEN)

    def _content(self) -> dict[str, dict[str, list[int]]]:
        from textcond.folders import read_json

        if self.path is None:
            return {}
        try:
            content = read_json(self.path)
        except FileNotFoundError:
            return {}
        return content if isinstance(content, dict) else {}

    def after(self, source: Source) -> int:
        """Return how many rows of a source need no reading."""
        return self._own.get(str(source.path), [0])[-1]

    def write(self, batch: Sequence[SourceRow]) -> None:
        """Note the rows of a batch, which the index has now."""
        for row in batch:
            if row.source.kind != "picture":
                self._own[str(row.source.path)][-1] = row.place
        self._save(self._own)

    def remove(self) -> None:
        """Remove these sources from the mark, which were read to their ends, and the mark if it holds no other."""
        self._save({})

    def _save(self, own: dict[str, list[int]]) -> None:
        if self.path is None:
            return
        content = self._content()  # read again: others may feed the same index
        others = {name: entry for name, entry in content.get(self._key, {}).items() if name not in self._own}
        content = {key: entries for key, entries in (content | {self._key: others | own}).items() if entries}
        if content:
            write_mark(self.path, content)
        else:
            self.path.unlink(missing_ok=True)


class _Encoding:
    """Documents encoded by all processes that were launched, each an equal share; alone, by this one."""

    def __init__(self, encoder: TextEncoder | None):
        self._state = launched()
        self.encoder = encoder if self._state is None else self._shared(encoder)

    def _shared(self, encoder: TextEncoder | None) -> TextEncoder:
        """Return the first process's encoder; the others load the same."""
        from .image_text import load_encoder

        if self._state.is_main_process and encoder.name_or_path is None:
            raise ValueError("the encoder was made in memory, where other processes cannot load it: save it first")
        told = [encoder.name_or_path, encoder.dtype] if self._state.is_main_process else None
        name, dtype = self._share(told)
        return encoder or load_encoder(name, device=self._state.device, dtype=dtype)

    def __enter__(self) -> _Encoding:
        return self

    def __exit__(self, *_: object) -> None:
        if self._state is not None and self._state.is_main_process:
            self._share(None)  # the others leave, whether it ended well or not

    def _share(self, texts: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([texts])[0]

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return vectors `(texts, dim)`."""
        if self._state is None:
            return self.encoder.encode(texts, kind="document")
        return self._encode_share(self._share(texts))

    def follow(self) -> None:
        """Encode this process's shares until the first process is done."""
        while (texts := self._share(None)) is not None:
            self._encode_share(texts)

    def _encode_share(self, texts: list[str]) -> np.ndarray:
        from accelerate.utils import gather_object

        count, place = self._state.num_processes, self._state.process_index
        share = texts[place::count]
        empty = np.empty((0, self.encoder.dim), np.float32)
        try:
            made: Any = self.encoder.encode(share, kind="document") if share else empty
        except Exception as error:  # told to all, so that none waits for ever
            made = error
        parts = gather_object([made])
        failed = next((part for part in parts if isinstance(part, Exception)), None)
        if failed is not None:
            if place == 0:
                raise failed
            return empty  # the first process tells it, and ends this one
        vectors = np.empty((len(texts), self.encoder.dim), np.float32)
        for start, part in enumerate(parts):
            vectors[start::count] = part
        return vectors


def mark_path(index: str | Path) -> Path | None:
    """Return where the mark of an index lies: in its folder, beside its file; None for one behind an address."""
    text = str(index)
    if re.match(r"\w+://", text):
        return None
    path = absolute(text)
    return path / "feeding.json" if path.is_dir() else path.with_name(f"{path.name}.feeding.json")
