"""The append-only record of a synthesis: what was asked, what it cost, what came back."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from textcond.synthesis.backends import Reply


class BudgetSpent(Exception):
    """The next request could go beyond a bound; the message names the bound."""


class Journal:
    """A JSONL file that a killed run can go on from.

    The first line holds the settings that decide the requests. Every request is written before it is sent, with the
    most tokens it may cost, and its outcome after: so the bounds hold over any number of runs and kills. A line that a
    kill cut short is taken off when the file is opened.

    Args:
        path: the file; made if it is not there.
        settings: what a run that goes on must share with the one that began.
        max_requests: the most requests, failed ones included, over all runs.
        max_tokens: the most tokens read and written, over all runs; None for no bound.

    Raises:
        ValueError: if the journal was begun with other settings (says which), or is damaged (names file and line).
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, max_requests: int, max_tokens: int | None):
        self.path = path
        self.requests = 0
        self.failed = 0
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._settled = 0
        self._open: dict[int, int] = {}
        self._places: dict[str, int] = {}
        self._changed = threading.Condition()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self._file.close()
            raise

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            try:
                entry = json.loads(line)
                if number == 1:
                    self._compare(entry["settings"], settings)
                else:
                    self._take_in(entry, place)
            except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is damaged ({error!r}): "
                    "restore it, or choose another file to begin anew"
                ) from error
            place += len(line)
        # what was being asked when a run ended counts with all that it may have cost
        self._settled += sum(self._open.values())
        self.failed += len(self._open)
        self._open.clear()
        if place == 0:
            self._write({"settings": settings})

    def _compare(self, begun: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [
            f"{key} was {begun.get(key)!r} and is {now.get(key)!r}"
            for key in {**begun, **now}
            if begun.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was begun with other settings ({'; '.join(changed)}): "
                "go on with those, or choose another file"
            )

    @property
    def tokens(self) -> int:
        """Tokens read and written so far; where no count came back, the most that there can have been."""
        return self._settled

    def ask(self, request: str, most_tokens: int) -> int:
        """Note that a request is about to be sent; return its number.

        Raises:
            BudgetSpent: if it would be one request too many, or might cost too many tokens.
        """
        with self._changed:
            # replies under way mostly cost less than they may: wait for them before giving up
            while self._max_tokens is not None:
                if self._settled + most_tokens > self._max_tokens:
                    raise BudgetSpent(f"max_tokens={self._max_tokens}")
                if self._settled + sum(self._open.values()) + most_tokens <= self._max_tokens:
                    break
                self._changed.wait()
            if self.requests >= self._max_requests:
                raise BudgetSpent(f"max_requests={self._max_requests}")
            entry = {"ask": self.requests, "request": request, "most_tokens": most_tokens}
            self._take_in(entry, self._write(entry))
            return entry["ask"]

    def reply(self, request: str) -> Reply | None:
        """Return the reply to a request, None if there is none yet."""
        with self._changed:
            if request not in self._places:
                return None
            self._file.seek(self._places[request])
            entry = json.loads(self._file.readline())
        return Reply(entry["text"], entry["tokens"], entry["complete"])

    def answer(self, ask: int, request: str, reply: Reply) -> None:
        """Note the reply to a request."""
        entry = {"answer": ask, "request": request, "text": reply.text, "complete": reply.complete}
        self._settle(entry | {"tokens": reply.tokens})

    def fail(self, ask: int, reason: str, *, billed: bool) -> None:
        """Note that a request failed, and whether it may have cost tokens all the same."""
        self._settle({"fail": ask, "reason": reason, "billed": billed})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _settle(self, entry: dict[str, Any]) -> None:
        with self._changed:
            self._take_in(entry, self._write(entry))
            self._changed.notify_all()

    def _take_in(self, entry: dict[str, Any], place: int) -> None:
        if "ask" in entry:
            self.requests += 1
            self._open[entry["ask"]] = entry["most_tokens"]
        elif "answer" in entry:
            most = self._open.pop(entry["answer"])
            self._settled += most if entry["tokens"] is None else entry["tokens"]
            # texts stay on disk: half a million replies are more than a gigabyte
            self._places[entry["request"]] = place
        else:
            most = self._open.pop(entry["fail"])
            self._settled += most if entry["billed"] else 0
            self.failed += 1

    def _write(self, entry: dict[str, Any]) -> int:
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        return place
