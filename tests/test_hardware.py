"""The names and the memory of GPUs and processors, as the machine gives them."""

import os
import platform

import pytest

from sdbatch import hardware
from sdbatch.hardware import Device
from tests.gpus import install

GIB = 2**30


def test_gpus_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3, 81559, 580.95.05", "Tesla T4, [N/A], 5")
    assert hardware.gpus() == [
        Device("cuda", "NVIDIA H100 80GB HBM3", "580.95.05", 81559 * 2**20),
        Device("cuda", "Tesla T4", "5", None),
    ]


def test_gpus_without_nvidia_smi_are_those_of_the_kernels_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "proc/driver/nvidia"
    (folder / "gpus/0000:01:00.0").mkdir(parents=True)
    (folder / "gpus/0000:01:00.0/information").write_text("Model: \t\t NVIDIA L4\nIRQ:   1\n")
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64  580.95.05  Tue Sep 23\n")
    assert hardware.gpus(tmp_path) == [Device("cuda", "NVIDIA L4", "580.95.05")]


def test_a_machine_without_a_gpu_or_with_a_broken_driver_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert hardware.gpus(tmp_path) == []
    install(tmp_path, monkeypatch, "NVIDIA-SMI has failed", code=9)
    assert hardware.gpus(tmp_path) == []


def test_a_processor_has_the_name_and_the_model_that_linux_gives_it(tmp_path):
    (tmp_path / "proc").mkdir()
    assert hardware.processor(tmp_path) == Device("cpu", platform.machine())
    lines = (
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t: fpu\n"
    )
    (tmp_path / "proc/cpuinfo").write_text(2 * f"{lines}\n")
    assert hardware.processor(tmp_path).name == "AMD EPYC, cpu family 25, model 17"


@pytest.mark.parametrize(
    ("kind", "fits"), [("H100", True), ("H10", False), ("T4", False), ("h100-80gb", True)]
)
def test_a_type_is_found_by_its_words_in_a_name(kind, fits):
    assert hardware.is_of_type("NVIDIA H100 80GB HBM3", kind) == fits


def test_a_silent_nvidia_smi_is_not_waited_for_without_end(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, code=0, first="read line <>fifo")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "_SECONDS", 0.1)
    assert hardware.gpus(tmp_path) == []
