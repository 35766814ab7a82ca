"""The attention loss: what the denoiser's cross-attention makes of the student's tokens, without running the denoiser.

Cross-attention reads its tokens as a set: their order and much of their content does not reach the picture. So the
student is compared with the teacher behind `softmax(q k) v`, for queries that the denoiser really asked on its
trajectories. Attention distillation as in X2I (2025), with prompts alone and at the cost of a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class AttentionProbe:
    """Cross-attention layers of a denoiser, with a sample of the queries that they were asked.

    Args:
        denoiser: layers named `...attn2` that read `width`-wide tokens are probed.
        width: of the tokens.
        queries: how many a layer keeps of each call.
        layers_at_once: how many layers, drawn anew, a loss is the mean of.
    """

    def __init__(self, denoiser: nn.Module, width: int, queries: int = 64, layers_at_once: int = 2):
        self.layers: dict[str, Attention] = {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, Attention) and name.endswith("attn2") and module.to_k.in_features == width
        }
        self.queries, self.layers_at_once = queries, layers_at_once
        self.bank: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.variance: dict[str, float] = {}

    @contextmanager
    def listening(self, generator: torch.Generator) -> Iterator[None]:
        """Keep a sample of the queries of every call of the denoiser inside the block."""

        def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
                rows = output.detach().float().flatten(0, 1)
                picked = torch.randint(len(rows), (self.queries,), generator=generator)
                self.bank[name].append(rows[picked.to(rows.device)])

            return hook

        hooks = [layer.to_q.register_forward_hook(keep(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def calibrate(self, tokens: Tensor) -> None:
        """Measure how much each layer's answers differ between prompts: the unit of the loss. `(prompts, n, width)`."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                answers = _answers(layer, torch.cat(self.bank[name])[:: len(self.bank[name])], tokens)
                self.variance[name] = float((answers - answers.mean(0)).float().square().mean().clamp_min(1e-12))

    def __call__(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        """Squared distance of the layers' answers, as a share of their variance over prompts, `(prompts,)`.

        Args:
            student: `(prompts, n, width)`; n may differ from the teacher's.
            teacher: `(prompts, tokens, width)`.
            generator: picks one call's queries for each layer.
        """
        names = list(self.layers)
        picked = torch.randperm(len(names), generator=generator)[: self.layers_at_once].tolist()
        total = torch.zeros(len(student), device=student.device)
        for name in [names[number] for number in picked]:
            layer = self.layers[name]
            queries = self.bank[name][int(torch.randint(len(self.bank[name]), (), generator=generator))]
            with torch.no_grad():
                wanted = _answers(layer, queries, teacher)
            error = (_answers(layer, queries, student) - wanted).float().square().flatten(1).mean(1)
            total = total + error / self.variance[name]
        return total / len(picked)


def _answers(layer: Attention, queries: Tensor, tokens: Tensor) -> Tensor:
    """What the layer adds to the picture for each query, `(prompts, queries, channels)`.

    Scaled dot-product attention written out: all prompts have the same queries, so that one product of a head has the
    scores of all, and fused attention on a CPU takes six times as long for heads as narrow as six or eight.
    """
    tokens = tokens.to(layer.to_k.weight.dtype)
    queries, keys, values = (
        states.unflatten(-1, (layer.heads, -1)) for states in (queries, layer.to_k(tokens), layer.to_v(tokens))
    )
    queries = queries.transpose(0, 1).to(keys.dtype) * keys.shape[-1] ** -0.5
    scores = queries @ keys.permute(2, 3, 0, 1).flatten(2)
    shares = scores.unflatten(-1, keys.shape[:2]).softmax(-1).to(values.dtype)
    answers = shares.permute(2, 0, 1, 3) @ values.transpose(1, 2)
    return layer.to_out[0](answers.transpose(1, 2).flatten(2))
