"""The command line: `sdbatch run`, `serve`, `plan`, `status`, `sheet`, `score`, `verify`, `schema`.

Commands import the rest of the package inside, so that `sdbatch --help` answers at once.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import click

from sdbatch.errors import SdbatchError

if TYPE_CHECKING:
    from sdbatch.report.progress import Display

CANNOT_START = 2


class Command(click.Command):
    """Shows an SdbatchError as one line, exit code 2; other exceptions keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SdbatchError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(CANNOT_START)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sdbatch")
def main() -> None:
    """Draw a dataset of images from a table of prompts, here or on a cluster.

    A job file says what to draw; `sdbatch run JOB` draws it, and goes on where it was after
    any interruption.
    """


_set = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of JOB."
)
_address = click.option(
    "--address", metavar="ADDRESS", help="Of a Ray cluster. Default: RAY_ADDRESS, or here."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@main.command(cls=Command)
@click.argument("job")
@_set
@_address
@click.option("--overwrite", is_flag=True, help="Remove what the output holds and start anew.")
@click.option("--retry-failed", is_flag=True, help="Draw again the shards in which rows failed.")
@click.option("--max-failed", type=click.IntRange(min=0), help="Stop when more rows have failed.")
@_json
def run(
    job: str,
    overrides: tuple[str, ...],
    address: str | None,
    overwrite: bool,
    retry_failed: bool,
    max_failed: int | None,
    as_json: bool,
) -> None:
    """Draw every image that the job file JOB asks for.

    Run the same command again to resume: what a receipt proves is not drawn again.

    Exit code: 0 all drawn, 3 finished with failed rows, 2 could not start, 1 stopped.
    """
    from sdbatch.job import load
    from sdbatch.pipeline import run_job

    asked = load(job, overrides)
    with quiet_terminal() as (out, log):
        report = run_job(
            asked,
            address=address,
            overwrite=overwrite,
            retry_failed=retry_failed,
            max_failed=max_failed,
            display=display(out, as_json),
        )
    if report.stopped is not None:
        click.echo(f"Error: {report.stopped}. Ray's log: {log}", err=True)
    sys.exit(report.exit_code)


@main.command(cls=Command)
@click.argument("job")
@_set
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@_address
def serve(job: str, overrides: tuple[str, ...], host: str, port: int, address: str | None) -> None:
    """Answer single requests as the job file JOB draws: a web page, OpenAI's API, AUTOMATIC1111's.

    JOB's prompt table and output are not touched. Ctrl-C answers what was taken in, then stops;
    long jobs are drawn too, but nobody can ask for them any more.
    """
    from sdbatch.job import load
    from sdbatch.serve.run import serve_job

    asked = load(job, overrides)
    with quiet_terminal() as (out, log):
        left = serve_job(
            asked,
            host=host,
            port=port,
            address=address,
            show=lambda text: print(text, file=out, flush=True),
        )
    if left:
        click.echo(f"Error: {left} images were not drawn in time. Ray's log: {log}", err=True)
    sys.exit(1 if left else 0)


@main.command(cls=Command)
@click.argument("job")
@_set
@_json
def plan(job: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what `sdbatch run JOB` would draw, and what is there already; draws nothing."""
    from sdbatch.job import load
    from sdbatch.report.plan import outline

    outlined = outline(load(job, overrides))
    click.echo(json.dumps(asdict(outlined)) if as_json else outlined.text())


@main.command(cls=Command)
@click.argument("output")
@_json
def status(output: str, as_json: bool) -> None:
    """Show how far the output at OUTPUT is, also while it is drawn."""
    from sdbatch.report.status import status as read
    from sdbatch.storage import Store

    found = read(Store(output))
    click.echo(json.dumps(asdict(found)) if as_json else found.text())


@main.command(cls=Command)
@click.argument("output")
@click.option("--images", type=click.IntRange(1, 1000), default=24, show_default=True)
@click.option("--random", "seed", type=int, metavar="SEED", help="A random set, not the first.")
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Only images that fulfil it: sampler=ddim, guidance_scale>=5, prompt~cat, fidelity<1.",
)
@click.option("--columns", type=click.IntRange(1, 100), default=6, show_default=True)
@click.option("--to", metavar="FILE", help="A .jpg or .png. Default: OUTPUT/gallery/sheet.jpg.")
def sheet(
    output: str, images: int, seed: int | None, where: tuple[str, ...], columns: int, to: str | None
) -> None:
    """Lay images of OUTPUT side by side, each with its prompt, also while it is drawn."""
    from sdbatch.report.sheet import make
    from sdbatch.storage import Store

    click.echo(make(Store(output), images, seed, where, columns, to))


@main.command(cls=Command)
@click.argument("output")
@_json
def score(output: str, as_json: bool) -> None:
    """Judge how well the images of OUTPUT show what their prompts ask for.

    For prompts of the embedded model's world: shapes on a background. What is found goes to
    OUTPUT/scores.parquet, one row an image.
    """
    from sdbatch.report.score import score as judge
    from sdbatch.storage import Store

    found = judge(Store(output))
    click.echo(json.dumps(asdict(found)) if as_json else found.text())


@main.command(cls=Command)
@click.argument("output")
def verify(output: str) -> None:
    """Check every receipt, checksum, count and key at OUTPUT; exit code 1 if one is wrong."""
    from sdbatch.report.verify import verify as check
    from sdbatch.storage import Store

    wrong = 0
    for text in check(Store(output)):
        click.echo(text)
        wrong += 1
    click.echo(f"{output}: {wrong} faults" if wrong else f"{output}: as promised")
    sys.exit(1 if wrong else 0)


@main.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from sdbatch.job import json_schema

    click.echo(json_schema())


def display(out: IO[str], as_json: bool) -> "Display":
    """Return how progress is shown on `out`: as JSON, live on a terminal, or as plain lines."""
    from sdbatch.report.progress import Bar, JsonLines, Lines

    if as_json:
        return JsonLines(out)
    return Bar(out) if out.isatty() else Lines(out)


@contextlib.contextmanager
def quiet_terminal() -> Iterator[tuple[IO[str], str]]:
    """Send what Ray and its processes print to a log file; yield the true stdout and the log.

    By file descriptor: Ray's C++ parts print past Python, and past every setting of Ray's.
    """
    number, log = tempfile.mkstemp(prefix="sdbatch-", suffix=".log")
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    out = os.fdopen(os.dup(kept[0]), "w", encoding="utf-8")
    try:
        os.dup2(number, 1)
        os.dup2(number, 2)
        yield out, log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, true in zip(kept, (1, 2), strict=True):
            os.dup2(fd, true)
            os.close(fd)
        os.close(number)
        out.close()
