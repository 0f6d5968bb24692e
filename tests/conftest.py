"""Markers by folder, and the fixtures that most tests share."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import hardware
from sdbatch.job import Job, parse

MARKED = ("ray", "stores", "gpu")


# Before torch is imported: two threads take longer than one for tensors as small as the tests'.
os.environ["OMP_NUM_THREADS"] = "1"
# And before torch imports triton: without a GPU its kernels are interpreted.
if not hardware.gpus():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        for name in MARKED:
            if f"tests/{name}/" in Path(item.path).as_posix():
                item.add_marker(getattr(pytest.mark, name))
        if item.get_closest_marker("ray"):
            # Ray leaves its log files to the garbage collector, and threads that outlive it
            for warning in (
                "PytestUnraisableExceptionWarning",
                "PytestUnhandledThreadExceptionWarning",
            ):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::pytest.{warning}"))


@pytest.fixture(autouse=True, scope="session")
def _offline():
    """No test may reach a model hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What `sdbatch tune` has found on this machine must change no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDBATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make_job(tmp_path):
    """Build a job from keyword sections over one that is whole, with a table of 6 prompts."""
    table = tmp_path / "prompts.txt"
    table.write_text("".join(f"a red dog, number {i}\n" for i in range(6)))

    def make(**sections) -> Job:
        values = {
            "prompts": {"path": str(table)},
            "model": "builtin:shapes",
            "sampling": {"height": 64, "width": 64, "num_inference_steps": 4},
            "output": {"path": str(tmp_path / "out")},
        }
        for name, section in sections.items():
            old = values.get(name)
            both = isinstance(section, dict) and isinstance(old, dict)
            values[name] = {**old, **section} if both else section
        return parse(values)

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Stable Diffusion in small, in diffusers' layout."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("tiny-model")
    tiny.write_folder(folder)
    return folder


@pytest.fixture(scope="session")
def folders_by_use(tmp_path_factory) -> dict[str, Path]:
    """Random models for inpainting and for editing in small, in diffusers' layout."""
    from tests import tiny

    channels = {"inpainting": 9, "editing": 8}
    folders = {use: tmp_path_factory.mktemp(use) for use in channels}
    for use, folder in folders.items():
        tiny.write_folder(folder, channels=channels[use])
    return folders


@pytest.fixture
def write(tmp_path):
    """Write a file below tmp_path; return its path."""

    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return put


@pytest.fixture
def prompts(write):
    """Write a table of prompts, one a line, and return its path."""

    def put(*lines: str, name: str = "table.txt") -> str:
        return write(name, "".join(f"{line}\n" for line in lines))

    return put
