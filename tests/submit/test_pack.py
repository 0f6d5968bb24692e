"""The files that are sent with a job, and errors before anything is sent."""

import os
from pathlib import Path

import pytest

from sdbatch.errors import JobError, PromptTableError
from sdbatch.job import load
from sdbatch.submit import SubmitOptions, make_submission, pack, parse_env
from sdbatch.submit.jobs import Submission


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to a folder with a job, tables, an output of an earlier run and a private file."""
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
    (tmp_path / "outside.csv").write_text("prompt\na cow\n")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def job(prompts="tables", reader=None, **sections):
    """Write a job file and load it."""
    import yaml

    values = {
        "prompts": {"path": prompts, "reader": reader or {}},
        "model": "builtin:shapes",
        "output": {"path": "s3://bucket/out"},
        **sections,
    }
    with open("job.yaml", "w") as file:
        yaml.safe_dump(values, file)
    return load("job.yaml")


@pytest.mark.parametrize(
    ("prompts", "sent"),
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
def test_only_tables_with_relative_paths_are_sent(here, prompts, sent):
    assert pack.files_to_send(job(prompts)).keys() == sent


def test_captions_are_sent_if_the_job_says_what_they_are(here):
    os.mkdir("captions")
    for name in ("1.png", "1.txt", "2.png", "2.txt", "notes.txt"):
        Path("captions", name).write_bytes(b"a dog")
    with pytest.raises(PromptTableError, match=r"captions: a folder of captions.*format=captions"):
        pack.files_to_send(job("captions"))
    sent = pack.files_to_send(job("captions", {"format": "captions"}))
    assert sent.keys() == {"captions/1.txt", "captions/2.txt"}


def test_adapters_of_the_model_are_sent(here):
    files = pack.files_to_send(
        job("s3://b/c.csv", model={"path": "a/hub-id", "loras": [{"path": "style.safetensors"}]})
    )
    assert files.keys() == {"style.safetensors"}


def test_every_file_that_the_job_names_is_sent(here):
    names = ("lora.safetensors", "word.pt", "vae/config.json", "config/a.json", "checker/b.json")
    for name in names:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(name)
    model = {
        "path": "style.safetensors",
        "config": "config",
        "vae": "vae",
        "loras": [{"path": "lora.safetensors"}, {"path": "/shared/other.safetensors"}],
        "embeddings": [{"path": "word.pt", "token": "<word>"}],
    }
    files = pack.files_to_send(job("s3://b/c.csv", model=model, safety={"checker": "checker"}))
    assert files.keys() == {"style.safetensors", *names}


@pytest.mark.parametrize("checker", ["auto", "none"])
def test_words_and_hub_ids_name_no_file(here, checker):
    model = {"path": "a/hub-id", "config": "another/hub-id"}
    assert pack.files_to_send(job("s3://b/c.csv", model=model, safety={"checker": checker})) == {}


def test_a_model_folder_is_sent_whole(here, tiny_model):
    os.symlink(tiny_model, "model")
    files = pack.files_to_send(job("s3://b/c.csv", model={"path": "model"}))
    assert {"model/model_index.json", "model/unet/config.json"} <= files.keys()


def test_files_are_copied_to_the_same_relative_paths(here, tmp_path):
    files = pack.files_to_send(job())
    folder = tmp_path / "cluster"
    folder.mkdir()
    pack.copy_files(files, here / "job.yaml", folder)
    copied = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert copied == {"job.yaml", "tables/a.csv", "tables/b.csv"}
    assert (folder / "tables/b.csv").read_bytes() == (here / "tables/b.csv").read_bytes()
    assert (folder / "job.yaml").read_text() == (here / "job.yaml").read_text()


def test_a_change_of_any_file_changes_the_hash(here):
    files = pack.files_to_send(job())
    before = pack.hash_files(files, here / "job.yaml")
    assert pack.hash_files(files, here / "job.yaml") == before
    (here / "tables/b.csv").write_text("prompt\na bird\n")
    after = pack.hash_files(files, here / "job.yaml")
    (here / "job.yaml").write_text((here / "job.yaml").read_text() + "\n")
    assert len({before, after, pack.hash_files(files, here / "job.yaml")}) == 3


@pytest.mark.parametrize("path", ["out", "./out/x", "../out"])
def test_an_output_in_the_jobs_own_folder_is_rejected(here, path):
    with pytest.raises(JobError, match=r"output.path = .*deleted with the job.*s3://BUCKET/PATH"):
        pack.check_output_path(job(output={"path": path}))


@pytest.mark.parametrize("path", ["s3://b/out", "/mnt/shared/out", "file:///mnt/out"])
def test_an_output_elsewhere_is_accepted(here, path):
    pack.check_output_path(job(output={"path": path}))


def test_a_table_outside_this_folder_is_rejected(here):
    with pytest.raises(
        JobError, match=r"prompts.path = ../outside.csv: must be inside this folder"
    ):
        pack.files_to_send(job("../outside.csv"))


def test_a_missing_table_is_rejected(here):
    with pytest.raises(PromptTableError, match=r"prompts.path = nowhere.csv: no such file"):
        pack.files_to_send(job("nowhere.csv"))


def test_a_missing_lora_is_rejected(here):
    model = {"path": "a/hub-id", "loras": [{"path": "gone.safetensors"}]}
    with pytest.raises(JobError, match=r"model.loras.0.path = gone.safetensors: no such file here"):
        pack.files_to_send(job("s3://b/c.csv", model=model))


def test_too_many_bytes_are_rejected_with_the_largest_key_and_the_way_out(here):
    with open("tables/a.csv", "wb") as file:
        file.truncate(150 * 2**20)  # sparse: uses no disk space
    with pytest.raises(
        JobError,
        match=r"prompts.path = 150 MiB of 150 MiB to send: .* at most 100 MiB\..*by its URL",
    ):
        pack.files_to_send(job())


def test_env_variables_take_the_value_in_the_option_or_here(monkeypatch):
    monkeypatch.setenv("HERE", "a=b")
    assert parse_env(["HERE", "X=1=2", "EMPTY="]) == {"HERE": "a=b", "X": "1=2", "EMPTY": ""}


def test_an_env_variable_without_a_value_is_rejected(monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(JobError, match=r"--env = 'NOWHERE': has no value here"):
        parse_env(["NOWHERE"])


def test_an_image_receives_the_job_file_in_its_environment_and_no_files(here):
    options = SubmitOptions(
        "job.yaml", overrides=("sampling.seed=1 2",), image="registry/sdbatch:1"
    )
    job("s3://b/c.csv")
    submission = make_submission(options, {}, "s3://bucket/out")
    assert submission.environment["image_uri"] == "registry/sdbatch:1"
    assert submission.environment["env_vars"] == {"SDBATCH_JOB": (here / "job.yaml").read_text()}
    assert submission.command == (
        "printf %s \"$SDBATCH_JOB\" > job.yaml && sdbatch run job.yaml --set 'sampling.seed=1 2'"
    )
    with pytest.raises(JobError, match=r"--image = .*receives no files.*tables/a.csv"):
        make_submission(options, pack.files_to_send(job()), "s3://bucket/out")


def test_other_options_change_the_digest():
    one = Submission("sdbatch run job.yaml", {}, "s3://b/out", "content", 0)
    other = Submission("sdbatch run job.yaml --overwrite", {}, "s3://b/out", "content", 0)
    assert one.digest != other.digest


def test_new_keys_of_an_object_store_do_not_change_the_digest():
    one, other = (
        Submission("sdbatch run job.yaml", {"env_vars": {"AWS_SESSION_TOKEN": key}}, "o", "c", 0)
        for key in ("monday", "tuesday")
    )
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("cell", "sent"),
    [("a.png", False), ("/shared/a.png", True), ("s3://bucket/a.png", True), ("", True)],
)
def test_a_table_that_names_pictures_by_relative_paths_is_not_sent(here, cell, sent):
    (here / "tables/a.csv").write_text(f"prompt,image\na dog,{cell}\n")
    if sent:
        assert "tables/a.csv" in pack.files_to_send(job("tables/a.csv"))
        return
    with pytest.raises(
        JobError, match=r"tables/a\.csv: names the picture 'a\.png', which is not s"
    ):
        pack.files_to_send(job("tables/a.csv"))
    in_job = job().updated(prompts={"rows": [{"prompt": "a dog", "image": cell}]})
    with pytest.raises(JobError, match=r"prompts\.rows: names the picture 'a\.png'"):
        pack.files_to_send(in_job)
