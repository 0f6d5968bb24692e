"""The layers of ARCHITECTURE.md, held: who may import whom, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sdbatch"
MODULES = sorted(ROOT.rglob("*.py"))
LOW = "errors cores schema job storage prompts plan receipts"
# Module or folder -> the others that it may import, lowest layer first.
MAY_IMPORT = {
    "errors": "",
    "cores": "",
    "schema": "",
    "samplers": "",
    "strict_yaml": "errors",
    "job": "errors strict_yaml samplers",
    "storage": "errors",
    "prompts": "errors schema job storage",
    "plan": "errors schema job storage prompts",
    "receipts": "errors schema storage",
    "engine": "errors samplers",
    "formats": "schema samplers job",
    "monitor": "schema",
    "watch": "errors monitor",
    "stages": f"{LOW} engine formats monitor",
    "shapes": "",
    "report": f"{LOW} formats shapes",
    "output": f"{LOW} report",
    "actors": "errors job",
    "cluster": "errors cores job monitor watch actors",
    "driver": f"{LOW} report output monitor watch actors cluster",
    "flow": f"{LOW} formats monitor watch stages actors cluster",
    "pipeline": f"{LOW} engine formats monitor stages report output actors cluster driver flow",
    "serve": f"{LOW} strict_yaml samplers engine formats stages actors cluster pipeline",
    "submit": f"{LOW} report",
    "terminal": "report",
    "cli": f"{LOW} pipeline report serve submit terminal",
    "__init__": "job pipeline report",
}


def part(path: Path) -> str:
    inside = path.relative_to(ROOT)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path) -> list[str]:
    """Return the dotted names that a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_module_has_its_layer():
    assert {part(path) for path in MODULES} == set(MAY_IMPORT)


def test_no_module_imports_what_its_layer_may_not():
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in imports(path)
        if name.startswith("sdbatch.")
        and name.split(".")[1] not in [part(path), *MAY_IMPORT[part(path)].split()]
    ]
    assert broken == []


@pytest.mark.parametrize("package", ["ray", "pyarrow", "fsspec"])
def test_the_engine_never_imports(package):
    broken = [
        path.name
        for path in MODULES
        if part(path) == "engine" and any(name.split(".")[0] == package for name in imports(path))
    ]
    assert broken == []


def test_only_the_run_knows_ray():
    knowing = {
        part(path) for path in MODULES if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert knowing == {"cluster", "driver", "flow", "monitor", "watch", "serve", "submit"}


def test_of_the_service_only_what_puts_it_on_ray_knows_ray():
    knowing = {
        path.stem
        for path in (ROOT / "serve").glob("*.py")
        if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert knowing == {"__init__", "application", "run"}


@pytest.mark.parametrize(
    "light",
    [
        "job",
        "prompts.table",
        "plan",
        "receipts",
        "report.status",
        "report.plan",
        "report.verify",
        "report.sheet",
        "report.score",
        "cli",
    ],
)
def test_import_loads_neither_torch_nor_ray(light):
    probe = (
        f"import sys, sdbatch.{light}; print({{'torch', 'ray', 'diffusers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_training_uses_nothing_of_the_package_but_the_world():
    of_package = {
        name.split(".")[1]
        for path in (ROOT.parent / "training").glob("*.py")
        for name in imports(path)
        if name.startswith("sdbatch.")
    }
    assert of_package == {"shapes"}


def test_the_driver_loads_no_torch():
    probe = "import sys, sdbatch.batch.pipeline; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300


def test_what_is_peculiar_to_stable_diffusion_1_stands_in_one_short_file():
    assert len((ROOT / "engine" / "sd1.py").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    long = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= 50
    ]
    assert long == []
