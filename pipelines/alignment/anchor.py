"""What holds a changing backbone to what it finds: its vectors of many texts, as they were before."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textcond import TextEncoder

DRAWN = 64  # texts of a step, over all processes
BANK = 4096  # texts that the drawn ones are told from
TEMPERATURE = 0.05


class Anchor:
    """A copy of an encoder before its training, and texts whose vectors are to stay near that copy's.

    Captions of an alignment alone are too few and too alike for it: held to them, an encoder of four layers lost half
    of its nDCG on names. Texts of every kind and language that it is to find keep it.
    """

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], seed: int):
        self.before = copy.deepcopy(encoder).eval()
        self.texts, self.seed = texts, seed
        chosen = np.random.default_rng([seed, 8]).permutation(len(texts))[:BANK]
        with torch.no_grad():
            bank = self.before.encode([texts[place] for place in chosen], convert_to_tensor=True)
        self.bank = F.normalize(bank.float(), dim=-1)

    def __call__(self, encoder: TextEncoder, step: int, mine: slice) -> Tensor:
        """Squared distance to the vectors before, and KL divergence from what those say of the bank; a scalar.

        Args:
            mine: which of the step's texts this process compares.
        """
        rows = np.random.default_rng([self.seed, 9, step]).integers(len(self.texts), size=DRAWN)[mine]
        texts = [self.texts[row] for row in rows]
        with torch.no_grad():
            before = F.normalize(self.before.features(texts).dense.float(), dim=-1)
        now = F.normalize(encoder.features(texts).dense.float(), dim=-1)
        cosine = (now * before).sum(1, keepdim=True)
        bank = self.bank.to(now.device)
        wanted = torch.cat([torch.ones_like(cosine), before @ bank.T], 1) / TEMPERATURE
        given = torch.cat([cosine, now @ bank.T], 1) / TEMPERATURE
        divergence = F.kl_div(given.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        return (2 - 2 * cosine).mean() + divergence
