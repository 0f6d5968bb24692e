"""What `sdbatch plan` shows: the memory of a shard, the first prompts, columns and rows."""

import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from sdbatch import advice, hardware, resolve, tuned
from sdbatch.cli import main
from sdbatch.errors import ModelError
from sdbatch.models import find_model
from sdbatch.output.plan import AIM_BYTES, make_plan
from sdbatch.output.record import write_record
from sdbatch.prompts.table import open_table
from sdbatch.report.outline import make_outline
from sdbatch.storage import Store
from sdbatch.tuned import Entry
from tests import without_ray
from tests.gpus import install
from tests.test_tuned import CHOICE


@pytest.fixture
def table(tmp_path):
    """A table in which one of 100 rows is larger than the others."""
    path = tmp_path / "table"
    path.mkdir()
    rows = "".join(f"a dog, number {i},{2048 if i == 50 else ''}\n" for i in range(99))
    (path / "a.csv").write_text(f"prompt,number,height\n{rows}")
    return path


def test_the_memory_of_a_shard_is_that_of_its_largest_images(table, make_job):
    job = make_job(prompts={"path": str(table), "images_per_row": 64}, sampling={"width": 2048})
    outline = make_outline(job)
    assert outline.images_per_shard == 53
    most = 2.2 * AIM_BYTES / 2**20
    assert outline.memory == (
        "up to 560 MiB for a shard, if it is 53 images of 2048x2048 pixels of pure noise"
    )
    assert 0.98 * most < 560 <= most
    assert f"memory     {outline.memory}\n" in outline.text()


def test_the_memory_of_a_shard_names_the_pictures_that_are_part_of_it(make_job, write):
    path = write("t.csv", "prompt,image\na dog,a.png\n")
    outline = make_outline(make_job(prompts={"path": path}))
    assert outline.memory.endswith("pixels of pure noise with their pictures")


def test_a_number_of_images_that_takes_more_memory_comes_with_the_way_out(table, make_job):
    output = {"images_per_shard": 99}
    job = make_job(
        prompts={"path": str(table), "images_per_row": 64}, sampling={"width": 2048}, output=output
    )
    assert make_outline(job).memory == (
        "up to 1.0 GiB for a shard, if it is 99 images of 2048x2048 pixels of pure noise. Set "
        "output.images_per_shard to 53 in a new output, or put the largest images into a job of "
        "their own"
    )


def test_larger_rows_that_are_appended_keep_the_shards_and_come_with_the_way_out(
    table, make_job, tmp_path
):
    store = Store(str(tmp_path / "out"))
    store.begin()
    job = make_job(prompts={"path": str(table), "images_per_row": 64}, sampling={"width": 2048})
    plan = make_plan(job, open_table(job.prompts), None)
    write_record(store, plan.job, plan.shards, plan.table.extras)
    rows = "".join(f"a cat,{i},4096\n" for i in range(60))
    (table / "b.csv").write_text(f"prompt,number,height\n{rows}")
    outline = make_outline(job)
    assert outline.images_per_shard == 53
    assert outline.memory.startswith("up to 1.1 GiB for a shard, if it is 53 images of 2048x4096")
    assert "Set output.images_per_shard to 26 in a new output" in outline.memory


def test_the_plan_shows_the_first_prompts_what_fails_and_what_columns_mean(make_job, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,width,steps\na (red:1.2) dog,64,5\na cat,65,6\n")
    job = make_job(prompts={"path": str(path)})
    outline = make_outline(job)
    assert "\n".join(outline.text().splitlines()[-6:]) == (
        "row 0      'a (red:1.2) dog'\n"
        "           64x64, 4 steps, guidance 7.5, dpmpp_2m, seed "
        f"{outline.check.examples[0]['seed']}\n"
        "note       column 'width' overrules sampling.width = 64 in every row where it is not "
        "empty; prompts.columns.width=null turns it off\n"
        "note       column 'steps' is copied, not used: if it is the number of steps, set "
        "prompts.columns.num_inference_steps=steps\n"
        "note       1 of the first 2 rows cannot be drawn: width = '65': must be a multiple of 8 "
        "(the first is row '1')\n"
        "note       1 of the first 2 rows have prompts like '(red:1.2)': drawn as text, as "
        "sampling.prompt_weights is off (the first is row '0')"
    )


def test_the_plan_as_json_has_what_it_shows_as_text(make_job, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,id\na dog,1\na cat,1\n")
    job_file = tmp_path / "job.yaml"
    job_file.write_text(
        f"prompts: {{path: {path}, columns: {{id: id}}}}\nmodel: builtin:shapes\n"
        f"output: {{path: {tmp_path / 'out'}}}\n"
    )
    done = CliRunner().invoke(main, ["plan", str(job_file), "--check", "--json"])
    values = json.loads(done.output)
    assert values["notes"] == ["1 rows have the id of an earlier row, so that they share its key"]
    assert values["check"]["whole"] is True
    assert (values["check"]["rows"], values["check"]["ids"]) == (2, 1)
    assert [row["prompt"] for row in values["check"]["examples"]] == ["a dog", "a cat"]
    assert "checked" in CliRunner().invoke(main, ["plan", str(job_file), "--check"]).output


def test_a_run_says_at_its_start_what_the_plan_says(make_job, tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_text("prompt,steps\na ((big)) dog,5\n")
    without_ray.draw(make_job(prompts={"path": str(path)}))
    records = [each for each in caplog.records if each.name == "sdbatch.batch.pipeline"]
    column, syntax = (record.getMessage() for record in records)
    assert column.startswith("Note: column 'steps' is copied, not used")
    assert "'((big))': drawn as text" in syntax


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer.*Run git lfs pull"),
        (b"<!DOCTYPE html><html>", r"a web page \(HTML\).*Download the file itself"),
        (b"", "is empty"),
    ],
)
def test_a_plan_with_a_model_that_is_none_is_an_error(table, tmp_path, content, reason):
    (tmp_path / "model.safetensors").write_bytes(content)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"prompts: {{path: {table}}}\nmodel: {tmp_path}/model.safetensors\n"
        f"output: {{path: {tmp_path}/out}}\n"
    )
    done = CliRunner().invoke(main, ["plan", str(job)])
    assert done.exit_code == 2
    assert re.match(rf"Error: model.path = .*{reason}", done.output)


