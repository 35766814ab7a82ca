"""The families of pipelines that take other text encoders: one entry each, which says all that is known of it."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import nn
from transformers import PreTrainedTokenizerBase

from .audio import AUDIOLDM2, MUSICLDM, STABLE_AUDIO
from .denoisers import TimestepAwareUNet
from .family import Conditioning, Family, Slot, Width, passed_as

# Numbers beside the pooled vector in the added conditioning of SDXL: sizes and crop, or crop and an aesthetic score.
SDXL_TIME_IDS, REFINER_TIME_IDS = 6, 5


def text_width(denoiser: nn.Module) -> int | None:
    """Width of the text tokens that a denoiser or a ControlNet reads, `(batch, tokens, width)`.

    None if it reads no text, or if its blocks read different widths.
    """
    config = denoiser.config
    for name in ("joint_attention_dim", "caption_channels"):
        if config.get(name):
            return config[name]
    if config.get("encoder_hid_dim_type") == "text_proj" or isinstance(denoiser, TimestepAwareUNet):
        return config.encoder_hid_dim
    widths = config.get("cross_attention_dim")
    widths = {widths} if widths is None or isinstance(widths, int) else set(widths)
    return widths.pop() if len(widths) == 1 else None


def call_default(pipe: DiffusionPipeline, name: str) -> Any:
    """Default of an argument of the pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def _tokens(pipe: DiffusionPipeline) -> int | None:
    return text_width(denoiser_of(pipe))


def _config(name: str) -> Width:
    return lambda pipe: denoiser_of(pipe).config[name]


# Stable Diffusion


