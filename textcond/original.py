"""Keeping what a pipeline's original text encoder knew: its tokens beside or under those of a new one.

A pipeline tokenizes a prompt once, for one encoder. So the tokenizer packs the ids of all into one row, `[original |
... | new]`, each part padded to its own fixed length, and the encoder splits the row at those places.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from .conditioning import ConditioningEncoder

MIXES = ("blend", "concatenate")
# Words of a prompt are the new encoder's to read; a third of the original keeps styles and trigger words in reach.
_WEIGHTS = {"blend": 0.3, "concatenate": 0.5}
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class PackedTokenizer(PreTrainedTokenizerFast):
    """Several tokenizers as one: their ids side by side in one row, each part padded or cut to its own length.

    Itself it is the tokenizer of the first original encoder: words added to it, as textual inversion does, belong to
    that one, and are left out of the text that the last tokenizer, the new encoder's, reads.
    """

    others: list[PreTrainedTokenizerBase]

    @classmethod
    def pack(cls, tokenizers: Sequence[PreTrainedTokenizerBase]) -> PackedTokenizer:
        """Pack tokenizers, the new encoder's last; each reads up to its `model_max_length`.

        Raises:
            ValueError: if the first has no backend of the tokenizers library.
        """
        first, *others = tokenizers
        if not isinstance(first, PreTrainedTokenizerFast):
            raise ValueError(f"{type(first).__name__} is not a fast tokenizer: load the one of its tokenizer.json")
        packed = cls(
            tokenizer_object=first.backend_tokenizer,
            model_max_length=sum(tokenizer.model_max_length for tokenizer in tokenizers),
            padding_side="right",
            truncation_side="right",
            packed=len(tokenizers),
            **first.special_tokens_map,
        )
        packed.others = [copy.deepcopy(tokenizer) for tokenizer in others]
        return packed

    @property
    def lengths(self) -> list[int]:
        """How many ids of a row each part has."""
        others = [tokenizer.model_max_length for tokenizer in self.others]
        return [self.model_max_length - sum(others), *others]

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """Tokenize a text or texts into rows of packed ids, `(batch, sum of lengths)`.

        A row padded to "max_length" is always of full length, whatever `max_length` says: pipelines ask negative
        prompts for the length of the output, which here is not that of the input. Otherwise the last part alone is
        padded and cut as asked, so that a pipeline's warning names what the new encoder does not read.

        Raises:
            ValueError: for rows without padding, as tools ask for that weigh words: they take a row for one encoder's.
        """
        if padding in (False, "do_not_pad"):
            raise ValueError(
                f"padding={padding!r}: a PackedTokenizer gives padded rows alone, the ids of several encoders, which "
                "compel and other tools that weigh words cannot read: swap the encoder in with keep_original=None"
            )
        single = isinstance(text, str)
        texts = [text] if single else list(text)
        full = {"padding": "max_length", "truncation": True}
        *kept, new = self.lengths
        parts = [super().__call__(texts, max_length=kept[0], **full)]
        parts += [tokenizer(texts, max_length=n, **full) for tokenizer, n in zip(self.others, kept[1:])]
        last = (
            {"max_length": new, **full} if padding == "max_length" else {"padding": padding, "truncation": truncation}
        )
        parts.append(self.others[-1]([self._without_placeholders(text) for text in texts], **last))
        rows = {
            name: [list(chain(*row)) for row in zip(*(part[name] for part in parts))]
            for name in ("input_ids", "attention_mask")
        }
        if single and return_tensors is None:
            rows = {name: values[0] for name, values in rows.items()}
        return BatchEncoding(rows, tensor_type=return_tensors)

    def batch_decode(self, sequences, *args, **kwargs) -> list[str]:
        """Decode the ends of rows, which are the new encoder's ids; pipelines do so for their warning."""
        return self.others[-1].batch_decode(sequences, *args, **kwargs)

    def _without_placeholders(self, text: str) -> str:
        added = [
            token.content
            for tokenizer in (self, *self.others[:-1])
            for token in tokenizer.added_tokens_decoder.values()
            if not token.special and token.content in text
        ]
        if not added:
            return text
        pattern = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
        return " ".join(re.sub(pattern, " ", text).split())

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> tuple[str, ...]:
        """Write the first tokenizer's files, and those of the others in folders beside them."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        for i, tokenizer in enumerate(self.others, 1):
            # With a dot: diffusers looks for a variant behind the first dot of every name in a component's folder.
            tokenizer.save_pretrained(os.path.join(save_directory, f"part.{i}"))
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> PackedTokenizer:
        """Load what `save_pretrained` wrote, from a folder or hub id."""
        packed = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        where = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        dot = "."
        if "parts" in packed.init_kwargs:  # as earlier versions wrote, into folders without a dot
            dot, packed.init_kwargs["packed"] = "_", packed.init_kwargs.pop("parts")
        packed.others = [
            AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path,
                subfolder=os.path.join(kwargs.get("subfolder", ""), f"part{dot}{i}"),
                **where,
            )
            for i in range(1, packed.init_kwargs["packed"])
        ]
        return packed


class OriginalEncoders(nn.Module):
    """The text encoders that a pipeline came with, called as the pipeline calls them, their tokens joined in width."""

    def __init__(self, settings: dict[str, Any], encoders: Sequence[PreTrainedModel] | None = None):
        super().__init__()
        if encoders is None:
            encoders = [
                model_class(part["class"])(AutoConfig.for_model(**part["config"])) for part in settings["encoders"]
            ]
        self.encoders = nn.ModuleList(encoders)
        self.lengths: list[int] = settings["lengths"]
        self.layer: int = settings["layer"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Turn the original parts of packed rows into tokens `(batch, n, width)` and the last one's pooled vector."""
        tokens, start = [], 0
        for encoder, length in zip(self.encoders, self.lengths):
            part = slice(start, start + length)
            start += length
            masked = attention_mask is not None and getattr(encoder.config, "use_attention_mask", False)
            output = encoder(
                input_ids[:, part],
                attention_mask=attention_mask[:, part] if masked else None,
                output_hidden_states=True,
            )
            tokens.append(output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer])
        pooled = output["text_embeds"] if "text_embeds" in output else output.get("pooler_output")
        return torch.cat(tokens, dim=-1), pooled


