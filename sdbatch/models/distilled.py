"""Which parts of a model were distilled to few steps, by their names and what they say; no torch.

How each must be drawn is in sdbatch/few_steps.py.
"""

from pathlib import Path, PurePosixPath

from sdbatch import few_steps
from sdbatch.few_steps import Distilled
from sdbatch.job import Model
from sdbatch.job.files import named_files
from sdbatch.models import extra_files, hub, identify
from sdbatch.models.find_model import ModelFiles

_TITLES = ("modelspec.title", "ss_output_name")  # in the metadata of a .safetensors file
_SCHEDULERS = {"LCMScheduler": few_steps.LCM, "TCDScheduler": few_steps.TCD}


def find_distilled(model: Model, files: ModelFiles | None) -> list[Distilled]:
    """Return the parts of a job's model that were distilled to few steps, LoRAs among them.

    Args:
        model: of the job.
        files: that were found; None: they are not on this machine, and names alone count.
    """
    found = []
    own = None if files is None else _SCHEDULERS.get(files.scheduler)
    if files is not None and own is not None:
        found.append(Distilled("model.path", own, f"its {files.scheduler}", certain=True))
    elif named := few_steps.find_recipe(_name_of(model.path)):
        found.append(Distilled("model.path", named, "its name"))
    settings = model if files is None else files.settings
    loras = [each for each in named_files(settings, "model") if each.kind.content == identify.LORA]
    for lora, file in zip(settings.loras, loras, strict=True):
        names = {"its name": _name_of(file.path)}
        if files is not None:
            metadata = extra_files.header_of(file.path, file.kind, file.key).metadata
            names |= {f"its {title}": metadata.get(title, "") for title in _TITLES}
        for evidence, name in names.items():
            if (recipe := few_steps.find_recipe(name)) and (lora.weight or lora.name):
                where = file.key.removesuffix(".path")
                found.append(Distilled(where, recipe, evidence, lora.name))
                break
    return found


def _name_of(path: str) -> str:
    """Return the name of a file, with its folder's if every file of its kind has the same."""
    if not Path(path).exists() and hub.parse(path) is not None:
        return path
    own = PurePosixPath(path)
    return f"{own.parent.name}/{own.name}" if extra_files.is_usual(own.name) else own.name
