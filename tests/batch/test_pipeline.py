"""The pipeline and its driver, without Ray: what is drawn, kept, drawn again and rejected."""

import hashlib
import io
import json
import os
import re
import shutil
import threading
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdbatch.batch import pipeline, stall
from sdbatch.engine.engine import Engine
from sdbatch.errors import JobError, ModelError, SdbatchError, StorageError
from sdbatch.job import Model, Safety
from sdbatch.models import sd1
from sdbatch.models.build import Build
from sdbatch.models.find_model import find_model
from sdbatch.output import lease, names, pulse
from sdbatch.output.record import read_record
from sdbatch.output.verify import verify_output
from sdbatch.report.progress import SilentDisplay
from sdbatch.storage import Store
from tests.engine.faulty_family import FaultyFamily
from tests.fakes import FakeEngine
from tests.without_ray import draw, without_ray


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an output, without those that say which run owns it."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    owner = (names.PROGRESS, f"{names.RUNS}/")
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith(owner)}


def take_over(store: Store) -> lease.Run:
    """Own the output as another run that found no sign of life of its owner; return that run."""
    before = lease.newest_run(store)
    after = replace(before, number=before.number + 1, id=f"{before.number + 1:06d}-other")
    assert store.create(names.run_file(after.number), lease._RUN.dump_json(after))
    return after


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*"))}


def test_two_clean_runs_give_identical_data(make_job, tmp_path):
    for name in ("one", "two"):
        draw(make_job(output={"path": str(tmp_path / name)}))
    assert hashes(tmp_path / "one" / "data") == hashes(tmp_path / "two" / "data") != {}


def test_a_finished_output_is_not_drawn_again(make_job, tmp_path):
    draw(make_job())
    before = hashes(tmp_path / "out" / "receipts")
    ready = pipeline.prepare(make_job())
    report = pipeline.draw(ready, display=SilentDisplay())  # no engine is needed, and no Ray
    assert (report.drawn_now, report.images) == (0, 6)
    assert hashes(tmp_path / "out" / "receipts") == before


def test_appended_files_become_new_shards(make_job, prompts, tmp_path):
    prompts("dog", "cat", name="table/b.txt")
    job = make_job(prompts={"path": str(tmp_path / "table")})
    draw(job)
    before = hashes(tmp_path / "out" / "data")
    prompts("cow", name="table/a.txt")
    report = draw(job)
    after = hashes(tmp_path / "out" / "data")
    assert (report.images, report.drawn_now) == (3, 1)
    assert before.items() <= after.items()


def test_a_job_that_changed_is_refused_and_overwrite_starts_anew(make_job, tmp_path):
    draw(make_job())
    changed = make_job(sampling={"guidance_scale": 3.0})
    with pytest.raises(
        JobError, match=r"sampling.guidance_scale = 3.0: must be 7.5, as in.*--overwrite"
    ):
        draw(changed)
    report = draw(changed, overwrite=True)
    assert report.drawn_now == 6
    assert read_record(Store(str(tmp_path / "out"))).job.sampling.guidance_scale == 3.0


def cannot_load():
    raise ModelError("model.path = 'x': its weights are cut off.")


@pytest.fixture
def mixed(make_job, prompts):
    """A job of two shards; a row of the first one fails."""
    table = prompts("dog", "fail", "cat", "cow")
    return make_job(prompts={"path": table}, output={"images_per_shard": 2})


@pytest.mark.parametrize("options", [{"overwrite": True}, {"retry_failed": True}])
def test_an_engine_that_cannot_be_loaded_leaves_the_old_output_as_it_is(mixed, options, tmp_path):
    draw(mixed)
    before = contents(tmp_path / "out")
    with pytest.raises(ModelError, match="its weights are cut off"):
        draw(mixed, make_engine=cannot_load, **options)
    assert contents(tmp_path / "out") == before
    assert list(verify_output(Store(mixed.output.path))) == []
    report = draw(mixed, make_engine=Tolerant, **options)
    assert (report.images, report.failed) == (4, 0)


def test_an_engine_that_cannot_be_loaded_leaves_a_part_of_an_output_as_it_is(singles, tmp_path):
    job = singles("dog", "cat", "cow")
    draw(job)
    (tmp_path / "out" / "receipts" / "000001.json").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(ModelError, match="its weights are cut off"):
        draw(job, make_engine=cannot_load)
    assert contents(tmp_path / "out") == before
    assert draw(job).drawn_now == 1


