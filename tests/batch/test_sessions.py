"""The folders of the Rays that runs start do not grow in number without end."""

import os

from sdbatch.batch import sessions
from sdbatch.retention import KEPT


def make_session(folder, number, mark=True):
    """Make the folder of a Ray as a run that is over left it; a later number is newer."""
    session = folder / f"session_{number}"
    (session / "logs").mkdir(parents=True)
    if mark:
        (session / sessions.MARK).touch()
        os.utime(session / sessions.MARK, (number, number))
    return session


def test_the_folders_of_old_runs_are_removed_and_those_of_the_last_few_stay(tmp_path):
    old = [make_session(tmp_path, number) for number in range(KEPT + 2)]
    own = make_session(tmp_path, 99, mark=False)
    (tmp_path / "session_latest").symlink_to(own)
    with sessions.marked(own):
        assert [path for path in old if not path.exists()] == old[:2]
        assert own.exists()
    assert len(list(tmp_path.glob("session_[0-9]*"))) == KEPT + 1


def test_the_folders_of_living_runs_and_of_other_rays_stay(tmp_path):
    living = make_session(tmp_path, 0, mark=False)
    others = make_session(tmp_path, 1, mark=False)
    with sessions.marked(living):
        os.utime(living / sessions.MARK, (0, 0))  # though it is the oldest
        for number in range(2, 2 + KEPT):
            make_session(tmp_path, number)
        before = set(tmp_path.iterdir())
        with sessions.marked(make_session(tmp_path, 99, mark=False)):
            assert before <= set(tmp_path.iterdir())
    assert (living / "logs").exists()
    assert (others / "logs").exists()


def test_many_runs_leave_a_few_folders(tmp_path):
    for number in range(4 * KEPT):
        with sessions.marked(make_session(tmp_path, number, mark=False)):
            os.utime(tmp_path / f"session_{number}" / sessions.MARK, (number, number))
    assert len(list(tmp_path.iterdir())) == KEPT + 1