def mix_tokens(kind: str, weight: float, original: Tensor, new: Tensor) -> Tensor:
    """Blend or concatenate tokens `(batch, n, width)`; `weight` is the original's, 0 to 1.

    A blend is `weight * original + (1 - weight) * new`. Of concatenated tokens the heavier part stays as it is and the
    lighter is scaled down by their ratio; a part of weight 0 is left out.
    """
    if kind == "blend":
        return weight * original + (1 - weight) * new
    parts = [(original, weight), (new, 1 - weight)]
    heavier = max(weight, 1 - weight)
    return torch.cat([tokens * (share / heavier) for tokens, share in parts if share], dim=1)


def keep_original(
    encoder: ConditioningEncoder,
    originals: PreTrainedModel | Sequence[PreTrainedModel],
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase],
    mix: str = "blend",
    weight: float | None = None,
    *,
    layer: int = -1,
) -> ConditioningEncoder:
    """An encoder of the same class that gives the original's tokens mixed with the new ones; all weights are shared.

    Of a prompt longer than the original's limit (77 tokens) the original reads the beginning. Textual inversion goes
    to the first original; load it into a second one before. `clip_skip` has no effect.

    Args:
        encoder: the new one, with its tokenizer.
        originals: what was in the slot; SDXL's two encoders if the new one serves both slots.
        tokenizers: theirs.
        mix: "blend", a weighted sum of token states, for encoders that give equally many; or "concatenate", the tokens
            of both one after the other, which keeps each state as it is.
        weight: of the original, 0 to 1; 1 gives the original's output exactly, 0 the new one's. None is 0.3 for a
            blend and 0.5, where both parts stay as they are, for concatenation. Pooled vectors are blended with it.
        layer: which hidden state the pipeline reads of the original: -1, or -2 for SDXL.

    Raises:
        ValueError: naming what does not fit, and its mend.
    """
    originals = [originals] if isinstance(originals, PreTrainedModel) else list(originals)
    tokenizers = [tokenizers] if isinstance(tokenizers, PreTrainedTokenizerBase) else list(tokenizers)
    if mix not in MIXES:
        raise ValueError(f"unknown keep_original={mix!r}: choose one of {', '.join(MIXES)}")
    weight = _WEIGHTS[mix] if weight is None else weight
    if not 0 <= weight <= 1:
        raise ValueError(f"original_weight={weight}: give a number from 0 to 1")
    _check(encoder, originals)
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if len(set(lengths)) > 1:
        raise ValueError(f"the original encoders read {lengths} tokens, and are joined token by token: swap one slot")
    new = encoder.config.tokens or encoder.tokenizer.model_max_length
    if mix == "blend" and new != lengths[0]:
        raise ValueError(
            f"the original gives {lengths[0]} tokens and the new encoder {new}, which cannot be added up: "
            f'make it with tokens={lengths[0]}, or, if it serves all slots, pass keep_original="concatenate"'
        )
    config = copy.copy(encoder.config)
    config.original = {
        "mix": mix,
        "weight": weight,
        "layer": layer,
        "tokens": new if mix == "blend" else lengths[0] * (weight > 0) + new * (weight < 1),
        "lengths": lengths,
        "encoders": [{"class": type(model).__name__, "config": model.config.to_dict()} for model in originals],
    }
    with torch.random.fork_rng(devices=[]):
        both = type(encoder)(config, encoder.backbone, encoder.retrieval_projection, encoder.heads, originals)
    both.layer_average, both.bridge = encoder.layer_average, encoder.bridge
    both.pooled_bridge = encoder.pooled_bridge
    both.tokenizer = PackedTokenizer.pack([*tokenizers, encoder.tokenizer])
    return both.train(encoder.training)


