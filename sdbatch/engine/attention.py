"""The kernels of attention, by the names of `engine.attention`."""

from contextlib import AbstractContextManager, nullcontext

from torch.nn.attention import SDPBackend, sdpa_kernel

_EFFICIENT, _MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
# By name: which kernel is tried first for a shape, and the others, as some heads are too wide.
KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, _EFFICIENT, _MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, _EFFICIENT, _MATH],
    "efficient": [_EFFICIENT, _MATH],
    "math": [_MATH],
}


def attention_by(name: str) -> AbstractContextManager[None]:
    """Use a kernel in the block; "torch": the one that torch chooses for each shape."""
    return sdpa_kernel(KERNELS[name], set_priority=True) if name in KERNELS else nullcontext()
