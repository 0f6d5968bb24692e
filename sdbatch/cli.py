"""The command line: `sdbatch run`, `submit`, `serve`, `plan`, `status`, `sheet`, ...

Commands import the rest of the package inside, so that `sdbatch --help` is quick.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import click

from sdbatch.errors import SdbatchError
from sdbatch.terminal import print_traceback

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
    """Draw a dataset of images from a table of prompts, on this machine or on a cluster.

    A job file describes the dataset. `sdbatch run JOB` draws it; run the same command again to
    resume after an interruption.
    """
    sys.excepthook = print_traceback


_job = click.argument("path", metavar="JOB")
_output = click.argument("output")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of JOB."
)
_address = click.option(
    "--address",
    metavar="ADDRESS",
    help="Address of a Ray cluster. Default: cluster.address, RAY_ADDRESS, or a local Ray.",
)
_overwrite = click.option(
    "--overwrite", is_flag=True, help="Remove the existing output and start again."
)
_retry_failed = click.option(
    "--retry-failed", is_flag=True, help="Draw the shards that have failed rows again."
)
_max_failed = click.option(
    "--max-failed",
    type=click.IntRange(min=0),
    metavar="ROWS",
    help="Stop when more rows than this have failed.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@main.command(cls=Command)
@_job
@_set
@_address
@_overwrite
@_retry_failed
@_max_failed
@_json
def run(
    path: str,
    overrides: tuple[str, ...],
    address: str | None,
    overwrite: bool,
    retry_failed: bool,
    max_failed: int | None,
    as_json: bool,
) -> None:
    """Draw the dataset of the job file JOB.

    Run the same command again to resume: shards that have a receipt are not drawn again.

    Exit code: 0 all images drawn, 3 finished with failed rows, 2 could not start, 1 stopped early.
    """
    from sdbatch.job import load
    from sdbatch.watched import watch

    job = load(path, overrides)
    # Only the command's own process: a program that calls `main` must not be forked.
    watched = watch(partial(_speak_for, job.output.path)) if path in sys.argv else None

    from sdbatch.batch.pipeline import run_job
    from sdbatch.terminal import display, quiet_terminal

    with quiet_terminal() as (out, err, log):
        if watched is not None:
            watched.note(log.encode())
        report = run_job(
            job,
            address=address,
            overwrite=overwrite,
            retry_failed=retry_failed,
            max_failed=max_failed,
            display=display(out, as_json),
        )
        if report.stopped is not None:
            click.echo(f"Error: {report.stopped.removesuffix('.')}. Ray's log: {log}", err)
        if watched is not None:
            watched.exit(report.exit_code)
    sys.exit(report.exit_code)


def _speak_for(output: str, process: int, how: str, log: str) -> None:
    """Say that a run died without a word, and note it in its output."""
    from sdbatch.output import lease
    from sdbatch.storage import Store

    click.echo(
        f"Error: the run ended with {how} and without a word: Ray's processes on this machine "
        f"died, or it was killed. Ray's log: {log}. What is committed stays; run the same "
        f"command again.",
        err=True,
    )
    lease.end_dead_run(Store(output), process)


@main.command(cls=Command)
@_job
@_set
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    metavar="URL",
    help="URL of the cluster's dashboard, such as http://HEAD:8265. "
    "Default: RAY_API_SERVER_ADDRESS.",
)
@click.option("--stop", is_flag=True, help="Stop the job on the cluster that draws JOB's output.")
@click.option("--image", help="Run in this container image. It receives no files.")
@click.option("--pip", multiple=True, metavar="REQUIREMENT", help="Install a package for the job.")
@click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Set an environment variable for the job. Default: its value here. Ray's dashboard shows "
    "it.",
)
@click.option(
    "--driver-cpus",
    type=click.FloatRange(min=0),
    default=0,
    metavar="CPUS",
    help="Reserve CPUs for the driver, which may then run on any node. Default: none, on the head.",
)
@_overwrite
@_retry_failed
@_max_failed
@_json
def submit(
    path: str,
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
    """Run the job file JOB on a Ray cluster, and follow it from here.

    JOB and the files that it names by relative paths are sent to the cluster, up to 100 MiB.
    Ctrl-C stops following; the job keeps running. Run the same command again to follow it, or with
    --stop to stop it. Committed shards stay.

    Exit code: that of `sdbatch run` on the cluster.
    """
    from sdbatch import submit as submission
    from sdbatch.terminal import display, quiet_terminal

    flags = ["--overwrite"] * overwrite + ["--retry-failed"] * retry_failed
    flags += ["--max-failed", str(max_failed)] if max_failed is not None else []
    options = submission.SubmitOptions(
        path=path,
        overrides=overrides,
        options=(*flags, *["--json"] * as_json),
        image=image,
        pip=pip,
        env=submission.parse_env(env),
        driver_cpus=driver_cpus,
    )
    with quiet_terminal() as (out, _, _):

        def echo(text: str) -> None:
            print(text, file=out, flush=True)

        if stop:
            submission.stop(options, address, echo)
            sys.exit(0)
        progress_display = None if as_json else display(out, as_json)
        code = submission.submit(options, address, progress_display, echo)
    sys.exit(code)


@main.command(cls=Command)
@_job
@_set
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
    metavar="PORT",
    help="Port to listen on.",
)
@_address
def serve(path: str, overrides: tuple[str, ...], host: str, port: int, address: str | None) -> None:
    """Serve the model of the job file JOB: a web page, OpenAI's API, AUTOMATIC1111's API.

    A request uses JOB's sampling settings unless it sets its own. JOB's prompt table and output
    are not used. Ctrl-C stops the service once the requests that it has accepted are drawn; long
    jobs cannot be polled after that.
    """
    from sdbatch.job import load
    from sdbatch.serve.application import serve_job
    from sdbatch.terminal import quiet_terminal

    job = load(path, overrides)
    with quiet_terminal() as (out, _, log):
        missing = serve_job(
            job,
            host=host,
            port=port,
            address=address,
            show=lambda text: print(text, file=out, flush=True),
        )
    if missing:
        click.echo(f"Error: {missing} images were not drawn in time. Ray's log: {log}", err=True)
    sys.exit(1 if missing else 0)


@main.command(cls=Command)
@_job
@_set
@click.option("--check", is_flag=True, help="Resolve all rows of the table, not only the first.")
@_json
def plan(path: str, overrides: tuple[str, ...], check: bool, as_json: bool) -> None:
    """Show what `sdbatch run JOB` would draw; draw nothing.

    Images that the output holds already are counted as committed. The first rows are resolved:
    three are shown as they will be drawn, and rows that cannot be drawn are counted by reason.
    """
    from sdbatch.job import load
    from sdbatch.report.outline import make_outline

    outline = make_outline(load(path, overrides), check)
    click.echo(json.dumps(asdict(outline)) if as_json else outline.text())


@main.command(cls=Command)
@click.argument("model", metavar="MODEL|JOB")
@click.option(
    "--size",
    metavar="WIDTHxHEIGHT",
    help="Of the images, such as 512x768 or 512. Default: that of JOB, or 512x512.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What to tune for. auto: the GPU, if there is one.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=180,
    show_default=True,
    metavar="SECONDS",
    help="Time that it may take.",
)
def tune(model: str, size: str | None, device: str, seconds: float) -> None:
    """Measure on this machine which values of the engine draw MODEL fastest, and keep them.

    MODEL is what a job has as model.path; JOB is a job file (.yaml), of which model, size, device
    and dtype count. Jobs with this model and size then use the values where they leave them
    `auto`. Run it while nothing else uses the device. Ctrl-C keeps nothing.
    """
    from sdbatch.terminal import quiet_terminal
    from sdbatch.tune.command import Options
    from sdbatch.tune.command import tune as find_fastest

    with quiet_terminal() as (out, err, _):
        try:
            find_fastest(
                Options(model, size, device, seconds),
                lambda text: print(text, file=out, flush=True),
            )
        except KeyboardInterrupt:
            click.echo("Interrupted: nothing is kept.", err)
            sys.exit(1)


@main.command(cls=Command)
@_output
@click.option("--watch", is_flag=True, help="Follow the run that draws the output until it ends.")
@_json
def status(output: str, watch: bool, as_json: bool) -> None:
    """Show the state of OUTPUT, finished or still being drawn.

    Exit code: 0; with --watch 3 if rows have failed, 1 if the run ended early.
    """
    from sdbatch.report.status import read_status, watch_run
    from sdbatch.storage import Store
    from sdbatch.terminal import display

    store = Store(output)
    state = watch_run(store, display(sys.stdout, as_json)) if watch else read_status(store)
    click.echo(json.dumps(asdict(state)) if as_json else state.text())
    sys.exit(state.exit_code if watch else 0)


@main.command(cls=Command)
@_output
@click.option(
    "--images",
    type=click.IntRange(1, 1000),
    default=24,
    show_default=True,
    help="Number of images.",
)
@click.option("--random", "seed", type=int, metavar="SEED", help="Choose images at random.")
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Choose images that match: sampler=ddim, guidance_scale>=5, prompt~cat, fidelity<1.",
)
@click.option(
    "--columns",
    type=click.IntRange(1, 100),
    default=6,
    show_default=True,
    help="Images per line.",
)
@click.option(
    "--animate",
    is_flag=True,
    help="Choose sequences, which prompts.frames draws, and let their images follow each other.",
)
@click.option(
    "--to",
    metavar="FILE",
    help="A .jpg or .png file, with --animate .webp. Default: sheet.jpg or .webp in "
    "OUTPUT/gallery.",
)
def sheet(
    output: str,
    images: int,
    seed: int | None,
    where: tuple[str, ...],
    columns: int,
    animate: bool,
    to: str | None,
) -> None:
    """Make a contact sheet of images of OUTPUT, each with its prompt.

    OUTPUT may still be drawn. Without --random the first images are chosen.
    """
    from sdbatch.report.sheet import make_animation, make_sheet
    from sdbatch.storage import Store

    make = make_animation if animate else make_sheet
    click.echo(make(Store(output), images, seed, where, columns, to))


@main.command(cls=Command)
@_output
@_json
def score(output: str, as_json: bool) -> None:
    """Score how well the images of OUTPUT match their prompts.

    The scorer reads images of the embedded model: shapes on a background. The scores are written
    to OUTPUT/scores.parquet, one row per image.
    """
    from sdbatch.report.scores import score_output
    from sdbatch.storage import Store

    summary = score_output(Store(output))
    click.echo(json.dumps(asdict(summary)) if as_json else summary.text())


@main.command(cls=Command)
@_output
@click.option(
    "--repair", is_flag=True, help="Let the next run draw the shards again that have faults."
)
@click.option(
    "--redraw",
    type=click.IntRange(1),
    metavar="IMAGES",
    help="Draw so many images again, chosen at random, and compare them.",
)
def verify(output: str, repair: bool, redraw: int | None) -> None:
    """Check every receipt, checksum, count and key of OUTPUT.

    Exit code: 0 no faults, 1 faults.
    """
    from sdbatch.output import verify as verification
    from sdbatch.storage import Store
    from sdbatch.urls import without_secrets

    store = Store(output)
    faults = []
    for fault in verification.verify_output(store):
        click.echo(fault.text)
        faults.append(fault)
    shown = without_secrets(output)
    note = verification.note_devices(store)
    if note is not None:
        click.echo(f"Note: {note}")
    click.echo(f"{shown}: {len(faults) or 'no'} faults")
    if repair and faults:
        shards = verification.repair(store, faults)
        click.echo(f"{shown}: the next run draws {shards} shards again")
    differ = 0
    if redraw is not None:
        from sdbatch.batch.redraw import redraw_images

        for again in redraw_images(store, redraw):
            click.echo(again.text())
            differ += again.is_fault
    sys.exit(1 if faults or differ else 0)


@main.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from sdbatch.job import json_schema

    click.echo(json_schema())
