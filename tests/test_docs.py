"""The documents say what the code does: links, commands, examples, the reference of all keys."""

import ast
import re
import runpy
from pathlib import Path

import pyarrow as pa
import pytest

import sdbatch
from sdbatch import schema
from sdbatch.cli import main
from tests.finished import finish, small_job

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
}
PAGES = sorted(
    path
    for path in ROOT.glob("**/*.md")
    if not {".venv", "out", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
MAX_LINES = 150  # of the README
# a command in code: in backticks, on an indented line, after a path, `&&` or `--`
COMMAND = re.compile(r"(?:`|/|&& |-- |^ {4})sdbatch ([a-z]+)([^`\n]*)", re.MULTILINE)
OPTION = re.compile(r"--[a-z][a-z-]+")


def code_blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def options(command: str) -> set[str]:
    """Return the options of a command of sdbatch."""
    return {name for each in main.commands[command].params for name in each.opts} | {"--help"}


def test_the_reference_of_the_job_file_is_current():
    page = runpy.run_path(str(DOCS / "reference.py"))["page"]
    assert page() == (DOCS / "job.md").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(README.splitlines()) < MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_and_option_of_sdbatch_exists(name):
    unknown = []
    for command, rest in COMMAND.findall(GUIDES[name]):
        known = options(command) if command in main.commands else set()
        unknown += [] if known else [command]
        unknown += set(OPTION.findall(rest)) - known
    assert unknown == []


def test_the_table_of_commands_has_every_command_and_only_its_options():
    rows = dict(re.findall(r"^\| `sdbatch (\w+).*?` \| (.*) \|$", GUIDES["docs/commands.md"], re.M))
    assert rows.keys() == main.commands.keys()
    unknown = {name: set(OPTION.findall(text)) - options(name) for name, text in rows.items()}
    assert unknown == {name: set() for name in rows}


@pytest.mark.parametrize("name", GUIDES)
def test_every_yaml_example_is_a_job(name, tmp_path):
    for text in code_blocks(GUIDES[name], "yaml"):
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        assert sdbatch.load_job(str(path)).output.path


def test_the_python_examples_read_an_output(make_job, tmp_path, monkeypatch):
    import datasets

    path = str(tmp_path / "out" / "shapes")
    images = finish(small_job(make_job, tmp_path, output={"path": path})).report.images
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    names = {}
    for text in code_blocks(GUIDES["docs/output.md"], "python"):
        exec(text, names)
    assert names["images"].num_rows == len(names["table"]) == len(names["same"]) == images
    assert names["seeds"].columns == ["prompt", "seed"]
    assert (tmp_path / "first.png").stat().st_size


def test_the_columns_of_the_output_are_listed_in_their_order():
    names = re.findall(r"^\| (`.*?) \|", GUIDES["docs/output.md"], re.MULTILINE)
    listed = re.findall(r"`(\w+)`", ", ".join(names))
    columns = schema.images(pa.schema([])).names
    assert listed[: len(columns)] == columns


def test_readme_has_the_two_commands_that_ci_runs():
    first, second = code_blocks(README, "sh")
    assert first.endswith("sdbatch run jobs/dataset.yaml\n")
    tests = [each.removeprefix(".venv/bin/") for each in second.strip().split(" && ")[1:]]
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"test:\n\t{tests[0]}\n\t{tests[1]}\n" in make


def test_the_recording_of_the_first_run_is_of_the_command_in_the_readme():
    recording = (DOCS / "first-run.txt").read_text(encoding="utf-8")
    assert recording.splitlines()[0] == f"~/sdbatch$ {code_blocks(README, 'sh')[0].strip()}"
    shown = re.findall(r"^    (.+)$", README, re.MULTILINE)
    assert shown
    assert [line for line in shown if line not in recording] == []


def test_every_fault_has_a_test_that_exists():
    rows = re.findall(r"^\| (?!fault).*$", GUIDES["docs/what-happens.md"], re.MULTILINE)
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert cells
    assert [row for row in cells if len(row) != 4] == []
    named = [re.findall(r"`(tests/\S+\.py)::(\w+)`", row[3]) for row in cells]
    assert [row for row, tests in zip(cells, named, strict=True) if not tests] == []
    missing = [test for tests in named for test in tests if test[1] not in functions(test[0])]
    assert missing == []


def functions(path: str) -> set[str]:
    """Return the names of the functions of a Python file, or none if it is missing."""
    if not (ROOT / path).exists():
        return set()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
