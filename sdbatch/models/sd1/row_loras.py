"""LoRAs by row: each layer adds, lane by lane, what the LoRAs of the lane's row add.

No weight changes, so rows with different LoRAs share a call. A layer with weight W computes
y = W x + sum_j s[lane, j] B_j (A_j x); the A_j and B_j of all declared LoRAs are stacked. The
computation is the same whichever LoRAs a lane uses, so its bits do not depend on its neighbours.

lanes = rows of a call, N = declared LoRAs, R = the sum of their ranks in a layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from sdbatch.models.sd1.layers import Layer
from sdbatch.models.sd1.networks import Factors, LayerNetwork

Networks = Mapping[str, Mapping[Layer, LayerNetwork]]  # by the names of the LoRAs


class RowLoras:
    """The LoRAs that rows can choose, attached to the layers of a model.

    Args:
        networks: what each adds; none of them is a DoRA.
        weights: of each LoRA where a row gives none.
        text_encoder: whose layers they may change too.
        compiled: whether the UNet will be compiled.
    """

    def __init__(
        self, networks: Networks, weights: Mapping[str, float], text_encoder: Any, *, compiled: bool
    ) -> None:
        self.weights = dict(weights)
        text_layers = set(text_encoder.modules())
        self._in_text = [not text_layers.isdisjoint(networks[name]) for name in self.weights]
        self._compiled = compiled
        self.of_lanes: torch.Tensor | None = None  # (lanes, N) float32 during a call
        chosen = [networks[name] for name in self.weights]
        for layer in dict.fromkeys(layer for network in chosen for layer in network):
            stack = _Stack(self, layer, [network.get(layer) for network in chosen])
            layer.register_forward_hook(stack.add)

    def vector(self, chosen: Mapping[str, float]) -> tuple[float, ...]:
        """Return the weights of a row as a row of (lanes, N)."""
        return tuple(chosen.get(name, 0.0) for name in self.weights)

    def in_text(self, vector: tuple[float, ...]) -> tuple[float, ...]:
        """Return the weights without those of LoRAs that do not change the text encoder."""
        return tuple(
            weight if used else 0.0 for weight, used in zip(vector, self._in_text, strict=True)
        )

    @contextmanager
    def apply(self, of_lanes: torch.Tensor | None) -> Iterator[None]:
        """Apply the weights (lanes, N) to all calls of the model in the block.

        A call without any is skipped where that is known without waiting for the device: it would
        add zeros, which change at most the sign of a zero. Not if compiled: another graph, and so
        other bits.
        """
        idle = of_lanes is not None and not self._compiled and of_lanes.device.type == "cpu"
        self.of_lanes = None if of_lanes is None or (idle and not of_lanes.any()) else of_lanes
        try:
            yield
        finally:
            self.of_lanes = None

    @contextmanager
    def of(self, lanes: torch.Tensor) -> Iterator[None]:
        """Apply the weights of these lanes of the call to the calls of layers in the block."""
        weights = self.of_lanes
        self.of_lanes = None if weights is None else weights[lanes]
        try:
            yield
        finally:
            self.of_lanes = weights


class _Stack:
    """The LoRAs of one layer, stacked: plain ones by their factors, others by their whole delta."""

    def __init__(self, loras: RowLoras, layer: Layer, networks: list[LayerNetwork | None]) -> None:
        self._loras = loras
        self._deltas: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        low: list[tuple[int, Factors]] = []
        for j, network in enumerate(networks):
            factors = network and network.factors(layer)
            if factors:
                low.append((j, factors))
            elif network:
                delta, bias = network.delta(layer)
                self._deltas.append((j, _like(layer, delta), _like(layer, bias)))
        self._down: torch.Tensor | None = None  # (R, I, *k)
        if low:
            self._down = _like(layer, torch.cat([each.down for _, each in low]))
            up = torch.cat([each.up for _, each in low], dim=1)
            up = up.reshape(*up.shape, *[1] * (layer.weight.ndim - 2))
            self._up: torch.Tensor = _like(layer, up)  # (O, R, 1, 1), or (O, R)
            device = layer.weight.device
            ranks = [len(each.down) for _, each in low]
            spread = torch.tensor(ranks, device=device)
            index = torch.tensor([j for j, _ in low], device=device)
            scales = torch.tensor([each.scale for _, each in low], device=device)
            self._index = index.repeat_interleave(spread)  # (R,), of the LoRA of each rank
            self._scales = scales.repeat_interleave(spread)

    def add(self, layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with what the lanes' LoRAs add to it."""
        weights = self._loras.of_lanes
        if weights is None:
            return output
        x = inputs[0]
        axis = -1 if isinstance(layer, torch.nn.Linear) else 1  # of the channels
        if self._down is not None:
            low = _call(layer, x, self._down)
            low = _scaled(low, weights[:, self._index] * self._scales, axis)
            output = output + (F.linear if axis == -1 else F.conv2d)(low, self._up)
        for j, delta, bias in self._deltas:
            output = output + _scaled(_call(layer, x, delta, bias), weights[:, j : j + 1], axis)
        return output


def _like(layer: Layer, tensor: Any) -> Any:
    """Return the tensor on the layer's device and of its dtype."""
    return None if tensor is None else tensor.to(layer.weight)


def _call(
    layer: Layer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Call the layer with another weight and bias."""
    if isinstance(layer, torch.nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, torch.nn.Conv2d):
        convolved: torch.Tensor = layer._conv_forward(x, weight, bias)  # with its own borders
        return convolved
    if isinstance(layer, torch.nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def _scaled(values: torch.Tensor, weights: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiply values (lanes, ..) by weights (lanes, R or 1) of their channels, at `axis`.

    Where the weight is 0 the result is 0, also if a value overflowed.
    """
    shape = [len(weights), *[1] * (values.ndim - 1)]
    shape[axis] = weights.shape[1]
    factors = weights.to(values.dtype).view(shape)
    return torch.where(factors == 0, torch.zeros_like(factors), values * factors)