def _stable_diffusion(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(texts, pipe._execution_device, 1, False)
    return {"encoder_hidden_states": embeds}


STABLE_DIFFUSION = Family(
    "Stable Diffusion 1.x and 2.x",
    (
        diffusers.StableDiffusionPipeline,
        diffusers.StableDiffusionImg2ImgPipeline,
        diffusers.StableDiffusionInpaintPipeline,
        diffusers.StableDiffusionControlNetPipeline,
        diffusers.StableDiffusionControlNetImg2ImgPipeline,
        diffusers.StableDiffusionControlNetInpaintPipeline,
    ),
    (
        Slot(
            "text_encoder",
            reads="the first output; hidden_states[-(clip_skip + 1)] with clip_skip",
            mask="never reaches the denoiser; the encoder gets it if its config says use_attention_mask",
            length="tokenizer",
            tokens=_tokens,
            negative_follows=True,
        ),
    ),
    "unet",
    _stable_diffusion,
    passed_as(_stable_diffusion, prompt_embeds="encoder_hidden_states"),
    alone=("text_encoder",),
)


# Stable Diffusion XL


def _stable_diffusion_xl(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = pipe.encode_prompt(texts, device=pipe._execution_device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs.text_embeds": pooled}


def _xl_pooled(pipe: DiffusionPipeline) -> int | None:
    config = pipe.unet.config
    if config.get("addition_embed_type") != "text_time":
        return None
    time_ids = REFINER_TIME_IDS if pipe.config.get("requires_aesthetics_score") else SDXL_TIME_IDS
    return config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim


_XL_MASK = "never reaches the denoiser, and the encoder gets none"
STABLE_DIFFUSION_XL = Family(
    "Stable Diffusion XL",
    (
        diffusers.StableDiffusionXLPipeline,
        diffusers.StableDiffusionXLImg2ImgPipeline,
        diffusers.StableDiffusionXLInpaintPipeline,
        diffusers.StableDiffusionXLControlNetPipeline,
        diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
        diffusers.StableDiffusionXLControlNetInpaintPipeline,
    ),
    (
        Slot(
            "text_encoder",
            reads="hidden_states[-2]",
            mask=_XL_MASK,
            length="tokenizer",
            tokens=_tokens,
            beside=("text_encoder_2",),
            negative_follows=True,
            required=False,
        ),
        Slot(
            "text_encoder_2",
            reads="hidden_states[-2]; the pooled vector is the first output",
            mask=_XL_MASK,
            length="tokenizer",
            tokens=_tokens,
            pooled=_xl_pooled,
            beside=("text_encoder",),
            pooled_first=True,
            negative_follows=True,
        ),
    ),
    "unet",
    _stable_diffusion_xl,
    passed_as(
        _stable_diffusion_xl,
        prompt_embeds="encoder_hidden_states",
        pooled_prompt_embeds="added_cond_kwargs.text_embeds",
    ),
    alone=("text_encoder_2",),
)


# Stable Diffusion 3


def _stable_diffusion_3(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    length = call_default(pipe, "max_sequence_length")
    embeds, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _sd3_clip_slot(name: str, other: str) -> Slot:
    return Slot(
        name,
        reads="hidden_states[-2]; the pooled vector is the first output",
        mask="never reaches the denoiser, and the encoder gets none",
        length="tokenizer_max_length",
        tokens=_tokens,
        pooled=_config("pooled_projection_dim"),
        beside=(other,),
        zero_padded=True,
        pooled_first=True,
    )


STABLE_DIFFUSION_3 = Family(
    "Stable Diffusion 3",
    (
        diffusers.StableDiffusion3Pipeline,
        diffusers.StableDiffusion3Img2ImgPipeline,
        diffusers.StableDiffusion3InpaintPipeline,
        diffusers.StableDiffusion3ControlNetPipeline,
        diffusers.StableDiffusion3ControlNetInpaintingPipeline,
    ),
    (
        _sd3_clip_slot("text_encoder", "text_encoder_2"),
        _sd3_clip_slot("text_encoder_2", "text_encoder"),
        Slot(
            "text_encoder_3",
            reads="the first output",
            mask="never reaches the denoiser, and the encoder gets none",
            length="max_sequence_length",
            tokens=_tokens,
            required=False,
        ),
    ),
    "transformer",
    _stable_diffusion_3,
    passed_as(_stable_diffusion_3, prompt_embeds="encoder_hidden_states", pooled_prompt_embeds="pooled_projections"),
    alone=("text_encoder", "text_encoder_2"),
    repeats=False,
)


# Flux


def _flux(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    embeds, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=call_default(pipe, "max_sequence_length"))
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


FLUX = Family(
    "Flux",
    (
        diffusers.FluxPipeline,
        diffusers.FluxImg2ImgPipeline,
        diffusers.FluxInpaintPipeline,
        diffusers.FluxFillPipeline,
        diffusers.FluxKontextPipeline,
        diffusers.FluxKontextInpaintPipeline,
        diffusers.FluxControlPipeline,
        diffusers.FluxControlImg2ImgPipeline,
        diffusers.FluxControlInpaintPipeline,
        diffusers.FluxControlNetPipeline,
        diffusers.FluxControlNetImg2ImgPipeline,
        diffusers.FluxControlNetInpaintPipeline,
    ),
    (
        Slot(
            "text_encoder",
            reads="pooler_output",
            mask="never reaches the denoiser, and the encoder gets none",
            length="tokenizer_max_length",
            pooled=_config("pooled_projection_dim"),
        ),
        Slot(
            "text_encoder_2",
            reads="the first output",
            mask="never reaches the denoiser, and the encoder gets none",
            length="max_sequence_length",
            tokens=_tokens,
        ),
    ),
    "transformer",
    _flux,
    passed_as(_flux, prompt_embeds="encoder_hidden_states", pooled_prompt_embeds="pooled_projections"),
    alone=("text_encoder", "text_encoder_2"),
    repeats=False,
)


# PixArt


def _pixart(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    options = {name: call_default(pipe, name) for name in ("clean_caption", "max_sequence_length")}
    embeds, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, **options)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


PIXART = Family(
    "PixArt",
    (diffusers.PixArtAlphaPipeline, diffusers.PixArtSigmaPipeline),
    (
        Slot(
            "text_encoder",
            reads="the first output",
            mask="goes to the encoder and to the denoiser",
            length="max_sequence_length",
            tokens=_tokens,
            keeps_length=True,
        ),
    ),
    "transformer",
    _pixart,
    passed_as(_pixart, prompt_embeds="encoder_hidden_states", prompt_attention_mask="encoder_attention_mask"),
    alone=("text_encoder",),
)


# Sana


def _sana(pipe: DiffusionPipeline, texts: list[str]) -> Conditioning:
    options = {
        name: call_default(pipe, name) for name in ("clean_caption", "max_sequence_length", "complex_human_instruction")
    }
    embeds, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, **options)
    if "" in texts:
        # The empty prompt is the negative one of guidance, which its call gives no instruction.
        options["complex_human_instruction"] = None
        bare, bare_mask, _, _ = pipe.encode_prompt([""], do_classifier_free_guidance=False, **options)
        empty = torch.tensor([text == "" for text in texts], device=embeds.device)
        embeds = torch.where(empty[:, None, None], bare, embeds)
        mask = torch.where(empty[:, None], bare_mask, mask)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _sana_instruction(pipe: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase) -> int:
    instruction = "\n".join(call_default(pipe, "complex_human_instruction"))
    # Two less, as the pipeline counts: the special tokens are there once.
    return len(tokenizer.encode(instruction, verbose=False)) - 2


SANA = Family(
    "Sana",
    (diffusers.SanaPipeline, diffusers.SanaControlNetPipeline),
    (
        Slot(
            "text_encoder",
            reads="the first output: its first token and its last max_sequence_length - 1",
            mask="goes to the encoder and to the denoiser",
            length="max_sequence_length",
            tokens=_tokens,
            keeps_length=True,
            casts=True,
            instruction=_sana_instruction,
        ),
    ),
    "transformer",
    _sana,
    passed_as(_sana, prompt_embeds="encoder_hidden_states", prompt_attention_mask="encoder_attention_mask"),
    alone=("text_encoder",),
    # It would give the mask of one prompt to another.
    repeats=False,
)

IMAGES = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3, FLUX, PIXART, SANA)
FAMILIES = (*IMAGES, AUDIOLDM2, MUSICLDM, STABLE_AUDIO)

# Why no other encoder can fill the slots of these, by how the names of their classes begin.
OBSTACLES = {
    "Flux2": "it puts prompts through a chat template and reads three inner layers of its own language model side by "
    "side (hidden_states[10], [20] and [30] in Flux2Pipeline)",
    "HunyuanDiT": "its denoiser holds a learned padding for exactly the lengths of its own two encoders",
    "Kolors": "its tokenizer must return position_ids, and its encoder's states are read with the tokens first",
}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: for a class of no supported family, saying why where the reason is known.
    """
    for family in FAMILIES:
        if isinstance(pipe, family.pipelines):
            return family
    name = type(pipe).__name__
    for start, reason in OBSTACLES.items():
        if name.startswith(start):
            raise ValueError(f"{name} cannot take another text encoder: {reason}; pass it prompt_embeds made elsewhere")
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"{name} is not supported yet: supported are {names}")


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The denoiser of a pipeline: its UNet or transformer, or the one inside what torch.compile made of it."""
    return unwrap_module(getattr(pipe, family_of(pipe).denoiser))


def condition(pipe: DiffusionPipeline, texts: Sequence[str]) -> Conditioning:
    """What the denoiser reads of each text, `(texts, ...)`, as the pipeline itself makes it; gradients flow."""
    return family_of(pipe).encode(pipe, list(texts))
