"""Contracts: what each text encoder slot of a diffusers pipeline expects, and whether its components meet it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection
from textcond.conditioning import NO_LENGTH_LIMIT
from textcond.encoder import position_capacity

STABLE_DIFFUSION = (
    diffusers.StableDiffusionPipeline,
    diffusers.StableDiffusionImg2ImgPipeline,
    diffusers.StableDiffusionInpaintPipeline,
    diffusers.StableDiffusionControlNetPipeline,
    diffusers.StableDiffusionControlNetImg2ImgPipeline,
    diffusers.StableDiffusionControlNetInpaintPipeline,
)
STABLE_DIFFUSION_XL = (
    diffusers.StableDiffusionXLPipeline,
    diffusers.StableDiffusionXLImg2ImgPipeline,
    diffusers.StableDiffusionXLInpaintPipeline,
    diffusers.StableDiffusionXLControlNetPipeline,
    diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    diffusers.StableDiffusionXLControlNetInpaintPipeline,
)
# Numbers beside the pooled vector in the added conditioning of SDXL: sizes and crop, or crop and an aesthetic score.
SDXL_TIME_IDS, REFINER_TIME_IDS = 6, 5


@dataclass
class Contract:
    """What one slot of one pipeline expects.

    Attributes:
        slot: attribute of the pipeline that holds the encoder.
        encoder: class of what is there now; "" for an empty slot.
        token_width: width of the tokens that the slot must give while the other slots stay as they are.
        pooled_width: width of the pooled vector that is read, or None where none is.
        output: which output of the encoder is read.
        length: how many tokens are allowed.
        mask: what becomes of the attention mask.
        problems: what is wrong with the components that are there, each with its mend; empty when they fit.
    """

    slot: str
    encoder: str
    token_width: int | None = None
    pooled_width: int | None = None
    output: str = ""
    length: str = ""
    mask: str = ""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = f"{self.token_width}-wide tokens" if self.token_width else "tokens of an unknown width"
        pooled = f" and a {self.pooled_width}-wide pooled vector" if self.pooled_width else ""
        lines = [f"{self.slot}: {self.encoder or 'empty'}"]
        if self.output:
            lines += [f"  expects {width}{pooled}", f"  reads {self.output}"]
            lines += [f"  length: {self.length}", f"  mask: {self.mask}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def is_stable_diffusion_xl(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline has the two slots and the pooled vector of SDXL."""
    return isinstance(pipe, STABLE_DIFFUSION_XL)


