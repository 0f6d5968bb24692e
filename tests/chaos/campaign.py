"""Break runs at random until the budget of faults is spent; compare each output in the end.

    python -m tests.chaos.campaign [--faults 300] [--seed S] [--output benchmarks/results/chaos]

An episode is one output: runs are started again and again, broken at random moments, until one
ends. Then `verify` must find nothing, data/ and failed/ must have the bytes of an undisturbed run,
and every row must be there. Moments are numbers of receipts, so that slow machines get on as well.
Linux only (/proc).
"""

import hashlib
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import click

from sdbatch.output import reader
from sdbatch.output.verify import verify_output
from sdbatch.storage import Store
from tests.chaos.faults import ENDING, NoVictim, Run, possible
from tests.chaos.place import FAILING, IMAGES, Place, new_place

END_SECONDS = 180.0  # for a run to end that must
HANG_SECONDS = 400.0  # without a receipt or an end; an S3 that is silent is given up after less
FAULTS_AN_EPISODE = 12
POLL_SECONDS = 0.1
FINISHED = 3  # exit code, as some rows cannot be drawn
FORMATS = ("parquet", "webdataset")


@dataclass
class Fault:
    """A fault, and what came of it."""

    episode: int
    start: int  # of the command, counted from 1
    name: str
    receipts: int  # that were there at that moment
    outcome: str = "the run went on"


@dataclass
class Episode:
    """One output and what it went through."""

    number: int
    where: str
    faults: list[Fault] = field(default_factory=list)
    starts: int = 0
    drawn: int = 0  # images, in all starts
    drawn_undisturbed: int = 0  # the same without faults
    longest_wait: float = 0.0  # seconds without a receipt, an end or a start
    longest_wait_after: str = ""


def run_episode(episode: Episode, place: Place, names: list[str], seed: int) -> None:
    """Let faults happen to the runs of one output, by `names`; the last run ends undisturbed."""
    left, code = list(names), None
    while code != FINISHED:
        if place.cluster is not None and place.find("gcs_server") is None:
            place.cluster.start()
        episode.starts += 1
        log = place.folder / f"start{episode.starts}.txt"
        run = Run(place, place.start(log.name), random.Random(f"{seed} {episode.starts}"))
        waiting, before = _Waiting(episode, run), len(episode.faults)
        while left and _wait_for_moment(waiting, run):
            break_run(episode, run, waiting, left.pop(0))
        while not waiting.ended():
            time.sleep(POLL_SECONDS)
        code = run.process.wait()
        if len(episode.faults) > before:
            episode.faults[-1].outcome = describe_end(code, log.read_text())
        elif code != FINISHED:
            raise AssertionError(f"an undisturbed run ended with {code}:\n{log.read_text()}")
    episode.drawn = place.count.stat().st_size


def break_run(episode: Episode, run: Run, waiting: "_Waiting", name: str) -> None:
    """Let a fault happen, and wait for the run's end if it must end; nothing without a victim."""
    receipts = len(run.place.receipts())
    try:
        possible(run.place)[name](run)
    except NoVictim:
        return
    episode.faults.append(Fault(episode.number, episode.starts, name, receipts))
    until = time.monotonic() + END_SECONDS
    while name in ENDING and not waiting.ended():
        if time.monotonic() > until:
            raise AssertionError(f"the run goes on after {episode.faults[-1]}")
        time.sleep(POLL_SECONDS)


def describe_end(code: int, text: str) -> str:
    """Return how a run ended; an AssertionError if it ended without a plain word."""
    lines = [line for line in text.splitlines() if line.startswith("Error: ")]
    if "Traceback" in text:
        raise AssertionError(f"a traceback (exit code {code}):\n{text}")
    if code in (1, 2) and len(lines) != 1 and "Aborted!" not in text:
        raise AssertionError(f"exit code {code} with {len(lines)} error lines:\n{text}")
    return f"exit code {code}" + "".join(f": {line}" for line in lines)


class _Waiting:
    """Measures how long a run gives no sign; a run that hangs ends the campaign."""

    def __init__(self, episode: Episode, run: Run) -> None:
        self._episode = episode
        self._run = run
        self._receipts = -1
        self._since = time.monotonic()

    def ended(self) -> bool:
        """Look for signs; return whether the run has ended."""
        ended = self._run.process.poll() is not None
        now = len(self._run.place.receipts())
        waited = time.monotonic() - self._since
        if waited > self._episode.longest_wait:
            faults = self._episode.faults
            self._episode.longest_wait = round(waited, 1)
            self._episode.longest_wait_after = faults[-1].name if faults else "the start"
        if now != self._receipts or ended:
            self._receipts, self._since = now, time.monotonic()
        elif waited > HANG_SECONDS:
            raise AssertionError(
                f"episode {self._episode.number} hangs after {self._episode.faults[-1:]}"
            )
        return ended


