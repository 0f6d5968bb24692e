"""The linear layers of a denoiser in 8 bits (float8 e4m3), by torchao.

Activations get a scale for each row of a product, which is a token of a lane. A scale for the whole
tensor would be faster, but then a lane's bits would depend on its neighbours' largest value.
"""

from collections.abc import Iterator
from typing import Any

import torch

from sdbatch.errors import ModelError

LEAST_CAPABILITY = (8, 9)  # of the GPUs that multiply float8: Ada, Hopper and later
SIDE_MULTIPLE = 16  # of a layer's inputs and outputs: what torch._scaled_mm takes


def quantize(denoiser: torch.nn.Module) -> None:
    """Replace the weights of the layers that `chosen` yields, in place.

    Raises:
        ModelError: torchao is missing, or the GPU does not multiply float8.
    """
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
        from torchao.quantization.quantize_.common import KernelPreference
    except ImportError as error:
        raise ModelError(
            'engine.fp8_linears = True: torchao is not installed. pip install "sdbatch[fp8]", or '
            "leave fp8_linears out."
        ) from error
    check_device(next(denoiser.parameters()).device)
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        kernel_preference=KernelPreference.TORCH,  # the same whatever else is installed
        set_inductor_config=False,  # it would turn on choices by timing, which differ by actor
    )
    names = {name for name, _ in chosen(denoiser)}
    quantize_(denoiser, config, filter_fn=lambda _, name: name in names)


def chosen(denoiser: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers that can be multiplied in 8 bits, with their names."""
    for name, layer in denoiser.named_modules():
        if isinstance(layer, torch.nn.Linear) and not (
            layer.in_features % SIDE_MULTIPLE or layer.out_features % SIDE_MULTIPLE
        ):
            yield name, layer


def check_device(device: torch.device) -> None:
    """Raise a ModelError if a device does not multiply float8."""
    if device.type != "cuda":
        raise ModelError(f"engine.fp8_linears = True: is for GPUs, not for {device}. Leave it out.")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ModelError(
            f"engine.fp8_linears = True: {name} has compute capability {write(capability)}: must "
            f"be at least {write(LEAST_CAPABILITY)}. Leave it out, or choose another GPU."
        )


def write(capability: tuple[int, int]) -> str:
    """Return a compute capability as CUDA writes it: 8.9."""
    return ".".join(map(str, capability))
