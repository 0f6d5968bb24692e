"""What one must touch to extend sdbatch: each extension is made in a copy of it, and works whole.

An extension is a list of edits; their number is the number of places. ARCHITECTURE.md, "How to
add", says the same in words.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import flow_family

ROOT = Path(__file__).parent.parent

# Each edit is (file, text after which it goes, what goes there); a new file has no such text.
EXTENSIONS = {
    "a sampling key": [
        (
            "sampling.py",
            "class Sampling(Section):\n"
            '    """How an image is drawn. A column of the same name wins, row by row."""\n',
            '    sharpness: Annotated[Share, Key("Sharpness", "sharpness")] = 0\n',
        ),
        (
            "models/sd1/family.py",
            "    keys = frozenset(\n        {\n",
            '            "sharpness",\n',
        ),
        (
            "models/sd1/family.py",
            "        return torch.randn(shape, generator=generator)[0]",
            " * (1 + request.sharpness)",
        ),
    ],
    "a sampler": [
        ("samplers.py", "SAMPLERS = {\n", '    "ddpm": Sampler("DDPMScheduler", "DDPM"),\n'),
    ],
    "an image format": [
        (
            "registry.py",
            "IMAGE_FORMATS: Mapping[str, ImageFormat] = {\n",
            '    "avif": ImageFormat("AVIF", "image/avif", "avif", "exif", 80, 1.2, 2.0, 4),\n',
        ),
    ],
    "an output format": [
        (
            "registry.py",
            "OUTPUT_FORMATS: Mapping[str, OutputFormat] = {\n",
            '    "arrow": OutputFormat("arrow", "sdbatch.output.formats.arrow"),\n',
        ),
        (
            "output/formats/arrow.py",
            None,
            """
            import pyarrow as pa

            def write(rows, output):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_file(sink, rows.schema) as file:
                    file.write_table(rows)
                return sink.getvalue().to_pybytes()

            def read(file, columns=None):
                yield from pa.ipc.open_file(file).read_all().to_pylist()

            def card_features(output):
                return {"license": "other"}
            """,
        ),
    ],
    "a model option with a file": [
        (
            "job/sections.py",
            '    """The model: Stable Diffusion 1.5 or one of the same architecture."""\n',
            "    offset: Annotated[str | None, FileKey(('.safetensors',))] = None\n",
        ),
        (
            "models/sd1/loading.py",
            "    networks = adapters.fuse_loras(parts, settings)\n",
            "    if settings.offset:\n"
            "        offset = read_weights(settings.offset)['b']\n"
            "        parts['vae'].decoder.conv_out.bias.data += offset\n",
        ),
    ],
    "a stage": [
        (
            "registry.py",
            "STAGES: dict[str, StageKind] = {",
            '"measure": StageKind("sdbatch.stages.measure", ("bytes",)), ',
        ),
        (
            "stages/measure.py",
            None,
            """
            import pyarrow as pa

            from sdbatch.stages.base import Needs, Stage

            class Measure(Stage):
                name = "measure"
                needs = Needs(columns=("image",))
                adds = pa.schema([("file_bytes", pa.int64())])

                def __call__(self, rows):
                    sizes = [image and len(image["bytes"]) for image in rows["image"].to_pylist()]
                    return rows.append_column(self.adds[0], pa.array(sizes, pa.int64()))

            def make(what):
                return Measure()
            """,
        ),
    ],
    "a model family": [
        (
            "registry.py",
            "FAMILIES: dict[str, str] = {\n",
            f'    "{flow_family.PIPELINE}": "sdbatch.models.flow",\n',
        ),
        ("models/flow/__init__.py", None, Path(flow_family.__file__).read_text()),
    ],
}
PLACES = {
    "a sampling key": 3,
    "a sampler": 1,
    "an image format": 1,
    "an output format": 2,
    "a model option with a file": 2,
    "a stage": 2,
    "a model family": 2,
}

PROBES = {
    "a sampling key": """
        import numpy as np
        from sdbatch import schema
        from sdbatch.output.image_file import infotext, read_parameters
        from sdbatch.serve import a1111, requests as api
        from tests import flow_family
        table = pa.table({"prompt": ["a dog"] * 3, "sharpness": [None, 0.5, 2.0], "seed": [1] * 3})
        pq.write_table(table, "table.parquet")
        job = job_of(prompts={"path": "table.parquet"}, sampling={"sharpness": 0.25})
        output = finish(job, engine_of(job))
        rows = list(open_images(output.store).rows())
        assert [row["sharpness"] for row in rows] == [0.25, 0.5]
        assert rows[0]["sha256"] != rows[1]["sha256"]
        values = read_parameters(rows[1]["image"]["bytes"])
        assert values["sharpness"] == 0.5 and "Sharpness: 0.5" in infotext(values)
        assert output.report.failed == 1 and "sharpness = 2.0" in next(iter(output.report.reasons))
        assert "sharpness" in json_schema() and "sharpness" in job_page()
        assert "sharpness" in a1111.Txt2Img.model_fields
        assert "sharpness" in api.Generation.model_fields
        try:
            job_of(sampling={"sharpness": 3.0})
        except JobError as error:
            assert "sampling.sharpness = 3.0" in str(error)
        else:
            raise AssertionError("out of range")
        with pytest.MonkeyPatch.context() as patch:
            flow_family.register(patch)
            flow_family.write_folder(Path("flow"))
            job = job_of(model="flow", sampling={"sharpness": 0.25, "sampler": "euler"})
            future = engine_of(job)().submit(request_of(job))
        assert "this model has no sharpness" in str(future.exception()), future.exception()
    """,
    "a sampler": """
        from sdbatch import samplers
        from sdbatch.serve import a1111
        job = job_of(sampling={"sampler": "ddpm"})
        output = finish(job, engine_of(job))
        assert (output.report.images, output.report.failed) == (4, 0)
        row = next(open_images(output.store).rows())
        assert row["sampler"] == "ddpm" and samplers.title("ddpm") == "DDPM"
        assert "ddpm" in job_page() and '"ddpm"' in json_schema()
    """,
    "an image format": """
        from sdbatch.output.image_file import read_parameters
        from sdbatch.serve import requests as api
        for file_format in ("parquet", "webdataset"):
            job = job_of(output={"image_format": "avif", "format": file_format,
                                 "path": file_format})
            output = finish(job)
            row = next(open_images(output.store).rows())
            picture = Image.open(io.BytesIO(row["image"]["bytes"]))
            assert (picture.format, row["image"]["path"]) == ("AVIF", f"{row['key']}.avif")
            assert read_parameters(row["image"]["bytes"])["prompt"] == row["prompt"]
            assert faults(output.store) == []
        assert job.output.encoder_quality == 80
        assert "avif" in str(api.Generation.model_json_schema()) and '"avif"' in json_schema()
    """,
    "an output format": """
        job = job_of(output={"format": "arrow"})
        output = finish(job)
        assert output.store.names("data").keys() == {"000000.arrow", "000001.arrow"}
        assert len(list(open_images(output.store).rows())) == 4
        assert faults(output.store) == []
        card = output.store.read("README.md").decode()
        assert "data/*.arrow" in card and "license: other" in card
        proof = require_record(output.store).proof()
        lifecycle.sweep(output.store, proof, output.receipts[:1])  # as if the rest were of a kill
        assert output.store.names("data").keys() == {"000000.arrow"}
    """,
    "a model option with a file": """
        import torch
        from safetensors.torch import save_file
        from sdbatch import resolve
        from sdbatch.models.find_model import sha256
        from sdbatch.output import identity
        from sdbatch.submit import pack
        Path("files").mkdir()
        save_file({"b": torch.ones(3)}, "files/offset.safetensors")
        plain, job = job_of(), job_of(model={"path": "model", "offset": "files/offset.safetensors"})
        hashes = [sha256(resolve.find_model(each)[0]) for each in (plain, job)]
        assert hashes[0] != hashes[1]
        assert Path("files/offset.safetensors") in pack.files_to_send(job).values()
        assert identity.identity(job, {})["model"]["offset"] == "offset.safetensors"
        drawn = [engine_of(each)().submit(request_of(each)).result().image for each in (plain, job)]
        assert (drawn[1] != drawn[0]).any()
        try:
            resolve.find_model(job_of(model={"path": "model", "offset": "missing.safetensors"}))
        except ModelError as error:
            assert str(error).startswith("model.offset = 'missing.safetensors': must be")
        else:
            raise AssertionError("a missing file")
    """,
    "a stage": """
        job = job_of(stages=[{"measure": "bytes"}])
        output = finish(job)
        for row in open_images(output.store).rows():
            assert row["file_bytes"] == len(row["image"]["bytes"])
        assert faults(output.store) == [] and "measure" in json_schema()
        try:
            job_of(stages=[{"measure": "weight"}])
        except JobError as error:
            assert "must be 'bytes'" in str(error)
        else:
            raise AssertionError("an unknown value")
    """,
    "a model family": """
        from tests import flow_family
        flow_family.write_folder(Path("flow"))
        job = job_of(model="flow", sampling={"sampler": "euler", "height": 40, "width": 24})
        output = finish(job, engine_of(job))
        assert (output.report.images, output.report.failed) == (4, 0)
        rows = list(open_images(output.store).rows())
        assert len({row["sha256"] for row in rows}) == 4 and faults(output.store) == []
        assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (24, 40)
    """,
}
HEAD = """
    import io
    import runpy
    from pathlib import Path

    import pyarrow as pa
    import pyarrow.parquet as pq
    import pytest
    from PIL import Image

    from sdbatch import resolve
    from sdbatch.engine.request import Request
    from sdbatch.errors import JobError, ModelError
    from sdbatch.job import json_schema, parse
    from sdbatch.output import lifecycle
    from sdbatch.output.reader import open_images
    from sdbatch.output.record import require_record
    from sdbatch.output.verify import verify_output
    from tests import tiny
    from tests.finished import finish

    tiny.write_folder(Path("model"))

    def job_of(**sections):
        values = {
            "prompts": {"rows": [{"prompt": f"dog {i}"} for i in range(4)]},
            "model": "model",
            "sampling": {"height": 64, "width": 64, "num_inference_steps": 4},
            "output": {"path": "out", "images_per_shard": 2},
        }
        for name, section in sections.items():
            old = values.get(name)
            both = isinstance(section, dict) and isinstance(old, dict) and "path" not in section
            values[name] = {**old, **section} if both or name == "output" else section
        return parse(values)

    def engine_of(job):
        files, job = resolve.find_model(job)
        return resolve.resolve(job, files, 0, None).make_engine({"sampler": "sampler"})

    def request_of(job):
        return Request(prompt="a dog", **job.sampling.model_dump())

    def faults(store):
        return list(verify_output(store))

    def job_page():
        return runpy.run_path(str(Path(ROOT) / "docs" / "reference.py"))["page"]()
