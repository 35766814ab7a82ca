"""ConditioningEncoder: a text backbone and a bridge behind the call surface that diffusers pipelines expect."""

import copy
import os
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput
from transformers.utils import cached_file

from .bridges import (
    LAYERS,
    GrowingResamplerBridge,
    LayerAverage,
    LinearBridge,
    MLPBridge,
    PooledBridge,
    ResamplerBridge,
    build_bridge,
)
from .encoder import TextEncoder, TextEncoderConfig, position_capacity
from .folders import atomic_folder
from .heads import new_heads
from .original import OriginalEncoders, PackedTokenizer, mix_tokens, model_class
from .packing import TURN
from .pooling import pool
from .sentence_folder import Dense

# A tokenizer without a length limit says 1e30, which overflows as a padding length.
NO_LENGTH_LIMIT = 1_000_000
# Every prompt is padded to the tokenizer's limit, so a decoder's 32,768 positions must not become it.
_LONGEST_PROMPT = 512
# What an earlier model may have left in the folder, weights apart; those go by variant.
_OWNED = (
    "config.json",
    "textcond.json",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*",
    "tokenizer*",
    "part[._]*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "connector.safetensors",
)
# More than any CLIP has: pipelines index from the end, at -(clip_skip + 2) at most.
_HIDDEN_STATES = 64
_INHERITED_KEYS = {
    "model_type",
    "transformers_version",
    "architectures",
    "_name_or_path",
    "name_or_path",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "quantization_config",
    "auto_map",
    "_commit_hash",
}


class ConditioningEncoderConfig(PretrainedConfig):
    """Everything but the weights: backbone, bridge, and the retrieval face.

    Args:
        text_config: the backbone's own configuration, or its dictionary.
        backbone_class: the backbone's class in transformers ("BertModel", "T5EncoderModel", ...).
        bridge: "linear", "mlp" or "resampler".
        hidden_size: width of the tokens given to the denoiser.
        tokens: number of tokens that a resampler gives; None where the bridge keeps the tokenizer's length.
        projection_dim: width of the pooled vector, or None for none.
        bridge_depth: blocks of a resampler.
        chunk: states that a resampler reads into `tokens` tokens, if their number grows with the text.
        layers: read the "last" layer of the backbone, or the learned "average" of all of them.
        pad_token_id: token that the backbone never sees.
        eos_token_id: the token whose state "eos" pooling takes.
        use_attention_mask: tells Stable Diffusion pipelines to pass the tokenizer's mask.
        text_encoder: fields of the TextEncoderConfig of the retrieval face.
        retrieval_projection: `in_features, out_features, bias, activation` of each layer after the pooling there.
        heads: output width of each head of the retrieval face, by name.
        original: what `textcond.original.keep_original` says of the encoders that it keeps.

    Raises:
        ValueError: for an unknown key or value, naming it.
    """

    model_type = "textcond_conditioning"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers reads this class attribute

    def __init__(
        self,
        text_config: PretrainedConfig | dict | None = None,
        backbone_class: str = "BertModel",
        bridge: str = "resampler",
        hidden_size: int = 768,
        tokens: int | None = 77,
        projection_dim: int | None = None,
        bridge_depth: int = 4,
        chunk: int | None = None,
        layers: str = "last",
        pad_token_id: int | None = 0,
        eos_token_id: int | None = None,
        use_attention_mask: bool = True,
        text_encoder: dict[str, Any] | None = None,
        retrieval_projection: list[dict[str, Any]] | None = None,
        heads: dict[str, int] | None = None,
        original: dict[str, Any] | None = None,
        **kwargs,
    ):
        unknown = sorted(set(kwargs) - _INHERITED_KEYS)
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0]!r} in a ConditioningEncoderConfig: remove it or correct its name"
            )
        if layers not in LAYERS:
            raise ValueError(f"unknown layers {layers!r}: choose one of {', '.join(LAYERS)}")
        if text_config is None:
            text_config = {"model_type": "bert"}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        super().__init__(**kwargs)
        # After the base class, which would reset the attention of a backbone that is in use.
        self.text_config = text_config
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]
        self.backbone_class = backbone_class
        self.bridge = bridge
        self.hidden_size = hidden_size
        self.tokens = tokens
        self.projection_dim = projection_dim
        self.bridge_depth = bridge_depth
        self.chunk = chunk
        self.layers = layers
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.use_attention_mask = use_attention_mask
        self.text_encoder = TextEncoderConfig.from_dict(text_encoder or {}).to_dict()
        self.retrieval_projection = retrieval_projection or []
        self.heads = heads or {}
        self.original = original

    def to_dict(self) -> dict[str, Any]:
        """The configuration without the place that the backbone was loaded from, which is nobody else's."""
        content = super().to_dict()
        content["text_config"].pop("_name_or_path", None)
        return content


