"""Many requests to a language model: several at a time, repeated when they fail, in order, within a budget."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from textcond.synthesis.backends import Backend, Reply, TryAgain
from textcond.synthesis.journal import BudgetSpent, Journal

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
# a server that asks for a longer wait has a quota by the day: stop rather than sleep
LONGEST_RETRY_AFTER = 600.0
# tokens of a chat template around a message
TEMPLATE_TOKENS = 256


@dataclass(frozen=True)
class Request:
    """A message to the model; `name` identifies it in the journal."""

    name: str
    prompt: str
    seed: int


class Requests:
    """Sends requests through a backend and a journal; a context manager.

    Args:
        backend: the model.
        journal: where requests and replies are written; what it has is not asked again.
        concurrency: the most requests under way at once.
    """

    def __init__(self, backend: Backend, journal: Journal, concurrency: int):
        self.spent: str | None = None
        self._backend, self._journal, self._concurrency = backend, journal, concurrency
        self._pool = ThreadPoolExecutor(concurrency)
        self._stop = threading.Event()
        self._resume_at = 0.0
        self._failure: BaseException | None = None

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._journal.close()

    def replies(self, requests: Iterator[Request], wanted: Callable[[], int]) -> Iterator[tuple[Request, Reply]]:
        """Yield requests and their replies in the order of the requests, whichever comes back first.

        Never are more under way than `wanted()` says are still wanted, so that none is paid for in vain and the same
        requests are made at any concurrency. Ends when none is wanted, or when the budget is spent (`spent` says how).

        Raises:
            ConnectionError: if a request fails again and again.
            Exception: whatever else the backend raises.
        """
        pending: deque[tuple[Request, Future[Reply]]] = deque()
        while True:
            room = min(4 * self._concurrency, wanted()) - len(pending)
            if self.spent is None:
                for request in itertools.islice(requests, max(0, room)):
                    pending.append((request, self._pool.submit(self._ask, request)))
            if not pending:
                return
            request, future = pending.popleft()
            try:
                reply = future.result()
            except BudgetSpent as error:
                self.spent = str(error)
                continue
            except InterruptedError as stopped:
                raise self._failure or stopped from None
            yield request, reply

    def _ask(self, request: Request) -> Reply:
        try:
            return self._reply(request)
        except (BudgetSpent, InterruptedError):
            raise
        except BaseException as error:
            # no other thread may send (and pay for) anything more
            self._failure = self._failure or error
            self._stop.set()
            raise

    def _reply(self, request: Request) -> Reply:
        if (reply := self._journal.reply(request.name)) is not None:
            return reply
        # no tokenizer gives more tokens than a text has bytes
        most = len(request.prompt.encode()) + TEMPLATE_TOKENS + self._backend.reply_tokens
        for attempt in range(ATTEMPTS):
            self._wait()
            ask = self._journal.ask(request.name, most)
            try:
                reply = self._backend.complete(request.prompt, seed=request.seed)
            except TryAgain as error:
                self._journal.fail(ask, str(error), billed=error.billed)
                last = error
                if (error.after or 0.0) > LONGEST_RETRY_AFTER:
                    raise ConnectionError(
                        f"{error}; it asks to wait {error.after:.0f} seconds: run the same command again after that"
                    ) from error
                backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                # the server's wait holds for every request, a backoff only for this one
                if error.after is not None:
                    self._resume_at = max(self._resume_at, time.monotonic() + error.after)
                else:
                    self._stop.wait(backoff)
            except BaseException as error:
                self._journal.fail(
                    ask, type(error).__name__, billed=not isinstance(error, (ConnectionError, ValueError))
                )
                raise
            else:
                self._journal.answer(ask, request.name, reply)
                # as a run that goes on will read it
                return self._journal.reply(request.name)
        raise ConnectionError(
            f"{ATTEMPTS} attempts failed, the last with: {last}; run the same command again when the server is well"
        ) from last

    def _wait(self) -> None:
        while (seconds := self._resume_at - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(seconds)
        if self._stop.is_set():
            raise InterruptedError("stopped")
