"""Texts of different lengths through a backbone without padding: one row of tokens, attention text by text."""

import threading
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

PACKED = "textcond_packed"
# A packed call changes the backbone's config for as long as it runs: whoever calls a backbone takes this turn.
TURN = threading.RLock()
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")
DECODERS = ("llama", "mistral", "qwen2")


def can_pack(backbone: PreTrainedModel, longest: int) -> bool:
    """Whether `packed_states` gives what the backbone gives of padded texts of up to `longest` tokens.

    True for model types of which it is tested, on a CPU (an accelerator would wait for the many small attentions),
    and where nothing recomputes attention outside of the call (gradient checkpointing) or looks through a shorter
    window.
    """
    config = backbone.config
    recomputes = backbone.training and any(
        getattr(part, "gradient_checkpointing", False) for part in backbone.modules()
    )
    if config.model_type in ENCODERS:
        known = not config.is_decoder and getattr(config, "position_embedding_type", "absolute") == "absolute"
    else:
        known = config.model_type in DECODERS
    return (
        known
        and config._attn_implementation == "sdpa"
        and next(backbone.parameters()).device.type == "cpu"
        and not recomputes
        and longest <= (getattr(config, "sliding_window", None) or longest)
    )


def packed_states(backbone: PreTrainedModel, input_ids: Tensor, lengths: list[int]) -> Tensor:
    """Return the last hidden states `(batch, tokens, width)` of padded `input_ids` `(batch, tokens)`, zeros at padding.

    Every layer but attention sees one row of `sum(lengths)` tokens. Neighbours of equal length share an attention
    call, so sort by length. Gradients flow as without packing.
    """
    attended = torch.arange(input_ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    config = backbone.config
    with TURN:
        implementation = config._attn_implementation
        config._attn_implementation = PACKED
        try:
            row = backbone(
                input_ids=input_ids[attended].unsqueeze(0),
                position_ids=_position_ids(backbone, input_ids)[attended].unsqueeze(0),
                packed_lengths=lengths,
            ).last_hidden_state[0]
        finally:
            config._attn_implementation = implementation
    return row.new_zeros(*input_ids.shape, row.shape[-1]).masked_scatter(attended.unsqueeze(-1), row)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: list[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each text of a row: `(1, heads, tokens, head width)` to `(1, tokens, heads, head width)`."""
    counts = [(length, len(list(equal))) for length, equal in groupby(packed_lengths)]
    sizes = [length * count for length, count in counts]
    outputs = []
    for (length, count), *parts in zip(counts, *(tensor[0].split(sizes, dim=1) for tensor in (query, key, value))):
        texts = [part.unflatten(1, (count, length)).transpose(0, 1) for part in parts]
        attention = F.scaled_dot_product_attention(
            *texts,
            dropout_p=dropout,
            scale=scaling,
            is_causal=bool(getattr(module, "is_causal", False)) and length > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(attention.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _position_ids(backbone: PreTrainedModel, input_ids: Tensor) -> Tensor:
    for module in backbone.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):  # RoBERTa and its kin count from the padding id
            return module.create_position_ids_from_input_ids(input_ids, module.padding_idx)
    return torch.arange(input_ids.shape[1]).expand(input_ids.shape)


# without a mask function of the same name transformers makes no mask, which is what a packed row needs
AttentionInterface.register(PACKED, packed_attention)
