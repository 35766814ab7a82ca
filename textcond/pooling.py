"""From one vector a token to one vector a text."""

import torch
from torch import Tensor

POOLINGS = ("cls", "mean", "last", "eos", "max")


def pool(
    token_states: Tensor,
    attention_mask: Tensor,
    pooling: str,
    *,
    input_ids: Tensor | None = None,
    eos_token_id: int | None = None,
) -> Tensor:
    """Pool token states `(batch, tokens, dim)` under a mask `(batch, tokens)` to `(batch, dim)`.

    - `cls`: the first attended token (BERT, Devlin et al. 2019).
    - `mean`: the average of the attended tokens (Sentence-BERT, Reimers and Gurevych 2019).
    - `last`: the last attended token (decoder models, E5-mistral, Wang et al. 2024); right or left padding.
    - `eos`: the first attended end-of-text token (CLIP, Radford et al. 2021), which a pad token equal to it does not
      disturb; the last attended token in a text that has none. Needs `input_ids` `(batch, tokens)` and `eos_token_id`.
    - `max`: the largest value of each dimension over the attended tokens.

    The result is float32 (float64 for float64 states): a sum of half-precision states would lose what the backbone
    computed. A text without any attended token gives zeros.

    Raises:
        ValueError: for an unknown pooling, shapes that do not match, or `eos` without its two arguments.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}: use one of {', '.join(POOLINGS)}")
    if token_states.ndim != 3 or attention_mask.shape != token_states.shape[:2]:
        raise ValueError(
            f"pooling needs states (batch, tokens, dim) and a mask (batch, tokens), "
            f"got {tuple(token_states.shape)} and {tuple(attention_mask.shape)}"
        )
    attended = attention_mask.bool()
    states = token_states.to(torch.promote_types(token_states.dtype, torch.float32))

    if pooling == "mean":
        # where, not a product: attention over padding alone may leave NaN there, and NaN times zero is NaN
        total = torch.where(attended.unsqueeze(-1), states, 0).sum(dim=1)
        return total / attended.sum(dim=1, keepdim=True).clamp(min=1)
    if pooling == "max":
        largest = states.masked_fill(~attended.unsqueeze(-1), float("-inf")).amax(dim=1)
        return largest.masked_fill(~attended.any(dim=1, keepdim=True), 0)

    if pooling == "cls":
        index = attended.int().argmax(dim=1)
    else:
        index = attended.shape[1] - 1 - attended.flip(1).int().argmax(dim=1)
    if pooling == "eos":
        if input_ids is None or eos_token_id is None:
            raise ValueError("eos pooling needs input_ids and eos_token_id: pass both, or use 'last'")
        is_eos = attended & (input_ids == eos_token_id)
        index = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), index)
    picked = states[torch.arange(len(states), device=states.device), index]
    return picked.masked_fill(~attended.any(dim=1, keepdim=True), 0)
