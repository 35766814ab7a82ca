"""Words for lexical search in any script, and what makes two texts the same."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from functools import lru_cache

# Scripts that are written without spaces between words: Han, kana, Thai, Lao, Myanmar, Khmer.
UNSPACED = (
    "\u3005-\u3007\u303b\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana, iteration marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf"  # Thai, Lao
    "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\uaa60-\uaa7f\u1780-\u17d3\u17d7\u17dc-\u17dd"  # Myanmar, Khmer
)


def normalised(text: str) -> str:
    """Return a text as comparisons see it: Unicode NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> int:
    """Return a 64-bit hash, equal for texts that are the same after normalising."""
    return int.from_bytes(hashlib.blake2b(normalised(text).encode(), digest_size=8).digest(), "little")


def words(text: str) -> list[str]:
    """Split a text into terms for lexical search.

    Spaced scripts give their words: letters, digits and the marks on them, normalised as by `normalised`. A run of
    Han, Hiragana, Katakana, Thai, Lao, Khmer or Myanmar characters gives its overlapping character bigrams, and a run
    of one character that character, as Lucene's CJKBigramFilter does for the first three; Lucene splits the others by
    dictionary, which bigrams approximate without one.
    """
    terms = []
    for match in _pattern().finditer(normalised(text)):
        run = match[0]
        if match.lastgroup == "unspaced" and len(run) > 1:
            terms += [run[index : index + 2] for index in range(len(run) - 1)]
        else:
            terms.append(run)
    return terms


def shingles(text: str, size: int = 5) -> frozenset[str]:
    """Return the character shingles of a normalised text: all substrings of `size`, or a shorter text whole."""
    text = normalised(text)
    return frozenset(text[index : index + size] for index in range(max(1, len(text) - size + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of shingles that two texts have in common, from 0 to 1."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    r"""Letters, numbers and marks: `\w` lacks the vowel signs of Devanagari, Tamil and many others."""
    unspaced = re.compile(f"[{UNSPACED}]")
    ranges: list[list[int]] = []
    for code in range(min(sys.maxunicode, 0x1FFFF) + 1):
        character = chr(code)
        if unicodedata.category(character)[0] not in "LNM" or unspaced.match(character):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    spaced = "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in ranges)
    return re.compile(f"(?P<unspaced>[{UNSPACED}]+)|[{spaced}]+")
