"""What the plan finds in the rows of a table before anything is drawn."""

from dataclasses import replace

import pyarrow as pa
import pytest

from sdbatch import few_steps
from sdbatch.errors import JobError
from sdbatch.few_steps import Distilled
from sdbatch.prompts import check
from sdbatch.prompts.check import check_rows
from sdbatch.prompts.table import open_table
from tests.pictures import colours, save


@pytest.fixture
def checked(write, make_job):
    """Return a function from a CSV to the check of its rows."""

    def build(text, whole=False, sampling=None, **prompts):
        path = write("t.csv", text)
        job = make_job(prompts={"path": str(path), **prompts}, sampling=sampling or {})
        return check_rows(job, open_table(job.prompts), whole=whole)

    return build


def csv(column, cells):
    return f"prompt,{column}\n" + "".join(f"p{i},{cell}\n" for i, cell in enumerate(cells))


def test_the_first_three_rows_are_shown_as_they_will_be_drawn(checked):
    found = checked(csv("seed", [5, 6, 7, 8]), sampling={"negative_prompt": "blurry"})
    assert (found.rows, len(found.examples)) == (4, 3)
    assert found.examples[0] == {
        "row_key": "0",
        "prompt": "p0",
        "negative_prompt": "blurry",
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "sampler": "dpmpp_2m",
        "seed": 5,
    }
    assert found.text()[:2] == [
        "row 0      'p0'",
        "           64x64, 4 steps, guidance 7.5, dpmpp_2m, seed 5, negative 'blurry'",
    ]


def test_only_the_first_rows_are_resolved_unless_all_are_wanted(checked):
    table = csv("width", [*([64] * 150), 65])
    assert (checked(table).rows, list(checked(table).notes())) == (100, [])
    whole = checked(table, whole=True)
    assert whole.rows == 151
    assert list(whole.notes()) == [
        "1 of 151 rows cannot be drawn: width = '65': must be a multiple of 8 (the "
        "first is row '150')"
    ]
    assert whole.text()[-1].startswith("checked    151 rows, ")
    assert checked(table, whole=True, limit=10).rows == 10


def test_rows_that_cannot_be_drawn_are_counted_by_column_and_rule(checked):
    found = checked(csv("width", [65, 171, 5000, "x", 64]))
    assert [(fault.rows, fault.row) for fault in found.faults] == [
        (2, "'0'"),
        (1, "'2'"),
        (1, "'3'"),
    ]
    assert [example["row_key"] for example in found.examples] == ["4"]
    assert next(found.notes()) == (
        "2 of the first 5 rows cannot be drawn: width = '65': must be a multiple of 8 "
        "(the first is row '0')"
    )


def test_a_row_without_an_id_is_named_by_its_number(checked):
    found = checked(csv("name", ["a", ""]), columns={"id": "name"})
    assert [(fault.example, fault.row) for fault in found.faults] == [
        ("id = null: must be set", "number 1")
    ]


def test_syntax_that_is_drawn_as_text_is_counted(checked):
    found = checked("prompt\na dog\na (red:1.2) dog\n[a|b] BREAK b\na AND b\n")
    assert list(found.notes()) == [
        "2 of the first 4 rows have prompts like '(red:1.2)': drawn as text, as "
        "sampling.prompt_weights is off (the first is row '1')",
        "1 of the first 4 rows have prompts like 'AND': drawn as text, as "
        "sampling.prompt_weights does not read it either (the first is row '3')",
    ]


def test_syntax_in_a_negative_prompt_counts(checked):
    (note,) = checked(csv("negative_prompt", ["(bad:1.5)"])).notes()
    assert "'(bad:1.5)': drawn as text" in note


