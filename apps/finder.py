"""The prompts of an index, found by whichever encoder conditions the pictures."""

from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textcond.index.prompt_index import LONGEST_QUERY

if TYPE_CHECKING:
    from PIL.Image import Image

    from textcond import Hit, PromptIndex, TextEncoder


def open_index(path: str | Path | None = None) -> PromptIndex:
    """The prompt index at `path`, or that of the reference model."""
    if path is not None:
        from textcond.index import PromptIndex

        return PromptIndex.open(path)
    from textcond.pipelines.reference import open_reference_index

    return open_reference_index()


class Finder:
    """Searches the rows of `index` with its own encoder, or with another one that encodes the texts again.

    What it finds is to be looked at: rows with nearly the same text or the same picture come once. The new vectors are
    kept in a temporary folder, as long as the finder.
    """

    def __init__(self, index: PromptIndex, encoder: TextEncoder | None = None):
        if encoder is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="textcond-finder-")
            index = index.rebuild(Path(self._folder.name) / "index", encoder)
        self.index, self.encoder = index, index.encoder
        self.weights_hash = self.encoder.weights_hash()
        self._ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sees(self) -> bool:
        """Whether the encoder reads pictures too."""
        return hasattr(self.encoder, "encode_image")

    def search(self, query: str, k: int, mode: str = "dense") -> list[Hit]:
        """The `k` best rows, best first; the end of a huge query is not read."""
        return self._distinct(k, query=query[:LONGEST_QUERY], mode=mode)

    def similar(self, row_id: str, k: int) -> list[Hit]:
        """The `k` rows nearest to one of them, without itself."""
        return self._distinct(k, id=row_id, mode="dense")

    def like(self, image: Image, prompt: str, k: int) -> tuple[list[Hit], str]:
        """The `k` rows nearest to a picture, and by what: itself if the encoder reads pictures, else its prompt.

        Raises:
            ValueError: neither is possible.
        """
        if self.sees:
            return self._distinct(k, query=image, mode="dense"), "what is on it"
        if not prompt.strip():
            raise ValueError("the encoder of this index reads no pictures, and this one has no prompt")
        return self.search(prompt, k), "its prompt"

    def _distinct(self, k: int, **asked: Any) -> list[Hit]:
        """Of rows that share a picture the best one, or the best in the language of the best of all, if rows say it."""
        for depth in (4 * k, 8 * k):
            hits = self.index.search(k=depth, **asked)
            best: dict[Any, Hit] = {}
            language = hits[0].metadata.get("language") if hits else None
            for hit in hits:
                image = hit.image
                picture = hit.id if image is None else (image.size, hashlib.sha256(image.tobytes()).digest())
                before = best.setdefault(picture, hit)
                if before.metadata.get("language") != language == hit.metadata.get("language"):
                    best[picture] = hit
            if len(best) >= k or len(hits) < depth:
                break
        return sorted(best.values(), key=lambda hit: -hit.score)[:k]

    def add(self, text: str, metadata: dict[str, Any], image: Image) -> None:
        """Put a row into what is searched; one that is there already is kept once."""
        self.index.add([text], metadata=[metadata], images=[image])
        self._ids = None

    def sample(self, k: int) -> list[Hit]:
        """`k` rows (or all of fewer), drawn at random."""
        if self._ids is None:
            self._ids = [row.id for row in self.index.rows()]
        return self.index.get(random.sample(self._ids, min(k, len(self._ids))))
