"""Bridges: from the token states of a text backbone to what a denoiser's cross-attention reads.

Every bridge maps `states` `(batch, tokens, input_width)` and `keep` `(batch, tokens)`, true where a token is real, to
`(batch, n, width)`. `linear` and `mlp` keep the length (`n == tokens`, padding included, as CLIP does in Stable
Diffusion); `resampler` gives a number of tokens, fixed or growing with the text, that padding cannot reach. `identity`
leaves the states to a denoiser that maps them itself; it is in none of the tables of trained bridges.

All of them start with unit variance per channel, the scale that CLIP's final layer norm gives a denoiser.
The projections carry the names `q_proj, k_proj, v_proj, out_proj` because diffusers recognises a LoRA file of a text
encoder by them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BRIDGES = ("linear", "mlp", "resampler")
LAYERS = ("last", "average")
HEAD_WIDTH = 64


def keep_variance(linear: nn.Linear, second_moment: float = 1.0) -> None:
    """Initialise so that inputs with the given mean square give outputs of unit variance (LeCun et al., 1998)."""
    nn.init.normal_(linear.weight, std=(linear.in_features * second_moment) ** -0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def reset_norm(norm: nn.LayerNorm) -> None:
    """Set a layer norm to the plain one."""
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


class IdentityBridge(nn.Module):
    """The backbone's own states, for a denoiser with a connector of its own: zero where padded, which tells it so."""

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Give the states where `keep` is true, zeros elsewhere."""
        return states.masked_fill(~keep[..., None], 0)


def positions(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of places `(...,)` -> `(..., width)` of unit variance (Vaswani et al., 2017).

    The wavelengths go from 6 to 600 places only: neighbours must be told apart, and prompts are short.
    """
    frequencies = 100 ** (-torch.arange(0, width, 2, device=places.device) / width)
    angles = places[..., None] * frequencies
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