def test_prompts_whose_weights_cannot_be_read_are_rows_that_cannot_be_drawn(checked):
    found = checked(
        "prompt\na (red:1.2) dog\na <lora:x:0.8> b\n", sampling={"prompt_weights": True}
    )
    (fault,) = found.faults
    assert (fault.rows, fault.row) == (1, "'1'")
    assert fault.example.startswith("prompt = '<lora:")
    assert (found.weights, found.syntax) == (None, None)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"prompt": "a BREAK b"}, "prompt = 'BREAK': must have chunk_prompts"),
        ({"negative_prompt": "a [b|c"}, "negative_prompt = '[b|': must be [before:after:when]"),
        ({"prompt_b": "[a:a AND b:20]"}, "prompt_b = 'AND': networks and AND are not"),
    ],
)
def test_what_changes_over_time_is_read_at_every_step(checked, values, error):
    row = {"prompt": "a dog", "negative_prompt": "", "prompt_b": "", **values}
    table = f"{','.join(row)}\n{','.join(row.values())}\n"
    (fault,) = checked(table, sampling={"prompt_weights": True}).faults
    assert fault.example.startswith(error)
    if "BREAK" in error:
        both = {"prompt_weights": True, "chunk_prompts": True}
        assert checked(table, sampling=both).faults == []


def test_equal_ids_and_equal_prompts_with_equal_seeds_are_counted(checked):
    table = "prompt,name,seed\na,1,5\na,2,5\nb,1,5\na,1,6\n"
    found = checked(table, whole=True, columns={"id": "name"})
    assert (found.ids, found.images, found.hashed) == (2, 1, 4)
    assert list(found.notes()) == [
        "2 rows have the id of an earlier row, so that they share its key",
        "1 images have the prompt and the seed of an earlier image",
    ]
    first = checked(table, columns={"id": "name"})
    assert (first.ids, first.images) == (None, None)


def test_copies_whose_seeds_overlap_are_equal_images(checked):
    found = checked("prompt,seed\na,5\na,7\nb,5\n", whole=True, images_per_row=3)
    assert found.images == 1  # a with seed 7
    assert found.ids is None


def test_the_memory_for_equal_images_has_a_bound(checked, monkeypatch):
    monkeypatch.setattr(check, "MOST_HASHES", 4)
    table = "prompt,seed\n" + "a,5\n" * 6
    found = checked(table, whole=True)
    assert (found.images, found.hashed) == (3, 4)
    (note,) = found.notes()
    assert note.startswith("3 images among the first 4 have")
    many = checked(table, whole=True, images_per_row=3)
    assert (many.hashed, many.images) == (4, 1)


@pytest.mark.parametrize("whole", [False, True])
def test_rows_of_several_files_are_checked_in_order(write, make_job, tmp_path, whole):
    for name in ("a", "b"):
        write(f"t/{name}.csv", "prompt,width\nx,64\ny,65\n")
    job = make_job(prompts={"path": str(tmp_path / "t")})
    found = check_rows(job, open_table(job.prompts), whole=whole)
    assert found.rows == 4
    assert [(fault.rows, fault.row) for fault in found.faults] == [(2, "'1'")]


def test_rows_in_the_job_file_are_checked(make_job):
    job = make_job(prompts={"path": None, "rows": [{"prompt": "a", "sampler": 9}]})
    for whole in (False, True):
        (fault,) = check_rows(job, open_table(job.prompts), whole=whole).faults
        assert fault.example == (
            "sampler = 9: must be a sampler's name, or DiffusionDB's number of one, 1 to 8"
        )


LCM = Distilled("model.loras.0", few_steps.LCM, "its name")
FITTING = {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.5}


def notes_on(job, *distilled):
    return list(check_rows(job, open_table(job.prompts), distilled).notes())


def test_values_that_a_distilled_lora_does_not_draw_with_are_counted(make_job):
    assert notes_on(make_job(), LCM) == [
        "6 of the first 6 rows have sampler = 'dpmpp_2m': must be lcm with model.loras.0, an LCM "
        "by its name (the first is row '0')",
        "6 of the first 6 rows have guidance_scale = 7.5: must be 1 to 2 with model.loras.0, an "
        "LCM by its name (the first is row '0')",
    ]
    assert notes_on(make_job(sampling=FITTING), LCM) == []


