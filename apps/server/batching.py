"""One thread that encodes for every client: texts that wait at the same time go through the encoder together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .metrics import Metrics

if TYPE_CHECKING:
    from textcond import TextEncoder

BATCH_TOKENS = {"cpu": 2048}  # what goes through the encoder in one turn, by type of device
ACCELERATOR_BATCH_TOKENS = 16_384
COUNTED = 32  # texts of one request whose tokens are counted at a time, so that a long request holds nobody up


class Encoded(NamedTuple):
    """Float32 `vectors` (texts, dim), how many `tokens` they were made from, and which texts were cut to fit."""

    vectors: np.ndarray
    tokens: int
    truncated: list[int]


@dataclass
class _Job:
    texts: Sequence[str]
    kind: str | None
    future: Future[Encoded] = field(default_factory=Future)
    lengths: list[int] = field(default_factory=list)  # in tokens, of the texts counted so far
    taken: int = 0  # texts that have had their turn
    vectors: np.ndarray | None = None


class Batcher:
    """Gathers the texts of concurrent requests into batches for an encoder, which only its one thread calls.

    A batch is full at `batch_tokens`. While the encoder works, what arrives waits and makes up the next batch, to which
    every waiting request gives an equal share of tokens: a request of one text is never behind the whole of another one
    of thousands. After a batch of several requests an idle encoder waits `wait` seconds for others to join the first
    that comes; a lone client is not kept waiting.

    Args:
        encoder: the encoder; nothing else may use it or its tokenizer meanwhile.
        batch_tokens: None for what suits the encoder's device; 1 encodes every text alone.
        wait: seconds.
        metrics: where batches, texts and tokens are counted.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        batch_tokens: int | None = None,
        wait: float = 0.002,
        metrics: Metrics | None = None,
    ):
        self.encoder, self.wait, self.metrics = encoder, wait, metrics or Metrics()
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(encoder.device.type, ACCELERATOR_BATCH_TOKENS)
        self._arrived: list[_Job] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="textcond-encoder", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether texts that are given now will be encoded."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, texts: Sequence[str], kind: str | None = None) -> Future[Encoded]:
        """Ask for the vectors of texts; the answer comes when the last of them is encoded. Returns at once.

        Raises:
            RuntimeError: after `stop`.
        """
        job = _Job(list(texts), kind, vectors=np.empty((len(texts), self.encoder.dim), np.float32))
        with self._changed:
            self._check_alive()
            if not job.texts:
                job.future.set_result(Encoded(job.vectors, 0, []))
            else:
                self._arrived.append(job)
                self._changed.notify()
        return job.future

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Have the encoder's thread do something else between two batches, such as encoding a picture.

        Raises:
            RuntimeError: after `stop`.
        """
        future: Future[Any] = Future()
        with self._changed:
            self._check_alive()
            self._calls.append((work, future))
            self._changed.notify()
        return future

    def stop(self) -> None:
        """Encode what was asked for until now, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _check_alive(self) -> None:
        if not self.alive:
            raise RuntimeError("the encoder has stopped: the server is shutting down")

    def _run(self) -> None:
        waiting: deque[_Job] = deque()
        shared = False
        while True:
            with self._changed:
                idle = not waiting
                while not (waiting or self._arrived or self._calls or self._stopping):
                    self._changed.wait()
                if not (waiting or self._arrived or self._calls):
                    return
                call = self._calls.popleft() if self._calls else None
            if call is not None:
                _answer(*call)
            elif idle and shared and self.wait:
                time.sleep(self.wait)
            with self._changed:
                waiting += self._arrived
                self._arrived = []
            if waiting:
                turns = self._next_batch(waiting)
                shared = len(turns) > 1
                self._encode(turns)

    def _next_batch(self, waiting: deque[_Job]) -> list[tuple[_Job, range]]:
        """Take a batch out of the requests that wait, an equal share of tokens from each; the unfinished go last."""
        turns: dict[int, tuple[_Job, range]] = {}
        room = self.batch_tokens
        share = max(1, room // len(waiting))
        while waiting and room > 0:
            job = waiting.popleft()
            if job.future.done():  # cancelled, or one of its texts has failed
                continue
            start, used = job.taken, 0
            while job.taken < len(job.texts):
                length = self._length(job, job.taken)
                # a turn is one text at least, and so is a batch
                if (used and used + length > share) or ((turns or used) and used + length > room):
                    break
                used += length
                job.taken += 1
            if not used:  # the batch is full but for tokens that are too few for this text
                waiting.appendleft(job)
                break
            room -= used
            first = turns[id(job)][1].start if id(job) in turns else start
            turns[id(job)] = (job, range(first, job.taken))
            if job.taken < len(job.texts):
                waiting.append(job)
        return list(turns.values())

    def _length(self, job: _Job, position: int) -> int:
        """Tokens of a text that the encoder reads; counting them cuts nothing, so that `_finish` knows what is cut."""
        while position >= len(job.lengths):
            some = job.texts[len(job.lengths) : len(job.lengths) + COUNTED]
            try:
                job.lengths += _count_tokens(self.encoder, some, job.kind)
            except Exception:
                # whatever is wrong with such a text, encoding it says so to the one who sent it
                job.lengths += [1] * len(some)
        return min(job.lengths[position], self.encoder.max_length or job.lengths[position])

    def _encode(self, turns: list[tuple[_Job, range]]) -> None:
        kinds: dict[str | None, list[tuple[_Job, range]]] = {}
        for job, texts in turns:
            kinds.setdefault(job.kind, []).append((job, texts))
        for kind, group in kinds.items():
            try:
                self._encode_together(kind, group)
            except Exception as error:
                if len(group) == 1:
                    _fail(group[0][0], error)
                    continue
                for turn in group:  # one bad text must not fail the others' requests
                    try:
                        self._encode_together(kind, [turn])
                    except Exception as alone:
                        _fail(turn[0], alone)

    def _encode_together(self, kind: str | None, group: list[tuple[_Job, range]]) -> None:
        texts = [job.texts[position] for job, positions in group for position in positions]
        started = time.monotonic()
        vectors = self.encoder.encode(texts, kind=kind)
        self.metrics.observe("textcond_batch_seconds", time.monotonic() - started)
        self.metrics.add("textcond_texts_total", len(texts))
        row = 0
        for job, positions in group:
            job.vectors[positions.start : positions.stop] = vectors[row : row + len(positions)]
            self.metrics.add("textcond_tokens_total", sum(self._length(job, position) for position in positions))
            row += len(positions)
            if job.taken == len(job.texts):
                self._finish(job)

    def _finish(self, job: _Job) -> None:
        limit = self.encoder.max_length
        truncated = [position for position, length in enumerate(job.lengths) if limit is not None and length > limit]
        tokens = sum(self._length(job, position) for position in range(len(job.texts)))
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(Encoded(job.vectors, tokens, truncated))


class BatchedEncoder:
    """Stands where an index keeps its encoder: what is encoded waits for its turn in the batcher's thread.

    Everything else that is asked of it is the encoder's.
    """

    def __init__(self, batcher: Batcher):
        self._batcher = batcher

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._batcher.encoder, name)
        if name == "encode_image":
            return lambda images, **options: self._batcher.call(partial(value, images, **options)).result()
        return value

    def encode(
        self, texts: str | Iterable[str], *, kind: str | None = None, show_progress_bar: bool = False
    ) -> np.ndarray:
        """Encode as `TextEncoder.encode` does; progress is the server's to show."""
        single = isinstance(texts, str)
        vectors = self._batcher.submit([texts] if single else list(texts), kind).result().vectors
        return vectors[0] if single else vectors


def _answer(work: Callable[[], Any], future: Future[Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)


def _fail(job: _Job, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)


def _count_tokens(encoder: TextEncoder, texts: Sequence[str], kind: str | None) -> list[int]:
    """Tokens of each text with its prompt and the special tokens, before anything is cut."""
    config = encoder.config
    prompt = config.prompts.get(config.default_prompt_name if kind is None else kind, "")
    ids = encoder.tokenizer(
        [prompt + text for text in texts],
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return [max(1, len(row)) for row in ids]
