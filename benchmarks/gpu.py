"""The yardstick on a GPU: the machine, the bits, the calls, the engine, and diffusers as its users
tune it.

    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME     # within eight minutes
    python benchmarks/gpu.py --part "compiled diffusers" --output benchmarks/results/gpu-NAME-b3
    python benchmarks/gpu.py --plan        # the parts, and the seconds expected on one H100
    python benchmarks/gpu.py --small       # on a CPU, with the tests' model

No network: random weights in the true shape of Stable Diffusion 1.5, which cost the same time.

    B1  diffusers, eager, float16             B2  with channels_last
    B3  with channels_last, fused QKV and torch.compile, max-autotune, Inductor's documented flags
    S   the engine, float16, channels_last    Sc  with engine.compile

B1 and B2 draw in their own best batch size, with the VAE in slices if that is faster; S with the
better of two numbers of lanes. Counted on every side: tokens, text encoder, denoising, decoding,
rounding to bytes on the device, their copy to the CPU. On no side: PIL, files, a safety checker.
S has the deterministic algorithms of a run; diffusers has torch's defaults.
Rates are medians of two runs, in turns forwards and backwards (A-B-B-A), with new prompts each.

A part that fails says so, and the others go on; NAME.json and NAME.md are written after every part.
A part that would not end in time is left out: `--part NAME` runs it alone. The expected seconds are
predictions (benchmarks/roofline.py), scaled by the card's own matrix products once they are known.
With --small that includes what compiles. `benchmarks/end_to_end.py` compares `sdbatch run` with the
bare engine.
"""

import json
import shutil
import time
import traceback
from pathlib import Path

import calls
import click
import rates
import torch
from bench import FULL, SMALL, Bench, Part, Setting, Work
from findings import Findings
from roofline import CEILING, COMPILED, EAGER

STARTED = time.monotonic()
SECONDS = 480
IMPORTS_S = 15.0  # before this module's first line
PARTS = (
    Part("machine", calls.machine, lambda _: Work(), 8),
    Part("places", calls.places, calls.places_work, 10),
    Part("places in another process", calls.another_process, calls.places_work, 35),
    Part("calls", calls.calls, calls.calls_work, 12),
    Part("samplers", calls.samplers, calls.samplers_work, 8),
    Part("engine", rates.engines, rates.engines_work, 2),
    Part("peers", rates.peers, rates.peers_work, 2),
    Part("accuracy", rates.accuracy, rates.accuracy_work, 8),
    # how long compilation takes is the least certain of all: 100 to 260 s are reported
    Part("compiled engine", rates.compiled_engine, rates.compiled_engine_work, 130, compiled=True),
    Part(
        "compiled diffusers",
        rates.compiled_diffusers,
        rates.compiled_diffusers_work,
        300,
        compiled=True,
        by_default=False,
    ),
)


def expected_s(part: Part, setting: Setting, ceiling: float = CEILING) -> float:
    """Return the seconds that a part is expected to take, on a card with that many TFLOP/s."""
    work = part.work(setting)
    speed = COMPILED if part.name == "compiled diffusers" else EAGER
    return part.fixed_s + speed.seconds(work.lane_steps, work.images) * CEILING / ceiling


def plan(setting: Setting) -> str:
    """Return the expected seconds of each part on one H100, and what they add up to."""
    lines, total = [], IMPORTS_S
    for part in PARTS:
        seconds = expected_s(part, setting)
        total += seconds if part.by_default else 0
        alone = "" if part.by_default else "  (alone: --part)"
        lines.append(f"{seconds:6.0f} s  {part.name}{alone}")
    return "\n".join([*lines, f"{total:6.0f} s  in all, with the imports; at most {SECONDS} s"])


def measure(bench: Bench, parts: list[Part], seconds: float | None) -> list[str]:
    """Run part after part; return the names of those that failed.

    Args:
        bench: what they share.
        parts: to run.
        seconds: from the start of the process; a part that would end later is left out.
    """
    failed = []
    for part in parts:
        left = None if seconds is None else seconds - IMPORTS_S - (time.monotonic() - STARTED)
        needed = expected_s(part, bench.setting, bench.ceiling or CEILING)
        if left is not None and needed > left:
            why = f"left out: {needed:.0f} s are expected, and {left:.0f} s are left"
            bench.found.add(part.name, {"not measured": f'{why}. Run it with --part "{part.name}"'})
            continue
        if part.compiled and bench.setting.device == "cpu" and not shutil.which("g++"):
            bench.found.add(part.name, {"not measured": "there is no C++ compiler here"})
            continue
        began = time.monotonic()
        try:
            part.run(bench)
        except Exception as error:  # noqa: BLE001  the other parts go on
            traceback.print_exc()
            failed.append(part.name)
            bench.found.add(f"{part.name}: failed", {type(error).__name__: str(error)[:300]})
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        bench.found.seconds(part.name, time.monotonic() - began)
    return failed


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="The tests' model on a CPU.")
@click.option("--plan", "planned", is_flag=True, help="Print the parts and their expected seconds.")
@click.option(
    "--part", "names", multiple=True, type=click.Choice([part.name for part in PARTS[1:]])
)
@click.option("--output", type=click.Path(path_type=Path), help="Write NAME.json and NAME.md.")
def main(small: bool, planned: bool, names: tuple[str, ...], output: Path | None) -> None:
    """Measure."""
    if planned:
        print(plan(FULL))
        return
    if not small and not torch.cuda.is_available():
        raise click.ClickException("this machine has no GPU: run with --small")
    if small:
        torch.set_num_threads(1)
    parts = [p for p in PARTS[1:] if (p.name in names if names else p.by_default)]
    if small and not names:
        parts = [part for part in parts if not part.compiled]  # minutes for g++
    bench = Bench(SMALL if small else FULL, Findings(output))
    failed = measure(bench, [PARTS[0], *parts], None if small or names else SECONDS)
    print(json.dumps(bench.found.values))
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
