"""open_clip's text towers as transformers CLIP models, weight for weight."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .folders import check_safetensors, check_weights, read_json

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
# what CLIPTextModel can express, beside sizes: option -> accepted values
EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "hf_model_name": (None, ""),
    "hf_tokenizer_name": (None, ""),
    "tokenizer_kwargs": (None, {}),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "ls_init_value": (None,),
    "pool_type": ("argmax",),
    "proj_type": ("linear", "none"),
    "act_kwargs": (None, {}),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}


def load_open_clip_text(source: str) -> tuple[CLIPTextModel, nn.Linear | None, CLIPTokenizer]:
    """Load the text tower, the text projection and the tokenizer of an open_clip model, without its image tower.

    `source` is `MODEL/TAG`, `MODEL/FILE.safetensors`, `hf-hub:ID` or `local-dir:FOLDER`, as open_clip names them.

    Raises:
        FileNotFoundError: no such file or folder, or a checkpoint that exists in pickled form only.
        ValueError: an unknown model or tag, a damaged file, or an architecture that CLIPTextModel does not express.
    """
    model_config, _, weights = find_open_clip(source)
    tensors = _text_tensors(weights)
    model, projection = convert_text_tower(tensors, model_config)
    tokenizer = open_clip_tokenizer(model.config.max_position_embeddings)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"open_clip:{source} has {model.config.vocab_size} token embeddings, "
            f"its tokenizer {len(tokenizer)} tokens: only the tokenizer of OpenAI's CLIP is supported"
        )
    return model, projection, tokenizer


def convert_text_tower(
    tensors: dict[str, Tensor], model_config: dict[str, Any]
) -> tuple[CLIPTextModel, nn.Linear | None]:
    """Build CLIPTextModel and the text projection from an open_clip state dict and model config.

    Projecting the state at the end-of-text token gives open_clip's `encode_text`.

    Raises:
        ValueError: names the option that CLIPTextModel does not express, or the parameters that do not fit.
    """
    text = model_config["text_cfg"]
    for option, accepted in EXPRESSIBLE.items():
        if option in text and text[option] not in accepted:
            raise ValueError(
                f"open_clip text tower with {option}={text[option]!r} has no exact form as a CLIPTextModel"
            )
    width = text.get("width", 512)
    config = CLIPTextConfig(
        vocab_size=text.get("vocab_size", 49408),
        hidden_size=width,
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        projection_dim=model_config["embed_dim"],
        num_hidden_layers=text.get("layers", 12),
        num_attention_heads=text.get("heads", 8),
        max_position_embeddings=text.get("context_length", 77),
        hidden_act="quick_gelu" if model_config.get("quick_gelu") else "gelu",
        layer_norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    renamed = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    state: dict[str, Tensor] = {}
    try:
        for ours, theirs in renamed.items():
            state[ours] = tensors[theirs]
        for index in range(config.num_hidden_layers):
            state |= _convert_block(tensors, f"transformer.resblocks.{index}.", f"encoder.layers.{index}.")
        projection = _convert_projection(tensors) if text.get("proj_type", "linear") == "linear" else None
    except KeyError as error:
        raise ValueError(f"the open_clip checkpoint lacks {error}: it does not belong to this model") from error
    model = CLIPTextModel(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the open_clip checkpoint does not fit its model config: {error}") from error
    return model.eval(), projection


def open_clip_tokenizer(context_length: int = 77) -> CLIPTokenizer:
    """Return open_clip's own vocabulary and merges as a CLIPTokenizer.

    The ids are the same for every text that open_clip's cleaning (ftfy, HTML entities) leaves alone; texts with
    curly quotes or HTML entities in them need that cleaning first.
    """
    from open_clip.tokenizer import SimpleTokenizer

    source = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={names.get(token, token): token_id for token, token_id in source.encoder.items()},
        merges=list(source.bpe_ranks),
        model_max_length=context_length,
    )


def _convert_block(tensors: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """Return one layer's tensors; open_clip stacks query, key and value in one matrix."""
    layer = {}
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", tensors[f"{theirs}attn.in_proj_{kind}"].chunk(3)):
            layer[f"{ours}self_attn.{name}_proj.{kind}"] = part
        layer[f"{ours}self_attn.out_proj.{kind}"] = tensors[f"{theirs}attn.out_proj.{kind}"]
        layer[f"{ours}layer_norm1.{kind}"] = tensors[f"{theirs}ln_1.{kind}"]
        layer[f"{ours}layer_norm2.{kind}"] = tensors[f"{theirs}ln_2.{kind}"]
        layer[f"{ours}mlp.fc1.{kind}"] = tensors[f"{theirs}mlp.c_fc.{kind}"]
        layer[f"{ours}mlp.fc2.{kind}"] = tensors[f"{theirs}mlp.c_proj.{kind}"]
    return layer


