"""Training in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def bfloat16(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Run what is inside in bfloat16 where that is safe, by autocast; nothing unless `enabled`.

    On a CPU attention is computed by plain products: backward, torch's fused kernel takes 5 to 9 times as long in
    bfloat16 for up to some hundred tokens, and its saving of memory matters beyond that only.
    """
    if not enabled:
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        if device.type != "cpu":
            yield
            return
        with sdpa_kernel(SDPBackend.MATH):
            yield
