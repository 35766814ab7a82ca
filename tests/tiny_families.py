"""Tiny random-weight pipelines of SD3, Flux, PixArt and Sana in their stock classes, and one way to call them all."""

from functools import partial

import diffusers
import torch
import transformers
from tiny import clip_text_model, stable_diffusion, stable_diffusion_xl, tokenizer

WIDTH = 32


def _t5(tok, width: int = WIDTH):
    config = transformers.T5Config(
        vocab_size=len(tok), d_model=width, d_kv=width // 2, d_ff=width, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def _vae(channels: int):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    )


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_2():
    """Stable Diffusion as its second version samples: velocity."""
    pipe = stable_diffusion()
    pipe.scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type="v_prediction")
    return pipe


def refiner():
    """SDXL's second stage: one text encoder, an aesthetic score, image to image."""
    base = stable_diffusion_xl("Img2Img", pooled=40)
    parts = base.components | {"text_encoder": None, "tokenizer": None}
    parts["text_encoder_2"] = clip_text_model(base.tokenizer_2, 64, projection=48)
    return _quiet(
        diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    )


def stable_diffusion_3(task: str = "", t5: bool = True):
    """SD3 whose first two encoders fill 28 of 32 channels; `task` is "", "Img2Img", "Inpaint" or "ControlNet"."""
    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 24 + 24,
        "pos_embed_max_size": 8,
    }
    tok, t5_tok = tokenizer("clip", 77), tokenizer("t5", 77)
    extra = {"controlnet": diffusers.SD3ControlNetModel(**sizes)} if task == "ControlNet" else {}
    cls = getattr(diffusers, f"StableDiffusion3{task}Pipeline")
    return _quiet(
        cls(
            transformer=diffusers.SD3Transformer2DModel(**sizes, out_channels=16),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=_vae(16),
            text_encoder=clip_text_model(tok, 12, projection=24),
            tokenizer=tok,
            text_encoder_2=clip_text_model(tok, 16, projection=24),
            tokenizer_2=tok,
            text_encoder_3=_t5(t5_tok) if t5 else None,
            tokenizer_3=t5_tok if t5 else None,
            **extra,
        )
    )


def flux(task: str = "", guidance: bool = True):
    """Flux; `task` is "", "Img2Img", "Inpaint", "ControlNet", "Control", "Fill" or "Kontext"."""
    torch.manual_seed(0)
    # Packed latents; Control adds those of its picture, Fill those and a mask.
    channels = {"Control": 32, "Fill": 32 + 16}.get(task, 16)
    sizes = {
        "in_channels": channels,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": guidance,
    }
    tok, t5_tok = tokenizer("clip", 77), tokenizer("t5", 77)
    extra = {"controlnet": diffusers.FluxControlNetModel(**sizes)} if task == "ControlNet" else {}
    cls = getattr(diffusers, f"Flux{task}Pipeline")
    return _quiet(
        cls(
            transformer=diffusers.FluxTransformer2DModel(**sizes, out_channels=16),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=_vae(4),
            text_encoder=clip_text_model(tok, 24),
            tokenizer=tok,
            text_encoder_2=_t5(t5_tok),
            tokenizer_2=t5_tok,
            **extra,
        )
    )


def pixart(version: str = "Alpha"):
    """PixArt; `version` is "Alpha" or "Sigma"."""
    torch.manual_seed(0)
    tok = tokenizer("t5", 120)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        use_additional_conditions=False,
    )
    # Untrained, its gates nearly shut the text out.
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    cls = getattr(diffusers, f"PixArt{version}Pipeline")
    return _quiet(
        cls(
            transformer=transformer.eval(),
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
            vae=_vae(4),
            text_encoder=_t5(tok),
            tokenizer=tok,
        )
    )


def sana(task: str = ""):
    """Sana with a Gemma 2 of one layer; `task` is "" or "ControlNet"."""
    torch.manual_seed(0)
    tok = tokenizer("gpt", 300)
    tok.add_special_tokens({"pad_token": "<pad>", "bos_token": "<bos>"})
    gemma = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=len(tok),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=tok.pad_token_id,
        )
    )
    sizes = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "sample_size": 8,
    }
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_act_fns="silu",
    )
    extra = {"controlnet": diffusers.SanaControlNetModel(**sizes)} if task == "ControlNet" else {}
    cls = getattr(diffusers, f"Sana{task}Pipeline")
    return _quiet(
        cls(
            transformer=diffusers.SanaTransformer2DModel(**sizes).eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=gemma.eval(),
            tokenizer=tok,
            **extra,
        )
    )


def call_options(pipe) -> dict:
    """Two guided steps of whatever the pipeline does, from fixed noise, at the smallest size."""
    name = type(pipe).__name__
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
    edits = any(part in name for part in ("Img2Img", "Inpaint"))
    if edits or "Kontext" in name or "Fill" in name:
        options["image"] = image
    if edits:
        options["strength"] = 1.0
    if "Inpaint" in name or "Fill" in name:
        options["mask_image"] = torch.ones(1, 1, 16, 16)
    if "Control" in name:
        # Of Stable Diffusion's and SDXL's ControlNets, those that edit call it otherwise.
        named_image = name.startswith(("StableDiffusionControlNet", "StableDiffusionXL")) and not edits
        options["image" if named_image else "control_image"] = image
    if "Kontext" in name:
        options |= {"_auto_resize": False, "max_area": 16 * 16}
    if "PixArt" in name or "Sana" in name:
        options["use_resolution_binning"] = False
    if "Img2Img" not in name or "Flux" in name:
        side = 32 if "Sana" in name else 16
        options |= {"height": side, "width": side}
    return options


def generate(pipe, prompt="a red fox", **options) -> torch.Tensor:
    """Pictures `(batch, 3, 16, 16)` in 0..1 under `call_options`; Sana's are twice as wide."""
    return pipe(prompt=prompt, **call_options(pipe) | {"output_type": "pt"} | options).images


PIPELINES = {
    "sd2": stable_diffusion_2,
    "refiner": refiner,
    "sd3": stable_diffusion_3,
    "sd3-img2img": partial(stable_diffusion_3, "Img2Img"),
    "sd3-inpaint": partial(stable_diffusion_3, "Inpaint"),
    "sd3-controlnet": partial(stable_diffusion_3, "ControlNet"),
    "flux": flux,
    "flux-img2img": partial(flux, "Img2Img"),
    "flux-inpaint": partial(flux, "Inpaint"),
    "flux-controlnet": partial(flux, "ControlNet"),
    "flux-control": partial(flux, "Control"),
    "flux-fill": partial(flux, "Fill"),
    "flux-kontext": partial(flux, "Kontext"),
    "pixart-alpha": pixart,
    "pixart-sigma": partial(pixart, "Sigma"),
    "sana": sana,
    "sana-controlnet": partial(sana, "ControlNet"),
}
