"""Files of weights that are opened safely: only the header is read, no code is run."""

import json
import os

import pytest
import torch

from sdbatch.errors import ModelError
from sdbatch.models import headers
from tests.models.load import RunsCode, find

TENSOR = {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}


def test_a_pickle_that_would_run_code_is_rejected_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save({"state_dict": {key: torch.zeros(1)}, "extra": RunsCode()}, "model.ckpt")
    with pytest.raises(
        ModelError, match=r"model.ckpt: its pickle would run posix.system.*safetensors"
    ):
        find("model.ckpt")
    assert not (tmp_path / "OWNED").exists()


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (2**63).to_bytes(8, "little") + b"{}",
        (100_000_000).to_bytes(8, "little") + b"{}",
        safetensors_file(b"\xff\xfe"),
        safetensors_file(b"[" * 100_000),
        safetensors_file(b'{"a":' * 100_000),
        safetensors_file({"lora": TENSOR}, bytes(39)),
        safetensors_file({"lora": TENSOR}, bytes(41)),
        safetensors_file({"lora": TENSOR | {"shape": [2**62, 2**62]}}, bytes(40)),
        safetensors_file({"lora": TENSOR | {"dtype": "F\n32"}}, bytes(40)),
        safetensors_file({"lora": TENSOR, "b": TENSOR}, bytes(40)),
    ],
    ids=range(11),
)
def test_a_safetensors_file_that_is_cut_off_or_hostile_is_rejected_in_one_line(tmp_path, content):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"^the key = .*(cannot be read as weights|is empty).*Download"
    ) as rejected:
        headers.read_header(file, "the key")
    assert "\n" not in str(rejected.value)
    assert len(str(rejected.value)) < 400


def test_only_the_header_of_a_large_safetensors_file_is_read(tmp_path):
    size = 40 * 2**30  # a file with a hole: it takes no space
    file = tmp_path / "lora.safetensors"
    header = {"lora": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    file.write_bytes(safetensors_file({"__metadata__": {"format": "pt"}, **header}))
    os.truncate(file, file.stat().st_size + size)
    assert headers.read_header(file, "the key").tensors.keys() == {"lora"}
