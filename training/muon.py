"""Muon: steps whose singular values are all alike, for the weights that have rows and columns."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of Newton and Schulz, as Jordan has them


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions, these as matrices of (outputs, inputs x window).

    torch's own takes no convolution, and orthogonalizes in bfloat16, which most CPUs emulate: that
    took as long as all the rest of a step.

    Source: Jordan et al. 2024; scaled as by Liu et al. 2025, eq. 4, so that AdamW's rates fit.
    """

    def __init__(
        self, weights: Iterable[torch.nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not called."""
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape are orthogonalized at once
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                ahead = weight.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
                alike[ahead.shape].append((weight, ahead))
            for shape, pairs in alike.items():
                steps = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (weight, _), step in zip(pairs, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(
                        step.view(weight.shape), alpha=0.2 * max(shape) ** 0.5 * group["lr"]
                    )


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal matrices nearest to `matrices`, (n, rows, columns), roughly.

    Their singular values are 0.6 to 1.3, not 1: that is near enough and takes five iterations.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
