"""What is kept of a language model's replies: JSON of the right shape, with sensible texts."""

from __future__ import annotations

import json
import re
from typing import Any

from textcond.duplicates import without_punctuation
from textcond.synthesis.backends import Reply
from textcond.synthesis.prompts import KINDS, Task

KEYS = ("query", "positive", "hard_negative")
# the fewest and the most characters of a short and of a long text; 50 words are some 80 characters of Chinese
LENGTHS = {"short": (2, 600), "long": (60, 20_000)}


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
    examples = {without_punctuation(example) for kind in KINDS.values() for example in kind[1:]}
    tasks = [" ".join(task.split()) for task in parse(reply, list) if isinstance(task, str)]
    tasks = [task for task in tasks if 15 <= len(task) <= 400 and without_punctuation(task) not in examples]
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
    if not all(without_punctuation(text) for text in texts):
        raise Unusable("empty text")
    if len({without_punctuation(text) for text in texts}) < len(texts):
        raise Unusable("equal texts")
    query_side, document_side = task.kind.split("-")
    for text, side in zip(texts, (query_side, document_side, document_side)):
        shortest, longest = LENGTHS[side]
        if not shortest <= len(text) <= longest:
            raise Unusable(f"{side} text of the wrong length")
    return texts
