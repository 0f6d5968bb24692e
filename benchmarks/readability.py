"""How the code reads, in figures: sizes, names, documentation, import cycles.

    python benchmarks/readability.py [FOLDER]

FOLDER is a package, by default sdbatch/. Lines are all lines of a file; a name of one word has no
underscore inside; a private one begins with an underscore. Prints a table and, on the last line,
JSON.
"""

import ast
import io
import json
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """Return the parameters of a function, without self and cls."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [each for each in every if each.arg not in ("self", "cls")]


def documented_lines(tree: ast.AST) -> int:
    """Return the lines of all docstrings."""
    count = 0
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            count += (text.end_lineno or text.lineno) - text.lineno + 1
    return count


def comment_lines(source: str) -> int:
    """Return the lines that have a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def imports_at_load(path: Path, package: Path) -> set[str]:
    """Return the modules of the package that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package.name):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def cycles(files: list[Path], package: Path) -> int:
    """Return the number of modules that import themselves through others."""
    names = {}
    for file in files:
        parts = file.relative_to(package.parent).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = file
    uses = {
        name: (imports_at_load(file, package) & names.keys()) - {name}
        for name, file in names.items()
    }

    def reaches(start: str) -> bool:
        seen, left = set(), [*uses[start]]
        while left:
            name = left.pop()
            if name == start:
                return True
            if name not in seen:
                seen.add(name)
                left += uses[name]
        return False

    return sum(reaches(name) for name in uses)


def share(part: float, whole: float) -> float:
    """Return a percentage."""
    return round(100 * part / whole, 1)


def measure(package: Path) -> dict[str, float]:
    """Return the figures of a package."""
    files = sorted(package.rglob("*.py"))
    sources = [file.read_text() for file in files]
    trees = [ast.parse(source) for source in sources]
    lines = [len(source.splitlines()) for source in sources]
    every = [node for tree in trees for node in functions(tree)]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in every)
    counts = sorted(len(parameters(node)) for node in every)
    named = [node.name for node in every if not node.name.startswith("__")]
    annotated = [
        node
        for node in every
        if node.returns is not None and all(arg.annotation for arg in parameters(node))
    ]
    total = sum(lines)
    return {
        "files": len(files),
        "lines": total,
        "median lines a file": statistics.median(lines),
        "most lines a file": max(lines),
        "functions": len(every),
        "most functions a file": max(len(list(functions(tree))) for tree in trees),
        "median lines a function": statistics.median(lengths),
        "90 % of functions have at most lines": lengths[int(0.9 * len(lengths))],
        "most lines a function": lengths[-1],
        "95 % of functions have at most parameters": counts[int(0.95 * len(counts))],
        "most parameters": counts[-1],
        "modules in an import cycle": cycles(files, package),
        "docstrings, % of lines": share(sum(map(documented_lines, trees)), total),
        "comments, % of lines": share(sum(map(comment_lines, sources)), total),
        "annotated functions, %": share(len(annotated), len(every)),
        "function names of one word, %": share(
            sum("_" not in name.strip("_") for name in named), len(named)
        ),
        "private function names, %": share(sum(name.startswith("_") for name in named), len(named)),
        "functions called read": sum(name.strip("_") == "read" for name in named),
    }


def main() -> None:
    """Print the figures."""
    package = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "sdbatch"
    found = measure(package)
    for name, value in found.items():
        print(f"{name:44} {value:>10,}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
