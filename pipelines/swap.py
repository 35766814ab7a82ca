"""Put another text encoder into an unmodified diffusers pipeline, and find texts with what conditions it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection, TextEncoder, TextEncoderConfig
from textcond.folders import check_weights, model_folder, read_json

from .contracts import check_components, encoder_slots, tokenizer_slot

ENCODERS = (ConditioningEncoder, CLIPTextModel, CLIPTextModelWithProjection)
_LOADABLE = {
    loadable.__name__: loadable
    for loadable in (ConditioningEncoder, ConditioningEncoderWithProjection, CLIPTextModel, CLIPTextModelWithProjection)
}


def swap_text_encoder(
    pipe: DiffusionPipeline,
    encoder: PreTrainedModel | str | Path,
    slot: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, object]:
    """Replace a pipeline's text encoder and tokenizer in place; the pipeline stays of its stock class.

    Everything is checked first, and nothing changes if something does not fit.

    LoRA files made for the pipeline's own encoder hold weights for it too: load only their `unet.` part afterwards.

    Args:
        pipe: Stable Diffusion 1.x, 2.x or XL, in any of its text-to-image, image-to-image, inpaint, ControlNet forms.
        encoder: a ConditioningEncoder (WithProjection for SDXL), a stock CLIPTextModel(WithProjection), or the folder
            or hub id of one, which is then loaded with the dtype and device of the UNet.
        slot: which encoder to replace. None replaces all: in SDXL one encoder then serves both slots, through
            `text_encoder_2`, the first is left empty, and `prompt_2` is not read.
        tokenizer: needed only where the encoder carries none and the one in the slot does not suit it.

    Returns:
        The components that were there, by name: `pipe.register_modules(**returned)` brings them back.

    Raises:
        ValueError: naming each misfit (token or pooled width, length, dtype, device, pad token) and its mend.
    """
    slots = encoder_slots(pipe)
    if slot is not None and slot not in slots:
        raise ValueError(f"{type(pipe).__name__} has no slot {slot!r}: choose one of {', '.join(slots)}")
    if isinstance(encoder, (str, Path)):
        encoder = load_encoder(encoder, dtype=pipe.unet.dtype, device=pipe.unet.device)
    if not isinstance(encoder, ENCODERS):
        mend = (
            "wrap it with ConditioningEncoder.from_text_encoder(encoder, ...)"
            if isinstance(encoder, TextEncoder)
            else "wrap a TextEncoder of it with ConditioningEncoder.from_text_encoder(...)"
        )
        raise ValueError(f"a {type(encoder).__name__} lacks the call surface of a pipeline's text encoder: {mend}")
    target = slot or slots[-1]
    if tokenizer is None:
        tokenizer = getattr(encoder, "tokenizer", None) or getattr(pipe, tokenizer_slot(target))
    new = {target: encoder, tokenizer_slot(target): tokenizer}
    if slot is None:
        new |= {name: None for other in slots if other != target for name in (other, tokenizer_slot(other))}
    problems = [problem for contract in check_components(pipe, new) for problem in contract.problems]
    if problems:
        raise ValueError("; ".join(problems))
    before = {name: getattr(pipe, name) for name in new}
    pipe.register_modules(**new)
    return before


@contextmanager
def swapped(
    pipe: DiffusionPipeline,
    encoder: PreTrainedModel | str | Path,
    slot: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[DiffusionPipeline]:
    """`swap_text_encoder` for the length of a `with` block; the old components return even after an exception."""
    before = swap_text_encoder(pipe, encoder, slot, tokenizer=tokenizer)
    try:
        yield pipe
    finally:
        pipe.register_modules(**before)


def retrieval_encoder(pipe: DiffusionPipeline) -> TextEncoder:
    """The TextEncoder that shares its weights with what conditions the pipeline now.

    A stock CLIP text model is pooled at its end-of-text token, as CLIP does, and normalised.

    Raises:
        ValueError: if the slots hold neither a ConditioningEncoder nor a stock CLIP text model.
    """
    # SDXL's second slot first: it gives the pooled vector.
    for slot in reversed(encoder_slots(pipe)):
        encoder, tokenizer = getattr(pipe, slot), getattr(pipe, tokenizer_slot(slot))
        if isinstance(encoder, ConditioningEncoder):
            return encoder.text_encoder_with(tokenizer)
        if isinstance(encoder, (CLIPTextModel, CLIPTextModelWithProjection)):
            return clip_text_encoder(encoder, tokenizer)
    raise ValueError(f"{type(pipe).__name__} holds no text encoder that can search: swap in a ConditioningEncoder")


def load_encoder(name_or_path: str | Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load what `swap_text_encoder` takes from a folder or hub id.

    Raises:
        FileNotFoundError: if there is nothing of that name, or no model in it.
        ValueError: if the folder holds a whole pipeline, a model of another class, or damaged weights.
    """
    folder = model_folder(name_or_path)
    if (folder / "model_index.json").exists():
        raise ValueError(f"{name_or_path} is a whole pipeline: pass its text_encoder folder")
    names = read_json(folder / "config.json").get("architectures") or ["model of unknown class"]
    if names[0] not in _LOADABLE:
        raise ValueError(
            f"{name_or_path} holds a {names[0]}: wrap it with "
            "ConditioningEncoder.from_text_encoder(TextEncoder.from_pretrained(...), ...) and save that"
        )
    check_weights(folder)
    return _LOADABLE[names[0]].from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)


def clip_text_encoder(
    model: CLIPTextModel | CLIPTextModelWithProjection, tokenizer: PreTrainedTokenizerBase
) -> TextEncoder:
    """The retrieval face of a stock CLIP text model: end-of-text pooling, its text projection if any, normalised."""
    config = TextEncoderConfig(pooling="eos", normalize=True)
    if isinstance(model, CLIPTextModelWithProjection):
        return TextEncoder(model.text_model, tokenizer, config, model.text_projection)
    return TextEncoder(model, tokenizer, config)