def _check(encoder: ConditioningEncoder, originals: Sequence[PreTrainedModel]) -> None:
    if encoder.config.original:
        raise ValueError("this encoder already keeps an original: pass the one that it was made from")
    if encoder.tokenizer is None:
        raise ValueError("this encoder came without a tokenizer, which the original's is packed with: set .tokenizer")
    if encoder.config.bridge == "identity":
        raise ValueError(
            "this encoder gives its backbone's own states to a connector, which the original's tokens do not go "
            'through: make it with another bridge, bridge="resampler"'
        )
    if encoder.config.chunk:
        raise ValueError(
            f"chunk={encoder.config.chunk} lets the number of tokens grow, and an original needs it fixed: "
            "make the encoder without chunk"
        )
    for model in originals:
        name = type(model).__name__
        if getattr(transformers, name, None) is not type(model):
            raise ValueError(f"the slot holds a {name}, not the encoder that the pipeline came with: bring that back")
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"the original {name} carries a LoRA: call pipe.fuse_lora() and pipe.unload_lora_weights()"
            )
    width = sum(model.config.hidden_size for model in originals)
    if width != encoder.config.hidden_size:
        raise ValueError(
            f"the original gives {width}-wide tokens, the new encoder {encoder.config.hidden_size}: "
            f"make it with width={width}"
        )
    pooled = encoder.config.projection_dim
    last = originals[-1].config
    theirs = last.projection_dim if type(originals[-1]).__name__.endswith("WithProjection") else last.hidden_size
    if pooled and pooled != theirs:
        raise ValueError(
            f"the original gives a {theirs}-wide pooled vector, the new encoder {pooled}: make it with "
            f"pooled_width={theirs}"
        )


def model_class(name: str) -> type[PreTrainedModel]:
    """The class of transformers with a name; a ValueError if there is none."""
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"backbone_class {name!r} is no model of transformers: correct the configuration")
    return found


# What model_index.json names.
PackedTokenizer.__module__ = "textcond"
