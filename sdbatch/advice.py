"""What an engine's values are taken from where a job leaves them open.

First what `tune` has found for its device, model and size; else the memory of the GPU, and rules.
"""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass, fields

from sdbatch import cores, hardware, tuned
from sdbatch.hardware import Device
from sdbatch.job import Job, Model
from sdbatch.models.find_model import ModelFiles
from sdbatch.tuned import Choice, Entry, Key

GIVEN = "as the job or its output says"
_OWN = ("vae", "loras", "embeddings", "config", "ema")  # keys that make another model of a model
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Advice:
    """Where open values come from."""

    source: str  # of the lanes, for people
    choice: Choice | None = None  # of `tune`
    memory: float = math.inf  # bytes of the GPU for an actor; infinite: not known


def advise(
    job: Job, files: ModelFiles, kind: str, sha256: str | None, gpu_types: Collection[str]
) -> Advice:
    """Find what `tune` has found for a job, or else the memory of its GPU.

    Args:
        job: with its size and the values that it leaves open.
        files: of its model.
        kind: of the device, cpu or cuda.
        sha256: of the files.
        gpu_types: Ray's names of the GPUs' types; none: those of this machine.
    """
    left_open = [each.name for each in fields(Choice) if getattr(job.engine, each.name) == "auto"]
    if not left_open:
        return Advice(GIVEN)
    device = hardware.processor() if kind == "cpu" else _gpu(gpu_types)
    found = None if isinstance(device, str) else _find(job, files, device, sha256)
    if found is not None:
        source = f"by tune of {found.date} on {found.key.device}"
        if "lanes" not in left_open:
            source = f"{GIVEN}, other values {source}"
        return Advice(source, found.choice)
    if "lanes" not in left_open:
        return Advice(GIVEN)
    way = f"not tuned: run `{_command(job)}`"
    if isinstance(device, str):
        return Advice(f"by rule, as {device}, {way}")
    if device.memory is None:
        unknown = "" if kind == "cpu" else ", as the memory of the GPU is not known here"
        return Advice(f"by rule{unknown}, {way}")
    memory = device.memory * min(1.0, job.cluster.gpus_per_actor)
    gib = f"{memory / 2**30:.0f} GiB"
    return Advice(f"by the memory of {device.name} ({gib}), {way}", memory=memory)


def dtype_by_rule(kind: str) -> str:
    """Return the type of the weights on a device that was not tuned."""
    if kind == "cuda":
        return "float16"
    return "bfloat16" if cores.have_bfloat16() else "float32"


def layout_by_rule(kind: str, dtype: str) -> bool:
    """Tell whether weights are channels_last on a device that was not tuned."""
    return (kind, dtype) != ("cpu", "bfloat16")  # by benchmarks/lanes.py


def tuning_key(job: Job, files: ModelFiles, device: Device, sha256: str | None) -> Key:
    """Return what a choice for a job must be good for."""
    dtype = job.engine.dtype
    return Key(
        device=device.name,
        driver=device.driver,
        versions=tuned.versions(),
        model=tuned.model_id(files.path, files.revision, sha256),
        height=job.sampling.height,
        width=job.sampling.width,
        dtype=dtype_by_rule("cuda") if (device.kind, dtype) == ("cuda", "auto") else dtype,
    )


def _find(job: Job, files: ModelFiles, device: Device, sha256: str | None) -> Entry | None:
    entries, notes = tuned.read()
    for note in notes:
        _log.warning(f"Note: {note}")
    if device.kind == "cuda" and job.cluster.gpus_per_actor < 1:  # tune has a whole GPU
        return None
    return tuned.find(entries, tuning_key(job, files, device, sha256), is_here=device.is_here)


def _gpu(types: Collection[str]) -> Device | str:
    """Return the GPU that draws a job, or why it is not known."""
    here = [
        gpu
        for gpu in hardware.gpus()
        if not types or any(hardware.is_of_type(gpu.name, kind) for kind in types)
    ]
    kinds = sorted(set(types) or {gpu.name for gpu in here})
    if len(kinds) > 1:
        return f"the GPUs are of several types ({', '.join(kinds)})"
    if here:
        return here[0]
    return Device("cuda", kinds[0], is_here=False) if kinds else "the GPU is not known here"


def _command(job: Job) -> str:
    """Return the command that tunes for a job: for its model, if the job adds nothing to it."""
    model, sampling = job.model, job.sampling
    plain = Model(path=model.path)
    adds = any(getattr(model, name) != getattr(plain, name) for name in _OWN)
    if adds or (job.safety.checker, job.engine.dtype) != ("auto", "auto"):
        return "sdbatch tune JOB"
    return f"sdbatch tune {model.path} --size {sampling.width}x{sampling.height}"