class LinearBridge(nn.Module):
    """Layer norm and one projection: `(batch, tokens, input_width)` -> `(batch, tokens, width)`."""

    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(input_width)
        self.out_proj = nn.Linear(input_width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise to unit variance per output channel."""
        reset_norm(self.norm)
        keep_variance(self.out_proj)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Project each token; `keep` is not read."""
        return self.out_proj(self.norm(states))


class MLPBridge(nn.Module):
    """Two projections with a GELU between, as the adapter of LaVi-Bridge (Zhao et al., 2024).

    `(batch, tokens, input_width)` -> `(batch, tokens, width)`.
    """

    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(input_width)
        self.fc1 = nn.Linear(input_width, 4 * width)
        self.out_proj = nn.Linear(4 * width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise to unit variance per output channel."""
        reset_norm(self.norm)
        keep_variance(self.fc1)
        # E[gelu(x)^2] of a standard normal x is 0.425.
        keep_variance(self.out_proj, second_moment=0.425)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Map each token by itself; `keep` is not read."""
        return self.out_proj(F.gelu(self.fc1(self.norm(states))))


class PerceiverAttention(nn.Module):
    """Queries attend to the token states and to each other, as in Flamingo (Alayrac et al., 2022, section 3.1.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        while width % self.heads:
            self.heads -= 1
        self.norm_queries = nn.LayerNorm(width)
        self.norm_states = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def reset_parameters(self) -> None:
        """Initialise every projection to keep variance."""
        for norm in (self.norm_queries, self.norm_states):
            reset_norm(norm)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            keep_variance(linear)

    def split(self, x: Tensor) -> Tensor:
        """`(batch, tokens, width)` -> `(batch, heads, tokens, width / heads)`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Attend from `queries` `(batch, n, width)`; `mask` `(batch, 1, 1, tokens + n)` is true where a key counts."""
        return self.attend(self.norm_queries(queries), self.norm_states(states), mask)

    def attend(self, queries: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """The attention of `forward` on queries and states that are already normalised."""
        keys = torch.cat([states, queries], dim=1)
        q, k, v = self.split(self.q_proj(queries)), self.split(self.k_proj(keys)), self.split(self.v_proj(keys))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class PerceiverBlock(nn.Module):
    """Pre-norm cross-attention, then a pre-norm MLP, each added to the queries."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = PerceiverAttention(width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def reset_parameters(self) -> None:
        """Initialise every projection to keep variance."""
        self.attention.reset_parameters()
        reset_norm(self.norm)
        keep_variance(self.fc1)
        keep_variance(self.fc2, second_moment=0.425)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Refine `queries` `(batch, n, width)` from `states` `(batch, tokens, width)`."""
        queries = queries + self.attention(queries, states, mask)
        return queries + self.fc2(F.gelu(self.fc1(self.norm(queries))))


class ResamplerBridge(nn.Module):
    """Perceiver resampler with `tokens` learned queries, as in Flamingo and IP-Adapter plus (Ye et al., 2023).

    `(batch, any length, input_width)` -> `(batch, tokens, width)`. Masked states get no attention, so the output is
    the same whatever padding surrounds a prompt, and a denoiser that takes no mask needs none.
    """

    block = PerceiverBlock

    def __init__(self, input_width: int, width: int, tokens: int, depth: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(tokens, width))
        self.proj_in = nn.Linear(input_width, width)
        self.blocks = nn.ModuleList(self.block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise to unit variance per output channel, and so that each query first reads around its place."""
        tokens, width = self.queries.shape
        # Small against what the blocks add, so that even an untrained bridge tells prompts apart.
        with torch.no_grad():
            self.queries.copy_(positions(torch.arange(tokens), width) * width**-0.5)
        keep_variance(self.proj_in)
        for block in self.blocks:
            block.reset_parameters()
        with torch.no_grad():
            self.blocks[0].attention.k_proj.weight.copy_(self.blocks[0].attention.q_proj.weight)
        reset_norm(self.norm)
        keep_variance(self.out_proj)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Read the states where `keep` is true; at least one must be true in each row."""
        states = self.placed(states, keep)
        queries = self.queries.expand(len(states), -1, -1)
        mask = torch.cat([keep, keep.new_ones(len(keep), self.queries.shape[0])], dim=1)[:, None, None, :]
        for block in self.blocks:
            queries = block(queries, states, mask)
        return self.out_proj(self.norm(queries))

    def placed(self, states: Tensor, keep: Tensor) -> Tensor:
        """The states in the width of the bridge, each marked with its place among those that are read."""
        states = self.proj_in(states)
        return states + positions(keep.cumsum(1) - 1, states.shape[-1]).to(states.dtype)


class GrowingResamplerBridge(ResamplerBridge):
    """A resampler whose output grows with the text: `tokens` for each of 1, 2, 4, 8 ... equal parts of it.

    `(batch, any length, input_width)` -> `(batch, blocks * tokens, width)`. A text is cut into the fewest parts, a
    power of two, of at most `chunk` states, and the queries read each part by itself; the backbone has already told
    every state of the whole text. A shorter text of a batch repeats its blocks, which for a denoiser that reads them
    by cross-attention is the same as having them once. Up to `chunk` states the output is a ResamplerBridge's, and
    so are the weights.
    """

    def __init__(self, input_width: int, width: int, tokens: int, depth: int, chunk: int):
        super().__init__(input_width, width, tokens, depth)
        self.chunk = chunk

    def blocks_for(self, length: int) -> int:
        """How many blocks a text of so many states needs."""
        return 1 << ((length - 1) // self.chunk).bit_length()

    def blocks_in(self, tokens: int) -> int | None:
        """How many blocks so many output tokens are; None if it is no number of tokens that this bridge gives."""
        blocks, rest = divmod(tokens, self.queries.shape[0])
        return blocks if blocks and not rest and not blocks & (blocks - 1) else None

    def forward(self, states: Tensor, keep: Tensor, blocks: int | None = None) -> Tensor:
        """Read the states where `keep` is true into a power of two of blocks, None being what the longest needs."""
        lengths = keep.sum(dim=1)
        own = [self.blocks_for(length) for length in lengths.tolist()]
        blocks = blocks or max(own)
        own = torch.tensor(own, device=keep.device).clamp(max=blocks)[:, None]
        part_of_state = (keep.cumsum(dim=1) - 1) * own // lengths[:, None]
        part_of_block = torch.arange(blocks, device=keep.device) % own
        keep = keep[:, None] & (part_of_state[:, None] == part_of_block[..., None])
        tokens = super().forward(states.repeat_interleave(blocks, dim=0), keep.flatten(0, 1))
        return tokens.unflatten(0, (-1, blocks)).flatten(1, 2)


class PooledBridge(nn.Module):
    """From the pooled backbone state `(batch, input_width)` to the pooled conditioning vector `(batch, width)`."""

    def __init__(self, input_width: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(input_width)
        self.out_proj = nn.Linear(input_width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise to unit variance per output channel."""
        reset_norm(self.norm)
        keep_variance(self.out_proj)

    def forward(self, pooled: Tensor) -> Tensor:
        """Project a pooled state."""
        return self.out_proj(self.norm(pooled))


class LayerAverage(nn.Module):
    """Learned average of the layer-normalised states of every layer, which beats the last one for decoder LLMs.

    Wang et al., "A Comprehensive Study of Decoder-Only LLMs for Text-to-Image Generation" (CVPR 2025). `layers`
    tensors `(batch, tokens, width)` -> one. Starts as the plain mean.
    """

    def __init__(self, layers: int):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every layer the same weight."""
        nn.init.zeros_(self.logits)

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Average over layers."""
        weights = self.logits.softmax(0)
        return sum(weight * F.layer_norm(state, state.shape[-1:]) for weight, state in zip(weights, states))


def build_bridge(
    kind: str, input_width: int, width: int, tokens: int | None, depth: int, chunk: int | None = None
) -> nn.Module:
    """Make a bridge of a kind in `BRIDGES`, or "identity"; `tokens`, `depth` and `chunk` are the resampler's.

    Raises ValueError for an unknown kind, a resampler without a number of tokens, a chunk for another kind or below 1,
    or an identity of two widths.
    """
    if chunk is not None and (kind != "resampler" or chunk < 1):
        raise ValueError(f"chunk={chunk} for a {kind} bridge: give a resampler a chunk of at least 1, or leave it out")
    if kind == "linear":
        return LinearBridge(input_width, width)
    if kind == "mlp":
        return MLPBridge(input_width, width)
    if kind == "resampler":
        if not tokens:
            raise ValueError("a resampler bridge needs a number of output tokens: pass tokens=77, say")
        if chunk:
            return GrowingResamplerBridge(input_width, width, tokens, depth, chunk)
        return ResamplerBridge(input_width, width, tokens, depth)
    if kind == "identity":
        if width != input_width:
            raise ValueError(
                f"an identity bridge gives the backbone's own {input_width}-wide states: pass width={input_width}"
            )
        return IdentityBridge()
    raise ValueError(f"unknown bridge {kind!r}: choose one of {', '.join(BRIDGES)}, identity")
