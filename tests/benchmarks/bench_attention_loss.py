"""The attention loss of alignment, forward and backward, beside torch's fused attention on the same queries.

python tests/benchmarks/bench_attention_loss.py
"""

from __future__ import annotations

import os
import time

os.environ |= {"OMP_NUM_THREADS": "1"}  # read when torch is loaded

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from textcond.pipelines import load_reference
from textcond.pipelines.alignment import attention

PROMPTS, REPEATS = 65, 10


def fused(layer: Attention, queries: Tensor, tokens: Tensor) -> Tensor:
    q, k, v = (
        states.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for states in (queries.expand(len(tokens), -1, -1), layer.to_k(tokens), layer.to_v(tokens))
    )
    return layer.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def main() -> None:
    pipe = load_reference()
    unet, generator = pipe.unet.requires_grad_(False), torch.Generator().manual_seed(0)
    width, shape = unet.config.cross_attention_dim, (unet.config.in_channels, *[unet.config.sample_size] * 2)
    probe = attention.AttentionProbe(unet, width)
    with probe.listening(generator), torch.no_grad():
        unet(torch.randn(8, *shape, generator=generator), 500, torch.randn(8, 32, width, generator=generator))
    student = torch.randn(PROMPTS, 32, width, generator=generator, requires_grad=True)
    teacher = torch.randn(PROMPTS, 32, width, generator=generator)
    probe.calibrate(teacher)
    seconds = {}
    for name, answers in (("ours", attention._answers), ("fused", fused)):
        attention._answers = answers
        for repeat in range(REPEATS + 1):
            if repeat == 1:  # the first warms up
                started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                probe(student, teacher, torch.Generator().manual_seed(repeat)).mean().backward()
        seconds[name] = (time.perf_counter() - started) / REPEATS
    print(f"{PROMPTS} prompts, bfloat16, one thread: ours {seconds['ours']:.3f} s, fused {seconds['fused']:.3f} s")
    print(f"ratio {seconds['fused'] / seconds['ours']:.2f}")


if __name__ == "__main__":
    main()
