"""The run: from a job to a dataset, with exact resume.

Read `run_job`, then `flow.graph`: the picture of ARCHITECTURE.md on one screen.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from sdbatch.batch import flow, pool, ray_setup
from sdbatch.batch.driver import Driver
from sdbatch.batch.flow import Drawing, MakeEngine
from sdbatch.batch.metrics import RayMonitor
from sdbatch.batch.pool import Machines
from sdbatch.engine.request import Request
from sdbatch.errors import ModelError, SdbatchError
from sdbatch.job import Job
from sdbatch.models import find_model as models
from sdbatch.output import lifecycle, plan, receipts
from sdbatch.output.image_file import Encoding
from sdbatch.output.plan import Begun, Plan
from sdbatch.output.receipts import Receipt
from sdbatch.prompts.table import open_table
from sdbatch.report.closing import Report
from sdbatch.report.progress import Display, Silent
from sdbatch.schema import Shard
from sdbatch.stages.draw import load_engine
from sdbatch.storage import Store

# Columns by which rows may ask for what the job's own values could not draw.
DECIDING = {"sampler", "num_inference_steps", "clip_skip", "negative_prompt", "prompt_weights"}


def run_job(
    job: Job,
    *,
    address: str | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    max_failed: int | None = None,
    display: Display | None = None,
) -> Report:
    """Draw every image of `job` that no receipt of its output proves yet.

    Args:
        job: from load_job.
        address: of a Ray cluster; else ray_setup.address, RAY_ADDRESS, or a Ray of this job's own.
        overwrite: remove what the output holds and start anew.
        retry_failed: draw again the shards in which rows failed.
        max_failed: stop when more rows of the output than this have failed.
        display: where progress and the report are shown; default: nowhere.

    Returns:
        What the output holds now. `stopped` says why the run ended early; run again to go on.

    Raises:
        SdbatchError: the job could not start; nothing new was written.
    """
    ready = prepare(job, overwrite=overwrite, retry_failed=retry_failed)
    display = display or Silent()
    try:
        return draw(ready, address=address, max_failed=max_failed, display=display)
    except BaseException:
        display.close(None)  # or a live bar would keep the terminal
        raise


@dataclass(frozen=True)
class Ready:
    """A job that was checked as far as it can be without starting anything."""

    plan: Plan
    begun: Begun | None
    model: models.ModelFiles
    store: Store
    kept: list[Receipt]  # shards that are not drawn again
    withdrawn: list[Receipt]  # shards to draw again: rows of them failed, or files are gone
    overwrite: bool

    @property
    def todo(self) -> list[Shard]:
        """Return the shards to draw."""
        kept = {receipt.shard for receipt in self.kept}
        return [shard for shard in self.plan.shards if shard.shard not in kept]


def prepare(job: Job, *, overwrite: bool = False, retry_failed: bool = False) -> Ready:
    """Find the table, the model and what the output holds; write nothing, start nothing."""
    store = Store(job.output.path)
    store.check_writable()
    lifecycle.refuse_foreign(store, job.prompts)
    begun = None if overwrite else plan.read(store)
    same = begun is not None and begun.job.model.path == job.model.path
    revision = job.model.revision or (begun.job.model.revision if begun and same else None)
    model, job = find_model(job, revision)
    planned = plan.make(job, open_table(job.prompts), begun)
    done = receipts.read_all(store, receipts.committed(store)) if begun else []
    whole = receipts.whole(store, done)
    again = {r.shard for r in done if r.shard not in whole or (r.failed and retry_failed)}
    kept = [receipt for receipt in done if receipt.shard not in again]
    withdrawn = [receipt for receipt in done if receipt.shard in again]
    return Ready(planned, begun, model, store, kept, withdrawn, overwrite)


def find_model(job: Job, revision: str | None = None) -> tuple[models.ModelFiles, Job]:
    """Find the job's model, of a hub at `revision` or as the job says; name it in the job.

    Raises:
        ModelError: there is none, or it is no Stable Diffusion model.
    """
    at = revision or job.model.revision
    files = models.find(job.model.path, at, job.model.config, extras(job))
    if job.model.sha256 and not models.hashed(files):
        raise ModelError(
            "model.sha256 = given: only files have one, and no file here is loaded. Leave it out; "
            "a hub id's commit is its model.revision."
        )
    if job.safety.policy != "flag" and files.extras.checker is None:
        raise ModelError(
            f"safety.policy = {job.safety.policy!r}: the model has no safety checker. Set "
            f"safety.checker to a checker's folder, or the policy to flag."
        )
    known = {"revision": files.revision, "variant": files.extras.variant}
    return files, job.model_copy(update={"model": job.model.model_copy(update=known)})


def draw(
    ready: Ready,
    *,
    address: str | None = None,
    max_failed: int | None = None,
    display: Display,
    make_engine: MakeEngine | None = None,
) -> Report:
    """Draw the shards of `ready.todo`; `make_engine` builds another engine than the model's."""
    driver = Driver(ready.plan, ready.kept, ready.store, display, max_failed)
    if not ready.todo:
        return driver.finish(ready.plan.job)
    driver.show("starting Ray")
    asked = ready.plan.job
    beside = ThreadPoolExecutor(1)  # reads the weights while Ray starts
    hashed = beside.submit(models.sha256, ready.model)
    try:
        with beside, ray_setup.connected(address or asked.cluster.address, asked) as machines:
            driver.note("ray")
            job = resolve(ready, machines, hashed.result())
            actors = pool.fit(job.cluster, job.engine, machines, len(ready.todo))
            planned = replace(ready.plan, job=job)
            lifecycle.begin(ready.store, planned, ready.kept, ready.withdrawn, ready.overwrite)
            monitor = RayMonitor(job.title)
            watch = ray_setup.start_watch(actors.most, monitor)
            sampling = job.sampling
            factory = make_engine or partial(
                load_engine,
                ready.model,
                job.engine,
                sampling.height * sampling.width,
                None if DECIDING & planned.table.columns.keys() else example(job),
            )
            drawing = Drawing(actors, factory, encoding(job), watch, monitor)
            graph = flow.graph(planned, ready.todo, ready.store, drawing)
            driver.follow(graph, watch, monitor)
            return driver.finish(job)
    except SdbatchError:  # it could not start: leave nothing behind
        if ready.begun is None and not receipts.committed(ready.store):
            lifecycle.withdraw(ready.store)
        raise


