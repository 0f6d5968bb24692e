"""A GPU: its lanes by its type, whether torch can use it, and its memory."""

import re

import pytest
import torch

from sdbatch.engine import cuda
from sdbatch.errors import ModelError

LANES = {"H100": 64, "A10G": 32, "L4": 16, "RTX-PRO-6000": 48}


@pytest.mark.parametrize(
    ("name", "lanes"),
    [
        ("NVIDIA H100 80GB HBM3", 64),
        ("NVIDIA A10G", 32),
        ("NVIDIA L4", 16),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 48),
    ],
)
def test_lanes_go_by_the_type_in_the_devices_name(name, lanes):
    assert cuda.lanes(LANES, name) == lanes


@pytest.mark.parametrize("name", ["NVIDIA L40S", "Tesla T4", "NVIDIA A100-SXM4-80GB", "cpu"])
def test_a_type_without_lanes_is_an_error_with_its_name(name):
    words = rf"engine.lanes = H100, .* an actor has {name}. .*label_sel"
    with pytest.raises(ModelError, match=words):
        cuda.lanes(LANES, name)


def test_a_cpu_is_called_so():
    assert cuda.name("cpu") == "cpu"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_wheel_for_cpus_is_an_error_that_names_wheel_and_driver():
    version = re.escape(torch.__version__)
    words = rf"^engine.device = 'cuda': torch {version}, on a machine with.* driver.*: must be a wh"
    with pytest.raises(ModelError, match=words):
        cuda.check_usable()


@pytest.mark.parametrize(
    ("visible", "text", "words"),
    [
        (
            None,
            "The NVIDIA driver on your system is too old (found version 11040). Please\n update.",
            r"driver 470.57.02: must find a GPU, and torch says: The NVIDIA driver on your system "
            r"is too old \(found version 11040\)\. Update the driver, install a torch wheel for an",
        ),
        ("", "No CUDA GPUs are available", r"CUDA_VISIBLE_DEVICES = '': must find .* make a GPU v"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error_with_torchs_reason(
    visible, text, words, monkeypatch
):
    def fail():
        raise RuntimeError(text)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    monkeypatch.setattr(cuda, "driver", lambda: "470.57.02")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ModelError, match=rf"^engine.device = .* for CUDA 13.0, .*{words}") as error:
        cuda.check_usable()
    assert "\n" not in str(error.value)


def test_a_gpu_without_kernels_in_the_wheel_is_an_error_with_both(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    words = r"must have kernels for Tesla P100-PCIE-16GB, which is sm_60, .* sm_75, sm_80, sm_90\. "
    with pytest.raises(ModelError, match=rf"^engine.device = 'cuda': torch .*{words}Install a"):
        cuda.check_usable()


@pytest.mark.parametrize(
    ("kernels", "capability", "run"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80", "sm_90"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "compute_90"], (10, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["sm_75"], (6, 1), False),
        ([], (9, 0), True),
    ],
)
def test_kernels_run_on_gpus_of_their_major_version_and_compute_on_all_later_ones(
    kernels, capability, run
):
    assert cuda.has_kernels(kernels, capability) is run


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "total", "warns"),
    [
        (1.5, 16, False),
        (0.9, 16, True),  # less than 1 GiB
        (7.5, 141, False),
        (6.5, 141, True),  # less than 5 %
        (-0.1, 16, True),
    ],
)
def test_little_free_memory_is_worth_a_warning(free, total, warns):
    warning = cuda.headroom_warning(int(free * GIB), int(total * GIB))
    assert (warning is not None) is warns


def test_the_warning_of_little_free_memory_has_the_numbers_and_the_way_out():
    warning = cuda.headroom_warning(GIB // 2, 16 * GIB)
    assert warning.startswith("Only 0.5 of 16.0 GiB of the GPU's memory are free.")
    assert warning.endswith("Reduce engine.lanes.")


def test_a_cpu_has_no_headroom_to_check(caplog):
    cuda.check_headroom(torch.device("cpu"))
    assert caplog.records == []
