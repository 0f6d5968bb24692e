"""One local Ray for the tests of a module; runs use a Ray that is there already."""

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
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def draw(ray_local):
    """Run a job with the fake engine, or with another one; returns the report."""

    def run(job, make_engine=FakeEngine, display=None):
        return pipeline.draw(
            pipeline.prepare(job), display=display or SilentDisplay(), make_engine=make_engine
        )

    return run
