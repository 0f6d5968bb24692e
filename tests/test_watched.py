"""A command in a child process, and what its parent says if it dies without a word."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wait import wait_until

COMMAND = """
import os, signal, sys, threading, time
from sdbatch.watched import watch
watched = watch(lambda process, how, log: print(f"{process} ended with {how}, {log}"))
watched.note(b"a.log")
"""


def start(code, before=""):
    return subprocess.Popen(
        [sys.executable, "-c", before + COMMAND + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def ended(code):
    """Run the code in a watched child; return its exit code, and what it and its parent print."""
    with start(code) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_an_exit_code_that_the_command_means_is_passed_on_without_a_word(code):
    assert ended(f"print('drawn'); sys.exit({code})") == (code, "drawn\n", "")


def test_a_traceback_of_the_command_is_not_commented_on():
    code, out, err = ended("raise ValueError('a bug')")
    assert (code, out) == (1, "")
    assert err.endswith("ValueError: a bug\n")


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("os.abort()", "signal SIGABRT"),
        ("os._exit(0)", "exit code 0"),
        ("os._exit(1)", "exit code 1"),
    ],
)
def test_the_parent_says_how_the_command_died_and_fails(death, how):
    code, out, _ = ended(f"print(os.getpid(), flush=True); {death}")
    process, said = out.splitlines()
    assert (code, said) == (1, f"{process} ended with {how}, a.log")


def test_a_signal_to_stop_reaches_the_command_once():
    code = """
count = 0
def stop(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
while not count:
    time.sleep(0.01)
time.sleep(0.2)
sys.exit(10 + count)
"""
    with start(code) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 11


def test_a_command_that_does_not_stop_is_killed_by_the_fourth_signal():
    code = """
heard = 0
def hear(*_):
    global heard
    heard += 1
    print("heard", flush=True)
signal.signal(signal.SIGTERM, hear)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""
    with start(code) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "heard\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        assert "signal SIGKILL" in process.stdout.read()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a child with its parent")
def test_the_command_dies_with_its_parent():
    with start("print(os.getpid(), flush=True); time.sleep(600)") as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait(60)
        wait_until(lambda: not _runs(child), 60)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_nothing_is_forked_while_other_threads_run():
    code = """
import threading, time
from sdbatch.watched import watch
threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
print(watch(print))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "None\n", done.stderr


def test_a_command_that_exits_at_once_runs_nothing_more():
    code = """
import atexit
atexit.register(print, "a handler of the interpreter")
watched.exit(3)
"""
    assert ended(code) == (3, "", "")


def test_a_signal_after_the_last_word_of_a_command_is_a_failure():
    code = """
watched.note(b"\\0")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert ended(code) == (1, "", "")
