"""The kinds of device that drew an output."""

import pytest

from sdbatch.output.devices import count_devices, describe_device, several_devices
from sdbatch.output.receipts import Receipt

H100 = {
    "kind": "cuda",
    "name": "NVIDIA H100 80GB HBM3",
    "multiprocessors": 132,
    "capability": "9.0",
    "memory": 84_929_806_336,
    "cuda": "13.0",
    "cudnn": 92000,
    "libraries": {"triton": "3.6.0"},
    "driver": "580.65.06",
    "instructions": "AVX512",
    "environment": {},
}
CPU = {
    "kind": "cpu",
    "name": "AMD EPYC",
    "instructions": "AVX512",
    "onednn": True,
    "environment": {},
}


def receipt(shard, images, **facts):
    return Receipt(shard, "0" * 16, "000001-run", images, 0, {}, [], facts)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (H100, "NVIDIA H100 80GB HBM3 (132 multiprocessors, CUDA 13.0, cuDNN 92000)"),
        (CPU, "AMD EPYC (AVX512)"),
        ({**CPU, "onednn": False}, "AMD EPYC (AVX512, without oneDNN)"),
        (
            {**CPU, "environment": {"ONEDNN_MAX_CPU_ISA": "AVX2"}},
            "AMD EPYC (AVX512, ONEDNN_MAX_CPU_ISA=AVX2)",
        ),
    ],
)
def test_a_kind_of_device_is_described_by_what_decides_its_bits(facts, text):
    assert describe_device(facts) == text


def test_another_driver_is_no_other_kind_of_device():
    assert describe_device({**H100, "driver": "570.86.15"}) == describe_device(H100)


def test_images_are_counted_by_kind_of_device_and_most_come_first():
    every = [receipt(0, 3, device=CPU), receipt(1, 2, device=H100), receipt(2, 2, device=H100)]
    assert list(count_devices(every).items()) == [
        (describe_device(H100), 4),
        (describe_device(CPU), 3),
    ]


def test_shards_without_an_image_or_without_facts_count_for_no_device():
    assert count_devices([receipt(0, 0, device=CPU), receipt(1, 2), receipt(2, 2, device={})]) == {}


def test_one_kind_of_device_is_worth_no_word_and_several_are():
    assert several_devices({}) is None
    assert several_devices({"AMD EPYC (AVX512)": 5}) is None
    assert several_devices({"H100 (x)": 3000, "A100 (y)": 20}) == (
        "2 kinds of device drew this output: 3,000 images by H100 (x), 20 images by A100 (y). The "
        "bits of a row may differ between them."
    )
