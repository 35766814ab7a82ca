"""Tiny random-weight backbones, tokenizers, text encoders and stock diffusers pipelines, built in memory for tests."""

import string

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from textcond import ConditioningEncoder, ConditioningEncoderWithProjection, TextEncoder, TextEncoderConfig

FAMILIES = ("bert", "roberta", "xlm-roberta", "mpnet", "t5", "mistral", "qwen2", "clip")
PROMPTS = ["a red fox in winter", "", "the dog", "Ünïcode 赤いりんご 🦊", "a green bird , " * 40]

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
# Special tokens in the order of their ids, their names in transformers, and what surrounds a text.
TOKENIZERS = {
    "bert": (
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "[CLS] $A [SEP]",
    ),
    "roberta": (
        {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "<s> $A </s>",
    ),
    "t5": ({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>"),
    "clip": (
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
        "<|startoftext|> $A <|endoftext|>",
    ),
    "gpt": ({"eos_token": "<|endoftext|>", "unk_token": "<unk>"}, "$A"),
}


def tokenizer(style: str = "bert", length: int = 64) -> transformers.PreTrainedTokenizerFast:
    """A character-level tokenizer with the special tokens of a family; "clip" pads with its end token, "gpt" cannot."""
    names, template = TOKENIZERS[style]
    pieces = [*names.values(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=names["unk_token"]))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    specials = [(piece, pieces.index(piece)) for piece in template.split() if piece != "$A"]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    if style == "clip":
        names = names | {"pad_token": names["eos_token"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, **names)


def backbone(family: str = "bert", width: int = 32, seed: int = 0):
    """A random two-layer model of a family and its tokenizer."""
    style = {"bert": "bert", "t5": "t5", "clip": "clip", "llama": "gpt", "mistral": "gpt", "qwen2": "gpt"}.get(
        family, "roberta"
    )
    tok = tokenizer(style)
    sizes = {"vocab_size": len(tok), "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 2 * width, "max_position_embeddings": 130, "pad_token_id": tok.pad_token_id}
    torch.manual_seed(seed)
    if family == "clip":
        model = clip_text_model(tok, width)
    elif family == "t5":
        config = transformers.T5Config(
            vocab_size=len(tok), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2
        )
        model = transformers.T5EncoderModel(config)
    else:
        name = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "mpnet": "MPNet"}.get(
            family, family.capitalize()
        )
        if style == "gpt":
            sizes["num_key_value_heads"] = 1
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    # Random weights give nearly equal states for all texts; larger ones tell mistakes apart.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval(), tok


def text_encoder(family: str = "bert", **options) -> TextEncoder:
    """A TextEncoder on a two-layer backbone of a family; `options` are those of TextEncoderConfig."""
    pooling = {"llama": "last", "mistral": "last", "qwen2": "last", "clip": "eos"}.get(family, "mean")
    return TextEncoder(*backbone(family), TextEncoderConfig(**{"pooling": pooling, **options}))


def conditioning(
    family: str = "bert", bridge: str = "resampler", width: int = 32, tokens: int | None = 12, **options
) -> ConditioningEncoder:
    """A ConditioningEncoder on a new backbone, WithProjection if `pooled_width` is given."""
    cls = ConditioningEncoderWithProjection if options.get("pooled_width") else ConditioningEncoder
    return cls.from_text_encoder(text_encoder(family), bridge=bridge, width=width, tokens=tokens, **options)


def token_ids(encoder: ConditioningEncoder, texts=PROMPTS, length: int | None = None) -> torch.Tensor:
    """Token ids `(batch, tokens)`, padded as a pipeline pads them."""
    length = length or encoder.tokenizer.model_max_length
    return encoder.tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def clip_text_model(tok, width: int = 32, projection: int | None = None):
    """A stock CLIP text encoder, with a text projection if its width is given."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(config).eval()


def _vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )


def _unet(width: int, **kwargs):
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=4,
        **kwargs,
    )


def _controlnet(unet):
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))


def stable_diffusion(task: str = "", width: int = 32, controlnet: bool = False):
    """A stock SD pipeline; `task` is "", "Img2Img" or "Inpaint"."""
    torch.manual_seed(0)
    unet, tok = _unet(width), tokenizer("clip", 77)
    extra = {"controlnet": _controlnet(unet)} if controlnet else {}
    cls = getattr(diffusers, f"StableDiffusion{'ControlNet' if controlnet else ''}{task}Pipeline")
    pipe = cls(
        vae=_vae(),
        text_encoder=clip_text_model(tok, width),
        tokenizer=tok,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(task: str = "", width: int = 64, pooled: int = 32, controlnet: bool = False):
    """A stock SDXL pipeline whose two encoders give `width / 2` each."""
    torch.manual_seed(0)
    unet = _unet(
        width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + pooled,
    )
    extra = {"controlnet": _controlnet(unet)} if controlnet else {}
    tok, tok_2 = tokenizer("clip", 77), tokenizer("clip", 77)
    cls = getattr(diffusers, f"StableDiffusionXL{'ControlNet' if controlnet else ''}{task}Pipeline")
    pipe = cls(
        vae=_vae(),
        text_encoder=clip_text_model(tok, width // 2),
        tokenizer=tok,
        text_encoder_2=clip_text_model(tok_2, width // 2, projection=pooled),
        tokenizer_2=tok_2,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
        **extra,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt="a red fox", **kwargs) -> torch.Tensor:
    """Two steps of whatever the pipeline does, from fixed noise, as `(batch, 3, 16, 16)` in 0..1."""
    name = type(pipe).__name__
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    inputs = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    edits = "Img2Img" in name or "Inpaint" in name
    if edits:
        inputs |= {"image": image, "strength": 1.0}
    if "Inpaint" in name:
        inputs |= {"mask_image": torch.ones(1, 1, 16, 16)}
    if "ControlNet" in name:
        inputs |= {"control_image" if edits else "image": image}
    if "Img2Img" not in name:
        inputs |= {"height": 16, "width": 16}
    inputs |= {"generator": torch.Generator().manual_seed(0), **kwargs}
    return pipe(prompt, **inputs).images
