"""What is finished is kept: pictures and numbers on disk, named by everything that decides them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from textcond.files import atomic_file, write_mark
from textcond.folders import read_json


class ResultCache:
    """PNGs and JSON under a folder, or nothing kept at all where the folder is None."""

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder is not None else None

    def picture(self, key: str) -> Image.Image | None:
        """The picture of a key, if it is finished."""
        path = self._path(key, "png")
        if path is None or not path.is_file():
            return None
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def keep_picture(self, key: str, picture: Image.Image) -> None:
        """Write a picture, whole or not at all."""
        path = self._path(key, "png")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                picture.save(file, format="png")

    def numbers(self, key: str) -> dict[str, Any] | None:
        """The numbers of a key, if they are finished."""
        path = self._path(key, "json")
        return read_json(path) if path is not None and path.is_file() else None

    def keep_numbers(self, key: str, numbers: dict[str, Any]) -> None:
        """Write numbers, whole or not at all."""
        path = self._path(key, "json")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mark(path, numbers)

    def _path(self, key: str, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.{suffix}"


def cache_key(**parts: Any) -> str:
    """A name for what the parts decide."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(*components: Any) -> str:
    """A hash of weights, configurations and vocabularies: the same components give the same pictures."""
    digest = hashlib.blake2b(digest_size=16)
    for component in components:
        digest.update(type(component).__name__.encode())
        config = getattr(component, "config", None)
        if config is not None:
            content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            content = {key: value for key, value in content.items() if not key.startswith("_")}
            digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        if isinstance(component, nn.Module):
            for name, tensor in sorted(component.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                if flat.numel():
                    digest.update(flat.view(torch.uint8).numpy())
        if hasattr(component, "get_vocab"):
            vocabulary = [sorted(component.get_vocab().items()), component.model_max_length]
            digest.update(json.dumps(vocabulary, ensure_ascii=False).encode())
    return digest.hexdigest()
