"""One local Ray for all tests of the folder; runs use a Ray that is there already."""

import pytest

from sdbatch.batch import pipeline
from sdbatch.report.progress import SilentDisplay
from tests.fakes import FakeEngine


@pytest.fixture(scope="module")
def ray_local():
    import ray

    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture
def draw(ray_local):
    """Run a job with the fake engine, or with another one; returns the report."""

    def run(job, make_engine=FakeEngine, display=None, **options):
        of_drawing = {name: options.pop(name) for name in ("max_failed",) if name in options}
        ready = pipeline.prepare(job, **options)
        return pipeline.draw(
            ready, display=display or SilentDisplay(), make_engine=make_engine, **of_drawing
        )

    return run


@pytest.fixture
def prompts(tmp_path):
    """Write a table of prompts, one a line, and return its path."""

    def write(*lines: str, name: str = "table.txt") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    return write