def test_overwrite_with_a_model_whose_weights_are_cut_off_leaves_the_old_output_as_it_is(
    make_job, tiny_model, tmp_path
):
    shutil.copytree(tiny_model, tmp_path / "model")
    job = make_job(model=str(tmp_path / "model"))
    draw(job)
    before = contents(tmp_path / "out")
    weights = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ModelError, match="unet"):
        draw(job, make_engine=None, overwrite=True)
    assert contents(tmp_path / "out") == before


def test_a_run_draws_each_row_with_its_loras_and_says_so_in_its_file(
    make_job, tiny_model, tmp_path
):
    for name, scale in (("ink", 1.0), ("fur", -1.0)):
        delta = {"lora_unet_conv_out.diff": torch.full((4, 32, 3, 3), 0.1 * scale)}
        save_file(delta, tmp_path / f"{name}.safetensors")
    loras = [{"path": f"{tmp_path}/{name}.safetensors", "name": name} for name in ("ink", "fur")]
    rows = [
        {"prompt": "a dog", "loras": "ink:2"},
        {"prompt": "a dog<lora:ink:2>"},
        {"prompt": "a dog", "loras": "fur"},
        {"prompt": "a dog"},
        {"prompt": "a dog", "loras": "sky"},
    ]
    job = make_job(
        prompts={"path": None, "rows": [{**row, "seed": 1} for row in rows]},
        model={"path": str(tiny_model), "loras": loras},
        sampling={"loras": "", "num_inference_steps": 2, "sampler": "euler"},
        output={"image_format": "png"},
    )
    draw(job, make_engine=None)
    table = ds.dataset(tmp_path / "out" / "data").to_table().to_pylist()
    images = [row["image"]["bytes"] for row in table]
    assert [row["loras"] for row in table] == ["ink:2", "", "fur:1", ""]
    pixels = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    assert np.array_equal(pixels[0], pixels[1])
    assert len({each.tobytes() for each in pixels}) == 3
    texts = [Image.open(io.BytesIO(image)).info["parameters"] for image in images]
    assert [text.splitlines()[0] for text in texts] == [
        "a dog<lora:ink:2>",
        "a dog<lora:ink:2>",
        "a dog<lora:fur:1>",
        "a dog",
    ]
    [failed] = ds.dataset(tmp_path / "out" / "failed").to_table().to_pylist()
    assert "'sky' is not the name of a LoRA. model.loras names ink, fur" in failed["error"]


@pytest.mark.parametrize("options", [{"overwrite": True}, {"retry_failed": True}])
@pytest.mark.parametrize("missing", ["table.txt", "model"])
def test_a_job_without_its_table_or_model_leaves_the_old_output_as_it_is(
    missing, options, make_job, prompts, tiny_model, tmp_path
):
    shutil.copytree(tiny_model, tmp_path / "model")
    job = make_job(prompts={"path": prompts("dog", "fail")}, model=str(tmp_path / "model"))
    draw(job)
    before = contents(tmp_path / "out")
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(SdbatchError, match=missing):
        draw(job, **options)
    assert contents(tmp_path / "out") == before


def test_overwrite_replaces_the_old_output_as_soon_as_an_engine_stands(make_job, prompts, tmp_path):
    old = make_job(output={"images_per_shard": 1})
    new = make_job(
        prompts={"path": prompts("dog", "fail", "cat")},
        output={"images_per_shard": 3, "format": "webdataset"},
    )
    draw(old)
    draw(new, overwrite=True)
    draw(new.updated(output=new.output.updated(path=str(tmp_path / "clean"))))
    replaced, clean = contents(tmp_path / "out"), contents(tmp_path / "clean")
    assert replaced.keys() == clean.keys()
    assert hashes(tmp_path / "out" / "data") == hashes(tmp_path / "clean" / "data") != {}
    assert list(verify_output(Store(str(tmp_path / "out")))) == []


def test_a_start_that_fails_leaves_no_new_output(make_job, tmp_path):
    with pytest.raises(ModelError, match="its weights are cut off"):
        draw(make_job(), make_engine=cannot_load)
    assert not (tmp_path / "out").exists()


def test_a_start_that_fails_leaves_a_folder_with_the_users_files(make_job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="its weights are cut off"):
        draw(make_job(), make_engine=cannot_load)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