def encoder_slots(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Names of the text encoder slots of a supported pipeline, in the order in which it calls them.

    Raises:
        ValueError: for a pipeline class that is not supported.
    """
    if isinstance(pipe, STABLE_DIFFUSION_XL):
        return ("text_encoder", "text_encoder_2")
    if isinstance(pipe, STABLE_DIFFUSION):
        return ("text_encoder",)
    raise ValueError(_unsupported(pipe))


def tokenizer_slot(slot: str) -> str:
    """Name of the tokenizer that belongs to an encoder slot."""
    return slot.replace("text_encoder", "tokenizer")


def inspect_pipeline(pipe: DiffusionPipeline) -> list[Contract]:
    """What each text encoder slot expects, and what is wrong with what it holds; reads configurations only.

    A pipeline of another family gives contracts whose `problems` say so.
    """
    if not isinstance(pipe, STABLE_DIFFUSION + STABLE_DIFFUSION_XL):
        slots = [name for name in pipe.components if name.startswith("text_encoder")] or ["text_encoder"]
        return [Contract(slot, _class_name(getattr(pipe, slot, None)), problems=[_unsupported(pipe)]) for slot in slots]
    return check_components(pipe, {})


def check_components(pipe: DiffusionPipeline, replaced: Mapping[str, object]) -> list[Contract]:
    """Contracts of a supported pipeline as if the components in `replaced` were already in their slots."""

    def component(name: str):
        return replaced[name] if name in replaced else getattr(pipe, name, None)

    slots = encoder_slots(pipe)
    filled = [slot for slot in slots if component(slot) is not None]
    unet, xl = pipe.unet, is_stable_diffusion_xl(pipe)
    unet_width = unet_token_width(unet) if unet is not None else None
    widths = {slot: token_width(component(slot)) for slot in filled}
    contracts = []
    for slot in slots:
        encoder, tokenizer = component(slot), component(tokenizer_slot(slot))
        others = sum(widths[other] or 0 for other in filled if other != slot)
        contract = Contract(slot, _class_name(encoder), mask="never reaches the UNet")
        contract.token_width = unet_width - others if unet_width else None
        if xl:
            contract.output = "hidden_states[-2]; the pooled vector is the first output"
            contract.mask += ", and the encoder gets none"
            if slot == slots[-1] and unet is not None:
                contract.pooled_width = unet_pooled_width(pipe)
        else:
            contract.output = "the first output; hidden_states[-(clip_skip + 1)] with clip_skip"
            contract.mask += "; the encoder gets it if its config says use_attention_mask"
        contract.length = "any, the same for the negative prompt, which is tokenized to the length of the output"
        if xl and len(filled) > 1:
            contract.length += ", and the same in both slots"
        contracts.append(contract)
        if encoder is None:
            contract.token_width = contract.pooled_width = None
            if slot == slots[-1]:
                contract.problems.append(f"{slot} is empty: swap in an encoder")
            continue
        if unet is None:
            contract.problems.append("the pipeline has no UNet to check the encoder against: load one")
            continue
        contract.problems += _width_problems(pipe, slot, encoder, contract)
        contract.problems += _placement_problems(slot, encoder, unet)
        contract.problems += _tokenizer_problems(slot, encoder, tokenizer)
    if xl and len(filled) == 2:
        lengths = {slot: output_length(component(slot), component(tokenizer_slot(slot))) for slot in slots}
        if len({length for length in lengths.values() if length}) > 1:
            first, second = lengths.values()
            contracts[-1].problems.append(
                f"text_encoder gives {first} tokens and text_encoder_2 {second}, and they are joined token by token: "
                f"make the new encoder with tokens={first if slots[1] in replaced else second}"
            )
    contracts[-1].problems += _controlnet_problems(pipe, unet_width)
    return contracts


def unet_token_width(unet) -> int | None:
    """Width of the text tokens that a UNet reads, `(batch, tokens, width)`; None if its blocks disagree."""
    if unet.config.get("encoder_hid_dim_type") == "text_proj":
        return unet.config.encoder_hid_dim
    widths = unet.config.cross_attention_dim
    widths = {widths} if isinstance(widths, int) else set(widths)
    return widths.pop() if len(widths) == 1 else None


def unet_pooled_width(pipe: DiffusionPipeline) -> int | None:
    """Width of the pooled vector `(batch, width)` that an SDXL UNet reads beside its time ids."""
    config = pipe.unet.config
    if config.get("addition_embed_type") != "text_time":
        return None
    time_ids = REFINER_TIME_IDS if pipe.config.get("requires_aesthetics_score") else SDXL_TIME_IDS
    return config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim


def token_width(encoder: PreTrainedModel) -> int | None:
    """Width of the tokens that an encoder gives."""
    return getattr(encoder.config, "hidden_size", None)


def pooled_width(encoder: PreTrainedModel) -> int | None:
    """Width of the 2-D vector that an encoder returns first, or None if it returns tokens first."""
    classes = (ConditioningEncoderWithProjection, CLIPTextModelWithProjection)
    return encoder.config.projection_dim if isinstance(encoder, classes) else None


def output_length(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """How many tokens the denoiser gets for a prompt."""
    if isinstance(encoder, ConditioningEncoder) and encoder.config.tokens:
        return encoder.config.tokens
    return tokenizer.model_max_length if tokenizer is not None else None


def _width_problems(pipe, slot: str, encoder: PreTrainedModel, contract: Contract) -> list[str]:
    problems = []
    width, pooled = token_width(encoder), pooled_width(encoder)
    if contract.token_width is None:
        problems.append("the UNet's blocks read tokens of different widths, which no single encoder gives")
    elif width != contract.token_width:
        problems.append(
            f"{slot} gives {width}-wide tokens, the UNet expects {contract.token_width}: "
            f"make a bridge with ConditioningEncoder.from_text_encoder(..., width={contract.token_width})"
            if contract.token_width > 0
            else f"{slot} gives {width}-wide tokens, and the other slot fills the UNet's whole width: "
            "leave slot out, so that one encoder serves both"
        )
    if contract.pooled_width is not None and pooled != contract.pooled_width:
        gives = f"a {pooled}-wide pooled vector" if pooled else "no pooled vector"
        problems.append(
            f"{slot} gives {gives}, the UNet expects {contract.pooled_width}: make it with "
            f"ConditioningEncoderWithProjection.from_text_encoder(..., pooled_width={contract.pooled_width})"
        )
    if contract.pooled_width is None and pooled is not None:
        problems.append(
            f"{slot} returns its pooled vector first, where the pipeline reads tokens: "
            f"use {type(encoder).__name__.removesuffix('WithProjection')} in this slot"
        )
    return problems


def _placement_problems(slot: str, encoder: PreTrainedModel, unet) -> list[str]:
    problems = []
    hooked = [name for name, module in ((slot, encoder), ("the UNet", unet)) if hasattr(module, "_hf_hook")]
    plain = (torch.float32, torch.float16, torch.bfloat16)
    if encoder.dtype != unet.dtype and unet.dtype in plain:
        problems.append(f"{slot} is {encoder.dtype}, the UNet {unet.dtype}: call encoder.to({unet.dtype})")
    if len(hooked) == 1:
        problems.append(
            f"{hooked[0]} is offloaded and the other is not: call pipe.remove_all_hooks(), swap, then offload again"
        )
    elif not hooked and encoder.device != unet.device:
        problems.append(f'{slot} is on {encoder.device}, the UNet on {unet.device}: call encoder.to("{unet.device}")')
    return problems


def _tokenizer_problems(slot: str, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    name = tokenizer_slot(slot)
    if tokenizer is None:
        return [f"{slot} has no tokenizer: pass tokenizer=..."]
    problems = []
    ours = isinstance(encoder, ConditioningEncoder)
    pad = tokenizer.pad_token_id
    if pad is None:
        problems.append(
            f"{name} has no pad token: use the tokenizer of ConditioningEncoder.from_text_encoder, which adds one"
        )
    elif ours and pad in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        problems.append(
            f"{name} pads with {tokenizer.pad_token!r}, which also begins or ends a text: "
            "use the tokenizer of ConditioningEncoder.from_text_encoder, which adds another"
        )
    elif ours and pad != encoder.config.pad_token_id:
        problems.append(
            f"{name} pads with token {pad}, the encoder leaves out token {encoder.config.pad_token_id}: "
            "use the encoder's own tokenizer"
        )
    if ours and tokenizer.padding_side != "right":
        problems.append(f'{name} pads on the left: set tokenizer.padding_side = "right"')
    rows = encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        problems.append(
            f"{name} has {len(tokenizer)} tokens, {slot} embeds {rows}: "
            "use the encoder's own tokenizer, or call encoder.resize_token_embeddings(len(tokenizer))"
        )
    capacity, length = position_capacity(encoder.backbone if ours else encoder), tokenizer.model_max_length
    limit = capacity or 512
    if length > NO_LENGTH_LIMIT:
        problems.append(f"{name} has no length limit: set tokenizer.model_max_length = {min(limit, 512)}")
    elif capacity is not None and length > capacity:
        problems.append(
            f"{name} pads prompts to {length} tokens, {slot} has positions for {capacity}: "
            f"set tokenizer.model_max_length = {capacity}"
        )
    output = output_length(encoder, tokenizer)
    if capacity is not None and output is not None and output != length and output > capacity:
        problems.append(
            f"{slot} gives {output} tokens, so negative prompts are padded to {output}, but it has positions for "
            f"{capacity}: make the bridge with tokens={capacity} or fewer"
        )
    return problems


def _controlnet_problems(pipe, unet_width: int | None) -> list[str]:
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is None or unet_width is None:
        return []
    widths = [unet_token_width(net) for net in getattr(controlnet, "nets", [controlnet])]
    return [
        f"the ControlNet reads {width}-wide tokens, the UNet {unet_width}: use a ControlNet made for this UNet"
        for width in widths
        if width != unet_width
    ]


def _class_name(component) -> str:
    return "" if component is None else type(component).__name__


def _unsupported(pipe: DiffusionPipeline) -> str:
    return (
        f"{type(pipe).__name__} is not supported yet: "
        "supported are Stable Diffusion 1.x, 2.x and XL (text-to-image, image-to-image, inpaint, ControlNet)"
    )
