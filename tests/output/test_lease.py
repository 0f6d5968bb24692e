"""Which run may write an output: one at a time, whatever the machines and their clocks do."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest

from sdbatch.errors import JobError, StorageError
from sdbatch.output import lease, names
from sdbatch.output.lease import Lease
from sdbatch.output.progress import Heartbeat, Progress, write_heartbeat
from sdbatch.output.receipts import Writer
from sdbatch.storage import Store
from tests.finished import planned

LONG = 600.0  # seconds; no test waits for it
SHORT = 0.01
# Takes the lease of an output when it may, says so, and holds it until its input ends.
TAKE = """
import sys
from sdbatch.errors import SdbatchError
from sdbatch.output import lease
from sdbatch.storage import Store
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    lease.take(store)
    print("taken", flush=True)
except SdbatchError as error:
    print(error, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "out"))


@pytest.fixture
def start(store):
    """Start a process that is about to take the lease of the store."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", TAKE, store.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def take(process):
    """Let a process take the lease, once it is ready; return what it says."""
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def edit(store, run, **changes):
    """Change the file of a run; return the run as its file says now."""
    file = names.run_file(run.number)
    store.put(file, json.dumps({**json.loads(store.read(file)), **changes}).encode())
    return lease.newest_run(store)


def elsewhere(store, **changes):
    """Take the lease as a process of another machine; return its run."""
    run = lease.take(store).run
    return edit(store, run, host="elsewhere", process="another-boot:pid:[1]:5-5", **changes)


def die(held):
    """Make the run of a lease look like one of a process of this machine that is gone."""
    edit(held.store, held.run, pid=2**30)


def beat(store, run, number):
    progress = Progress(planned=1, drawn=0, failed=0, images_per_s=0.0, step="")
    write_heartbeat(store, Heartbeat(run.id, number, "running", 2.0, progress))


@pytest.fixture
def beating():
    """Write heartbeats of a run from a thread until the test ends."""
    ended = threading.Event()
    threads = []

    def begin(store, run):
        def go_on():
            number = 0
            while not ended.wait(0.01):
                number += 1
                beat(store, run, number)

        threads.append(threading.Thread(target=go_on))
        threads[-1].start()

    yield begin
    ended.set()
    for thread in threads:
        thread.join()


def test_a_lease_says_who_holds_it_and_where_since_when(store):
    run = lease.take(store).run
    assert lease.newest_run(store) == run
    assert (run.number, run.host, run.pid) == (1, socket.gethostname(), os.getpid())
    assert re.fullmatch(r"000001-[0-9a-f]{8}", run.id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", run.began)
    assert run.ended is None
    words = f"run {run.id} (process {os.getpid()} on {socket.gethostname()}, since {run.began})"
    assert run.describe() == words


def test_take_is_refused_while_the_first_run_lives_with_who_and_where_since_when(store):
    held = lease.take(store)
    words = (
        f"output.path = {store.url}: {held.run.describe()} is drawing it: must have one run at a "
        f"time. Wait until that run ends, or stop it; `sdbatch status {store.url}` shows it."
    )
    with pytest.raises(JobError, match=f"^{re.escape(words)}$"):
        lease.take(store)
    held.check()
    assert set(store.names("runs")) == {"000001.json"}


def test_take_is_refused_while_a_run_of_another_process_lives(store, start):
    process = start()
    assert take(process) == "taken\n"
    shown = []
    with pytest.raises(JobError, match=rf"process {process.pid} on {socket.gethostname()}, since"):
        lease.take(store, shown.append)
    assert shown == []  # nothing to wait for: the process is on this machine


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_ended_is_followed_at_once_by_the_next_number(store, state):
    first = lease.take(store)
    first.release(state)
    assert lease.newest_run(store) == replace(first.run, ended=state)
    shown = []
    second = lease.take(store, shown.append)
    assert (second.run.number, shown) == (2, [])
    assert set(store.names("runs")) == {"000001.json", "000002.json"}
    second.check()


def test_a_run_whose_process_was_killed_is_followed_at_once(store, start):
    process = start()
    take(process)
    process.kill()
    process.wait()
    assert lease.take(store).run.number == 2


def test_a_run_whose_process_is_a_zombie_is_followed_at_once(store, start):
    process = start()
    take(process)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, but not reaped
    assert lease.take(store).run.number == 2


def test_a_run_whose_number_of_a_process_has_another_process_now_is_followed_at_once(store):
    run = lease.take(store).run
    boot, _, ticks = run.process.rpartition("-")
    edit(store, run, process=f"{boot}-{int(ticks) - 1}")
    assert lease.take(store).run.number == 2


def test_a_run_of_another_machine_without_a_heartbeat_is_gone(store):
    assert not lease.is_alive(store, elsewhere(store), SHORT)


@pytest.mark.parametrize("began", ["1970-01-01T00:00:00Z", "2999-01-01T00:00:00Z", "yesterday"])
@pytest.mark.parametrize("written", [0, 2**33])
def test_a_run_of_another_machine_is_gone_if_its_heartbeat_stays_whatever_the_clocks_say(
    store, began, written
):
    run = elsewhere(store, began=began)
    beat(store, run, 7)
    for name in (names.PROGRESS, names.run_file(1)):
        os.utime(store.path(name), (written, written))
    assert not lease.is_alive(store, run, SHORT)


@pytest.mark.parametrize("began", ["1970-01-01T00:00:00Z", "2999-01-01T00:00:00Z"])
def test_a_run_of_another_machine_lives_if_its_heartbeat_changes(store, beating, began):
    run = elsewhere(store, began=began)
    beating(store, run)
    assert lease.is_alive(store, run, LONG)
    with pytest.raises(JobError, match=rf"run {run.id} \(process \d+ on elsewhere, since {began}"):
        lease.take(store)


class BeatingStore(Store):
    """The heartbeat of a run changes whenever it is read."""

    def __init__(self, url, run):
        super().__init__(url)
        self.run, self.number = run, 0

    def read_if_exists(self, name):
        if name == names.PROGRESS:
            self.number += 1
            beat(self, self.run, self.number)
        return super().read_if_exists(name)


def test_the_heartbeat_of_another_run_is_no_sign_of_life(store):
    run = elsewhere(store)
    other = replace(run, id="000000-other")
    assert not lease.is_alive(BeatingStore(store.url, other), run, SHORT)
    assert lease.is_alive(BeatingStore(store.url, run), run, SHORT)


def test_a_run_whose_process_is_unknown_lives_by_its_heartbeat(store, beating):
    run = elsewhere(store)
    run = edit(store, run, process="")
    assert not lease.is_alive(store, run, SHORT)
    beating(store, run)
    assert lease.is_alive(store, run, LONG)


def test_a_run_whose_process_is_hidden_lives_by_its_heartbeat(store, beating, monkeypatch):
    """As /proc does that is mounted with hidepid, for the processes of other users."""
    run = edit(store, lease.take(store).run, pid=2**30)  # which has no folder in /proc
    assert not lease.is_alive(store, run, LONG)
    monkeypatch.setattr(os, "kill", not_permitted)
    assert not lease.is_alive(store, run, SHORT)
    beating(store, run)
    assert lease.is_alive(store, run, LONG)


def test_a_run_of_another_machine_that_ends_while_it_is_watched_is_followed(store):
    run = elsewhere(store)
    second = lease.take(store, show=lambda text: edit(store, run, ended="finished"))
    assert second.run.number == 2


def test_take_names_the_run_that_began_while_it_watched_another(store):
    run = elsewhere(store)
    other = replace(run, number=2, id="000002-other", host="third")

    def begin(text):
        store.create(names.run_file(2), json.dumps(asdict(other)).encode())

    with pytest.raises(JobError, match=r"run 000002-other \(process \d+ on third, "):
        lease.take(store, show=begin)


@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_threads_that_take_at_the_same_time_one_wins(tmp_path, monkeypatch, has_links):
    if not has_links:  # the others may see its file empty; then it loses, and notices
        monkeypatch.setattr(os, "link", not_permitted)
    for attempt in range(10):
        results = take_at_once(Store(str(tmp_path / str(attempt))))
        leases = [result for result in results if isinstance(result, Lease)]
        assert sum(held.lost() is None for held in leases) == 1
        assert len(leases) == 1 or not has_links
        words = "is drawing it: must have one run at a time"
        assert [result for result in results if words not in str(result)] == leases


def not_permitted(*_):
    raise PermissionError(1, "Operation not permitted")


def take_at_once(store):
    """Take the lease of a store in eight threads; return the leases and errors."""
    results, barrier = [], threading.Barrier(8)

    def try_to_take():
        barrier.wait()
        try:
            results.append(lease.take(Store(store.url)))
        except JobError as error:
            results.append(error)

    threads = [threading.Thread(target=try_to_take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    return results


def test_of_many_processes_that_take_at_the_same_time_one_wins(store, start):
    processes = [start() for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stdout.readline() for process in processes]
    (winner,) = [
        process for process, text in zip(processes, said, strict=True) if text == "taken\n"
    ]
    assert lease.newest_run(store).pid == winner.pid
    assert sum(f"process {winner.pid} on" in text for text in said) == len(said) - 1


GARBAGE = [b"", b"{", b"[]", b"null", b"\xff", bytes(100), b'{"number": 1}', b"[" * 100_000]


@pytest.mark.parametrize("content", GARBAGE)
def test_a_run_whose_file_is_garbage_counts_as_ended(store, content):
    store.begin()
    store.put(names.run_file(3), content)
    run = lease.newest_run(store)
    assert (run.number, run.ended) == (3, "failed")
    assert lease.take(store).run.number == 4


@pytest.mark.parametrize(
    "changes", [{"number": "1"}, {"pid": None}, {"host": 3}, {"more": 1}, {"ended": False}]
)
def test_a_run_whose_file_has_other_types_counts_as_ended(store, changes):
    run = edit(store, lease.take(store).run, **changes)
    assert run.ended == "failed"
    assert lease.take(store).run.number == 2


def test_files_in_runs_that_are_not_of_runs_are_ignored(store):
    store.begin()
    others = ("notes.txt", "000009.json.bak", "x.json", ".half.tmp", "9.json", "0000009.json")
    for name in (*others, "٠٠٠٠٠٩.json"):
        store.put(f"runs/{name}", b"mine")
    assert lease.newest_run(store) is None
    assert lease.take(store).run.number == 1


def test_runs_are_numbered_beyond_six_digits(store):
    store.begin()
    store.put("runs/999999.json", b"")
    assert lease.take(store).run.number == 1_000_000
    assert lease.newest_run(store).number == 1_000_000


def test_an_output_without_runs_has_no_owner(store):
    assert lease.newest_run(store) is None
    store.begin()
    assert lease.newest_run(store) is None


def test_a_lease_works_in_another_process(store):
    held = pickle.loads(pickle.dumps(lease.take(store)))
    held.check()
    die(held)
    lease.take(store)
    with pytest.raises(StorageError, match="owns it now, so this run has ended"):
        held.check()


FILES = {"data/000000.parquet": b"images"}


@pytest.fixture
def writer(store):
    return Writer(lease.take(store), "0123456789abcdef")


def files(store):
    return {name for folder in names.SHARD_FOLDERS for name in store.names(folder)}


def test_a_late_writer_notices_that_another_run_took_over_and_writes_nothing(store, writer):
    die(writer.lease)
    second = lease.take(store)
    words = rf"^output\.path = {store.url}: {re.escape(second.run.describe())} owns it now, so this"
    with pytest.raises(StorageError, match=words):
        writer.lease.check()
    with pytest.raises(StorageError, match=words):
        writer.commit(planned(0), {}, FILES, {})
    assert files(store) == set()
    Writer(second, "0123456789abcdef").commit(planned(0), {}, FILES, {})
    assert files(store) == {"000000.parquet", "000000.json"}


class TakenStore(Store):
    """Another run takes over after a file is put in data/."""

    def put(self, name, data):
        super().put(name, data)
        if name.startswith("data/"):
            die(Lease(self, lease.newest_run(self)))
            lease.take(Store(self.url))


def test_a_writer_that_is_overtaken_while_it_writes_commits_nothing(store, writer):
    late = replace(writer, lease=replace(writer.lease, store=TakenStore(store.url)))
    with pytest.raises(StorageError, match="owns it now, so this run has ended"):
        late.commit(planned(0), {}, FILES, {})
    assert files(store) == {"000000.parquet"}


def test_a_late_writer_commits_nothing_when_its_run_has_ended(store, writer):
    writer.lease.release("stopped")
    with pytest.raises(StorageError, match="this run has ended and commits nothing more"):
        writer.commit(planned(0), {}, FILES, {})
    assert files(store) == set()


def test_a_late_writer_notices_that_its_output_was_moved_away_and_makes_no_new_one(
    store, writer, tmp_path
):
    os.rename(store.url, tmp_path / "moved")
    words = rf"^output\.path = {store.url}: it was moved away or emptied, so this run has ended\.$"
    with pytest.raises(StorageError, match=words):
        writer.lease.check()
    with pytest.raises(StorageError, match=words):
        writer.commit(planned(0), {}, FILES, {})
    writer.lease.release("stopped")
    writer.lease.withdraw()
    assert not os.path.exists(store.url)
    assert files(Store(str(tmp_path / "moved"))) == set()


def test_a_late_writer_notices_that_another_output_is_in_the_place_of_its_own(
    store, writer, tmp_path
):
    os.rename(store.url, tmp_path / "moved")
    second = lease.take(store)
    assert second.run.number == writer.lease.run.number
    with pytest.raises(StorageError, match=f"run {second.run.id} .* owns it now"):
        writer.commit(planned(0), {}, FILES, {})
    writer.lease.release("stopped")
    writer.lease.withdraw()
    assert lease.newest_run(store) == second.run
    assert files(store) == set()


def test_a_lease_is_released_once_and_by_its_owner_alone(store):
    first = lease.take(store)
    die(first)
    second = lease.take(store)
    before = store.read(names.run_file(1))
    first.release("finished")
    assert store.read(names.run_file(1)) == before
    assert lease.newest_run(store) == second.run
    second.release("stopped")
    assert lease.newest_run(store).ended == "stopped"


def test_withdraw_leaves_no_folder_of_an_output_that_did_not_exist(store, tmp_path):
    held = lease.take(store)
    beat(store, held.run, 1)
    held.withdraw()
    assert list(tmp_path.iterdir()) == []


def test_withdraw_leaves_the_files_of_the_user_and_of_other_runs(store):
    store.begin()
    store.put("notes.txt", b"mine")
    lease.take(store).release("failed")
    lease.take(store).withdraw()
    assert set(store.names()) == {"notes.txt"}
    assert set(store.names("runs")) == {"000001.json"}


def test_withdraw_of_a_run_that_was_followed_removes_nothing(store):
    first = lease.take(store)
    die(first)
    second = lease.take(store)
    first.withdraw()
    second.check()
    assert set(store.names("runs")) == {"000001.json", "000002.json"}
