"""The terms that lexical search compares, in any script."""

from __future__ import annotations

import re

from textcond.duplicates import normalised
from textcond.words import words

HAN = re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def query_terms(text: str) -> list[str]:
    """Return the different terms of a query: `textcond.words.words`, bigrams where no spaces are written."""
    return list(dict.fromkeys(words(text)))


def document_terms(text: str) -> list[str]:
    """Return the terms under which a text is found: those of a query, and each Han character.

    A single one is a whole word often (犬, 猫), and a query of that word alone has no bigram to share.
    """
    terms = [term for term in words(text) if not (len(term) == 1 and HAN.match(term))]
    return terms + HAN.findall(normalised(text))