class Interrupted(SilentDisplay):
    """Presses Ctrl-C as soon as the run waits for `step`."""

    def __init__(self, step):
        self.pressed = threading.Event()
        self._step = step

    def show(self, progress):
        if progress.step == self._step and not self.pressed.is_set():
            self.pressed.set()
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["starting Ray", "loading the model"])
def test_ctrl_c_before_the_first_engine_stops_the_run_and_leaves_no_new_output(
    step, make_job, tmp_path
):
    display = Interrupted(step)

    def wait_and_load():
        assert display.pressed.wait(60)
        return FakeEngine()

    report = draw(make_job(), make_engine=wait_and_load, display=display)
    assert (report.stopped, report.exit_code, report.images) == ("interrupted", 1, 0)
    assert report.text().startswith("Stopped: 0 images of 6")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_first_engine_leaves_the_old_output_as_it_is(mixed, tmp_path):
    draw(mixed)
    before = contents(tmp_path / "out")
    report = draw(mixed, display=Interrupted("starting Ray"), overwrite=True)
    assert (report.stopped, report.exit_code) == ("interrupted", 1)
    assert contents(tmp_path / "out") == before


class Steps(SilentDisplay):
    """Keeps the step in which Ray starts, and presses Ctrl-C then."""

    step = ""

    def show(self, progress):
        if progress.step.startswith("starting Ray") and not self.step:
            self.step = progress.step
            raise KeyboardInterrupt


