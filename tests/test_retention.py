"""What runs leave on a machine: the logs of living runs and of the last few."""

import os
import subprocess
import sys

import pytest

from sdbatch import retention


@pytest.fixture
def logs(tmp_path):
    """Write eight logs, the first one the oldest."""
    files = [tmp_path / f"{number}.log" for number in range(8)]
    for number, file in enumerate(files):
        file.touch()
        os.utime(file, (number, number))
    return files


def test_all_but_the_newest_five_logs_are_of_old_runs(logs):
    assert sorted(retention.of_old_runs(logs)) == logs[:3]
    assert retention.of_old_runs(logs[:5]) == []


def test_the_log_of_a_run_that_lives_is_not_old(logs):
    with logs[1].open("a") as held:
        retention.lock(held.fileno())
        assert sorted(retention.of_old_runs(logs)) == [logs[0], logs[2]]
    assert sorted(retention.of_old_runs(logs)) == logs[:3]


def test_a_log_is_not_old_while_a_process_lives_that_inherited_it(logs):
    with logs[1].open("a") as held:
        retention.lock(held.fileno())
        wait = "import sys; sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, stdout=held)
    assert logs[1] not in retention.of_old_runs(logs)
    child.communicate()
    assert logs[1] in retention.of_old_runs(logs)


def test_links_and_files_that_vanish_are_left_alone(logs, tmp_path):
    link = tmp_path / "link.log"
    link.symlink_to(logs[0])
    assert sorted(retention.of_old_runs([link, tmp_path / "gone", *logs])) == logs[:3]


def test_the_folder_of_logs_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(retention.tempfile, "tempdir", str(tmp_path))
    folder = retention.log_folder()
    assert folder == str(tmp_path / f"sdbatch-{os.getuid()}") == retention.log_folder()
    assert os.stat(folder).st_mode & 0o777 == 0o700

    os.rmdir(folder)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder)  # of somebody who guessed the name
    assert retention.log_folder() not in (folder, str(tmp_path / "elsewhere"))
