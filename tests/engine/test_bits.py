"""What can change bits from one process to the next: pinned, rejected or recorded."""

import pytest
import torch

from sdbatch.engine.bits import check_environment, pin_bits, recorded_environment
from sdbatch.errors import ModelError


@pytest.fixture
def unpinned():
    """Torch as a library might leave it: autotuning, and less than float32 for float32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    mkldnn = torch.backends.mkldnn
    cudnn.benchmark, cudnn.deterministic = True, False
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    mkldnn.conv.fp32_precision = mkldnn.matmul.fp32_precision = "bf16"
    yield
    pin_bits("cpu")


def test_nothing_is_autotuned_and_float32_is_float32_after_pinning(unpinned):
    pin_bits("cpu")

    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        assert backend.fp32_precision != "tf32"
    for backend in (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul):
        assert backend.fp32_precision == "ieee"


def test_torchs_older_interface_reads_what_is_pinned(unpinned):
    """It raises where the newer one has set TF32; Inductor's convolutions read the older one."""
    pin_bits("cpu")

    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("cuda", "NVIDIA_TF32_OVERRIDE", "1"),
        ("cuda", "PYTORCH_TUNABLEOP_ENABLED", "1"),
        ("cpu", "ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("cpu", "DNNL_DEFAULT_FPMATH_MODE", "ANY"),
    ],
)
def test_a_variable_that_wins_over_what_is_pinned_is_an_error_with_its_name(kind, name, value):
    neutral = "0" if kind == "cuda" else "STRICT"
    words = rf"^environment {name} = '{value}': must be {neutral} or unset, .* Unset it on the mach"
    with pytest.raises(ModelError, match=words):
        check_environment(kind, {name: value})
    for harmless in (neutral, neutral.lower(), ""):
        check_environment(kind, {name: harmless})


def test_a_variable_of_the_other_kind_of_device_is_no_error():
    check_environment("cpu", {"NVIDIA_TF32_OVERRIDE": "1"})
    check_environment("cuda", {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"})


def test_pinning_rejects_the_environment_of_this_process(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(ModelError, match="environment ONEDNN_DEFAULT_FPMATH_MODE = 'BF16'"):
        pin_bits("cpu")


def test_variables_that_choose_kernels_are_recorded_without_secrets_and_no_others():
    environment = {
        "HOME": "/root",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/cache",
        "ATEN_CPU_CAPABILITY": "avx2",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "CUBLASLT_WORKSPACE_SIZE": "32768",
        "DISABLE_ADDMM_CUDA_LT": "1",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_URL": "https://user:secret@host/x",
    }

    on_gpu = recorded_environment("cuda", environment)
    assert sorted(on_gpu) == [
        "ATEN_CPU_CAPABILITY",
        "CUBLASLT_WORKSPACE_SIZE",
        "CUBLAS_WORKSPACE_CONFIG",
        "DISABLE_ADDMM_CUDA_LT",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TORCHINDUCTOR_CACHE_URL",
    ]
    assert "secret" not in on_gpu["TORCHINDUCTOR_CACHE_URL"]
    on_cpu = recorded_environment("cpu", environment)
    assert on_cpu == {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
