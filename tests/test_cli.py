"""The command line: quick help, errors in one line, exit codes. tests/ray has runs that draw."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdbatch.cli import main
from sdbatch.report import status
from tests.finished import finish, small_job

COMMANDS = ("run", "plan", "status", "sheet", "score", "verify", "schema")
SDBATCH = str(Path(sys.executable).parent / "sdbatch")
REPOSITORY = Path(__file__).parent.parent


def sdbatch(*arguments, cwd=None):
    return subprocess.run([SDBATCH, *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def here(tmp_path):
    """A folder with a small job and its table."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("prompt\n")
    (tmp_path / "captions.csv").write_text("caption,x\na,1\n")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "job.yaml").write_text(
        "prompts: {path: p.txt}\nmodel: builtin:shapes\n"
        "sampling: {height: 64, width: 64, num_inference_steps: 2}\noutput: {path: out}\n"
    )
    return tmp_path


def test_help_is_quick_and_loads_neither_torch_nor_ray():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = []
    for _ in range(5):
        done = sdbatch("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        before = after
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert min(times) < 0.3  # seconds of CPU, not of the clock: the promise itself
    probe = "import sys, sdbatch.cli; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    assert (
        "set()"
        in subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout
    )


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch OWNED",))


RUN_ERRORS = {
    "prompts.path=missing.csv": ["missing.csv", "no such file"],
    "prompts.path=empty.csv": ["empty.csv", "holds no row"],
    "prompts.path=header.csv": ["header.csv", "holds no row"],
    "prompts.path=folder": ["folder", "no table in the folder"],
    "prompts.path=captions.csv": ["It has: caption, x", "--set prompts.columns.prompt=caption"],
    "prompts.path=oss://bucket/x.csv": ["oss://", "package that is missing", "ossfs"],
    "sampling.widht=3": ["sampling.widht: unknown key", "Did you mean 'sampling.width'?"],
    "sampling.width=wide": ["sampling.width = 'wide'", "must be a whole number"],
    "sampling.height=513": ["sampling.height = 513", "multiple of 8", "Nearest: 512"],
    "sampling.sampler=foo": ["sampling.sampler = 'foo'", "dpmpp_2m", "_karras"],
    "output.path=file/out": ["file is a file", "must be a folder"],
    "output.path=foo://bucket/x": ["foo://bucket/x", "Protocol not known"],
    "output.images_per_shard=1000000": ["images_per_shard = 1000000", "must be at most", "2 GiB"],
    "model=folder": ["model.path = folder", "no model_index.json"],
    "model=p.txt": ["model.path = p.txt", ".safetensors or .ckpt"],
    "model=./nothing": ["model.path = './nothing'", "no such file or folder"],
    "model=evil.ckpt": ["evil.ckpt", "would run posix.system", "not opened"],
    "model.loras=[{path: none.safetensors}]": ["model.loras.0.path", "must be a local file"],
    "model.vae=someone/vae": ["model.vae = 'someone/vae'", "the hub did not deliver it"],
    "safety.policy=drop": ["safety.policy = 'drop'", "no safety checker"],
    "safety.checker=folder": ["safety.checker = 'folder'", "config.json and weights"],
    "cluster.address=127.0.0.1:1": ["cluster.address = '127.0.0.1:1'", "no Ray answers"],
}


@pytest.mark.parametrize("override", RUN_ERRORS)
def test_run_that_cannot_start_prints_one_line_and_writes_nothing(here, override):
    if override == "model=evil.ckpt":
        weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "x": RunsCode()}
        torch.save(weights, here / "evil.ckpt")
    before = sorted(here.rglob("*"))
    done = sdbatch("run", "job.yaml", "--set", override, cwd=here)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert [word for word in RUN_ERRORS[override] if word not in done.stderr] == []
    assert sorted(here.rglob("*")) == before


