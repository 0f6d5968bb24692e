"""One training loop for all networks: a course of the rate of learning, averaged weights.

A step's data is a function of the step's number, and the state is saved with all it needs: a
training that was stopped goes on with the bits it would have had.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from training.muon import Muon

REPORT_EVERY = 50  # steps; the curve has their mean loss
SAVE_EVERY = 250  # steps, a multiple of REPORT_EVERY
DECAY = 0.01  # of the weights, times the rate
Course = tuple[tuple[int, float], ...]
STATE_FILE, CURVE_FILE = "state.pt", "curve.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one network is trained."""

    steps: int  # a multiple of REPORT_EVERY
    batch: int  # pictures a step
    rate: float  # of learning, the highest
    course: Course = ((0, 0.0), (200, 1.0))  # step, the share of the rate there; lines between
    muon: bool = False  # moves what has rows and columns; AdamW the rest, or all
    average: float = 0.999  # the part of the averaged weights that a step keeps
    threads: int = 1  # of torch: the sums of another number differ in their last bits
    seed: int = 0

    def share_of_rate(self, step: int) -> float:
        """Return what part of the rate this step has."""
        steps, shares = zip(*self.course, strict=True)
        return float(np.interp(step, steps, shares))

    def past(self, step: int) -> dict[str, Any]:
        """Return what the first `step` steps depend on."""
        same = {field.name: getattr(self, field.name) for field in fields(self)}
        del same["steps"], same["course"]
        return {**same, "shares": [self.share_of_rate(at) for at in range(step)]}


LAST_OF_BRANCH = ("conv2", "to_out.0", "ff.net.2")  # of diffusers' blocks, before it is added


def let_through(network: torch.nn.Module) -> None:
    """Give `network` fresh weights that keep a signal's size, in branches that begin at zero.

    torch's own shrink it by about a half in each of the many layers between a picture and its
    copy, until the biases hide it: all is learnt late.

    Source: He et al. 2015, for no activation; Zhang et al. 2019 (Fixup) for the branches.
    """
    for name, part in network.named_modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)
        if name.endswith(LAST_OF_BRANCH):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)


def train(
    network: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    settings: Settings,
    folder: Path,
) -> None:
    """Train `network` to its averaged weights; go on where `folder` says that it was.

    Args:
        network: leaves with the averaged weights in it.
        loss: the loss of the step of this number, with its graph.
        settings: steps, rate and averaging.
        folder: gets state.pt, and curve.jsonl with one line every 50 steps.
    """
    torch.set_num_threads(settings.threads)
    folder.mkdir(parents=True, exist_ok=True)
    weights = list(network.parameters())
    optimizers = _optimizers(weights, settings)
    average = EMAModel(weights, decay=settings.average)
    parts = {"network": network, "average": average}
    for name, optimizer in optimizers.items():
        parts[name] = optimizer
        parts[f"{name}_rate"] = LambdaLR(optimizer, settings.share_of_rate)
    recent, began = 0.0, time.monotonic()
    for step in range(_restore(parts, settings, folder), settings.steps):
        value = loss(step)
        network.zero_grad()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for name, optimizer in optimizers.items():
            optimizer.step()
            parts[f"{name}_rate"].step()
        average.step(weights)
        recent += value.item() / REPORT_EVERY
        done = step + 1
        if done % REPORT_EVERY == 0:
            _report(folder, done, recent, (time.monotonic() - began) / REPORT_EVERY)
            recent, began = 0.0, time.monotonic()
        if done % SAVE_EVERY == 0 or done == settings.steps:
            _save(parts, settings.past(done), done, folder)
    average.copy_to(weights)


def _optimizers(
    weights: list[torch.nn.Parameter], settings: Settings
) -> dict[str, torch.optim.Optimizer]:
    by_muon = [weight for weight in weights if settings.muon and weight.ndim > 1]
    rest = [weight for weight in weights if not settings.muon or weight.ndim < 2]
    adamw = torch.optim.AdamW(rest, lr=settings.rate, weight_decay=DECAY)
    if not by_muon:
        return {"adamw": adamw}
    return {"adamw": adamw, "muon": Muon(by_muon, lr=settings.rate, weight_decay=DECAY)}


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's curve: step, mean loss of 50 steps, seconds a step."""
    path = folder / CURVE_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _report(folder: Path, step: int, loss: float, seconds: float) -> None:
    line = {"step": step, "loss": round(loss, 6), "seconds_a_step": round(seconds, 3)}
    print(folder.name, json.dumps(line), flush=True)
    with (folder / CURVE_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


def _save(parts: dict[str, Any], past: dict[str, Any], step: int, folder: Path) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "past": past, "step": step}, folder / "state.tmp")
    (folder / "state.tmp").rename(folder / STATE_FILE)


def _restore(parts: dict[str, Any], settings: Settings, folder: Path) -> int:
    """Bring the saved state back, if there is one; return how many steps it has had.

    Raises:
        ValueError: its steps were done under other settings.
    """
    lines = curve(folder)
    state: dict[str, Any] = {"step": 0}
    if (folder / STATE_FILE).exists():
        state = torch.load(folder / STATE_FILE)
        if state["past"] != settings.past(state["step"]):
            raise ValueError(
                f"{folder} = {state['step']} steps under other settings: must be a training of "
                f"these. Give another folder."
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= state["step"]]
    (folder / CURVE_FILE).write_text("".join(kept))
    return int(state["step"])
