"""diffusers' schedulers on a device other than the CPU, without waiting for it.

Some schedulers compute with scalars on the latents' device (unipc solves small systems of equations
there), and the noise of a step is copied with a wait. Here scalars stay on the CPU, from which any
operation on the device takes them, and noise is copied without waiting.
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
        """Call a function of torch: on the CPU if it would make or move a tensor."""
        kwargs = kwargs or {}
        if func is torch.einsum:  # unipc's, of a vector of the CPU and latents
            return func(*map(self._for_latents, args), **kwargs)
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu":
            return func(*args, **kwargs)
        made = func(
            *map(self._on_cpu, args), **{name: self._on_cpu(each) for name, each in kwargs.items()}
        )
        moves = func is torch.Tensor.to and any(
            self._is_device(each) for each in (*args, *kwargs.values())
        )
        return self._for_latents(made) if moves else made

    def _is_device(self, value: Any) -> bool:
        return isinstance(value, torch.device) and value.type == self._device.type

    def _on_cpu(self, value: Any) -> Any:
        return torch.device("cpu") if self._is_device(value) else value

    def _for_latents(self, value: Any) -> Any:
        """Return a tensor that operations with latents take: a scalar may stay on the CPU."""
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim():
            return moved(value, self._device)
        return value