def test_run_of_a_missing_job_file_names_it(here):
    done = sdbatch("run", "nothing.yaml", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing.yaml" in done.stderr


def test_plan_shows_what_a_run_would_draw_and_writes_nothing(here):
    done = sdbatch("plan", "job.yaml", "--set", "prompts.images_per_row=3", cwd=here)
    assert done.returncode == 0
    assert "images     6, 3 per row" in done.stdout
    assert "committed  0 images" in done.stdout
    assert f"{here}/out (parquet, jpg)" in done.stdout
    assert not (here / "out").exists()
    outline = json.loads(sdbatch("plan", "job.yaml", "--json", cwd=here).stdout)
    assert (outline["rows"], outline["images"], outline["shards"]) == (2, 2, 1)


@pytest.mark.parametrize("command", ["status", "sheet", "score", "verify"])
def test_command_on_a_missing_output_fails(here, command):
    done = sdbatch(command, "nothing", cwd=here)
    assert done.returncode == 2
    assert "no job.yaml: must be the output of a job" in done.stderr


@pytest.fixture
def output(make_job, here):
    """A finished output at out in `here`: 4 images in 3 shards."""
    return finish(small_job(make_job, here))


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_status_reads_the_output_once(output, monkeypatch, watch):
    counted = []
    once = status.read_status
    monkeypatch.setattr(status, "read_status", lambda store: counted.append(store) or once(store))
    with pytest.raises(SystemExit) as ended:
        main(["status", str(output.folder), *watch])
    assert (ended.value.code, len(counted)) == (3 if watch else 0, 1)


def test_sheet_prints_its_path_and_takes_every_option(output, here):
    done = sdbatch("sheet", "out", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{here}/out/gallery/sheet.jpg\n"
    assert (here / "out/gallery/sheet.jpg").exists()
    options = ["--images", "2", "--random", "5", "--columns", "1", "--to", "my sheet.png"]
    conditions = ["--where", "width=8", "--where", "prompt~a"]
    done = sdbatch("sheet", "out", *options, *conditions, cwd=here)
    assert (done.returncode, done.stdout) == (0, f"{here}/my sheet.png\n")


SHEET_ERRORS = {
    "--where=widht=8": ["--where = 'widht': not a column of the output", "Did you mean 'width'?"],
    "--where=dog": ["--where = 'dog': must be a column, an operator", "guidance_scale>=5"],
    "--where=seed=high": [
        "--where = 'seed=high': cannot be compared with",
        "a value of the same type",
    ],
    "--where=width=9": ["No image matches --where width=9."],
    "--where=fidelity<1": [
        "--where = 'fidelity': the output has no scores yet",
        "Run `sdbatch score",
    ],
    "--to=sheet.gif": ["--to = 'sheet.gif': must end with .jpg, .jpeg, .png"],
    "--to=file/sheet.png": ["/file = File exists"],
    "--to=foo://bucket/x.png": ["foo://bucket/x.png", "Protocol not known"],
    "--images=0": ["--images", "1<=x<=1000"],
    "--columns=0": ["--columns", "1<=x<=100"],
    "--random=dog": ["--random", "not a valid integer"],
}


@pytest.mark.parametrize("option", SHEET_ERRORS)
def test_sheet_that_cannot_be_made_prints_an_error_and_writes_nothing(output, here, option):
    before = sorted(here.rglob("*"))
    done = sdbatch("sheet", "out", option, cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert [word for word in SHEET_ERRORS[option] if word not in done.stderr] == []
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1 or done.stderr.startswith("Usage: ")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", ["sheet", "score"])
def test_sheet_and_score_of_a_damaged_output_print_one_line(output, here, command):
    (here / "out/data/000001.parquet").write_bytes(b"PAR1")
    done = sdbatch(command, "out", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {here}/out/data/000001.parquet: cannot be read")
    assert f"`sdbatch verify {here}/out`" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_score_prints_text_and_json(output, here):
    done = sdbatch("score", "out", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 of 4 images scored" in done.stdout
    assert "4 not scored: their prompts name no known shape" in done.stdout
    assert f"{here}/out/scores.parquet" in done.stdout
    summary = json.loads(sdbatch("score", "out", "--json", cwd=here).stdout)
    assert (summary["images"], summary["unread"], summary["fidelity"]) == (4, 4, None)


def test_schema_is_the_file_that_the_job_files_name():
    printed = sdbatch("schema").stdout
    assert printed == (REPOSITORY / "jobs" / "job.schema.json").read_text()
    json.loads(printed)


@pytest.mark.parametrize("job", sorted((REPOSITORY / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_job_files_are_valid_and_name_their_schema(job):
    from sdbatch.job import load

    assert load(job).name == job.stem or job.stem == "dataset"
    assert job.read_text().startswith("# yaml-language-server: $schema=job.schema.json\n")