def test_the_start_shows_the_memory_of_shards_that_are_larger_than_those_of_automatic_size(
    make_job, tmp_path
):
    rows = [{"prompt": f"a dog, number {i}", "height": 4096, "width": 4096} for i in range(20)]
    (tmp_path / "large.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"path": str(tmp_path / "large.jsonl")}
    for size, shown in (("auto", False), (20, True)):
        display = Steps()
        output = {"path": str(tmp_path / f"{size}"), "images_per_shard": size}
        job = make_job(prompts=prompts, output=output)
        draw(job, display=display)
        assert ("memory: up to" in display.step) == shown
        assert ("output.images_per_shard to 13 in a new output" in display.step) == shown


@pytest.mark.parametrize("existing", [False, True])
def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_after_it(
    existing, make_job, tmp_path
):
    if existing:
        draw(make_job())
    held = lease.take(Store(str(tmp_path / "out")))
    before = contents(tmp_path / "out")
    for options in ({}, {"overwrite": True}, {"retry_failed": True}):
        with pytest.raises(JobError) as caught:
            draw(make_job(), **options)
        assert f"run {held.run.id} (process {os.getpid()} on {held.run.host}" in str(caught.value)
        assert "is drawing it: must have one run at a time. Wait until" in str(caught.value)
    assert contents(tmp_path / "out") == before
    assert held.lost() is None
    held.release("stopped")
    assert draw(make_job()).images == 6


def test_a_run_is_refused_when_another_changed_the_output_since_it_was_planned(make_job, tmp_path):
    ready = pipeline.prepare(make_job())
    draw(make_job(sampling={"guidance_scale": 3.0}))
    before = contents(tmp_path / "out")
    with without_ray(), pytest.raises(StorageError, match="changed by another run while this one"):
        pipeline.draw(ready, display=SilentDisplay(), make_engine=FakeEngine)
    assert contents(tmp_path / "out") == before


class TakenOver(FakeEngine):
    """Another run takes the output over before the prompt "overtake" is drawn."""

    def __init__(self, store):
        super().__init__()
        self._store = store

    def _draw(self, request):
        if request.prompt == "overtake":
            take_over(self._store)
        return super()._draw(request)


def test_a_run_that_another_took_over_stops_and_commits_nothing_more(singles, tmp_path):
    store = Store(str(tmp_path / "out"))
    job = singles("dog", "cat", "cow", "overtake", "bee", "ant")
    report = draw(job, make_engine=partial(TakenOver, store))
    assert (report.exit_code, report.images) == (1, 3)
    assert "run 000002-other " in report.stopped
    assert "owns it now, so this run has ended" in report.stopped
    assert store.names("receipts").keys() == {f"00000{shard}.json" for shard in range(3)}
    assert store.names("data").keys() == {f"00000{shard}.parquet" for shard in range(3)}
    assert lease.newest_run(store).id == "000002-other"
    assert lease.newest_run(store).ended is None


class TakenOverAndStuck(FakeEngine):
    """Never draws, while another run takes the output over."""

    def __init__(self, store):
        super().__init__()
        self._store = store

    def submit(self, request):
        if lease.newest_run(self._store).number == 1:
            take_over(self._store)
        return Future()


def test_a_run_that_draws_for_long_notices_that_another_took_over(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "HEARTBEAT_SECONDS", 0.05)
    store = Store(str(tmp_path / "out"))
    report = draw(make_job(), make_engine=partial(TakenOverAndStuck, store))
    assert (report.exit_code, report.images) == (1, 0)
    assert "run 000002-other " in report.stopped
    assert "owns it now, so this run has ended" in report.stopped


class Tampering(SilentDisplay):
    """Changes the output as soon as it has all its receipts, while the run is not at its end."""

    def __init__(self, folder, shards, tamper):
        self._receipts = folder / "receipts"
        self._shards = shards
        self._tamper = tamper
        self.tampered = False

    def show(self, progress):
        if not self.tampered and len(list(self._receipts.glob("*.json"))) == self._shards:
            self.tampered = True
            self._tamper()


def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("fault", ["receipt", "no receipt", "data", "short data"])
def test_a_run_whose_shard_is_not_proved_at_the_end_is_stopped_and_the_next_one_finishes(
    fault, singles, tmp_path
):
    table = ("dog", "cat", "cow")
    draw(singles(*table, path=str(tmp_path / "clean")))
    draw(singles("bee", "ant", "fly", path=str(tmp_path / "other")))
    folder, job = tmp_path / "out", singles(*table)
    receipt, data = "receipts/000001.json", "data/000001.parquet"
    faults = {
        "receipt": lambda: shutil.copy(tmp_path / "other" / receipt, folder / receipt),
        "no receipt": (folder / receipt).unlink,
        "data": (folder / data).unlink,
        "short data": lambda: shorten(folder / data),
    }
    display = Tampering(folder, 3, faults[fault])
    report = draw(job, display=display)
    assert display.tampered
    assert (report.exit_code, report.images) == (1, 2)
    assert re.match(r"1 of \d shards have no receipt that proves them", report.stopped)
    assert lease.newest_run(Store(str(folder))).ended == "stopped"

    report = draw(job)
    assert (report.stopped, report.images, report.drawn_now) == (None, 3, 1)
    assert hashes(folder / "data") == hashes(tmp_path / "clean" / "data")
    assert list(verify_output(Store(str(folder)))) == []


class Tolerant(FakeEngine):
    """Draws what FakeEngine fails."""

    def submit(self, request):
        return super().submit(request.updated(prompt="anything"))


def test_retry_failed_draws_the_shards_with_failed_rows_again(make_job, prompts, tmp_path):
    job = make_job(
        prompts={"path": prompts("dog", "fail", "cat", "cow")}, output={"images_per_shard": 2}
    )
    first = draw(job)
    assert (first.images, first.failed) == (3, 1)
    report = draw(job, make_engine=Tolerant, retry_failed=True)
    assert (report.images, report.failed, report.drawn_now) == (4, 0, 2)
    assert list((tmp_path / "out" / "failed").glob("*")) == []
    assert list(verify_output(Store(str(tmp_path / "out")))) == []


def test_max_failed_stops_the_run_and_says_so(make_job, prompts):
    job = make_job(prompts={"path": prompts(*["fail"] * 30)}, output={"images_per_shard": 5})
    report = draw(job, make_engine=partial(FakeEngine, delay=0.05), max_failed=3)
    assert "more than --max-failed 3" in report.stopped
    assert report.exit_code == 1


class Stuck(FakeEngine):
    """Never draws."""

    def submit(self, request):
        return Future()


def test_a_run_in_which_nothing_moves_ends(make_job, monkeypatch):
    monkeypatch.setattr(stall, "STALL_SECONDS", 1.0)
    report = draw(make_job(), make_engine=Stuck)
    assert "no progress for" in report.stopped


def test_an_output_folder_that_is_not_ours_is_left_alone(make_job, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "mine.parquet").write_text("precious")
    with pytest.raises(StorageError, match=r"holds data/ but no job.yaml"):
        pipeline.prepare(make_job(), overwrite=True)
    assert (tmp_path / "out" / "data" / "mine.parquet").read_text() == "precious"


def overflowing_decoder():
    """Return an engine whose pictures are finite in float32 alone."""
    files = find_model(Model(path="builtin:shapes"), Safety(checker="none"))
    family = FaultyFamily(sd1.load(files, Build("cpu", "bfloat16")))
    family.on_pictures = lambda latents, dtype, finite: finite.fill_(dtype == torch.float32)
    return Engine(family, lanes=8, threads=1)


def test_a_run_says_which_images_were_decoded_again_and_the_way_out(make_job, prompts, tmp_path):
    job = make_job(
        prompts={"path": prompts(*(f"dog {i}" for i in range(6)))},
        sampling={"num_inference_steps": 2},
    )
    report = draw(job, make_engine=overflowing_decoder)
    assert (report.images, report.failed, report.exit_code) == (6, 0, 0)
    rows = ds.dataset(tmp_path / "out" / "data").to_table(columns=["decoded_again"])
    assert rows["decoded_again"].to_pylist() == [True] * 6
    assert "  decoded again in float32: 6 images, because" in report.text()