"""


RUN = """
import os, runpy, sys

for folder in sys.argv[1:]:
    os.chdir(folder)
    runpy.run_path("probe.py")
"""


@pytest.fixture
def probe(tmp_path):
    """Make extensions in a copy of the package, and run their probes, each in its own folder."""

    def run(*extensions: str) -> None:
        package = tmp_path / "copy" / "sdbatch"
        ignored = shutil.ignore_patterns("__pycache__", "builtin")
        shutil.copytree(ROOT / "sdbatch", package, ignore=ignored)
        os.symlink(ROOT / "sdbatch" / "builtin", package / "builtin")
        os.symlink(ROOT / "tests", tmp_path / "copy" / "tests")
        for extension in extensions:
            extend(package, EXTENSIONS[extension])
            folder = tmp_path / extension
            folder.mkdir()
            text = textwrap.dedent(HEAD) + textwrap.dedent(PROBES[extension])
            (folder / "probe.py").write_text(f"ROOT = {str(ROOT)!r}\n{text}")
        done = subprocess.run(
            [sys.executable, "-c", RUN, *(str(tmp_path / extension) for extension in extensions)],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "copy")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    return run


def extend(package: Path, edits) -> None:
    for name, after, text in edits:
        file = package / name
        if after is None:
            file.parent.mkdir(exist_ok=True)
            file.write_text(textwrap.dedent(text))
        else:
            source = file.read_text()
            assert source.count(after) == 1, f"{name}: {after}"
            file.write_text(source.replace(after, after + text))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_extension_touches_few_places(extension):
    assert len(EXTENSIONS[extension]) == PLACES[extension]


def test_all_extensions_work_whole_together(probe):
    probe(*EXTENSIONS)


@pytest.mark.slow
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_extension_works_whole_alone(probe, extension):
    probe(extension)