def extras(job: Job) -> models.Extras:
    """Return what the job says of its model beside where it is."""
    model = job.model
    return models.Extras(
        variant=model.variant,
        ema=model.ema,
        prediction_type=model.prediction_type,
        zero_snr=model.zero_snr,
        vae=model.vae,
        loras=tuple((lora.path, lora.weight) for lora in model.loras),
        embeddings=tuple((embedding.path, embedding.token) for embedding in model.embeddings),
        checker=None if job.safety.checker == "none" else job.safety.checker,
    )


def example(job: Job) -> Request:
    """Return a request as the job asks for it where the table says nothing."""
    return Request(**{**job.sampling.model_dump(), "prompt": ""})


def encoding(job: Job) -> Encoding:
    """Return how the job's images are encoded and what they say of their model."""
    return Encoding(
        image_format=job.output.image_format,
        quality=job.output.encoder_quality,
        model=job.model.name,
        model_hash=job.model.sha256 or job.model.revision or "",
        software=f"sdbatch {plan.versions()['sdbatch']}",
    )


def resolve(ready: Ready, machines: Machines, sha256: str | None) -> Job:
    """Resolve the planned job, and refuse it if the output was begun with another."""
    job = resolve_job(ready.plan.job, machines, sha256)
    if ready.begun is not None:
        plan.refuse_changes(job, ready.begun)
    return job


def resolve_job(job: Job, machines: Machines, sha256: str | None) -> Job:
    """Replace every `auto` of the job by what the machines have, and name the model's weights."""
    if job.model.sha256 not in (None, sha256):
        raise ModelError(
            f"model.path = {job.model.path}: its weights' sha256 is {sha256}, and must be "
            f"{job.model.sha256}, as the job or the begun output says."
        )
    model = job.model.model_copy(update={"sha256": sha256})
    engine = pool.resolve_engine(job, machines)
    return job.model_copy(update={"model": model, "engine": engine})