def test_a_plan_with_a_lora_of_another_model_is_an_error(table, tmp_path, make_job):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_te2_text_model.lora_down.weight": np.zeros((4, 4), np.float32)}, path)
    job = make_job(
        prompts={"path": str(table)},
        model={"path": "builtin:shapes", "loras": [{"path": str(path)}]},
    )
    with pytest.raises(ModelError, match=r"model.loras.0.path = .*SDXL.*must be a LoRA of Stable"):
        make_outline(job)


def test_a_model_of_the_hub_or_of_another_machine_is_not_looked_at(table, make_job):
    job = make_job(prompts={"path": str(table)}, model="someone/model")
    assert (
        "model      someone/model, not on this machine: not checked\n" in make_outline(job).text()
    )


def test_the_plan_says_where_the_lanes_are_from(table, make_job, tmp_path, monkeypatch):
    def engine_line(**sections):
        text = make_outline(make_job(prompts={"path": str(table)}, **sections)).text()
        return next(line for line in text.splitlines() if line.startswith("engine "))

    monkeypatch.setenv("SDBATCH_CACHE", str(tmp_path / "cache"))
    install(tmp_path, monkeypatch)
    by_rule = (
        "engine     32 lanes by rule, not tuned: run `sdbatch tune builtin:shapes --size 64x64`"
    )
    assert engine_line() == by_rule
    assert engine_line(engine={"lanes": 8}) == "engine     8 lanes as the job or its output says"
    lanes = {"H100": 64, "T4": 8}
    assert engine_line(engine={"lanes": lanes, "device": "cuda"}) == (
        "engine     lanes by type as the job or its output says"
    )
    assert engine_line(engine={"device": "cuda"}).startswith(
        "engine     512 lanes by rule, as the GPU is not known here, not tuned"
    )
    assert engine_line(cluster={"actors": {"max": 4}}) == (
        "engine     lanes by the device of the cluster's nodes"
    )
    install(tmp_path, monkeypatch, "NVIDIA H100, 81559, 580")
    assert engine_line().startswith("engine     512 lanes by the memory of NVIDIA H100 (80 GiB)")
    files, job = resolve.find_model(make_job())
    (gpu,) = hardware.gpus()
    key = advice.tuning_key(job, files, gpu, find_model.sha256(files))
    tuned.keep(Entry(key, CHOICE, "2026-11-29", []))
    assert engine_line() == "engine     16 lanes by tune of 2026-11-29 on NVIDIA H100"


def test_the_plan_of_an_output_says_its_lanes(table, make_job, tmp_path):
    store = Store(str(tmp_path / "out"))
    store.begin()
    _, job = resolve.find_model(make_job(prompts={"path": str(table)}))
    job = job.updated(engine=job.engine.updated(lanes=4))
    plan = make_plan(job, open_table(job.prompts), None)
    write_record(store, plan.job, plan.shards, plan.table.extras)
    outline = make_outline(make_job(prompts={"path": str(table)}))
    assert outline.engine == "4 lanes as the job or its output says"


@pytest.mark.parametrize("here", [True, False])
def test_an_output_whose_model_has_one_variant_is_planned_again(
    table, make_job, tiny_model, tmp_path, here
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (model / part).glob("*.safetensors")
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    store = Store(str(tmp_path / "out"))
    store.begin()
    job = make_job(prompts={"path": str(table)}, model=str(model))
    _, found = resolve.find_model(job)
    plan = make_plan(found, open_table(found.prompts), None)
    write_record(store, plan.job, plan.shards, plan.table.extras)
    if not here:
        shutil.rmtree(model)
    assert make_outline(job).images == 99
