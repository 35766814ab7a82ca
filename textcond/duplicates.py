"""What makes two texts the same, or nearly the same."""

from __future__ import annotations

import hashlib
import unicodedata
import zlib

import numpy as np


def normalised(text: str) -> str:
    """Return a text as comparisons see it: Unicode NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def without_punctuation(text: str) -> str:
    """Return a normalised text of nothing but letters, numbers and the marks on letters, in words."""
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in normalised(text))
    return " ".join("".join(kept).split())


def text_key(text: str) -> int:
    """Return a 64-bit hash, equal for texts that are the same after normalising."""
    return int.from_bytes(hashlib.blake2b(normalised(text).encode(), digest_size=8).digest(), "little")


def shingles(text: str, size: int = 5) -> frozenset[str]:
    """Return the character shingles of a text: all substrings of `size`, or a shorter text whole."""
    return frozenset(text[index : index + size] for index in range(max(1, len(text) - size + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of shingles that two texts have in common, from 0 to 1."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


class DistinctTexts:
    """Texts of which none is like another: a Jaccard similarity of character trigrams below `near`.

    Case, punctuation and spacing are set aside. Candidates come from MinHash signatures in 16 bands of 4 (Broder 1997),
    which find a pair at 0.8 with a probability of 0.9997, and are compared exactly.
    """

    def __init__(self, near: float = 0.8):
        self._near = near
        self._texts: list[frozenset[str]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        draw = np.random.default_rng(0)
        self._factors, self._shifts = draw.integers(1, 2**64, (2, 64, 1), dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> bool:
        """Take a text in and return True, or return False if it, or one much like it, is there already."""
        trigrams = shingles(f" {without_punctuation(text)} ", 3)
        hashes = np.fromiter((zlib.crc32(trigram.encode()) for trigram in trigrams), dtype=np.uint64)
        # multiply-shift hashing: the high half of a product modulo 2**64
        signature = ((self._factors * hashes + self._shifts) >> np.uint64(32)).min(1).reshape(16, 4)
        bands = [(band, values.tobytes()) for band, values in enumerate(signature)]
        candidates = {row for band in bands for row in self._bands.get(band, ())}
        if any(jaccard(trigrams, self._texts[row]) >= self._near for row in candidates):
            return False
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._texts))
        self._texts.append(trigrams)
        return True
