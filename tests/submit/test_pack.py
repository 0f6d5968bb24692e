"""What goes along with a submitted job, and what is refused before anything is sent."""

import os

import pytest

from sdbatch.errors import JobError, PromptTableError
from sdbatch.job import load
from sdbatch.submit import Asked, pack, variables
from sdbatch.submit.jobs import Submission


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Stand in a folder with a job, tables, an output of an earlier run and a private file."""
    files = {
        "tables/a.csv": "prompt\na dog\n",
        "tables/b.csv": "prompt\na cat\n",
        "tables/notes.md": "no table",
        "style.safetensors": "weights",
        "out/data/000000.parquet": "x" * 1000,
        ".env": "SECRET=1",
    }
    for name, text in files.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(text)
    (tmp_path / "beside.csv").write_text("prompt\na cow\n")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def job(prompts="tables", **sections):
    """Write a job file and load it."""
    import yaml

    values = {
        "prompts": {"path": prompts},
        "model": "builtin:shapes",
        "output": {"path": "s3://bucket/out"},
        **sections,
    }
    with open("job.yaml", "w") as file:
        yaml.safe_dump(values, file)
    return load("job.yaml")


@pytest.mark.parametrize(
    ("prompts", "packed"),
    [
        ("tables/a.csv", {"tables/a.csv"}),
        ("tables", {"tables/a.csv", "tables/b.csv"}),
        ("./tables/*.csv", {"tables/a.csv", "tables/b.csv"}),
        (["tables/b.csv", "s3://bucket/c.csv"], {"tables/b.csv"}),
        ("s3://bucket/c.csv", set()),
        ("/shared/c.csv", set()),
        ("~/c.csv", set()),
    ],
)
def test_relative_tables_go_along_and_nothing_else(here, prompts, packed):
    assert pack.contents(job(prompts)).keys() == packed


def test_files_beside_the_model_go_along(here):
    found = pack.contents(
        job("s3://b/c.csv", model={"path": "a/hub-id", "loras": [{"path": "style.safetensors"}]})
    )
    assert found.keys() == {"style.safetensors"}


def test_a_model_folder_goes_along_whole(here, tiny_model):
    os.symlink(tiny_model, "model")
    found = pack.contents(job("s3://b/c.csv", model={"path": "model"}))
    assert {"model/model_index.json", "model/unet/config.json"} <= found.keys()


def test_what_goes_along_lies_on_the_cluster_as_it_lies_here(here, tmp_path):
    found = pack.contents(job())
    folder = tmp_path / "there"
    folder.mkdir()
    pack.copy(found, here / "job.yaml", folder)
    laid = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert laid == {"job.yaml", "tables/a.csv", "tables/b.csv"}
    assert (folder / "tables/b.csv").read_bytes() == (here / "tables/b.csv").read_bytes()
    assert (folder / "job.yaml").read_text() == (here / "job.yaml").read_text()


def test_a_change_of_any_file_is_another_digest(here):
    found = pack.contents(job())
    before = pack.digest(found, here / "job.yaml")
    assert pack.digest(found, here / "job.yaml") == before
    (here / "tables/b.csv").write_text("prompt\na bird\n")
    after = pack.digest(found, here / "job.yaml")
    (here / "job.yaml").write_text((here / "job.yaml").read_text() + "\n")
    assert len({before, after, pack.digest(found, here / "job.yaml")}) == 3


@pytest.mark.parametrize("path", ["out", "./out/x", "../out"])
def test_an_output_in_the_jobs_own_folder_is_refused(here, path):
    with pytest.raises(JobError, match=r"output.path = .*goes with the job.*s3://BUCKET/PATH"):
        pack.refuse_lost_output(job(output={"path": path}))


@pytest.mark.parametrize("path", ["s3://b/out", "/mnt/shared/out", "file:///mnt/out"])
def test_an_output_elsewhere_is_taken(here, path):
    pack.refuse_lost_output(job(output={"path": path}))


def test_a_table_outside_this_folder_is_refused(here):
    with pytest.raises(JobError, match=r"prompts.path = ../beside.csv: must be below this folder"):
        pack.contents(job("../beside.csv"))


def test_a_table_that_is_not_there_is_refused(here):
    with pytest.raises(PromptTableError, match=r"prompts.path = nowhere.csv: no such file"):
        pack.contents(job("nowhere.csv"))


def test_a_lora_that_is_not_there_is_refused(here):
    model = {"path": "a/hub-id", "loras": [{"path": "gone.safetensors"}]}
    with pytest.raises(JobError, match=r"model.loras = gone.safetensors: no such file here"):
        pack.contents(job("s3://b/c.csv", model=model))


def test_too_much_is_refused_with_what_is_largest_and_where_it_must_be(here):
    with open("tables/a.csv", "wb") as file:
        file.truncate(150 * 2**20)  # a hole: it takes no room on the disk
    with pytest.raises(
        JobError, match=r"prompts.path = 150 MiB of files: at most 100 MiB go along .*by URL"
    ):
        pack.contents(job())


def test_variables_are_as_given_or_as_they_are_here(monkeypatch):
    monkeypatch.setenv("HERE", "a=b")
    assert variables(["HERE", "X=1=2", "EMPTY="]) == {"HERE": "a=b", "X": "1=2", "EMPTY": ""}


def test_a_variable_that_has_no_value_is_refused(monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(JobError, match=r"--env = 'NOWHERE': has no value here"):
        variables(["NOWHERE"])


def test_an_image_takes_the_job_in_its_environment_and_no_files(here):
    from sdbatch.submit import assemble

    asked = Asked("job.yaml", overrides=("sampling.seed=1 2",), image="registry/sdbatch:1")
    job("s3://b/c.csv")
    made = assemble(asked, {}, "s3://bucket/out")
    assert made.environment["image_uri"] == "registry/sdbatch:1"
    assert made.environment["env_vars"] == {"SDBATCH_JOB": (here / "job.yaml").read_text()}
    assert made.command == (
        "printf %s \"$SDBATCH_JOB\" > job.yaml && sdbatch run job.yaml --set 'sampling.seed=1 2'"
    )
    with pytest.raises(JobError, match=r"--image = .*takes no files along.*tables/a.csv"):
        assemble(asked, pack.contents(job()), "s3://bucket/out")


def test_other_options_make_another_submission():
    one = Submission("sdbatch run job.yaml", {}, "s3://b/out", "content", 0)
    other = Submission("sdbatch run job.yaml --overwrite", {}, "s3://b/out", "content", 0)
    assert one.digest != other.digest


def test_new_keys_of_an_object_store_are_the_same_submission():
    one, other = (
        Submission("sdbatch run job.yaml", {"env_vars": {"AWS_SESSION_TOKEN": key}}, "o", "c", 0)
        for key in ("monday", "tuesday")
    )
    assert one.digest == other.digest