def test_rows_are_judged_by_the_loras_and_the_values_that_they_choose(make_job):
    rows = [
        {"prompt": "a fox"},
        {"prompt": "a fox <lora:fast:1>", **FITTING},
        {"prompt": "a fox", "loras": "fast", **FITTING, "guidance_scale": 4},
        {"prompt": "a fox <lora:fast:0>"},
    ]
    loras = [{"path": "fast.safetensors", "name": "fast"}]
    job = make_job(prompts={"path": None, "rows": rows}, model={"path": "m", "loras": loras})
    assert notes_on(job, replace(LCM, lora="fast")) == [
        "1 of the first 4 rows have guidance_scale = 4.0: must be 1 to 2 with model.loras.0, an "
        "LCM by its name (the first is row '2')"
    ]


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_a_sampler_for_distilled_models_is_noted_without_one(make_job, sampler):
    (note,) = notes_on(make_job(sampling={"sampler": sampler}))
    assert note.startswith(f"6 of the first 6 rows have sampler = '{sampler}', which is for models")


def test_a_model_that_says_how_it_is_drawn_is_not_drawn_otherwise(make_job, write):
    model = Distilled("model.path", few_steps.LCM, "its LCMScheduler", certain=True)
    job = make_job()
    with pytest.raises(
        JobError, match=r"^sampling.sampler = 'dpmpp_2m': must be lcm with model.path, an LCM"
    ):
        notes_on(job, model)
    job = make_job(sampling={**FITTING, "guidance_scale": 7.5})
    with pytest.raises(JobError, match=r"^sampling.guidance_scale = 7.5: must be 1 to 2 with"):
        notes_on(job, model)
    (note,) = notes_on(make_job(sampling={**FITTING, "num_inference_steps": 20}), model)
    assert "num_inference_steps = 20: must be 1 to 8" in note  # which spoils nothing
    table = write("t.csv", "prompt,sampler,guidance_scale\na,lcm,1\nb,euler,1\n")
    (note,) = notes_on(make_job(prompts={"path": table}), model)
    assert note.startswith("1 of the first 2 rows have sampler = 'euler': must be lcm")


def test_pictures_that_the_first_rows_name_are_looked_for_where_they_are_files(checked, write):
    write("a.png", save(colours(8, 8)))
    write("a.txt", "no picture")
    cells = [
        "a.png,",
        "b.png,",
        "a.txt,",
        ",a.png",
        "http://127.0.0.1:9/a.png,",
        "c.png,",
        "a.png,d.png",
    ]
    found = checked("image,mask_image,prompt\n" + "".join(f"{cell},p\n" for cell in cells))
    assert [(fault.rows, fault.row) for fault in found.faults] == [
        (2, "'1'"),
        (1, "'2'"),
        (1, "'3'"),
        (1, "'6'"),
    ]
    first = next(found.notes())
    assert first.startswith("2 of the first 7 rows cannot be drawn: image = 'b.png': No such file")
    missing = checked("image,prompt\n" + "b.png,p\n" * 150, whole=True)
    assert missing.faults[0].rows == check.FIRST_ROWS  # the others are not looked for


def test_a_mask_that_a_path_names_is_no_fault_where_pictures_are_in_the_table(make_job, write):
    write("m.png", save(colours(8, 8)[..., 0]))
    images = [save(colours(8, 8))] * 3
    table = pa.table({"prompt": ["a"] * 3, "image": images, "mask_image": ["m.png", None, "x.png"]})
    job = make_job(prompts={"path": write("t.parquet", table)})
    (fault,) = check.check_rows(job, open_table(job.prompts)).faults
    assert (fault.rows, fault.row) == (1, "'2'")
    assert fault.example.startswith("mask_image = 'x.png': No such file")


def test_one_prompt_and_seed_for_several_pictures_are_no_repeated_images(checked, write):
    for name in "ab":
        write(f"{name}.png", save(colours(8, 8)))
    rows = "prompt,seed,image\na dog,1,a.png\na dog,1,b.png\n"
    assert [*checked(rows, whole=True).notes()] == []
    notes = [*checked(rows.replace("image", "photo"), whole=True).notes()]
    assert notes == ["1 images have the prompt and the seed of an earlier image"]
