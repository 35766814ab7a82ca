"""Float32 linear layers by oneDNN, which uses all vector units of a CPU where torch's own choice may use half."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# oneDNN keeps the code that it makes for each of the last 1,024 shapes. Batches of text hardly ever have equally many
# tokens, so that is hundreds of MB which nothing reads again; a step of training needs some 30 at a time.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # read when the first layer runs

SMALLEST = 2**23  # multiply-adds below which changing the layout costs more than it gains


class OneDnnLinear(TorchFunctionMode):
    """While active, every large enough float32 linear layer on a CPU runs in oneDNN, forward and backward.

    torch gives float32 products to MKL, which on CPUs of other makers than its own leaves AVX-512 unused: half the
    speed on a CPU with full-width units. Precision is that of float32 either way; only the order of sums differs.
    Layers keep their weights in place, and what is not float32 on a CPU runs as without it.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Replace `torch.nn.functional.linear`, pass on everything else."""
        return (_linear if function is F.linear else function)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    gains = (
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.numel() * len(weight) >= SMALLEST
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
    if not gains:
        return F.linear(input, weight, bias)
    # the weight stays as it is: in oneDNN's layout it would have no gradient
    output = F.linear(input.reshape(-1, input.shape[-1]).to_mkldnn(), weight, bias).to_dense()
    return output.view(*input.shape[:-1], len(weight))
