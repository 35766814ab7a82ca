"""Stock pipelines at the sizes of the published models, with random weights, and what they are measured by."""

import resource
import time
from contextlib import contextmanager

import diffusers
import torch

CLIP_TOKENS = 77
# unet/config.json of Stable Diffusion 1.5, where it differs from the defaults of the class.
SD_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
# unet/config.json of Stable Diffusion XL base 1.0.
SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# vae/config.json of both, but for its scale and picture size.
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# text_encoder/config.json of Stable Diffusion 1.x, CLIP ViT-L/14.
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": CLIP_TOKENS,
    "projection_dim": 768,
}
# scheduler/scheduler_config.json of both.
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Make modules in a dtype at once, where `.to(dtype)` would need one and a half times the memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def stable_diffusion(dtype: torch.dtype = torch.float32) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.5 with an empty text encoder slot: 860M parameters of UNet, 84M of VAE."""
    with default_dtype(dtype):
        pipe = diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(**VAE, sample_size=512),
            text_encoder=None,
            tokenizer=None,
            unet=diffusers.UNet2DConditionModel(**SD_UNET),
            scheduler=diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(dtype: torch.dtype = torch.bfloat16) -> diffusers.StableDiffusionXLPipeline:
    """Stable Diffusion XL base 1.0 with empty text encoder slots: 2567M parameters of UNet, 84M of VAE."""
    with default_dtype(dtype):
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=diffusers.AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            unet=diffusers.UNet2DConditionModel(**SDXL_UNET),
            scheduler=diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parameters(module: torch.nn.Module) -> int:
    """How many weights a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def peak_gb() -> float:
    """Largest resident size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def stopwatch(seconds: dict[str, float], name: str):
    """Write the wall time of a block into a dictionary."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
