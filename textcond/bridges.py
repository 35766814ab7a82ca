"""Bridges: from the token states of a text backbone to what a denoiser's cross-attention reads.

Every bridge maps `states` `(batch, tokens, input_width)` and `keep` `(batch, tokens)`, true where a token is real, to
`(batch, n, width)`. `linear` and `mlp` keep the length (`n == tokens`, padding included, as CLIP does in Stable
Diffusion); `resampler` gives a fixed number of tokens that padding cannot reach.

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
        queries = self.norm_queries(queries)
        keys = torch.cat([self.norm_states(states), queries], dim=1)
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

    def __init__(self, input_width: int, width: int, tokens: int, depth: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(tokens, width))
        self.proj_in = nn.Linear(input_width, width)
        self.blocks = nn.ModuleList(PerceiverBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise to unit variance per output channel."""
        # Small against what the blocks add, so that even an untrained bridge tells prompts apart.
        nn.init.normal_(self.queries, std=self.queries.shape[-1] ** -0.5)
        keep_variance(self.proj_in)
        for block in self.blocks:
            block.reset_parameters()
        reset_norm(self.norm)
        keep_variance(self.out_proj)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Read the states where `keep` is true; at least one must be true in each row."""
        states = self.proj_in(states)
        queries = self.queries.expand(len(states), -1, -1)
        mask = torch.cat([keep, keep.new_ones(len(keep), self.queries.shape[0])], dim=1)[:, None, None, :]
        for block in self.blocks:
            queries = block(queries, states, mask)
        return self.out_proj(self.norm(queries))


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


def build_bridge(kind: str, input_width: int, width: int, tokens: int | None, depth: int) -> nn.Module:
    """Make a bridge of a kind in `BRIDGES`; `tokens` and `depth` are the resampler's.

    Raises ValueError for an unknown kind, or a resampler without a number of tokens.
    """
    if kind == "linear":
        return LinearBridge(input_width, width)
    if kind == "mlp":
        return MLPBridge(input_width, width)
    if kind == "resampler":
        if not tokens:
            raise ValueError("a resampler bridge needs a number of output tokens: pass tokens=77, say")
        return ResamplerBridge(input_width, width, tokens, depth)
    raise ValueError(f"unknown bridge {kind!r}: choose one of {', '.join(BRIDGES)}")
