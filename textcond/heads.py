"""What an encoder can say of every token beside its one vector: the sparse and multi-vector heads of BGE-M3.

Chen et al. (2024), "BGE M3-Embedding: Multi-Lingual, Multi-Functionality, Multi-Granularity Text Embeddings Through
Self-Knowledge Distillation", section 3.2.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .folders import check_safetensors, read_json, write_json


class SparseHead(nn.Module):
    """A weight for every token: `relu(w h + b)`, the lexical weights of BGE-M3."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, token_states: Tensor, mask: Tensor) -> Tensor:
        """Map states `(batch, tokens, width)` and a bool mask `(batch, tokens)` to float32 `(batch, tokens)`."""
        weights = self.linear(token_states.to(self.linear.weight.dtype)).squeeze(-1).float()
        return torch.where(mask, weights.relu(), 0)


class MultiVectorHead(nn.Module):
    """A unit vector for every token: `normalize(W h + b)`, BGE-M3's form of ColBERT's late interaction."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, token_states: Tensor, mask: Tensor) -> Tensor:
        """Map states `(batch, tokens, width)` and a bool mask `(batch, tokens)` to float32 `(batch, tokens, out)`."""
        vectors = self.linear(token_states.to(self.linear.weight.dtype)).float()
        return torch.where(mask.unsqueeze(-1), nn.functional.normalize(vectors, dim=-1), 0)


def new_heads(width: int, *, sparse: bool, tokens: int) -> nn.ModuleDict:
    """Return heads with random weights on states of a width; `tokens` is the width of the vectors, 0 for none."""
    heads: dict[str, nn.Module] = {}
    if sparse:
        heads["sparse"] = SparseHead(width)
    if tokens:
        heads["tokens"] = MultiVectorHead(width, tokens)
    return nn.ModuleDict(heads)


def save_heads(heads: nn.ModuleDict, folder: Path) -> None:
    """Write `heads.json` and `heads.safetensors` into a model folder, nothing if there are none."""
    if not len(heads):
        return
    write_json(folder / "heads.json", {name: head.linear.out_features for name, head in heads.items()})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    save_file(tensors, folder / "heads.safetensors", metadata={"format": "pt"})


def load_heads(folder: Path, width: int, dtype: torch.dtype) -> nn.ModuleDict:
    """Return the heads of a model folder, on states of a width; none if it has no `heads.json`.

    Raises:
        FileNotFoundError: if the weights are missing.
        ValueError: for damaged weights, or weights that do not fit.
    """
    if not (folder / "heads.json").exists():
        return nn.ModuleDict()
    sizes = read_json(folder / "heads.json")
    file = folder / "heads.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds heads.json but no heads.safetensors: copy the whole model folder")
    check_safetensors(file)
    heads = new_heads(width, sparse="sparse" in sizes, tokens=sizes.get("tokens", 0))
    tensors = load_file(file)
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"{file} does not fit heads.json and a backbone {width} wide: save the model again")
    heads.load_state_dict(tensors)
    return heads.to(dtype)
