"""Size and shape of the package: folders, imports between them, circles, long functions. Compares commits:

python benchmarks/structure.py                      # the working tree
python benchmarks/structure.py --commit 62ce293     # an older one
"""

import argparse
import ast
import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from minitron_mcore.reporting import tables

PACKAGE = "minitron_mcore"


def imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or ({node.module} & modules)
    return found


def circles(graph: dict[str, set[str]]) -> int:
    """Modules that reach themselves."""
    reached = {name: set(targets) for name, targets in graph.items()}
    for _ in graph:
        grown = {name: targets.union(*(reached.get(t, set()) for t in targets)) for name, targets in reached.items()}
        if grown == reached:
            break
        reached = grown
    return sum(name in targets for name, targets in reached.items())


def measure(root: Path) -> dict[str, int]:
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text()
        for path in root.glob(f"{PACKAGE}/**/*.py")
    }
    trees = {name: ast.parse(text) for name, text in files.items()}
    graph = {name: imported(tree, set(files)) for name, tree in trees.items()}
    room = {name: name.split(".")[1] if "." in name else name for name in files}
    arrows = {(room[a], room[b]) for a, targets in graph.items() for b in targets if room[a] != room[b]}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    parameters = [
        len(f.args.args) + len(f.args.kwonlyargs) - bool(f.args.args and f.args.args[0].arg == "self")
        for f in functions
    ]
    return {
        "lines": sum(text.count("\n") for text in files.values()),
        "files": len(files),
        "rooms in the root": len(set(room.values()) - {PACKAGE}),
        "arrows between rooms": len(arrows),
        "rooms that import each other": sum((b, a) in arrows for a, b in arrows) // 2,
        "modules in circles": circles(graph),
        "longest function": max(f.end_lineno - f.lineno + 1 for f in functions),
        "functions above 70 lines": sum(f.end_lineno - f.lineno + 1 > 70 for f in functions),
        "most parameters": max(parameters),
        "functions above 8 parameters": sum(n > 8 for n in parameters),
        "longest file": max(text.count("\n") for text in files.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", action="append", default=[], help="also of this commit")
    rows = {"now": measure(Path(__file__).parents[1])}
    for commit in parser.parse_args().commit:
        packed = subprocess.run(["git", "archive", commit, PACKAGE], capture_output=True, check=True).stdout
        with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
            rows[commit] = measure(Path(folder))
    tables.table("structure", [{"": kind, **{name: row[kind] for name, row in rows.items()}} for kind in rows["now"]])


if __name__ == "__main__":
    main()
