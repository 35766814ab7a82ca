"""What is kept of a language model's replies: JSON of the right shape, with sensible texts, not seen before."""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from typing import Any

import numpy as np

from textcond.synthesis.backends import Reply
from textcond.synthesis.prompts import KINDS, Task

KEYS = ("query", "positive", "hard_negative")
# the fewest and the most characters of a short and of a long text; 50 words are some 80 characters of Chinese
LENGTHS = {"short": (2, 600), "long": (60, 20_000)}
NEAR = 0.8


class Unusable(Exception):
    """A reply that is not kept; the message is the reason, one of a few."""


def parse(reply: Reply, kind: type[dict] | type[list]) -> Any:
    """Return the first JSON object (`dict`) or list that a reply holds.

    Markdown fences, thoughts before the answer and talk around it are passed over; line breaks inside strings, which
    models write and JSON forbids, are let through.

    Raises:
        Unusable: if there is none.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", reply.text, flags=re.DOTALL)
    decoder = json.JSONDecoder(strict=False)
    for start in re.finditer(r"\{" if kind is dict else r"\[", text):
        try:
            value, _ = decoder.raw_decode(text, start.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        else:
            return value
    raise Unusable("no JSON" if reply.complete else "cut short")


def check_tasks(reply: Reply) -> list[str]:
    """Return the instructions of a brainstorm reply, in order, those that are no sentence left out.

    Raises:
        Unusable: if there is none.
    """
    examples = {normalised(example) for kind in KINDS.values() for example in kind[1:]}
    tasks = [" ".join(task.split()) for task in parse(reply, list) if isinstance(task, str)]
    tasks = [task for task in tasks if 15 <= len(task) <= 400 and normalised(task) not in examples]
    if not tasks:
        raise Unusable("no tasks")
    return tasks


def check_triple(reply: Reply, task: Task) -> tuple[str, str, str]:
    """Return query, positive and hard negative of a reply, stripped; what else a reply says is paid for and harmless.

    Raises:
        Unusable: for a missing or empty text, equal texts, or a length that the task's kind does not have.
    """
    value = parse(reply, dict)
    if not all(isinstance(value.get(key), str) for key in KEYS):
        raise Unusable("wrong keys")
    texts = tuple(value[key].strip() for key in KEYS)
    # half an emoji, escaped, is JSON and no text
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise Unusable("broken characters")
    if not all(normalised(text) for text in texts):
        raise Unusable("empty text")
    if len({normalised(text) for text in texts}) < len(texts):
        raise Unusable("equal texts")
    query_side, document_side = task.kind.split("-")
    for text, side in zip(texts, (query_side, document_side, document_side)):
        shortest, longest = LENGTHS[side]
        if not shortest <= len(text) <= longest:
            raise Unusable(f"{side} text of the wrong length")
    return texts


def normalised(text: str) -> str:
    """Return a text as duplicates are compared: compatibility forms, case, punctuation and spacing set aside."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded).split())


class Seen:
    """Texts seen so far, for exact and near duplicates: a Jaccard similarity of character trigrams of at least `near`.

    Candidates come from MinHash signatures in 16 bands of 4 (Broder 1997), which find a pair at 0.8 with a
    probability of 0.9997, and are compared exactly.
    """

    def __init__(self, near: float = NEAR):
        self._near = near
        self._texts: list[frozenset[int]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        draw = np.random.default_rng(0)
        self._factors, self._shifts = draw.integers(1, 2**64, (2, 64, 1), dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> bool:
        """Take a text in and return True, or return False if it, or one much like it, is there already."""
        text = f" {normalised(text)} "
        trigrams = frozenset(zlib.crc32(text[i : i + 3].encode()) for i in range(max(1, len(text) - 2)))
        hashes = np.fromiter(trigrams, dtype=np.uint64)
        # multiply-shift hashing: the high half of a product modulo 2**64
        signature = ((self._factors * hashes + self._shifts) >> np.uint64(32)).min(1).reshape(16, 4)
        bands = [(band, values.tobytes()) for band, values in enumerate(signature)]
        for other in {row for band in bands for row in self._bands.get(band, ())}:
            shared = len(trigrams & self._texts[other])
            if shared >= self._near * (len(trigrams) + len(self._texts[other]) - shared):
                return False
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._texts))
        self._texts.append(trigrams)
        return True
