"""BM25 over a corpus in any script, by bm25s."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from textcond.words import words


class BM25Index:
    """BM25 in Lucene's variant (k1 = 1.5, b = 0.75) over `words` of texts.

    Memory: 4 bytes a token and about 40 bytes a distinct term of a text while it is built, 8 bytes of them after.

    Args:
        texts: read once.

    Raises:
        ValueError: if no text has a word.
    """

    def __init__(self, texts: Iterable[str]):
        import bm25s

        vocabulary: dict[str, int] = {}
        tokens, starts = array("i"), array("q", [0])
        for text in texts:
            tokens.extend(vocabulary.setdefault(word, len(vocabulary)) for word in words(text))
            starts.append(len(tokens))
        if not tokens:
            raise ValueError("the corpus has no word in it: BM25 has nothing to search")
        self._vocabulary = vocabulary
        self._average_length = len(tokens) / (len(starts) - 1)
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self._index.scores = self._index.build_index_from_ids(
            unique_token_ids=range(len(vocabulary)), corpus_token_ids=_Ragged(tokens, starts), show_progress=False
        )

    def __len__(self) -> int:
        return self._index.scores["num_docs"]

    def search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of at most k texts that share a word with the query, best first, and their scores.

        Equal scores come in the order of rows.
        """
        known = [self._vocabulary[word] for word in words(query) if word in self._vocabulary]
        if not known:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        scores = self._index.get_scores_from_ids(known)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:
            smallest = np.partition(scores[found], len(found) - k)[len(found) - k]
            found = found[scores[found] >= smallest]
        found = found[np.argsort(-scores[found], kind="stable")[:k]]
        return found, scores[found]

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """Return the score that each text has, or would have in this corpus (Robertson and Zaragoza, 2009)."""
        known = [self._vocabulary[word] for word in words(query) if word in self._vocabulary]
        starts, size = self._index.scores["indptr"], len(self)
        frequencies = np.array([starts[term + 1] - starts[term] for term in known], np.float64)
        rarity = np.log(1 + (size - frequencies + 0.5) / (frequencies + 0.5))
        scores = []
        for text in texts:
            found = words(text)
            counts = Counter(self._vocabulary[word] for word in found if word in self._vocabulary)
            count = np.array([counts[term] for term in known], np.float64)
            length = self._index.k1 * (1 - self._index.b + self._index.b * len(found) / self._average_length)
            scores.append(float((rarity * count / (count + length)).sum()))
        return scores


class _Ragged:
    """Lists of ids in one flat array, which bm25s reads as a list of lists, several times."""

    def __init__(self, values: array, starts: array):
        self.values, self.starts = values, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for first, last in zip(self.starts, self.starts[1:]):
            yield self.values[first:last].tolist()
