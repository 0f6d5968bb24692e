"""The short part of the chaos suite; `make chaos` runs the long one."""

import random
import sys

import pytest

from tests.chaos.campaign import Episode, check, draw_undisturbed, run_episode
from tests.chaos.pairs import Pair, run_pairs
from tests.chaos.place import new_place

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]


def test_an_output_that_was_broken_at_random_moments_is_as_if_it_was_not(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    names = ["drawing actor KILL", "store throttled", "liveness KILL", "driver KILL"]
    expected = draw_undisturbed(tmp_path / "alone", "parquet")
    episode = Episode(1, "S3, own Ray, parquet")
    with new_place(tmp_path / "broken", on_s3=True) as place:
        try:
            run_episode(episode, place, names, seed)
            check(place, expected)
        except BaseException as error:
            error.add_note(f"seed {seed}: {episode}")
            raise


@pytest.mark.slow
def test_a_second_start_of_another_job_waits_for_its_turn(tmp_path):
    run_pairs([Pair(same_job=False, overwrite=True, on_s3=False, offset=4.0)], tmp_path)
