"""What torch and its libraries may choose, and what changes bits: pinned, rejected or recorded.

Settings of torch belong to the whole process, so the process that draws makes them, before it loads
a model. Nothing is set by an import.
"""

import os
import warnings
from collections.abc import Mapping

import torch

from sdbatch.errors import ModelError, one_line

# Variables that win over what `pin_bits` sets, and the only value that changes nothing.
_OVERRIDES = {
    "cuda": {
        "NVIDIA_TF32_OVERRIDE": "0",  # of cuBLAS and cuDNN
        "PYTORCH_TUNABLEOP_ENABLED": "0",
    },
    "cpu": {
        "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
        "DNNL_DEFAULT_FPMATH_MODE": "STRICT",  # its old name, which oneDNN still reads
    },
}
# Variables that choose a kernel or an instruction set: legitimate, but bits depend on them.
_RECORDED = {
    "cuda": (
        "ATEN_CPU_",  # noise is drawn on the CPU
        "CUBLAS",  # CUBLASLT_ too
        "CUDNN_",
        "DISABLE_ADDMM_CUDA_LT",
        "NVIDIA_TF32_OVERRIDE",
        "PYTORCH_",
        "TORCH_ALLOW_TF32_",
        "TORCH_BLAS_",
        "TORCH_CUDNN_",
        "TORCHINDUCTOR_",
        "TRITON_",
    ),
    "cpu": ("ATEN_CPU_", "DNNL_", "MKL_", "ONEDNN_", "TORCH_LINEAR_", "TORCH_MKLDNN_"),
}
# Places, logs and numbers of threads, which engine.threads decides: they change no bit.
_HARMLESS = ("_DIR", "_PATH", "_THREADS", "_VERBOSE", "_DEBUG", "_LEVEL")


def pin_bits(kind: str) -> None:
    """Set what could change bits from one process to the next; `kind` is cpu or cuda.

    cuDNN measures no algorithms and takes deterministic ones, float32 is computed in float32 (TF32
    has ten bits of it), and nothing is tuned while it runs.

    TF32 goes by `allow_tf32`, the one setting that each of torch's two interfaces reads back: after
    `fp32_precision` the other raises, and Inductor's convolutions read the other.

    Raises:
        ModelError: an environment variable wins over these settings.
    """
    check_environment(kind, os.environ)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    with warnings.catch_warnings():  # torch before 2.13 recommends `fp32_precision`
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.mkldnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    if kind == "cuda":
        torch.cuda.tunable.enable(False)


def check_environment(kind: str, environment: Mapping[str, str]) -> None:
    """Raise a ModelError if a variable wins over what `pin_bits` sets for this kind of device."""
    for name, neutral in _OVERRIDES[kind].items():
        value = environment.get(name, "")
        if value.upper() not in ("", neutral):
            raise ModelError(
                f"environment {name} = {one_line(value, 40)!r}: must be {neutral} or unset, as it "
                f"changes the bits of images, whatever the job says. Unset it on the machines that "
                f"draw, and run again."
            )


def recorded_environment(kind: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that choose kernels or instruction sets on this kind of device."""
    return {
        name: one_line(value, 200)
        for name, value in sorted(environment.items())
        if name.startswith(_RECORDED["cpu" if kind == "cpu" else "cuda"])
        and not name.endswith(_HARMLESS)
    }
