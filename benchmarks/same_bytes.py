"""Run the same jobs with two states of the code, and compare every byte of their datasets.

    python benchmarks/same_bytes.py REVISION [--jobs NAME ...] [--keep FOLDER] [--pixels]

REVISION is a commit or branch of this repository: its state is checked out next to this one and run
by the same Python. The jobs cover Parquet and WebDataset, all image formats, mixed samplers, steps,
sizes and guidance, a LoRA and an embedding, all safety policies, and rows that fail. Exits with 1
if a file of a `data/` folder differs. The version of sdbatch that images record must be the same.
With --pixels, for revisions between which columns were added: compares the pixels of each image and
the values of the columns that both have.
Prints a table and, on the last line, JSON.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import torch
import yaml
from before_after import ROOT, checked_out
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT))

from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker,
)
from transformers import CLIPConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tests import tiny

SAMPLERS = ("ddim", "euler_a", "dpmpp_2m_karras", "lms", "unipc", "dpmpp_sde", "tcd", "heun")
RUN = "from sdbatch.cli import main; main()"
SMALL = {"height": 64, "width": 64, "num_inference_steps": 6}
MIXED = [
    {
        "prompt": f"a (red:1.{i % 4}) dog and a [blue] cat, number {i}" + " and so on" * (i % 12),
        "sampler": SAMPLERS[i % len(SAMPLERS)],
        "num_inference_steps": 2 + i % 7,
        "guidance_scale": (1.0, 3.5, 7.5)[i % 3],
        "guidance_rescale": (0.0, 0.7)[i % 2],
        "guidance_stop": (1.0, 0.6)[i % 5 == 0],
        "height": (64, 64, 96)[i % 3],
        "width": (64, 80)[i % 4 == 0],
        "clip_skip": i % 2,
        "prompt_weights": i % 2 == 0,
        "chunk_prompts": i % 3 == 0,
        "breed": ("pug", None, "lab")[i % 3],
    }
    for i in range(40)
]
FAULTY: list[dict[str, Any]] = [
    {"prompt": "a dog"},
    {"prompt": None},
    {"prompt": "a dog", "height": 65},
    {"prompt": "a dog", "sampler": "none"},
    {"prompt": "a dog", "sampler": "lcm", "num_inference_steps": 900},
    {"prompt": "a dog", "seed": 2**63 - 1},
    {"prompt": "a dog", "clip_skip": 9},
    {"prompt": "a <lora:x:1> dog", "prompt_weights": True},
    *({"prompt": f"a cat, number {i}", "eta": 0.5, "sampler": "ddim"} for i in range(8)),
]


def write_inputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the models that the jobs name into `folder`; return the jobs by name."""
    tiny.write_folder(folder / "model")
    write_lora(folder / "model", folder / "style.safetensors")
    embedding = torch.randn(3, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
    save_file({"emb_params": embedding}, folder / "word.safetensors")
    write_checker(folder / "model", folder / "checker")
    plain = [{"prompt": f"a dog, number {i}"} for i in range(24)]
    words = [{"prompt": f"a <word> dog, number {i}", "mood": i / 7} for i in range(24)]
    fused = {
        "path": "model",
        "loras": [{"path": "style.safetensors", "weight": 0.8}],
        "embeddings": [{"path": "word.safetensors", "token": "<word>"}],
    }
    return {
        "shapes": job(
            [{"prompt": f"{n} red circles on a blue background"} for n in ("two", "three")] * 6,
            model="builtin:shapes",
            sampling={"height": 128, "width": 128, "num_inference_steps": 8},
            output={"image_format": "jpg"},
            prompts={"images_per_row": 2},
        ),
        "mixed": job(MIXED, output={"image_format": "png"}),
        "mixed-tar": job(MIXED, output={"image_format": "webp", "format": "webdataset"}),
        "fused": job(words, model=fused, output={"image_format": "webp", "quality": 80}),
        "fused-tar": job(words, model=fused, output={"format": "webdataset"}),
        **{
            f"safety-{policy}": job(
                plain,
                safety={"checker": "checker", "policy": policy},
                output={"image_format": form, "format": file_format},
            )
            for policy, form, file_format in (
                ("flag", "png", "parquet"),
                ("blank", "jpg", "parquet"),
                ("drop", "png", "webdataset"),
            )
        },
        "failed": job(FAULTY, output={"image_format": "png"}, prompts={"images_per_row": 2}),
    }


def job(rows: list[dict[str, Any]], **sections: Any) -> dict[str, Any]:
    """Return a job over `rows`, with small shards."""
    output = {"path": "set by the run", "images_per_shard": 10, **sections.pop("output", {})}
    prompts = {"rows": rows, **sections.pop("prompts", {})}
    return {"model": "model", "sampling": SMALL, "prompts": prompts, "output": output, **sections}


def write_lora(model: Path, path: Path) -> None:
    """Write a random LoRA of the UNet and the text encoder as diffusers' training scripts do."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    layers = {}
    torch.manual_seed(1)
    for name, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "fc1"])):
        part = getattr(pipe, name)
        part.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        for key, weight in part.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.1)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
    StableDiffusionPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers)


@torch.no_grad()
def write_checker(model: Path, folder: Path) -> None:
    """Write a small safety checker with a random concept that flags about half of all images."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(2)
    prompts = [f"a dog, number {i}" for i in range(24)]
    drawn = pipe(prompts, num_inference_steps=6, height=64, width=64, output_type="pt").images
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = CLIPConfig(vision_config=vision, text_config={}, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config)
    for weight in checker.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    checker.concept_embeds_weights.fill_(1.0)
    checker.special_care_embeds_weights.fill_(1.0)
    pictures = torch.nn.functional.interpolate(drawn, (32, 32), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(each)[:, None, None] for each in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pictures = (pictures - mean) / std
    embeddings = checker.visual_projection(checker.vision_model(pictures)[1])
    likeness = torch.nn.functional.cosine_similarity(embeddings, checker.concept_embeds[:1])
    checker.concept_embeds_weights[0] = likeness.median()
    checker.save_pretrained(folder)


def run(state: Path, inputs: Path, name: str, output: Path) -> None:
    """Run one job with the code in `state`."""
    command = [sys.executable, "-c", RUN, "run", f"{name}.yaml"]
    command += ["--set", f"output.path={output}"]
    environment = {**os.environ, "PYTHONPATH": str(state), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=inputs, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name} with {state}: exit code {done.returncode}\n{done.stderr}")


def hashes(output: Path) -> dict[str, str]:
    """Return the sha256 of each file of a dataset."""
    files = sorted((output / "data").glob("*"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def contents(output: Path) -> dict[str, Any]:
    """Return the pixels' hash of each image of a dataset, and its other values, by name."""
    found: dict[str, Any] = {}
    for file in sorted((output / "data").glob("*")):
        for name, image, values in _read(file):
            found[f"{name} pixels"] = hashlib.sha256(Image.open(image).tobytes()).hexdigest()
            found |= {f"{name} {key}": value for key, value in values.items() if key != "sha256"}
    return found


def _read(file: Path) -> Iterator[tuple[str, io.BytesIO, dict[str, Any]]]:
    """Yield each image of a shard: its name, its file, its values."""
    if file.suffix == ".parquet":
        for row in pq.read_table(file).to_pylist():
            yield row["key"], io.BytesIO(row.pop("image")["bytes"]), row
        return
    with tarfile.open(file) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name in (name for name in members if name.endswith(".json")):
        stem = name.removesuffix(".json")
        (image,) = (
            n for n in members if n.startswith(f"{stem}.") and not n.endswith((".json", ".txt"))
        )
        yield stem, io.BytesIO(members[image]), json.loads(members[name])


def compare(before: Path, inputs: Path, name: str, folder: Path, *, pixels: bool) -> dict[str, Any]:
    """Run a job with both states; return what they drew, and which files or values differ."""
    outputs = {state: folder / name / state for state in ("before", "after")}
    run(before, inputs, name, outputs["before"])
    run(ROOT, inputs, name, outputs["after"])
    first, second = ((contents if pixels else hashes)(output) for output in outputs.values())
    if pixels:  # what only one of them records is no difference
        columns = [{key.partition(" ")[2] for key in each} for each in (first, second)]
        both = columns[0] & columns[1]
        first, second = (
            {key: value for key, value in each.items() if key.partition(" ")[2] in both}
            for each in (first, second)
        )
    counts = [
        json.loads(file.read_text()) for file in (outputs["after"] / "receipts").glob("*.json")
    ]
    return {
        "job": name,
        "files": len(list((outputs["after"] / "data").glob("*"))),
        "images": sum(each["images"] for each in counts),
        "failed": sum(each["failed"] for each in counts),
        "differing": sorted(
            file for file in first.keys() | second.keys() if first.get(file) != second.get(file)
        ),
    }


@click.command()
@click.argument("revision")
@click.option("--jobs", multiple=True, help="Only these jobs.")
@click.option("--pixels", is_flag=True, help="Compare pixels and values instead of files.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep all files in this folder.")
def main(revision: str, jobs: tuple[str, ...], pixels: bool, keep: Path | None) -> None:
    """Compare this state of the code with that of REVISION."""
    folder = (keep or Path(tempfile.mkdtemp(prefix="same-bytes-"))).resolve()
    results = []
    try:
        inputs = folder / "inputs"
        inputs.mkdir(parents=True)
        made = write_inputs(inputs)
        for name, values in made.items():
            (inputs / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        with checked_out(revision) as before:
            for name in jobs or made:
                results.append(compare(before, inputs, name, folder, pixels=pixels))
                result = results[-1]
                verdict = ", ".join(result["differing"][:20]) or "none"
                print(
                    f"{name:14} {result['files']:3} files {result['images']:4} images "
                    f"{result['failed']:3} failed   differing: {verdict}",
                    flush=True,
                )
    finally:
        if keep is None:
            shutil.rmtree(folder)
    print(json.dumps({"revision": revision, "jobs": results}))
    sys.exit(1 if any(result["differing"] for result in results) else 0)


if __name__ == "__main__":
    main()
