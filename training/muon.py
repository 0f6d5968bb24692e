"""Muon, an optimizer for matrices: the singular values of each step are nearly equal."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Newton-Schulz, values of Jordan et al.


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions, which it views as matrices (outputs, inputs x window).

    torch.optim.Muon does not accept convolutions. It also orthogonalizes in bfloat16, which most
    CPUs emulate: this doubled the time of a step.

    Source: Jordan et al. 2024; scaled as in Liu et al. 2025, eq. 4, to suit AdamW's learning rates.
    """

    def __init__(
        self, weights: Iterable[torch.nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights; `closure` is not called."""
        for group in self.param_groups:
            by_shape = defaultdict(list)  # matrices of one shape are orthogonalized together
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                update = weight.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
                by_shape[update.shape].append((weight, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(
                        update.view(weight.shape), alpha=0.2 * max(shape) ** 0.5 * group["lr"]
                    )


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return approximately the nearest orthogonal matrices to `matrices`, (n, rows, columns).

    Their singular values are 0.6 to 1.3 instead of 1: this is accurate enough and takes only five
    iterations.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x
