"""A job that the tests of runs share."""

import pytest


@pytest.fixture
def singles(make_job, prompts):
    """Make a job of a shard for each prompt, of which an actor draws half at a time."""

    def make(*lines, **output):
        return make_job(
            prompts={"path": prompts(*lines)},
            output={"images_per_shard": 1, **output},
            cluster={"actors": 2},
        )

    return make
