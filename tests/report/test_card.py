"""The dataset card: its content, and that `datasets` loads the output with it."""

import re
from dataclasses import replace

import pyarrow as pa
import pytest
import yaml

from sdbatch.report.card import dataset_card
from sdbatch.report.closing import Report
from tests.finished import PROMPTS, finish, small_job

REPORT = Report(
    output="out/dogs",
    planned=1500,
    images=1490,
    failed=10,
    reasons={"no prompt": 7, "height = 13: must be a multiple of 8": 3},
    drawn_now=1490,
    seconds=1.0,
    images_per_s=1.0,
    began=0.0,
)
DRAWN = [prompt for prompt in PROMPTS if prompt != "fail"]
IMAGE = {"parquet": "image", "webdataset": "jpg"}


def read_front_matter(text):
    """Return what Hugging Face reads between the first two lines of dashes."""
    before, front_matter, _ = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    assert before == ""
    return yaml.safe_load(front_matter)


def load_output(output, folder, **options):
    import datasets

    return datasets.load_dataset(str(output.folder), cache_dir=str(folder / "cache"), **options)


@pytest.mark.parametrize(
    ("name", "output_format", "files"),
    [("dogs", "parquet", "data/*.parquet"), ("cats", "webdataset", "data/*.tar")],
)
def test_card_has_front_matter_that_names_the_dataset_and_its_files(
    name, output_format, files, make_job
):
    front_matter = read_front_matter(
        dataset_card(make_job(name=name, output={"format": output_format}), REPORT)
    )

    assert front_matter["pretty_name"] == name
    assert front_matter["configs"] == [{"config_name": "default", "data_files": files}]
    assert front_matter["task_categories"] == ["text-to-image"]
    assert "synthetic" in front_matter["tags"]
    assert front_matter["annotations_creators"] == ["machine-generated"]


@pytest.mark.parametrize(
    "name", ["dogs: {a} --- #1", "- 'dogs'", "犬 🐕", "{front_matter}", "yes", "%s"]
)
def test_card_has_valid_yaml_when_the_name_has_special_characters(name, make_job):
    text = dataset_card(make_job(name=name), REPORT)

    assert read_front_matter(text)["pretty_name"] == name
    assert f"\n# {name}\n" in text


@pytest.mark.parametrize(
    ("images", "category"),
    [  # https://github.com/huggingface/hub-docs/blob/main/datasetcard.md
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (10**4, "10K<n<100K"),
        (10**5, "100K<n<1M"),
        (10**6, "1M<n<10M"),
        (10**7, "10M<n<100M"),
        (10**8, "100M<n<1B"),
        (10**9, "1B<n<10B"),
        (10**10, "10B<n<100B"),
        (10**11, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_card_has_the_size_category_of_the_images_that_were_drawn(images, category, make_job):
    front_matter = read_front_matter(dataset_card(make_job(), replace(REPORT, images=images)))

    assert front_matter["size_categories"] == [category]


def test_card_describes_how_the_images_were_made_and_that_none_is_a_photograph(make_job):
    model = {"path": "builtin:shapes", "sha256": "0" * 64}
    text = dataset_card(
        make_job(model=model, sampling={"guidance_scale": 3.5, "width": 128}), REPORT
    )

    assert "1,490 images drawn from text by a trained model; none is a photograph." in text
    assert f"- model: builtin:shapes ({'0' * 64})" in text
    assert "dpmpp_2m, 4 steps, guidance 3.5, 128x64" in text
    assert re.search(r"^- fingerprint: [0-9a-f]{16}$", text, re.MULTILINE)


def test_card_lists_why_rows_failed(make_job):
    text = dataset_card(make_job(), REPORT)

    assert "10 rows failed." in text
    assert "\n- 7: no prompt\n- 3: height = 13: must be a multiple of 8\n" in text


def test_card_lists_no_reasons_when_no_row_failed(make_job):
    text = dataset_card(make_job(), replace(REPORT, failed=0, reasons={}))

    assert "0 rows failed." in text
    assert "by reason" not in text


def test_card_does_not_depend_on_the_output_folder(make_job):
    first, second = (
        dataset_card(make_job(name="dogs", output={"path": path}), REPORT)
        for path in ("out/a", "s3://b/c")
    )

    assert first == second


@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_card_lets_datasets_load_the_folder_without_its_failed_rows(
    output_format, make_job, tmp_path
):
    from PIL import Image

    output = finish(small_job(make_job, tmp_path, output={"format": output_format}))
    assert (output.folder / "failed" / "000000.parquet").exists()
    dataset = load_output(output, tmp_path)

    assert list(dataset) == ["train"]
    images = list(dataset["train"][IMAGE[output_format]])
    assert [type(image) for image in images] == [type(images[0])] * len(DRAWN)
    assert isinstance(images[0], Image.Image)


def test_card_lets_datasets_load_every_column_of_the_rows_that_were_drawn(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path))
    dataset = load_output(output, tmp_path, split="train")

    assert list(dataset["prompt"]) == DRAWN
    assert list(dataset["row_key"]) == ["0", "2", "4", "5"]
    assert set(dataset["nsfw"]) == {None}


@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_card_lets_datasets_load_a_column_that_is_null_at_first(output_format, make_job, tmp_path):
    """Without types in the card, `datasets` infers those of a tar from its first five images."""
    table = pa.table({"prompt": ["a dog"] * 8, "breed": [None] * 6 + ["pug"] * 2})
    output = {"format": output_format, "images_per_shard": 8}
    dataset = load_output(
        finish(small_job(make_job, tmp_path, table, output=output)), tmp_path, split="train"
    )
    rows = dataset["json"] if output_format == "webdataset" else dataset

    assert [row["breed"] for row in rows] == table["breed"].to_pylist()


@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_card_has_code_that_loads_the_images_when_run_in_the_folder(
    output_format, make_job, tmp_path, monkeypatch
):
    import datasets

    output = finish(small_job(make_job, tmp_path, output={"format": output_format}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(output.folder)
    (code,) = re.findall(
        r"```python\n(.*?)```", (output.folder / "README.md").read_text(), re.DOTALL
    )
    names = {}
    exec(code, names)

    assert names["images"].num_rows == len(DRAWN)


def test_card_cuts_a_long_name_and_long_reasons_with_a_mark(make_job):
    report = replace(REPORT, reasons={f"{i} {'x' * 10_000_000}": 1 for i in range(3)})
    card = dataset_card(make_job(name="n" * 10_000_000), report)
    assert len(card) < 10_000
    assert f"- 1: 2 {'x' * 498} ...\n" in card
    assert len(read_front_matter(card)["pretty_name"]) == 504


def test_card_says_if_several_kinds_of_device_drew_the_output(make_job):
    several = replace(REPORT, devices={"H100 (x)": 1480, "A100 (y)": 10})
    words = "again. 2 kinds of device drew this output: 1,480 images by H100 (x), 10 images by A10"
    assert words in dataset_card(make_job(), several)
    assert "kinds of device" not in dataset_card(make_job(), REPORT)


def test_card_says_how_many_images_were_drawn_from_pictures(make_job):
    page = dataset_card(make_job(), replace(REPORT, from_pictures=12))
    assert "1,490 images drawn from text by a trained model, 12 of them also from pictures" in page
    assert "none is a photograph" not in page
    assert read_front_matter(page)["task_categories"] == ["text-to-image", "image-to-image"]
    assert "none is a photograph" in dataset_card(make_job(), REPORT)
