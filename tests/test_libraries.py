"""The libraries of a GPU, in what identifies an output."""

import pytest

from sdbatch.errors import JobError
from sdbatch.libraries import optional_libraries
from sdbatch.output import identity


def install(folder, name, version):
    """Write a distribution as pip leaves it: its metadata, in a folder of sys.path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    "name",
    ["triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas"],
)
def test_the_libraries_of_a_gpu_are_recorded_where_they_are_installed(name, tmp_path, monkeypatch):
    before = optional_libraries()
    install(tmp_path, name, "99.20.0.48")
    monkeypatch.syspath_prepend(tmp_path)

    assert optional_libraries() == {**before, name: "99.20.0.48"}
    assert identity.versions()[name] == "99.20.0.48"


def test_a_resume_with_another_library_of_the_gpu_is_an_error_that_names_it(
    make_job, tmp_path, monkeypatch
):
    job = make_job()
    recorded = {**identity.versions(), "nvidia-cudnn-cu13": "99.19.0.56"}
    install(tmp_path, "nvidia-cudnn-cu13", "99.20.0.48")
    monkeypatch.syspath_prepend(tmp_path)

    words = r"^versions.nvidia-cudnn-cu13 = '99.20.0.48': must be '99.19.0.56', as in the existing"
    with pytest.raises(JobError, match=words):
        identity.check_unchanged(job, job, recorded)
