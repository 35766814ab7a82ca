"""Folders of models and of data: found, checked, and written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
OTHER_RUNTIMES = ("onnx/*", "openvino/*", "consolidated*")


def model_folder(name_or_path: str | Path, *, revision: str | None = None, code: bool = False) -> Path:
    """Return the folder at a path, or the folder that the hub gives for an id; `code` also fetches Python files.

    Raises:
        FileNotFoundError: for neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{name_or_path} is a file: pass the model folder that holds it")
    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                revision=revision,
                allow_patterns=[*MODEL_FILES, "*.py"] if code else list(MODEL_FILES),
                ignore_patterns=list(OTHER_RUNTIMES),
            )
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"no folder {name_or_path}: check the path") from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{str(name_or_path)!r} is neither a folder here nor a model that the hub gives "
            f"({type(error).__name__}): check the name, the network and the access token"
        ) from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON; names the file and the place.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: it is not the folder that it should be") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): write or download it again") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a person can read and a diff can follow."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_weights(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, each with a header that matches its length.

    Raises:
        FileNotFoundError: if there are none; pickled weights are named and refused, because reading them runs code.
        ValueError: for a damaged file, by name.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}"))
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors"
            + (
                f", only pickled weights ({', '.join(pickled)}), which are refused: save the model again as safetensors"
                if pickled
                else ": it is not a whole model folder"
            )
        )
    for file in files:
        check_safetensors(file)
    return files


def check_safetensors(file: Path) -> None:
    """Raise ValueError if a safetensors file is truncated or otherwise damaged."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): download or save it again") from error


@contextmanager
def atomic_folder(path: str | Path, owned: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends without an error.

    Of a folder that was there, entries matching an `owned` pattern go with it, so that no stale file of an earlier
    content is read with the new one; every other entry (a model card, a `.git`) is carried over unless the new folder
    has its own.

    Raises:
        NotADirectoryError: if `path` is a file.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield new
        # mkdtemp makes a private folder; the one that stays gets the permissions that mkdir would have given
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)
        if not path.exists():
            new.rename(path)
            return
        old = new.with_name(f"{new.name}-old")
        path.rename(old)
        new.rename(path)
        for entry in old.iterdir():
            if not any(fnmatch(entry.name, pattern) for pattern in owned) and not (path / entry.name).exists():
                entry.rename(path / entry.name)
        shutil.rmtree(old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
