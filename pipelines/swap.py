"""Put another text encoder into an unmodified diffusers pipeline, and find texts with what conditions it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection, TextEncoder, TextEncoderConfig
from textcond.folders import check_weights, model_folder, read_json
from textcond.original import keep_original as mixed_with_original

from .contracts import check_components, expected_widths, output_length, padded_length, slots_of
from .denoisers import TimestepAwareUNet
from .families import denoiser_of, family_of
from .family import Slot

ENCODERS = (
    ConditioningEncoder,
    ConditioningEncoderWithProjection,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5EncoderModel,
)
# Beside an encoder that was aligned through one: the connector of a TimestepAwareUNet.
CONNECTOR = "connector.safetensors"
_LOADABLE = {loadable.__name__: loadable for loadable in ENCODERS}


def swap_text_encoder(
    pipe: DiffusionPipeline,
    encoder: PreTrainedModel | str | Path,
    slot: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_original: str | None = None,
    original_weight: float | None = None,
) -> dict[str, object]:
    """Replace a pipeline's text encoder and tokenizer in place; the pipeline stays of its stock class.

    Everything is checked first, and nothing changes if something does not fit.

    LoRA files made for the pipeline's own encoder hold weights for it too: load them before the swap, which keeps the
    UNet's part.

    Args:
        pipe: a pipeline of one of the `FAMILIES`.
        encoder: a ConditioningEncoder (WithProjection where `inspect_pipeline` says so), a stock CLIP text model or T5
            encoder, or the folder or hub id of one, which is then loaded with the dtype and device of the denoiser; the
            connector of a TimestepAwareUNet that lies beside it is put before the UNet too. One that is there leaves,
            unless the encoder gives a connector its backbone's own states (`bridge="identity"`).
        slot: which encoder to replace. None replaces all, so that one encoder serves the whole pipeline: in SDXL
            through `text_encoder_2`, with the first left empty and `prompt_2` not read; in SD3 and Flux from both of
            the first two slots, with SD3's third left empty: load what you save of it with `text_encoder_3=None,
            tokenizer_3=None`, as diffusers asks.
        tokenizer: needed only where the encoder carries none and the one in the slot does not suit it.
        keep_original: "blend" or "concatenate" the tokens of what is in the slots now with the new ones, so that
            trigger words and styles of the original stay in reach: `textcond.original.keep_original`. Stable
            Diffusion and SDXL only.
        original_weight: of the original, 0 to 1; None is 0.3 for a blend, 0.5 for concatenation.

    Returns:
        The components that were there, by name: `pipe.register_modules(**returned)` brings them back.

    Raises:
        ValueError: naming each misfit (token or pooled width, length, dtype, device, pad token) and its mend.
    """
    slots, targets = slots_of(pipe), _targets(pipe, slot)
    new: dict[str, object] = {}
    denoiser = denoiser_of(pipe)
    if isinstance(encoder, (str, Path)):
        connector = model_folder(encoder) / CONNECTOR
        if connector.is_file():
            new[family_of(pipe).denoiser] = TimestepAwareUNet.with_connector(_stock(denoiser), connector)
        encoder = load_encoder(encoder, dtype=denoiser.dtype, device=denoiser.device)
    if not isinstance(encoder, ENCODERS):
        mend = (
            "wrap it with ConditioningEncoder.from_text_encoder(encoder, ...)"
            if isinstance(encoder, TextEncoder)
            else "wrap a TextEncoder of it with ConditioningEncoder.from_text_encoder(...)"
        )
        raise ValueError(f"a {type(encoder).__name__} lacks the call surface of a pipeline's text encoder: {mend}")
    new = new or _without_connector(pipe, getattr(encoder.config, "bridge", None))
    # What the slots expect is read from the denoiser that will be there.
    fitted = _holding(pipe, new)
    if keep_original is not None:
        encoder = _keeping_original(pipe, encoder, targets, slot, keep_original, original_weight)
    elif original_weight is not None:
        raise ValueError(f'original_weight={original_weight} without an original: pass keep_original="blend"')
    if tokenizer is None:
        tokenizer = getattr(encoder, "tokenizer", None) or getattr(pipe, targets[-1].tokenizer)
    if slot is None:
        new |= {name: None for other in slots.values() for name in (other.name, other.tokenizer)}
    for one in targets:
        new |= {one.name: encoder, one.tokenizer: one.adapt_tokenizer(tokenizer) if one.adapt_tokenizer else tokenizer}
    problems = [problem for contract in check_components(fitted, new) for problem in contract.problems]
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
    keep_original: str | None = None,
    original_weight: float | None = None,
) -> Iterator[DiffusionPipeline]:
    """`swap_text_encoder` for the length of a `with` block; the old components return even after an exception."""
    before = swap_text_encoder(
        pipe, encoder, slot, tokenizer=tokenizer, keep_original=keep_original, original_weight=original_weight
    )
    try:
        yield pipe
    finally:
        pipe.register_modules(**before)


def make_encoder(
    pipe: DiffusionPipeline,
    text_encoder: TextEncoder,
    *,
    slot: str | None = None,
    bridge: str = "resampler",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> ConditioningEncoder:
    """Put an untrained bridge on a TextEncoder that fits a pipeline's slot, as many tokens as the pipeline has now.

    Args:
        slot: which encoder it is to replace; None for all, as in `swap_text_encoder`.
        bridge: as in `ConditioningEncoder.from_text_encoder`. Where the denoiser gets the mask of the text, "mlp"
            stands in for "resampler", which does not keep the length; where it reads no tokens, "linear" does.
        dtype: of the encoder, and so of the TextEncoder, whose weights it shares; None for the denoiser's.
        options: further ones of `ConditioningEncoder.from_text_encoder`: `tokens`, `bridge_depth`, `layers`, `seed`.

    Returns:
        A ConditioningEncoder, WithProjection where the slot reads the pooled vector first.

    Raises:
        ValueError: for an unknown slot, one that the pipeline's other slots leave no room for, or `tokens` where the
            pipeline leaves no choice.
    """
    targets = _targets(pipe, slot)
    serving = [one.name for one in targets]
    pipe = _holding(pipe, _without_connector(pipe, bridge))
    # With slot=None the others are emptied.
    kept = (lambda name: getattr(pipe, name)) if slot else (lambda name: None)
    widths = [expected_widths(pipe, one, serving, kept) for one in targets]
    width, pooled_width = (max((one for one in each if one is not None), default=None) for each in zip(*widths))
    if width is not None and width <= 0:
        raise ValueError(f"the other slots fill the denoiser's whole width: leave slot={slot!r} out")
    reading = next((one for one in reversed(targets) if one.tokens), targets[-1])
    padded = padded_length(pipe, reading, getattr(pipe, reading.tokenizer))
    if width is None:
        if pooled_width is None:
            raise ValueError(f"the blocks of this {type(pipe).__name__} read tokens of different widths")
        bridge, width, options = "linear", pooled_width, options | {"tokens": padded}
    elif reading.keeps_length and bridge == "resampler":
        bridge = "mlp"
    if reading.keeps_length and reading.length == "max_sequence_length" and options.get("tokens"):
        raise ValueError(
            f"tokens={options['tokens']}: a {type(pipe).__name__} says itself to how many tokens prompts are padded, "
            "and gives the denoiser their mask: leave tokens out"
        )
    options.setdefault("tokens", output_length(getattr(pipe, reading.name), padded))
    encoder = reading.encoder_class.from_text_encoder(
        text_encoder, bridge=bridge, width=width, pooled_width=pooled_width, **options
    )
    if targets[0].length == "tokenizer_max_length":
        # The pipeline took it from its first tokenizer, and will again when it is loaded.
        encoder.tokenizer.model_max_length = pipe.tokenizer_max_length
    denoiser = denoiser_of(pipe)
    return encoder.to(denoiser.device, dtype or denoiser.dtype)


def retrieval_encoder(pipe: DiffusionPipeline) -> TextEncoder:
    """The TextEncoder that shares its weights with what conditions the pipeline now.

    A stock CLIP text model is pooled at its end-of-text token, as CLIP does, and normalised.

    Raises:
        ValueError: if the slots hold neither a ConditioningEncoder nor a stock CLIP text model.
    """
    # Ours first; then the last of CLIP's, which in SDXL and SD3 is the larger.
    held = [(getattr(pipe, slot.name), getattr(pipe, slot.tokenizer)) for slot in reversed(slots_of(pipe).values())]
    for encoder, tokenizer in held:
        if isinstance(encoder, ConditioningEncoder):
            return encoder.text_encoder_with(tokenizer)
    for encoder, tokenizer in held:
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


def _stock(denoiser: nn.Module) -> nn.Module:
    return denoiser.stock_unet() if isinstance(denoiser, TimestepAwareUNet) else denoiser


def _without_connector(pipe: DiffusionPipeline, bridge: str | None) -> dict[str, nn.Module]:
    """The stock denoiser by its name, where another has a connector that an encoder with this bridge does not need."""
    denoiser = denoiser_of(pipe)
    if bridge == "identity" or not isinstance(denoiser, TimestepAwareUNet):
        return {}
    return {family_of(pipe).denoiser: denoiser.stock_unet()}


def _holding(pipe: DiffusionPipeline, components: dict[str, nn.Module]) -> DiffusionPipeline:
    """The same pipeline with other components, beside the one that keeps its own."""
    other = copy.copy(pipe)
    other.register_modules(**components)
    return other


def _keeping_original(
    pipe: DiffusionPipeline,
    encoder: PreTrainedModel,
    targets: list[Slot],
    slot: str | None,
    mix: str,
    weight: float | None,
) -> ConditioningEncoder:
    """The encoder mixed with what is in the slots that it replaces."""
    target = targets[-1]
    if len(targets) > 1 or target.length != "tokenizer" or target.keeps_length:
        raise ValueError(
            f"keep_original={mix!r} needs a slot that reads as many tokens as its tokenizer gives, which {target.name} "
            f"of a {type(pipe).__name__} is not: leave keep_original out"
        )
    if not isinstance(encoder, ConditioningEncoder):
        raise ValueError(f"keep_original={mix!r} mixes with a ConditioningEncoder, not with a {type(encoder).__name__}")
    replaced = [target] if slot else [one for one in slots_of(pipe).values() if getattr(pipe, one.name) is not None]
    if not replaced or getattr(pipe, target.name) is None:
        raise ValueError(f"{target.name} is empty, so there is no original to keep: leave keep_original out")
    return mixed_with_original(
        encoder,
        [getattr(pipe, one.name) for one in replaced],
        [getattr(pipe, one.tokenizer) for one in replaced],
        mix,
        weight,
        layer=-2 if target.reads.startswith("hidden_states[-2]") else -1,
    )


def _targets(pipe: DiffusionPipeline, slot: str | None) -> list[Slot]:
    """The slots that an encoder fills when it replaces one slot, or all."""
    slots = slots_of(pipe)
    if slot is not None and slot not in slots:
        raise ValueError(f"{type(pipe).__name__} has no slot {slot!r}: choose one of {', '.join(slots)}")
    names = [slot] if slot else family_of(pipe).alone
    if not names:
        raise ValueError(
            f"no one encoder can serve all slots of a {type(pipe).__name__}: choose one of {', '.join(slots)}"
        )
    return [slots[name] for name in names]
