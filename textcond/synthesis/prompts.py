"""What the language model is asked: retrieval tasks first, then triples of varied attributes for each.

The two steps, the kinds of task and most attributes are those of E5-mistral (Wang et al. 2024, tables 7 to 10); the
wording is ours, and every kind asks for a hard negative.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from dataclasses import dataclass

TASKS_A_REPLY = 20

# what a kind's query and documents are, and examples of its tasks
KINDS = {
    "short-long": (
        "a short search query that is answered by a long document",
        "Given a claim about a medicine, retrieve trial reports that support or refute it.",
        "Given a question about local law, retrieve passages that answer it.",
    ),
    "long-short": (
        "a long text that belongs to a short category, label or title",
        "Given a customer's complaint, retrieve the department that should handle it.",
        "Given a research abstract, retrieve its field of study.",
    ),
    "short-short": (
        "a short text that is matched with another short text",
        "Given the name of a product, retrieve the search terms that buyers would use for it.",
        "Given a riddle, retrieve its solution.",
    ),
    "long-long": (
        "a long text that is matched with another long text",
        "Given a news article, retrieve another report of the same event.",
        "Given a description of a fault, retrieve the report of a similar case and its repair.",
    ),
}

THEMES = (
    "everyday household questions",
    "cooking and food",
    "health and medicine",
    "law and public services",
    "money and taxes",
    "programming and software",
    "mathematics",
    "physics and chemistry",
    "biology and nature",
    "engineering and repair",
    "history",
    "geography and travel",
    "literature",
    "music",
    "film and games",
    "pictures and their descriptions",
    "art and design",
    "fashion",
    "sports",
    "education",
    "jobs and careers",
    "shopping",
    "customer support",
    "news and politics",
    "science papers",
    "language learning",
    "religion and philosophy",
    "agriculture",
    "transport",
    "housing",
    "family and children",
)

QUERY_TYPES = ("extremely long-tail", "long-tail", "common")
QUERY_LENGTHS = ("less than 5 words", "5 to 15 words", "at least 10 words")
DIFFICULTIES = ("high school", "college", "PhD")
CLARITIES = ("clear", "understandable with some effort", "ambiguous")
WORDS = (50, 100, 200, 300, 400, 500)


@dataclass(frozen=True)
class Task:
    """A retrieval task: its kind (a key of `KINDS`) and the instruction that goes before its queries."""

    kind: str
    instruction: str


def tasks_prompt(kind: str, count: int, rng: random.Random) -> str:
    """Return the message that asks for `count` tasks of a kind, around a theme that the generator draws."""
    matching, *examples = KINDS[kind]
    return f"""Brainstorm {count} different and useful text retrieval tasks. Each has {matching}.

Two examples of such tasks:
- {examples[0]}
- {examples[1]}

Rules:
- Each task is one sentence that says what the query is and what has to be retrieved for it.
- The tasks differ from each other and from the examples. Let several of them touch on {rng.choice(THEMES)}.

Answer with a JSON list of {count} strings and nothing else, one string for each task."""


def triple_prompt(task: Task, language: str, rng: random.Random) -> str:
    """Return the message that asks for one triple of a task, with attributes that the generator draws."""
    query_side, document_side = task.kind.split("-")
    words = rng.choice(WORDS)
    difficulty, clarity = rng.choice(DIFFICULTIES), rng.choice(CLARITIES)
    query_type, query_length = rng.choice(QUERY_TYPES), rng.choice(QUERY_LENGTHS)
    if query_side == "short":
        query_rule = f"The query is {query_type}, {query_length} long and {clarity}."
    else:
        query_rule = f"The query is a text of at least {words} words, {clarity} in its wording."
    if document_side == "short":
        document_rule = "The positive and the hard negative are at most 15 words each."
    else:
        document_rule = f"The positive and the hard negative are at least {words} words each."
    return f"""You write training data for the following text retrieval task:
{task.instruction}

Write one example as a JSON object with exactly these three string keys:
- "query": a query of the task.
- "positive": a text that is right for the query.
- "hard_negative": a text that looks right for the query at first sight and is not.

Rules:
- {query_rule}
- {document_rule}
- The positive does not repeat the query's words where others would do. The hard negative shares the topic and words of
  the query, yet it is less useful or wrong for it.
- All texts are in {language}, and understanding them takes {difficulty} level education.
- No text says that it is a query, a positive or a hard negative.

Answer with the JSON object and nothing else. Be creative."""


def wording() -> str:
    """Return a hash of everything here, so that a resume knows when replies answer other questions."""
    return hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()[:16]
