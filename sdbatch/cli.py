"""The command line: `sdbatch run`, `submit`, `serve`, `plan`, `status`, `sheet`, ...

Commands import the rest of the package inside, so that `sdbatch --help` answers at once.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import click

from sdbatch.errors import SdbatchError

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
_overwrite = click.option(
    "--overwrite", is_flag=True, help="Remove what the output holds and start anew."
)
_retry_failed = click.option(
    "--retry-failed", is_flag=True, help="Draw again the shards in which rows failed."
)
_max_failed = click.option(
    "--max-failed", type=click.IntRange(min=0), help="Stop when more rows have failed."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@main.command(cls=Command)
@click.argument("job")
@_set
@_address
@_overwrite
@_retry_failed
@_max_failed
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
    from sdbatch.batch.pipeline import run_job
    from sdbatch.job import load
    from sdbatch.terminal import display, quiet_terminal

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
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    metavar="URL",
    help="Of the cluster's dashboard, such as http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS.",
)
@click.option("--stop", is_flag=True, help="End the job that draws JOB's output there.")
@click.option("--image", help="A container image for the job to run in; takes no files along.")
@click.option("--pip", multiple=True, metavar="REQUIREMENT", help="What to install for the job.")
@click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="An environment variable for the job, by default as it is here. Ray's dashboard shows it.",
)
@click.option(
    "--driver-cpus",
    type=click.FloatRange(min=0),
    default=0,
    help="CPUs to reserve for the driver, which may then run beside the head. Default: none.",
)
@_overwrite
@_retry_failed
@_max_failed
@_json
def submit(
    job: str,
    overrides: tuple[str, ...],
    address: str,
    stop: bool,
    image: str | None,
    pip: tuple[str, ...],
    env: tuple[str, ...],
    driver_cpus: float,
    overwrite: bool,
    retry_failed: bool,
    max_failed: int | None,
    as_json: bool,
) -> None:
    """Run the job file JOB on the Ray cluster at URL, and follow it from here.

    JOB and the files that it names by relative paths go along, 100 MiB at most. Ctrl-C leaves the
    job at work; the same command again follows it, or with --stop ends it. What it has drawn stays.

    Exit code: as `sdbatch run` has it there.
    """
    from sdbatch import submit as submission
    from sdbatch.terminal import display, quiet_terminal

    options = ["--overwrite"] * overwrite + ["--retry-failed"] * retry_failed
    options += ["--max-failed", str(max_failed)] if max_failed is not None else []
    asked = submission.Asked(
        path=job,
        overrides=overrides,
        options=(*options, *["--json"] * as_json),
        image=image,
        pip=pip,
        env=submission.variables(env),
        driver_cpus=driver_cpus,
    )
    with quiet_terminal() as (out, _):

        def say(text: str) -> None:
            print(text, file=out, flush=True)

        if stop:
            submission.stop(asked, address, say)
            sys.exit(0)
        shown = None if as_json else display(out, as_json)
        code = submission.submit(asked, address, shown, say)
    sys.exit(code)


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
    from sdbatch.serve.command import serve_job
    from sdbatch.terminal import quiet_terminal

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
    from sdbatch.report.outline import outline

    outlined = outline(load(job, overrides))
    click.echo(json.dumps(asdict(outlined)) if as_json else outlined.text())


@main.command(cls=Command)
@click.argument("output")
@click.option("--watch", is_flag=True, help="Follow the run that draws it, until it is over.")
@_json
def status(output: str, watch: bool, as_json: bool) -> None:
    """Show how far the output at OUTPUT is, also while it is drawn.

    Exit code: 0; with --watch 3 if rows have failed, 1 if the run ended early.
    """
    from sdbatch.report import status as statuses
    from sdbatch.storage import Store
    from sdbatch.terminal import display

    store = Store(output)
    found = statuses.status(store)
    if watch:
        found = statuses.watch(store, display(sys.stdout, as_json))
    click.echo(json.dumps(asdict(found)) if as_json else found.text())
    sys.exit(found.exit_code if watch else 0)


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
    from sdbatch.report.scores import score as judge
    from sdbatch.storage import Store

    found = judge(Store(output))
    click.echo(json.dumps(asdict(found)) if as_json else found.text())


@main.command(cls=Command)
@click.argument("output")
def verify(output: str) -> None:
    """Check every receipt, checksum, count and key at OUTPUT; exit code 1 if one is wrong."""
    from sdbatch.output.verify import verify as check
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
