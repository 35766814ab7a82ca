"""Step 0: the bridge's last layer by ridge regression, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


class RidgeRegression:
    """Ridge regression of targets `(rows, width)` on inputs `(rows, inputs)`, summed up batch by batch in float64."""

    def __init__(self):
        self.products: Tensor | None = None

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Count some rows in."""
        inputs, targets = inputs.flatten(0, -2).double(), targets.flatten(0, -2).double()
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        if self.products is None:
            self.products = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            self.answers = inputs.new_zeros(inputs.shape[1], targets.shape[1])
            self.rows = 0
        self.products += inputs.T @ inputs
        self.answers += inputs.T @ targets
        self.rows += len(inputs)

    def solve(self, penalty: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Weight `(width, inputs)` and bias `(width,)`; the penalty is a share of the inputs' mean square."""
        scale = self.products.diagonal()[:-1].mean()
        penalties = torch.full_like(self.products.diagonal(), float(penalty * scale))
        penalties[-1] = 0
        solution = torch.linalg.solve(self.products + penalties.diag(), self.answers)
        return solution[:-1].T, solution[-1]


@torch.no_grad()
def gives(linear: nn.Linear, run: Callable[[], Tensor], shape: Sequence[int]) -> bool:
    """Whether what `run` gives, `(1, *shape)`, is a layer's own output, in front of padding.

    It is not where other encoders share the tensor, or a pipeline maps it further.
    """
    made: list[Tensor] = []
    hook = linear.register_forward_hook(lambda module, inputs, output: made.append(output))
    try:
        given = run()
    finally:
        hook.remove()
    front = given[:, : made[-1].shape[1]] if given.ndim == 3 else given
    return given.shape[1:] == tuple(shape) and front.shape == made[-1].shape and torch.equal(front, made[-1])


@torch.no_grad()
def fit_last_layer(linear: nn.Linear, run: Callable[[], Iterable[Tensor]], penalty: float = 1e-3) -> None:
    """Set a linear layer to the ridge solution.

    Args:
        run: calls the model batch by batch and yields what the layer should have given, `(batch, ..., width)`.
    """
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    regression = RidgeRegression()
    try:
        for target in run():
            inputs = seen.pop()
            seen.clear()
            # A growing bridge reads a long text in parts, each of which is to say the whole.
            target = target.repeat_interleave(len(inputs) // len(target), dim=0)
            if target.ndim == 3:  # a pipeline may pad what the layer gives of a batch
                target = target[:, : inputs.shape[1]]
            regression.add(inputs, target.expand(*inputs.shape[:-1], -1))
    finally:
        hook.remove()
    weight, bias = regression.solve(penalty)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)
