"""A random pipeline folder and a prompt index of the shape of the reference model, small enough to make in a test."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image
from tiny import clip_text_model
from tokenizers import pre_tokenizers

from textcond import ConditioningEncoder, TextEncoder
from textcond.index import PromptIndex
from textcond.pipelines import retrieval_encoder

WIDTH, TOKENS = 32, 32
THINGS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("apple", "fox")]
PROMPTS = [f"{thing}, {style} style" for thing in THINGS for style in ("noto", "blob")]


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Byte-level, as CLIP's: every text has tokens, emoji and right-to-left ones included."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=TOKENS
    )


def pipeline() -> diffusers.StableDiffusionPipeline:
    """128x128 pixels, 8 latent channels, 32-wide tokens, v-prediction DDIM with zero terminal SNR."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            latent_channels=8,
        ),
        text_encoder=clip_text_model(tokenizer, WIDTH),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=diffusers.DDIMScheduler(
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(folder: Path) -> Path:
    """Write `pipeline()`, the same every time; its `text_encoder` is a sentence-transformers folder too."""
    pipe = pipeline()
    pipe.save_pretrained(folder)
    retrieval_encoder(pipe).save_pretrained(folder / "text_encoder")
    return folder


def save_index(folder: Path, pipeline_folder: Path) -> Path:
    """Write an index of `PROMPTS` with a picture each, made by the encoder of the pipeline in `pipeline_folder`."""
    index = PromptIndex(TextEncoder.from_pretrained(pipeline_folder / "text_encoder"))
    pictures = [Image.new("RGB", (16, 16), (30 * row, 80, 120)) for row in range(len(PROMPTS))]
    index.add(PROMPTS, metadata=[{"row": row} for row in range(len(PROMPTS))], images=pictures)
    index.save(folder)
    return folder


def save_encoder(folder: Path, width: int = WIDTH) -> Path:
    """Write a conditioning encoder of another backbone, random too, that gives `width`-wide tokens."""
    from tiny import backbone

    model, tokenizer = backbone("bert")
    encoder = ConditioningEncoder.from_text_encoder(
        TextEncoder(model, tokenizer), bridge="resampler", width=width, tokens=8
    )
    encoder.save_pretrained(folder)
    return folder
