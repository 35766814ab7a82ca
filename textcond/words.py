"""Words for lexical search in any script."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import lru_cache

from textcond.duplicates import normalised

# Scripts that are written without spaces between words: Han, kana, Thai, Lao, Myanmar, Khmer.
UNSPACED = (
    "\u3005-\u3007\u303b\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana, iteration marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf"  # Thai, Lao
    "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\uaa60-\uaa7f\u1780-\u17d3\u17d7\u17dc-\u17dd"  # Myanmar, Khmer
)


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