class _TextModel(nn.Module):
    """Where stock pipelines look for the layer norm that `clip_skip` needs, here already applied, and for a dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.final_layer_norm = nn.Identity()
        self.dtype = dtype


class ConditioningEncoder(PreTrainedModel):
    """Backbone and bridge as the `text_encoder` of an unmodified diffusers pipeline.

    `forward` returns a BaseModelOutputWithPooling: `last_hidden_state` `(batch, n, width)` is what the denoiser reads,
    `pooler_output` `(batch, pooled_width)` is there if the encoder has a pooled bridge, and `hidden_states`, if asked
    for, repeats `last_hidden_state`, so that every index that a pipeline may read is the trained output.

    `tokenizer` is the one that the pipeline must use, or None for a folder without one. The same backbone serves
    retrieval: `encoder.text_encoder.encode(texts)`.

    Stable Diffusion pipelines cut a negative prompt to as many tokens as the output has. A longer one is read whole if
    `pipe.encode_prompt` encodes it as a prompt, and the call gets it as `negative_prompt_embeds`.

    Tools that weigh the words of a prompt multiply output tokens by the weights of input tokens: they need a `linear`
    or `mlp` bridge.
    """

    config_class = ConditioningEncoderConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_save = ("backbone.pooler.dense.weight", "backbone.pooler.dense.bias")
    _keys_to_ignore_on_load_unexpected = (r"^backbone\.pooler\.",)

    def __init__(
        self,
        config: ConditioningEncoderConfig,
        backbone: PreTrainedModel | None = None,
        retrieval_projection: nn.Module | None = None,
        heads: nn.ModuleDict | None = None,
        originals: list[PreTrainedModel] | None = None,
    ):
        super().__init__(config)
        width = config.text_config.hidden_size
        if backbone is None:
            backbone = model_class(config.backbone_class)(config.text_config)
            # BERT's head for next-sentence prediction: no pooling here reads it, and not every checkpoint has it.
            if hasattr(backbone, "pooler"):
                backbone.pooler = None
            retrieval_projection = _build_projection(config.retrieval_projection)
            heads = new_heads(width, sparse="sparse" in config.heads, tokens=config.heads.get("tokens", 0))
        else:
            # Trained weights, which post_init would draw anew.
            for model in (backbone, *(originals or ())):
                for module in model.modules():
                    module._is_hf_initialized = True
        self.backbone = backbone
        self.retrieval_projection = retrieval_projection
        self.heads = heads
        self.original = OriginalEncoders(config.original, originals) if config.original else None
        depth = config.text_config.num_hidden_layers
        self.layer_average = LayerAverage(depth + 1) if config.layers == "average" else None
        self.bridge = build_bridge(
            config.bridge, width, config.hidden_size, config.tokens, config.bridge_depth, config.chunk
        )
        self.pooled_bridge = PooledBridge(width, config.projection_dim) if config.projection_dim else None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._capacity = position_capacity(backbone)
        # A prompt is encoded once: keys and values need not be kept.
        config.text_config.use_cache = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (LinearBridge, MLPBridge, ResamplerBridge, PooledBridge, LayerAverage)):
            module.reset_parameters()

    @classmethod
    def from_text_encoder(
        cls,
        encoder: TextEncoder,
        *,
        bridge: str = "resampler",
        width: int = 768,
        tokens: int | None = 77,
        pooled_width: int | None = None,
        bridge_depth: int = 4,
        chunk: int | None = None,
        prompt_length: int | None = None,
        layers: str = "last",
        seed: int = 0,
    ) -> "ConditioningEncoder":
        """Put an untrained bridge on the very backbone of a TextEncoder; both share its weights from then on.

        A tokenizer without a pad token of its own (decoder LLMs, CLIP) gets one, and the backbone a row for it.

        Args:
            encoder: the retrieval face; its pooling also feeds the pooled vector.
            bridge: "linear", "mlp" (one output token for each input token) or "resampler" (a fixed number).
            width: width of the tokens that the denoiser reads: `pipe.unet.config.cross_attention_dim`.
            tokens: how many tokens the denoiser reads. For a resampler its queries; for the others the length to which
                the pipeline pads prompts, None being the encoder's `max_length`.
            pooled_width: width of the pooled vector (1280 for SDXL), or None for none.
            bridge_depth: blocks of a resampler.
            chunk: lets a resampler's output grow with the prompt: `tokens` for up to `chunk` tokens in, twice as many
                for up to `2 * chunk`, then four times, and so on. None gives `tokens` whatever the length.
            prompt_length: the longest prompt in tokens, at most what the backbone has positions for. None is the
                encoder's `max_length`, 512 at most; a `linear` or `mlp` bridge takes `tokens` for it.
            layers: "last", or "average" for a learned average of the backbone's layers.
            seed: of the bridge's initial weights.

        Raises:
            ValueError: for an unknown bridge, a resampler without `tokens`, a ConditioningEncoderWithProjection
                without `pooled_width`, a backbone whose class is not one of transformers, or a length that it has no
                positions for.
        """
        backbone = encoder.backbone
        backbone_class = type(backbone).__name__
        if getattr(transformers, backbone_class, None) is not type(backbone):
            raise ValueError(
                f"backbone {backbone_class} is not a class of transformers, so it could not be loaded again: "
                "use a TextEncoder on one that is"
            )
        tokenizer = _with_own_pad(encoder.tokenizer)
        _add_rows(backbone, tokenizer.pad_token_id + 1)
        limit = min(encoder.max_length or _LONGEST_PROMPT, _LONGEST_PROMPT)
        if bridge != "resampler":
            if prompt_length is not None:
                raise ValueError(f"prompt_length={prompt_length} for a {bridge} bridge: pass it as tokens")
            limit = tokens or limit
        elif prompt_length is not None:
            capacity = position_capacity(backbone)
            if capacity is not None and prompt_length > capacity:
                raise ValueError(
                    f"prompt_length={prompt_length}, but {backbone_class} has positions for {capacity} tokens: "
                    f"pass {capacity} or fewer"
                )
            limit = prompt_length
        tokenizer.model_max_length = limit
        config = ConditioningEncoderConfig(
            text_config=backbone.config,
            backbone_class=backbone_class,
            bridge=bridge,
            hidden_size=width,
            tokens=tokens if bridge == "resampler" else None,
            projection_dim=pooled_width,
            bridge_depth=bridge_depth,
            chunk=chunk,
            layers=layers,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=encoder.tokenizer.eos_token_id,
            # The pipeline's length limit may be shorter; the vectors of the retrieval face must not change.
            text_encoder=encoder.config.to_dict() | {"max_length": encoder.max_length or NO_LENGTH_LIMIT},
            retrieval_projection=_describe_projection(encoder.projection),
            heads={name: head.linear.out_features for name, head in encoder.heads.items()},
            dtype=encoder.dtype,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, backbone, encoder.projection, encoder.heads)
        for module in (model.bridge, model.pooled_bridge, model.layer_average):
            if module is not None:
                module.to(encoder.device, encoder.dtype)
        model.tokenizer = tokenizer
        if isinstance(model.bridge, GrowingResamplerBridge):
            model._fit_growth()
        return model.eval()

    def _fit_growth(self) -> None:
        limit, capacity = self.tokenizer.model_max_length, position_capacity(self.backbone)
        most = self.bridge.blocks_for(limit) * self.config.tokens
        if capacity is not None and most > capacity:
            raise ValueError(
                f"chunk={self.config.chunk} makes {most} tokens of a prompt of {limit}, to which negative prompts are "
                f"padded, and there are positions for {capacity}: pass a larger chunk or fewer tokens"
            )
        # A row as long as an output asks for that output, so a prompt's must be of another length.
        if self.bridge.blocks_in(limit):
            self.tokenizer.model_max_length = limit - 1

    @property
    def text_encoder(self) -> TextEncoder:
        """The retrieval face on the same backbone.

        Raises:
            ValueError: if the encoder was loaded from a folder without tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this encoder came without a tokenizer: use textcond.pipelines.retrieval_encoder(pipe)")
        return self.text_encoder_with(self.tokenizer)

    def text_encoder_with(self, tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
        """The retrieval face on the same backbone, with a given tokenizer."""
        if isinstance(tokenizer, PackedTokenizer):
            tokenizer = tokenizer.others[-1]
        encoder = TextEncoder(
            self.backbone, tokenizer, TextEncoderConfig.from_dict(self.config.text_encoder), self.retrieval_projection
        )
        encoder.heads = self.heads
        return encoder

    @property
    def text_model(self) -> nn.Module:
        """What a stock text encoder keeps under this name, as far as pipelines ask for it."""
        return _TextModel(self.dtype)

    @property
    def _vocabulary_model(self) -> PreTrainedModel:
        # Textual inversion is learned for a pipeline's original encoder, and goes there where it is kept.
        return self.backbone if self.original is None else self.original.encoders[0]

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings that belong to the tokenizer: the backbone's, or those of an original that is kept."""
        return self._vocabulary_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings that `get_input_embeddings` returns."""
        self._vocabulary_model.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Resize those token embeddings, and the vocabulary size in the configuration that is saved."""
        # `config.text_config` is the backbone's own configuration, so this sets the size in both.
        resized = self._vocabulary_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.original is not None:
            self.config.original["encoders"][0]["config"] = self.original.encoders[0].config.to_dict()
        return resized

    def load_adapter(self, *args, **kwargs):
        """Load a peft adapter, as PreTrainedModel does.

        Raises:
            ValueError: if its weights name a module that is not here, which would leave others with random ones.
        """
        modules = dict(self.named_modules())
        for key in kwargs.get("adapter_state_dict") or ():
            module, lora, _ = key.removeprefix("base_model.model.").partition(".lora_")
            if lora and module not in modules:
                raise ValueError(
                    f"this adapter has weights for {module!r}, so it was made for another text encoder than this "
                    f"{type(self).__name__}: load such a LoRA file before swap_text_encoder, which keeps the UNet's "
                    "part of it"
                )
        return super().load_adapter(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Turn token ids `(batch, tokens)` into `(batch, n, width)`; see the class for the output.

        Pad tokens are masked whatever `attention_mask` says: SDXL and Flux pass none, and prompt weighting tools pass
        ones over the padding. A text of nothing but padding, the empty prompt of a tokenizer without special tokens,
        reads as one pad token, so that its states are finite and the same every time.
        """
        tokens, pooled = self._condition(input_ids, attention_mask)
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)
        return self._finish(output, output_hidden_states, return_dict)

    def _condition(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.original is None:
            return self._read(input_ids, attention_mask)
        first, weight = sum(self.original.lengths), self.config.original["weight"]
        if input_ids.shape[1] <= first:
            raise ValueError(
                f"rows of {input_ids.shape[1]} ids, and the original's part alone has {first}: "
                "use the encoder's own tokenizer"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        original, original_pooled = self.original(input_ids[:, :first], mask[:, :first])
        tokens, pooled = self._read(input_ids[:, first:], mask[:, first:])
        if pooled is not None:
            pooled = weight * original_pooled + (1 - weight) * pooled
        return mix_tokens(self.config.original["mix"], weight, original, tokens), pooled

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        padded = input_ids.shape[1]
        keep = input_ids != self.config.pad_token_id
        if attention_mask is not None:
            keep = keep & attention_mask.bool()
        first = torch.arange(keep.shape[1], device=keep.device) == 0
        keep = keep | (first & ~keep.any(dim=1, keepdim=True))
        if self.config.bridge in ("resampler", "identity") and not torch.compiler.is_compiling():
            # Nothing behind the longest text of the batch reaches the output, or it is zero there.
            length = int(keep.any(dim=0).nonzero()[-1]) + 1
            input_ids, keep = input_ids[:, :length], keep[:, :length]
        if self._capacity is not None and input_ids.shape[1] > self._capacity:
            raise ValueError(
                f"a text of {input_ids.shape[1]} tokens, and {self.config.backbone_class} has positions for "
                f"{self._capacity}: shorten it, or set the tokenizer's model_max_length to {self._capacity}"
            )
        average = self.layer_average is not None
        with nullcontext() if torch.compiler.is_compiling() else TURN:
            output = self.backbone(input_ids=input_ids, attention_mask=keep.long(), output_hidden_states=average)
        states = self.layer_average(output.hidden_states) if average else output.last_hidden_state
        pooled = None
        if self.pooled_bridge is not None:
            pooled = pool(
                output.last_hidden_state,
                keep,
                self.config.text_encoder["pooling"],
                input_ids=input_ids,
                eos_token_id=self.config.eos_token_id,
            )
            pooled = self.pooled_bridge(pooled.to(states.dtype))
        if isinstance(self.bridge, GrowingResamplerBridge):
            return self.bridge(states, keep, self.bridge.blocks_in(padded)), pooled
        tokens = self.bridge(states, keep)
        if self.config.bridge == "identity":
            tokens = F.pad(tokens, (0, 0, 0, padded - tokens.shape[1]))
        return tokens, pooled

    def _finish(self, output, output_hidden_states: bool | None, return_dict: bool | None):
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            output.hidden_states = (output.last_hidden_state,) * _HIDDEN_STATES
        return output if return_dict is None or return_dict else output.to_tuple()

    def save_pretrained(self, save_directory: str | os.PathLike, variant: str | None = None, **kwargs) -> None:
        """Write configuration, safetensors weights and tokenizer; the folder appears whole or not at all.

        The keyword arguments are those of PreTrainedModel.

        Raises:
            ValueError: if the encoder carries a peft adapter, which has to be merged or saved by itself.
        """
        if any(name.endswith(".base_layer") for name, _ in self.named_modules()):
            raise ValueError(
                "this encoder carries a peft adapter, beside which its own weights would not be saved: merge it first "
                "(in a pipeline: pipe.fuse_lora(), then pipe.unload_lora_weights()), or save the adapter alone with "
                "pipe.save_lora_weights"
            )
        suffix = f".{variant}" if variant else ""
        weights = (
            f"model{suffix}.safetensors",
            f"model{suffix}-*.safetensors",
            f"model.safetensors.index{suffix}.json",
        )
        with atomic_folder(save_directory, owned=[*_OWNED, *weights]) as folder:
            super().save_pretrained(folder, variant=variant, **kwargs)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """Load a folder or hub id, with the tokenizer that lies beside the weights.

        `dtype=None` means float32, as it does for the other parts of a diffusers pipeline, not the dtype of the file.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        # Pickled weights run code.
        kwargs["use_safetensors"] = True
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        tokenizer = PackedTokenizer if model.config.original else AutoTokenizer
        model.tokenizer = _tokenizer_beside(pretrained_model_name_or_path, tokenizer, kwargs)
        return loaded


class ConditioningEncoderWithProjection(ConditioningEncoder):
    """A ConditioningEncoder whose first output is its pooled vector, for the slots that read one (SDXL, SD3).

    `forward` returns a CLIPTextModelOutput: `text_embeds` `(batch, pooled_width)`, `last_hidden_state`
    `(batch, n, width)`, and `hidden_states` if asked for.
    """

    def __init__(self, config: ConditioningEncoderConfig, *args, **kwargs):
        if not config.projection_dim:
            raise ValueError("a ConditioningEncoderWithProjection needs a pooled vector: pass pooled_width=1280, say")
        super().__init__(config, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CLIPTextModelOutput | tuple:
        """Turn token ids `(batch, tokens)` into a pooled vector and tokens, under the masks of ConditioningEncoder."""
        tokens, pooled = self._condition(input_ids, attention_mask)
        output = CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=tokens)
        return self._finish(output, output_hidden_states, return_dict)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The pooled vector `(batch, pooled_width)` alone, under the name by which MusicLDM asks CLAP for it."""
        return self(input_ids, attention_mask).text_embeds


def _with_own_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads on the right with a token that means nothing else, and names its first and last token."""
    tokenizer = copy.deepcopy(tokenizer)
    # Prompt weighting tools ask for these two by name; BERT has them under others.
    if tokenizer.bos_token is None and tokenizer.cls_token is not None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


@torch.no_grad()
def _add_rows(backbone: PreTrainedModel, tokens: int) -> None:
    """Grow the token embeddings to a vocabulary; new rows are the mean of the others."""
    weight = backbone.get_input_embeddings().weight
    rows, mean = len(weight), weight.float().mean(dim=0)
    if tokens > rows:
        backbone.resize_token_embeddings(tokens, mean_resizing=False).weight[rows:] = mean.to(weight.dtype)


def _describe_projection(projection: nn.Module | None) -> list[dict[str, Any]]:
    layers = [] if projection is None else list(projection) if isinstance(projection, nn.Sequential) else [projection]
    return [
        {
            "in_features": layer.linear.in_features,
            "out_features": layer.linear.out_features,
            "bias": layer.linear.bias is not None,
            "activation": type(layer.activation).__name__,
        }
        for layer in layers
    ]


def _build_projection(description: list[dict[str, Any]]) -> nn.Module | None:
    layers = [
        Dense(
            nn.Linear(layer["in_features"], layer["out_features"], bias=layer["bias"]),
            getattr(nn, layer["activation"])(),
        )
        for layer in description
    ]
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0] if layers else None


def _tokenizer_beside(
    name_or_path: str | os.PathLike, cls: type, kwargs: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    where = {
        name: kwargs[name]
        for name in ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        if kwargs.get(name) is not None
    }
    found = cached_file(
        name_or_path,
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return cls.from_pretrained(name_or_path, **where) if found else None


# What model_index.json names: the package, whatever file of it holds the class.
for _class in (ConditioningEncoderConfig, ConditioningEncoder, ConditioningEncoderWithProjection):
    _class.__module__ = "textcond"

# AutoTokenizer reads the configuration beside a tokenizer.
AutoConfig.register(ConditioningEncoderConfig.model_type, ConditioningEncoderConfig, exist_ok=True)
