"""The facts of the device that draws."""

import os

import pytest
import torch

from sdbatch.engine.device import device_facts
from sdbatch.hardware import driver

# What the kernel's modules of NVIDIA, closed and open, say of themselves.
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root)"


def test_facts_of_a_cpu_name_the_processor_and_what_chooses_its_kernels(monkeypatch):
    for name in os.environ:
        if name.startswith(("ATEN_", "MKL_", "ONEDNN_", "DNNL_", "TORCH_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    facts = device_facts("cpu")

    assert facts.keys() == {"kind", "name", "instructions", "onednn", "environment"}
    assert facts["kind"] == "cpu"
    assert len(facts["name"]) > 2
    assert facts["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert facts["onednn"] is True
    assert facts["environment"] == {"ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.104.05"), (OPEN, "580.65.06")])
def test_driver_is_the_version_that_the_kernel_reports(text, version, tmp_path):
    folder = tmp_path / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(f"{text}\nGCC version:  gcc version 12.3.0\n")
    assert driver(tmp_path) == version


def test_driver_is_none_where_there_is_none(tmp_path):
    assert driver(tmp_path) is None