def _convert_projection(tensors: dict[str, Tensor]) -> nn.Linear:
    """Return the text projection: a matrix `(width, dim)`, or a Linear where the model has a bias."""
    matrix = tensors["text_projection"].T if "text_projection" in tensors else tensors["text_projection.weight"]
    projection = nn.Linear(matrix.shape[1], matrix.shape[0], bias="text_projection.bias" in tensors)
    with torch.no_grad():
        projection.weight.copy_(matrix)
        if projection.bias is not None:
            projection.bias.copy_(tensors["text_projection.bias"])
    return projection


def _text_tensors(weights: Path) -> dict[str, Tensor]:
    """Read the text tower's tensors as float32; models with a separate text module put `text.` before their names."""
    check_safetensors(weights)
    with safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if not name.startswith("visual.")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("text."): file.get_tensor(name).float() for name in names}


def find_open_clip(source: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return the model config, how pictures are prepared as far as it is stated, and the weights file of a source."""
    if source.startswith("local-dir:"):
        folder = Path(source.removeprefix("local-dir:")).expanduser()
        config = read_json(folder / CONFIG)
        files = check_weights(folder)
        if len(files) > 1 and folder / WEIGHTS not in files:
            raise ValueError(f"{folder} holds several *.safetensors: name the one to load {WEIGHTS}")
        weights = folder / WEIGHTS if folder / WEIGHTS in files else files[0]
        return _model_config(config, folder / CONFIG), config.get("preprocess_cfg", {}), weights
    if source.startswith("hf-hub:"):
        repo = source.removeprefix("hf-hub:")
        path = _download(repo, CONFIG)
        config = read_json(path)
        return _model_config(config, path), config.get("preprocess_cfg", {}), _download(repo, WEIGHTS)

    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    name, _, pretrained = source.partition("/")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no model {name!r}: see open_clip.list_models()")
    tags = list_pretrained_tags_by_model(name)
    if not pretrained:
        raise ValueError(
            f"open_clip:{name} names no weights: add /TAG or /FILE.safetensors; tags are {', '.join(tags) or 'none'}"
        )
    tag = get_pretrained_cfg(name, pretrained)
    if tag:
        # a tag knows which activation it was trained with; the model of that name may have the other
        config["quick_gelu"] = tag.get("quick_gelu", config.get("quick_gelu", False))
        repo, _, file = tag.get("hf_hub", "").rpartition("/")
        return config, tag, _download(repo, Path(file).with_suffix(".safetensors").name if file else WEIGHTS)
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"open_clip:{source}: {pretrained!r} is neither a file nor a tag of {name} ({', '.join(tags) or 'no tags'})"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a safetensors file: pickled weights are refused, save it again as safetensors")
    return config, {}, path


def _model_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if "text_cfg" not in config.get("model_cfg", {}):
        raise ValueError(f"{path} has no model_cfg with a text_cfg: it is not an open_clip config")
    return config["model_cfg"]


def _download(repo: str, file: str) -> Path:
    try:
        return Path(hf_hub_download(repo, file))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"the hub gives no {file} of {repo!r} ({type(error).__name__}): check the name, the network and the access "
            "token; pickled weights are refused"
        ) from error
