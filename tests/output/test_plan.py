"""Which shards a job has, and whether an existing output is this job's."""

import re
from dataclasses import replace

import pytest

from sdbatch.errors import JobError, PromptTableError
from sdbatch.output import plan
from sdbatch.output.record import read_record, write_record
from sdbatch.prompts.table import open_table
from sdbatch.storage import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    """A table of two files: b.txt with 5 prompts, d.txt with 4."""
    path = tmp_path / "table"
    path.mkdir()
    for name, rows in (("b", 5), ("d", 4)):
        lines(path / f"{name}.txt", rows)
    return path


@pytest.fixture
def make(make_job, folder):
    """Plan a job over the table, for a new output or for an existing one."""

    def planned(begun=None, path=folder, **sections):
        prompts = {"path": str(path), **sections.pop("prompts", {})}
        job = make_job(prompts=prompts, **sections)
        return plan.make_plan(job, open_table(job.prompts), begun)

    return planned


@pytest.fixture
def begin(make, tmp_path):
    """Plan a job, write its record into an output, and return that."""

    def begun(**sections):
        store = Store(str(tmp_path / "out"))
        store.begin()
        planned = make(**sections)
        write_record(store, planned.job, planned.shards, planned.table.extras)
        return read_record(store)

    return begun


def lines(path, rows):
    path.write_text("".join(f"{path.stem} {i}\n" for i in range(rows)))


def cuts(planned):
    """Return each shard as (file, first row of the file, first image, images)."""
    return [(s.source, s.first_row, s.first_image, s.images) for s in planned.shards]


SMALL = {"images_per_shard": 3}


def test_shards_cover_each_file_in_order_and_never_cross_files(make):
    planned = make(output=SMALL, prompts={"images_per_row": 2})
    assert cuts(planned) == [
        ("b.txt", 0, 0, 3),
        ("b.txt", 0, 3, 3),
        ("b.txt", 0, 6, 3),
        ("b.txt", 0, 9, 1),
        ("d.txt", 5, 0, 3),
        ("d.txt", 5, 3, 3),
        ("d.txt", 5, 6, 2),
    ]
    assert [shard.shard for shard in planned.shards] == list(range(7))
    assert (planned.rows, planned.images, planned.images_per_shard) == (9, 18, 3)
    assert [shard.rows(2) for shard in planned.shards[:4]] == [(0, 2), (1, 3), (3, 5), (4, 5)]


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100, "auto"])
@pytest.mark.parametrize("limit", [None, 1, 5, 6, 100])
def test_every_image_is_in_one_shard_however_the_table_is_cut(make, size, limit):
    planned = make(output={"images_per_shard": size}, prompts={"images_per_row": 3, "limit": limit})
    images = [
        (shard.source, image)
        for shard in planned.shards
        for image in range(shard.first_image, shard.first_image + shard.images)
    ]
    expected = [("b.txt", i) for i in range(15)] + [("d.txt", i) for i in range(12)]
    assert images == expected[: 3 * (limit or 9)]
    assert planned.images == len(images)
    assert planned.rows == min(limit or 9, 9)


def test_plan_is_a_function_of_the_job_and_the_table_not_of_the_place(make, folder, tmp_path):
    first = make(output=SMALL)
    assert make(output=SMALL).shards == first.shards
    cluster = {"actors": 7, "cpus_per_actor": 2}
    assert make(output={**SMALL, "path": "memory://elsewhere"}, cluster=cluster).shards == (
        first.shards
    )
    folder.rename(tmp_path / "moved")
    moved = make(path=tmp_path / "moved", output=SMALL)
    assert moved.shards == first.shards
    assert moved.urls() == {name: f"{tmp_path}/moved/{name}" for name in ("b.txt", "d.txt")}


def test_images_per_shard_chosen_is_a_function_of_the_job_and_the_images(make_job):
    job = make_job()
    table = open_table(job.prompts)
    sizes = {
        n: plan.images_per_shard(job, table, n, (64, 64)) for n in (1, 32, 64 * 32, 64 * 500, 10**9)
    }
    assert sizes == {1: 32, 32: 32, 64 * 32: 32, 64 * 500: 500, 10**9: plan.MOST_IMAGES}
    assert plan.MOST_IMAGES == 1000


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("side", [512, 4096])
def test_images_per_shard_chosen_keeps_a_shard_within_256_mib(make_job, image_format, side):
    sampling = {"height": side, "width": side}
    job = make_job(sampling=sampling, output={"image_format": image_format})
    size = plan.images_per_shard(job, open_table(job.prompts), 10**9, (side, side))
    each = plan.image_bytes(job.output, side, side)
    assert size * each <= 256 * 2**20 < (size + 1) * each
    assert size >= 1


