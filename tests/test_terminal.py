"""The terminal of a command in a process of its own: pipes that end, logs, notices."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sdbatch.output.verify import verify_output
from sdbatch.retention import KEPT
from sdbatch.storage import Store

RUN = """
    import sys
    from sdbatch.cli import main
    from tests.without_ray import without_ray

    sys.argv = ["sdbatch", "run", "job.yaml", *sys.argv[1:]]
    with without_ray():
        main()
"""
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path):
    """A folder with a job of three shards, and a folder for logs."""
    (tmp_path / "p.txt").write_text("a dog\na cat\na cow\n")
    (tmp_path / "job.yaml").write_text(
        "prompts: {path: p.txt}\nmodel: builtin:shapes\n"
        "sampling: {height: 64, width: 64, num_inference_steps: 2}\n"
        "output: {path: out, images_per_shard: 1}\n"
    )
    (tmp_path / "tmp").mkdir()
    return tmp_path


def start(here, code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(here / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def logs(here):
    return list((here / "tmp" / f"sdbatch-{os.getuid()}").iterdir())


def test_a_run_goes_on_and_says_so_when_nobody_reads_its_progress_any_more(here):
    with start(here, RUN, "--json") as run:
        run.stdout.readline()
        run.stdout.close()  # as `| head -1` does
        _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert err.splitlines() == [
        "The progress cannot be shown any more ([Errno 32] Broken pipe). The run goes on; "
        "`sdbatch status OUTPUT` shows it."
    ]
    assert list(verify_output(Store(str(here / "out")))) == []


def test_many_commands_leave_a_few_logs(here):
    code = """
        from sdbatch.terminal import quiet_terminal
        for number in range(20):
            with quiet_terminal() as (_, _, log):
                open(log).close()
    """
    with start(here, code) as commands:
        assert commands.communicate(timeout=60) == ("", "")
    assert len(logs(here)) == KEPT + 1


def test_warnings_of_sdbatch_are_shown_now_and_then_and_all_of_them_are_in_the_log(here):
    code = """
        import logging, sys
        from sdbatch.terminal import quiet_terminal
        log = logging.getLogger("sdbatch.somewhere")
        with quiet_terminal():
            for number in range(3):
                log.warning("waiting for %s", number)
                log.warning("again: %s", number)
                log.info("a note")
            logging.getLogger("ray").error("not ours")
            print("nor this", file=sys.stderr)
        log.warning("after it")
    """
    with start(here, code) as command:
        out, err = command.communicate(timeout=60)
    assert (out, err) == ("", "waiting for 0\nagain: 0\nafter it\n")
    (log,) = logs(here)
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.startswith("waiting")] == [
        f"waiting for {number}" for number in range(3)
    ]
    assert {"a note", "not ours", "nor this"} <= set(lines)
