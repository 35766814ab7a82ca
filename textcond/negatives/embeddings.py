"""Vectors of many texts, encoded once: a cache on disk that resumes and is read in place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from textcond.encoder import TextEncoder
from textcond.files import write_mark

BLOCK = 16_384  # texts between two notes of how far the encoding got


def cached_embeddings(
    encoder: TextEncoder,
    texts: Sequence[str],
    kind: str,
    cache: str | Path,
    *,
    show_progress_bar: bool = False,
) -> np.ndarray:
    """Return float32 vectors `(texts, dim)` as a read-only memory map of a file in the cache folder.

    The file is named after the encoder's `weights_hash()` and number type, the kind, and a hash of the texts, so that
    changed weights, prompts or texts never find an old file. An encoding that was cut off goes on where it stopped.

    Args:
        encoder: encodes the texts.
        texts: the texts; read a block at a time.
        kind: "query" or "document".
        cache: a folder, made if it is not there.
        show_progress_bar: show progress and rate.
    """
    cache = Path(cache).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(
        json.dumps([encoder.weights_hash(), str(encoder.dtype), kind, _texts_hash(texts)]).encode()
    ).hexdigest()
    path = cache / f"{name}.npy"
    if not path.exists():
        _encode_into(path, encoder, texts, kind, show_progress_bar)
    return np.load(path, mmap_mode="r")


def _encode_into(path: Path, encoder: TextEncoder, texts: Sequence[str], kind: str, show_progress_bar: bool) -> None:
    partial, note = path.with_suffix(".partial"), path.with_suffix(".rows")
    done = int(note.read_text()) if note.exists() and partial.exists() else 0
    shape = (len(texts), encoder.dim)
    vectors = np.lib.format.open_memmap(partial, "r+" if done else "w+", np.float32, shape)
    remaining = islice(texts, done, None)
    with tqdm(total=len(texts), initial=done, desc=f"encode {kind}s", disable=not show_progress_bar) as progress:
        while block := list(islice(remaining, BLOCK)):
            vectors[done : done + len(block)] = encoder.encode(block, kind=kind)
            vectors.flush()
            done += len(block)
            write_mark(note, done)
            progress.update(len(block))
    del vectors
    os.replace(partial, path)
    note.unlink(missing_ok=True)


def _texts_hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