@pytest.mark.parametrize(
    ("header", "fitting"),
    [("prompt", 842), ("prompt,image", 141), ("prompt,image,mask_image", 77)],
)
def test_images_per_shard_chosen_counts_the_pictures_that_rows_are_drawn_from(
    make, folder, header, fitting
):
    rows = "".join(f"a dog{',x' * header.count(',')}\n" for _ in range(100_000))
    (folder / "pictures.csv").write_text(f"{header}\n{rows}")
    planned = make(path=folder / "pictures.csv", sampling={"height": 512, "width": 512})
    assert planned.images_per_shard == planned.fitting_images == fitting
    assert planned.shard_bytes <= plan.AIM_BYTES


def test_images_per_shard_chosen_counts_whole_photos_where_only_a_part_is_drawn(make, folder):
    (folder / "pictures.csv").write_text("prompt,image,mask_image\n" + "a dog,x,y\n" * 5000)
    sampling = {"height": 512, "width": 512, "only_masked": True}
    planned = make(path=folder / "pictures.csv", sampling=sampling)
    assert planned.images_per_shard == 8


def test_images_per_shard_chosen_is_that_of_the_largest_row(make, folder):
    rows = "".join(f"a dog,{i},2048\n" for i in range(999))
    (folder / "sides.csv").write_text(f"prompt,height,width\n{rows.replace(',1,', ',2048,')}")
    small = make(prompts={"images_per_row": 64})
    assert (small.largest, small.images_per_shard) == ((2048, 2048), 53)
    each = plan.image_bytes(small.job.output, 2048, 2048)
    assert small.shard_bytes == 53 * each <= plan.AIM_BYTES
    assert small.job.output.images_per_shard == 53  # what job.yaml records


def test_a_row_with_an_invalid_size_does_not_count_and_is_no_error(make, folder):
    cells = ["4104", "-8", "wide", "100000000000000000000", "2047", "nan", ""]
    (folder / "sides.csv").write_text("prompt,width\n" + "".join(f"a,{c}\n" for c in cells))
    planned = make()
    assert (planned.largest, planned.rows) == ((64, 64), 16)


def test_resume_keeps_its_shards_when_a_new_file_holds_larger_rows(begin, make, folder):
    begun = begin(output=SMALL)
    (folder / "e.csv").write_text("prompt,height,width\n" + "a,4096,4096\n" * 7)
    resumed = make(begun)
    assert resumed.shards[: len(begun.shards)] == begun.shards
    assert (resumed.images_per_shard, resumed.largest) == (3, (4096, 4096))
    assert resumed.shard_bytes == 3 * plan.image_bytes(resumed.job.output, 4096, 4096)


@pytest.mark.parametrize(
    ("images", "mib"),  # of the measured shards: benchmarks/results/shard_memory.md
    [(120, 277), (256, 415), (340, 519)],
)
def test_memory_of_a_shard_is_at_least_what_was_measured(make, images, mib):
    planned = make(
        prompts={"images_per_row": images},
        sampling={"height": 512, "width": 512},
        output={"image_format": "png", "images_per_shard": images},
    )
    assert mib <= planned.shard_memory / 2**20 < 1.15 * mib


def test_small_job_is_one_shard_a_file(make):
    assert [images for *_, images in cuts(make())] == [5, 4]


def test_images_per_shard_too_large_is_an_error_with_the_largest_that_fits(make):
    sampling = {"height": 1024, "width": 1024}
    with pytest.raises(JobError, match=r"^output\.images_per_shard = 9000: must be") as caught:
        make(output={"images_per_shard": 9000}, sampling=sampling)
    most = int(re.search(r"must be at most (\d+), .* 2 GiB", str(caught.value)).group(1))
    assert make(output={"images_per_shard": most}, sampling=sampling).images == 9
    with pytest.raises(JobError, match=f"must be at most {most},"):
        make(output={"images_per_shard": most + 1}, sampling=sampling)


@pytest.mark.parametrize(
    ("name", "value", "old"),
    [
        ("sampling.guidance_scale", 3.5, "7.5"),
        ("output.image_format", "webp", "'jpg'"),
        ("output.images_per_shard", 4, "3"),
        ("prompts.images_per_row", 2, "1"),
        ("prompts.limit", 8, "None"),
        ("engine.threads", 2, "1"),
        ("model.path", "other", "'builtin:shapes'"),
    ],
)
def test_resume_of_a_changed_job_is_an_error_with_the_key_and_both_values(
    begin, make, name, value, old
):
    begun = begin(output=SMALL)
    section, key = name.split(".")
    sections = {"output": SMALL, "model": {"path": "builtin:shapes"}}
    sections[section] = {**sections.get(section, {}), key: value}
    words = re.escape(f"{value!r}: must be {old}, as in the existing output")
    with pytest.raises(JobError, match=rf"^{name} = {words}.*--overwrite"):
        make(begun, **sections)


def test_resume_under_another_library_is_an_error_with_its_name(begin, make):
    begun = begin()
    older = replace(begun, versions={**begun.versions, "torch": "0.9"})
    with pytest.raises(
        JobError, match=r"^versions\.torch = '.*': must be '0\.9', as in the existing"
    ):
        make(older)


