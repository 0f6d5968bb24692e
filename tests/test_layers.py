"""The layers of ARCHITECTURE.md, held: who may import whom, and what stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sdbatch"
MODULES = sorted(ROOT.rglob("*.py"))
PICTURE = (ROOT.parent / "ARCHITECTURE.md").read_text()
# Module or folder -> the others that it may import, from the table in ARCHITECTURE.md.
MAY_IMPORT = {
    name: others.split() for name, others in re.findall(r"^\| `(\w+)` \| ([\w ]*)\|", PICTURE, re.M)
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


def knows(path: Path, package: str) -> bool:
    return any(name.split(".")[0] == package for name in imports(path))


def test_every_module_has_its_layer():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert {part(path) for path in MODULES} | folders == set(MAY_IMPORT)


def test_no_module_imports_what_its_layer_may_not():
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in imports(path)
        if name.startswith("sdbatch.")
        and name.split(".")[1] not in [part(path), *MAY_IMPORT[part(path)]]
    ]
    assert broken == []


def test_the_layers_have_an_order_without_cycles():
    order: list[str] = []
    left = dict(MAY_IMPORT)
    while left:
        free = [name for name, others in left.items() if set(others) <= set(order)]
        assert free, f"a cycle among {', '.join(left)}"
        order += free
        left = {name: others for name, others in left.items() if name not in free}
    assert order[-1] in ("__init__", "cli")


def test_every_import_that_the_picture_allows_is_used():
    used = {
        (part(path), name.split(".")[1])
        for path in MODULES
        for name in imports(path)
        if name.startswith("sdbatch.")
    }
    unused = [
        f"{name} may import {other}"
        for name, others in MAY_IMPORT.items()
        for other in others
        if (name, other) not in used
    ]
    assert unused == []


@pytest.mark.parametrize("package", ["ray", "pyarrow", "fsspec"])
@pytest.mark.parametrize("folder", ["engine", "models"])
def test_the_engine_and_the_models_never_import(folder, package):
    assert [path.name for path in MODULES if part(path) == folder and knows(path, package)] == []


def test_the_engine_holds_no_word_of_a_model_family():
    words = re.compile(
        r"sdbatch\.models|diffusers|transformers|\bunet\b|\bvae\b|stable.?diffusion", re.I
    )
    found = {
        path.name: words.findall(path.read_text())
        for path in (ROOT / "engine").glob("*.py")
        if words.search(path.read_text())
    }
    assert found == {}


def test_only_the_batch_run_the_service_and_submitting_know_ray():
    knowing = {str(path.relative_to(ROOT)) for path in MODULES if knows(path, "ray")}
    outside = {name for name in knowing if not name.startswith("batch/")}
    assert outside == {"serve/application.py", "submit/jobs.py"}


def test_the_service_uses_nothing_of_the_batch_run_but_the_pool_and_rays_setup():
    used = {
        name.split(".")[2]
        for path in (ROOT / "serve").glob("*.py")
        for name in imports(path)
        if name.startswith("sdbatch.batch.")
    }
    assert used == {"pool", "ray_setup"}
    probe = (
        "import sys, sdbatch.serve.application;"
        "print({f'sdbatch.batch.{m}' for m in ('pipeline', 'driver', 'flow')} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "light",
    [
        "job",
        "prompts.table",
        "output.plan",
        "output.receipts",
        "output.verify",
        "resolve",
        "stages.base",
        "report.status",
        "report.outline",
        "report.sheet",
        "report.scores",
        "batch.pipeline",
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


def test_the_way_from_the_command_to_a_shard_has_at_most_ten_stops():
    """Each stop that ARCHITECTURE.md names exists."""
    way = PICTURE.partition("in ten stops: ")[2].partition(".\n")[0]
    stops = way.replace("\n", " ").split("->")
    assert 5 <= len(stops) <= 10
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in MODULES}
    for name in re.findall(r"`([^`]+)`", way):
        file, _, function = name.removesuffix(".py").rpartition(".")
        if name.endswith(".py"):
            assert name in sources
        elif name not in ("lay_out", "_round"):
            found = [text for path, text in sources.items() if path.endswith(f"{file}.py")]
            assert any(f"def {function}(" in text for text in found), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_one_noun_of_at_most_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    long = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= 50
    ]
    assert long == []
