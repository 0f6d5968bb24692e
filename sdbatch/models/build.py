"""How a model is laid out on its device. No torch: the driver plans with it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Build:
    """The layout of a model's parts on the device. All of it can change bits."""

    device: str  # "cpu", "cuda"
    dtype: str  # of the weights: "float32", ...
    channels_last: bool = False
    compile: bool = False
    attention: str = "torch"  # the kernel of the denoiser's attention: see engine.attention
    rewrites: tuple[str, ...] = ()  # names in registry.REWRITES
    fp8_linears: bool = False
