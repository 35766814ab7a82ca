"""Loading pipelines and encoders by name: a folder, a hub id, or "reference"."""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metadata import MULTILINGUAL, NATIVE, REFERENCE

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin
    from transformers import PreTrainedModel

    from textcond import TextEncoder

DTYPES = ("float32", "float16", "bfloat16")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IMPORTING = threading.Lock()


def import_libraries() -> None:
    """Import what pipelines are made of, in one thread at a time: two that meet in a cycle get half a module each."""
    with _IMPORTING:
        import textcond.pipelines
        import textcond.pipelines.retrieval  # noqa: F401


def load_pipeline(
    name: str = REFERENCE,
    *,
    encoder: str = NATIVE,
    device: str | None = None,
    dtype: str | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> DiffusionPipeline:
    """Load a pipeline, from safetensors only, and swap an encoder into it.

    Args:
        name: "reference", a diffusers folder, or a hub id.
        encoder: "native" leaves the pipeline's own; else a folder or hub id for `swap_text_encoder`.
        device: a torch device; None is the GPU when there is one, else the CPU.
        dtype: one of `DTYPES`; None is float16 on a GPU, float32 elsewhere.
        on_progress: called between the parts with (share of the bytes that are loaded, what comes next). An exception
            that it raises ends the loading and reaches the caller.

    Returns:
        The pipeline on the device; on a GPU whose free memory is too small for it, with its parts in main memory, each
        moved there when its turn comes (`enable_model_cpu_offload`).

    Raises:
        FileNotFoundError, OSError: there is no such folder, and no such pipeline within reach on the hub.
        ValueError: not a pipeline folder, a damaged weight file (it is named), an unusable device, an encoder that
            does not fit.
    """
    import diffusers
    from transformers import ClapModel

    import textcond  # noqa: F401  (a saved pipeline may name our classes, and diffusers imports nothing by name)
    from textcond.folders import check_safetensors
    from textcond.pipelines import swap_text_encoder
    from textcond.pipelines.audio import mend_clap

    diffusers.utils.logging.disable_progress_bar()  # loading is short, and the caller shows its own
    tell = on_progress or (lambda share, what: None)
    place = torch_device(device)
    precision = torch_dtype(dtype, place)
    if name == REFERENCE:
        from textcond.pipelines.reference import load_reference

        tell(0, "the reference model")
        pipe = load_reference(dtype=precision, device=place)
    else:
        tell(0, f"finding {name}")
        folder = find_pipeline(name)
        for file in sorted(folder.rglob("*.safetensors")):
            check_safetensors(file)
        parts = _large_parts(folder, precision, tell)
        options = {"dtype": precision, "use_safetensors": True, "variant": _variant(folder.glob("*/*.safetensors"))}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options, **parts)
        if isinstance(pipe, diffusers.MusicLDMPipeline) and isinstance(pipe.text_encoder, ClapModel):
            mend_clap(pipe)
        tell(1, f"moving to {place}")
        if fits(pipe, place):
            pipe.to(place)
        else:
            pipe.enable_model_cpu_offload(device=place)
    if encoder != NATIVE:
        swap_text_encoder(pipe, find_encoder(encoder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _large_parts(
    folder: Path, precision: torch.dtype, on_progress: Callable[[float, str], None]
) -> dict[str, PreTrainedModel | ModelMixin]:
    """Load the models of a pipeline folder one by one; what the two libraries do not know is left to diffusers."""
    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    models = {}
    for name, kind in parts.items():
        weights = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        if weights and isinstance(kind, list) and kind[0] in ("diffusers", "transformers"):
            models[name] = (*kind, weights)
    total, done, loaded = sum(weights for *_, weights in models.values()), 0, {}
    for name, (library, kind, weights) in models.items():
        on_progress(done / total, f"{name} ({weights / 1e6:,.0f} MB)")
        variant = _variant((folder / name).glob("*.safetensors"))
        options: dict[str, Any] = {"dtype": precision, "use_safetensors": True, "variant": variant}
        loaded[name] = getattr(importlib.import_module(library), kind).from_pretrained(folder / name, **options)
        done += weights
    return loaded


def _variant(files: Iterable[Path]) -> str | None:
    """The variant that weights were saved as, such as "fp16", if there are none of the plain name."""
    names = [re.fullmatch(r"[^.]+(?:\.([^.-]+))?(?:-\d+-of-\d+)?\.safetensors", file.name) for file in files]
    variants = sorted({found[1] or "" for found in names if found})
    return variants[0] or None if variants else None


# Activations need memory beside the weights: about as much again for small pipelines, less for large ones.
HEADROOM = 1.3


def fits(pipe: DiffusionPipeline, device: torch.device) -> bool:
    """Whether all of a pipeline finds room in the free memory of a GPU at once; other devices share main memory."""
    import torch

    if device.type != "cuda":
        return True
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))
    free, _ = torch.cuda.mem_get_info(device)
    return HEADROOM * weights < free


def devices() -> list[str]:
    """The devices of this machine, the usual one first."""
    import torch

    gpus = [f"cuda:{number}" if number else "cuda" for number in range(torch.cuda.device_count())]
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def find_pipeline(name: str | Path) -> Path:
    """The local folder of a pipeline: `name` itself, or where the hub id `name` was downloaded to."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{name} holds no model_index.json, so it is no pipeline: pass the folder that has it")
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file: pass a diffusers folder (the one that holds model_index.json)")
    if not _HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(f"there is no pipeline folder {name}: check the path (a hub id reads OWNER/NAME)")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(name), use_safetensors=True))
    except Exception as error:  # the hub client raises a dozen kinds, from OSError to its own
        raise OSError(
            f"{name} is neither a folder here nor a pipeline within reach on the model hub: "
            f"check the spelling and the connection, or download it first"
        ) from error


def find_encoder(name: str | Path) -> str:
    """The folder of the shipped "multilingual" encoder, or `name` if it is a folder or may be a hub id.

    A damaged weight file in the folder is named in a ValueError.
    """
    from textcond.folders import check_safetensors

    if name == MULTILINGUAL:
        from textcond.pipelines import reference

        return str(reference.MULTILINGUAL)

    folder = Path(name).expanduser()
    if folder.is_dir():
        for file in sorted(folder.glob("*.safetensors")):
            check_safetensors(file)
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(f"there is no encoder folder {name}: check the path (a hub id reads OWNER/NAME)")
    return str(name)


def load_text_encoder(name: str = MULTILINGUAL, *, device: str | None = None, dtype: str | None = None) -> TextEncoder:
    """A text encoder, with its image tower if it has one.

    Args:
        name: a folder, a hub id, or one that ships: "multilingual", or "native" for the reference model's own.
        device, dtype: as for `load_pipeline`.
    """
    from textcond.index.image_text import load_encoder

    place = torch_device(device)
    folder: str | Path = name
    if name in (NATIVE, MULTILINGUAL):
        from textcond.pipelines import reference

        folder = reference.MULTILINGUAL if name == MULTILINGUAL else reference.REFERENCE / "text_encoder"
    return load_encoder(folder, device=place, dtype=torch_dtype(dtype, place))


def torch_device(name: str | None) -> torch.device:
    """The device of that name; None is the GPU when there is one, else the CPU."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}): pass cpu, or leave it out") from error
    return device


def torch_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name, one of `DTYPES`; None is float16 on a GPU, float32 elsewhere."""
    import torch

    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: pass one of {', '.join(DTYPES)}")
    return getattr(torch, name)
