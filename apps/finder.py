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
        for depth in (4 * k, 8 * k):
            hits = self.index.search(k=depth, **asked)
            seen: set[tuple] = set()
            kept = []
            for hit in hits:
                if (image := hit.image) is not None:
                    picture = (image.size, image.mode, hashlib.sha256(image.tobytes()).digest())
                    if picture in seen:
                        continue
                    seen.add(picture)
                kept.append(hit)
                if len(kept) == k:
                    return kept
            if len(hits) < depth:
                break
        return kept

    def add(self, text: str, metadata: dict[str, Any], image: Image) -> None:
        """Put a row into what is searched; one that is there already is kept once."""
        self.index.add([text], metadata=[metadata], images=[image])
        self._ids = None

    def sample(self, k: int) -> list[Hit]:
        """`k` rows (or all of fewer), drawn at random."""
        if self._ids is None:
            self._ids = [row.id for row in self.index.rows()]
        return self.index.get(random.sample(self._ids, min(k, len(self._ids))))