def test_resume_goes_on_when_only_what_changes_no_byte_changes(begin, make):
    begun = begin(output=SMALL)
    resumed = make(begun, name="new", cluster={"actors": 2}, output={**SMALL, "path": "moved"})
    assert resumed.shards == begun.shards


def test_resume_adopts_what_was_recorded_for_what_the_job_leaves_open(begin, make, folder):
    resolved = {"device": "cpu", "dtype": "float32", "lanes": 12}
    model = {"path": "hub/model", "revision": COMMIT, "sha256": "f" * 64}
    begun = begin(engine=resolved, model=model, output=SMALL)
    lines(folder / "e.txt", 5000)  # would make another images_per_shard, if chosen anew
    resumed = make(begun, model={"path": "hub/model"})
    assert resumed.job.engine == begun.job.engine
    assert resumed.job.model == begun.job.model
    assert resumed.job.output.images_per_shard == 3
    assert resumed.shards[:4] == begun.shards


def test_resume_with_another_commit_of_the_model_is_an_error_with_both(begin, make):
    begun = begin(model={"path": "hub/model", "revision": COMMIT})
    with pytest.raises(JobError, match=rf"^model\.revision = 'ffff.*must be '{COMMIT}'"):
        make(begun, model={"path": "hub/model", "revision": "f" * 40})


@pytest.mark.parametrize("new", ["a.txt", "c.txt", "e.txt"])
def test_resume_appends_the_shards_of_a_new_file_wherever_its_name_sorts(begin, make, folder, new):
    begun = begin(output=SMALL)
    lines(folder / new, 4)
    resumed = make(begun, output=SMALL)
    assert resumed.shards[: len(begun.shards)] == begun.shards
    assert cuts(resumed)[len(begun.shards) :] == [(new, 9, 0, 3), (new, 9, 3, 1)]
    assert (resumed.rows, resumed.images) == (13, 13)


def test_resume_of_a_moved_table_goes_on(begin, make, folder, tmp_path):
    begun = begin(output=SMALL)
    folder.rename(tmp_path / "moved")
    assert make(begun, path=tmp_path / "moved", output=SMALL).shards == begun.shards


@pytest.mark.parametrize("rows", [4, 5, 6])
def test_resume_over_a_changed_file_is_an_error_with_its_name_and_the_way_out(
    begin, make, folder, rows
):
    begun = begin()
    (folder / "d.txt").write_text("another\n" * rows)
    words = r"^prompts\.path = d\.txt has changed .* Put new rows into a new file.*--overwrite"
    with pytest.raises(PromptTableError, match=words):
        make(begun)


def test_resume_without_its_plan_cuts_the_table_anew_as_the_job_says(begin, make, folder):
    begun = begin(output=SMALL)
    lines(folder / "e.txt", 5000)  # would make another images_per_shard, if chosen anew
    resumed = make(replace(begun, shards=None))
    assert resumed.shards[:4] == begun.shards
    assert resumed.images_per_shard == 3
    with pytest.raises(
        JobError, match=r"^sampling\.seed = 1: must be 0, as in the existing output"
    ):
        make(replace(begun, shards=None), sampling={"seed": 1})


def test_resume_without_a_file_is_an_error_with_its_name(begin, make, folder):
    begun = begin()
    (folder / "b.txt").unlink()
    with pytest.raises(
        PromptTableError, match=r"^prompts\.path = b\.txt is missing: .*--overwrite"
    ):
        make(begun)


def test_resume_over_other_columns_is_an_error_with_both(begin, make, folder):
    begun = begin()
    (folder / "e.csv").write_text("prompt,breed\na,b\n")
    with pytest.raises(
        PromptTableError, match=r"columns breed: must be those of the existing output, none"
    ):
        make(begun)
    (folder / "e.csv").unlink()
    assert make(begun).shards == begun.shards


def test_resume_over_shards_that_would_be_cut_otherwise_is_an_error(begin, make):
    begun = begin()
    other = replace(begun, shards=(replace(begun.shards[0], images=4), *begun.shards[1:]))
    with pytest.raises(PromptTableError, match="change the shards of the existing output"):
        make(other)


@pytest.mark.parametrize(
    ("prompts", "output", "words"),
    [
        (
            {"images_per_row": 10**9},
            {},
            r"^prompts.images_per_row = 1,000,000,000 for 9 rows: makes",
        ),
        (
            {"images_per_row": 10**8},
            {"images_per_shard": 1},
            r"^output.images_per_shard = 1: makes 900,000,000 shards, must be at most 10,000,000",
        ),
    ],
)
def test_plan_of_more_images_or_shards_than_memory_holds_is_an_error(make, prompts, output, words):
    with pytest.raises(JobError, match=words):
        make(prompts=prompts, output=output)


@pytest.mark.parametrize("count", [10**9 + 1, 10**12, 10**400])
def test_job_of_more_images_than_a_plan_holds_is_an_error(make, count):
    with pytest.raises(JobError, match=r"^prompts.images_per_row = 1000+.*must be less than or"):
        make(prompts={"images_per_row": count})