def _wait_for_moment(waiting: _Waiting, run: Run) -> bool:
    """Wait for a random number of receipts and a moment; return whether the run still goes on."""
    now = len(run.place.receipts())
    target = now + run.random.choice((0, 1, 1, 2, 3, 5))
    until = time.monotonic() + run.random.uniform(0, 8 if target == now else 0.5)
    while not waiting.ended():
        if len(run.place.receipts()) >= target and time.monotonic() > until:
            return True
        time.sleep(POLL_SECONDS)
    return False


@dataclass(frozen=True)
class Undisturbed:
    """An output whose run was left alone."""

    hashes: dict[str, str]  # file -> checksum
    drawn: int  # images; more than it has, as the shard of a deadly row is drawn again


def check(place: Place, expected: Undisturbed) -> None:
    """Compare an output with an undisturbed one, file by file, and count its rows."""
    copy = place.local_copy()
    store = Store(str(copy))
    faults = [fault.text for fault in verify_output(store)]
    assert faults == [], faults
    different = set(hashes(copy).items()) ^ set(expected.hashes.items())
    assert not different, different
    images = reader.open_images(store)
    failed = sum(receipt.failed for receipt in images.receipts)
    assert (len(images), failed) == (IMAGES - len(FAILING), len(FAILING))


def hashes(output: Path) -> dict[str, str]:
    """Return the checksums of the files that depend on the job alone."""
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("data", "failed")
        for path in (output / folder).glob("*")
    }


def draw_undisturbed(folder: Path, output_format: str, *options: str) -> Undisturbed:
    """Draw an output in a run that is left alone; `options` are the command's."""
    with new_place(folder, format=output_format) as place:
        code = place.start("alone.txt", *options).wait(600)
        assert code == FINISHED, (folder / "alone.txt").read_text()
        return Undisturbed(hashes(Path(place.output)), place.count.stat().st_size)


def campaign(faults: int, seed: int, folder: Path) -> Iterator[Episode]:
    """Yield episode after episode until `faults` faults have happened."""
    rng = random.Random(seed)
    expected = {each: draw_undisturbed(folder / each, each) for each in FORMATS}
    number, happened = 0, 0
    while happened < faults:
        number += 1
        on_s3, on_cluster = rng.random() < 0.4, rng.random() < 0.3
        output_format = rng.choice(FORMATS)
        where = f"{'S3' if on_s3 else 'folder'}, {'cluster' if on_cluster else 'own Ray'}"
        episode = Episode(number, f"{where}, {output_format}")
        options = {"on_s3": on_s3, "on_cluster": on_cluster, "format": output_format}
        with new_place(folder / str(number), **options) as place:
            names = rng.choices(list(possible(place)), k=min(FAULTS_AN_EPISODE, faults - happened))
            try:
                run_episode(episode, place, names, seed)
                check(place, expected[output_format])
            except Exception as error:
                error.add_note(f"seed {seed}, files in {place.folder}, {episode}")
                raise
        episode.drawn_undisturbed = expected[output_format].drawn
        happened += len(episode.faults)
        yield episode


def summary(episodes: list[Episode], seed: int) -> dict[str, object]:
    """Return the figures of a campaign."""
    longest = max(episodes, key=lambda episode: episode.longest_wait)
    drawn = sum(episode.drawn for episode in episodes)
    needed = sum(episode.drawn_undisturbed for episode in episodes)
    every = [fault for episode in episodes for fault in episode.faults]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "on": platform.platform(terse=True),
        **{name: version(name) for name in ("sdbatch", "ray")},
        "seed": seed,
        "faults": len(every),
        "outputs": len(episodes),
        "starts": sum(episode.starts for episode in episodes),
        "identical": len(episodes),  # or `check` has ended the campaign
        "rows": len(episodes) * IMAGES,
        "drawn_twice_percent": round(100 * (drawn - needed) / needed, 1),
        "images_drawn_again_a_fault": round((drawn - needed) / len(every), 1),
        "longest_wait_s": longest.longest_wait,
        "longest_wait_after": longest.longest_wait_after,
        "runs_that_went_on": sum(fault.outcome == "the run went on" for fault in every),
        "kinds": dict(Counter(fault.name for fault in every).most_common()),
    }


@click.command()
@click.option("--faults", default=300, show_default=True)
@click.option("--seed", type=int, help="Default: a random one, which is printed.")
@click.option("--output", type=click.Path(path_type=Path), help="Where .jsonl and .json go.")
def main(faults: int, seed: int | None, output: Path | None) -> None:
    """Break runs at random and compare what they leave."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"seed {seed}", flush=True)  # noqa: T201
    log = output.with_suffix(".jsonl").open("w") if output else sys.stdout
    episodes = []
    folder = Path(tempfile.mkdtemp())  # it stays if the campaign fails
    for episode in campaign(faults, seed, folder):
        episodes.append(episode)
        log.write(json.dumps(asdict(episode)) + "\n")
        log.flush()
    shutil.rmtree(folder)
    result = json.dumps(summary(episodes, seed), indent=1)
    if output:
        output.with_suffix(".json").write_text(result + "\n")
    print(result)  # noqa: T201


if __name__ == "__main__":
    main()
