"""Two starts on one output at random moments: never mixed, never lost, never drawn twice.

    python -m tests.chaos.pairs [--pairs 20] [--seed S] [--output benchmarks/results/pairs.json]

The second start is of the same job or of one with another seed, with or without --overwrite. It is
refused while the first one goes on. Whatever it does, the output holds one of the two jobs, whole.
"""

import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click

from sdbatch.output.record import require_record
from sdbatch.storage import Store
from tests.chaos.campaign import FINISHED, Undisturbed, check, draw_undisturbed
from tests.chaos.place import Place, new_place

OTHER = ("--set", "sampling.seed=7")  # the other job
REFUSED = 2
MOST_OFFSET_SECONDS = 25.0  # a run takes about as long


@dataclass
class Pair:
    """Two starts, and what came of them."""

    same_job: bool
    overwrite: bool
    on_s3: bool
    offset: float  # seconds from the first start to the second
    codes: tuple[int, int] = (0, 0)
    drawn: int = 0  # images, by both


def random_pair(rng: random.Random) -> Pair:
    """Return a pair of starts; half of them begin within a second."""
    offset = rng.choice((rng.uniform(0, 1), rng.uniform(1, MOST_OFFSET_SECONDS)))
    return Pair(rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.3, round(offset, 2))


def start_both(pair: Pair, place: Place) -> None:
    """Start both, and wait for both."""
    options = [*([] if pair.same_job else OTHER), *(["--overwrite"] if pair.overwrite else [])]
    first = place.start("first.txt")
    time.sleep(pair.offset)
    second = place.start("second.txt", *options)
    pair.codes = first.wait(600), second.wait(600)
    pair.drawn = place.count.stat().st_size


def check_pair(pair: Pair, place: Place, expected: dict[int, Undisturbed]) -> None:
    """Raise an AssertionError if the output is not one job's, whole, drawn as often as it must be.

    Args:
        pair: after `start_both`.
        place: of its output.
        expected: seed of a job -> its output.
    """
    said = [(place.folder / f"{name}.txt").read_text() for name in ("first", "second")]
    about = f"{pair}\n{said[0]}\n{said[1]}"
    assert set(pair.codes) <= {FINISHED, REFUSED}, about
    assert FINISHED in pair.codes, about
    for code, text in zip(pair.codes, said, strict=True):
        assert (
            code != REFUSED
            or any(
                words in text
                for words in ("is drawing it", "began at the same moment", "changed by another run")
            )
            or "sampling.seed" in text
        ), about
    seed = require_record(Store(str(place.local_copy()))).job.sampling.seed
    check(place, expected[seed])
    replaced = pair.codes == (FINISHED, FINISHED) and pair.overwrite
    times = 2 if replaced else 1
    assert pair.drawn <= times * max(each.drawn for each in expected.values()), about


def run_pairs(pairs: list[Pair], folder: Path) -> None:
    """Start each pair on an output of its own, and check what it leaves."""
    expected = {
        seed: draw_undisturbed(folder / f"seed{seed}", "parquet", *options)
        for seed, options in ((0, ()), (7, OTHER))
    }
    for number, pair in enumerate(pairs):
        with new_place(folder / str(number), on_s3=pair.on_s3) as place:
            start_both(pair, place)
            check_pair(pair, place, expected)


@click.command()
@click.option("--pairs", default=20, show_default=True)
@click.option("--seed", type=int, help="Default: a random one, which is printed.")
@click.option("--output", type=click.Path(path_type=Path), help="A JSON file.")
def main(pairs: int, seed: int | None, output: Path | None) -> None:
    """Start pairs of runs at random moments."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"seed {seed}", flush=True)  # noqa: T201
    rng = random.Random(seed)
    every = [random_pair(rng) for _ in range(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        run_pairs(every, Path(folder))
    versions = {name: version(name) for name in ("sdbatch", "ray")}
    head = {"date": time.strftime("%Y-%m-%d"), **versions, "seed": seed}
    result = json.dumps({**head, "pairs": [asdict(pair) for pair in every]}, indent=1)
    if output:
        output.write_text(result + "\n")
    print(result)  # noqa: T201


if __name__ == "__main__":
    main()
