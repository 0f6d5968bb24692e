"""diffusers' schedulers on a device other than the CPU, without waiting for it.

Their arithmetic on noise levels is scalar and theirs alone, yet some of it runs on the latents'
device (unipc solves systems of two equations there), and noise is copied with a wait. Here scalars
stay on the CPU, whence every operation takes them, and noise is copied without waiting.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sdbatch.engine.cuda import moved


class HostScalars(TorchFunctionMode):
    """Changes where the code in its block computes; not for code on the CPU, which needs no change.

    Args:
        device: of the latents.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make a call of torch's."""
        kwargs = kwargs or {}
        if func is torch.einsum:  # of unipc's vector of weights with latents
            return func(*(self._beside_latents(each) for each in args), **kwargs)
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu":
            return func(*args, **kwargs)
        named = any(map(self._names_device, (*args, *kwargs.values())))
        if not named:
            return func(*args, **kwargs)
        made = func(
            *map(self._on_cpu, args), **{name: self._on_cpu(each) for name, each in kwargs.items()}
        )
        return self._beside_latents(made) if func is torch.Tensor.to else made

    def _names_device(self, value: Any) -> bool:
        return isinstance(value, torch.device) and value.type == self._device.type

    def _on_cpu(self, value: Any) -> Any:
        return torch.device("cpu") if self._names_device(value) else value

    def _beside_latents(self, value: Any) -> Any:
        """Return a tensor that operations with latents take: a scalar may stay on the CPU."""
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim():
            return moved(value, self._device)
        return value
