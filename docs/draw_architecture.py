"""Draw docs/assets/architecture.svg: the package's folders as floors and their imports (lazy ones included), without arrows that
follow from others: A -> C is left out where A -> B -> C.

    python docs/draw_architecture.py            # write the picture
    python docs/draw_architecture.py --check    # status 1 where it is not up to date
"""

import ast
import io
import sys
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "architecture"  # the same file for the same code
matplotlib.rcParams["svg.fonttype"] = "none"
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "architecture.svg"


def imports(folder: Path) -> set[str]:
    """Names of the floors that the modules of a folder (or the one module of that name) import."""
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minitron_mcore":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found - {folder.name}


def draw(floors: list[str]) -> str:
    height = {name: len(floors) - n for n, name in enumerate(floors)}
    direct = {name: imports(ROOT / "minitron_mcore" / name) & height.keys() for name in floors}
    reached = {}
    for name in reversed(floors):
        reached[name] = direct[name].union(*(reached[target] for target in direct[name]))
    figure, axes = plt.subplots(figsize=(6, 8.5))
    for name, y in height.items():
        axes.add_patch(plt.Rectangle((0, y - 0.36), 2.2, 0.72, facecolor="#e8eef7", edgecolor="#33568c"))
        axes.text(1.1, y, name, ha="center", va="center", fontsize=11, family="monospace")
        for target in sorted(direct[name] - set().union(*(reached[other] for other in direct[name]))):
            if y - height[target] == 1:
                ends, bend = [(1.1, height[target] + 0.36), (1.1, y - 0.36)], 0.0
            else:
                ends, bend = [(2.2, height[target] + 0.15), (2.2, y - 0.15)], -0.45
            style = dict(arrowstyle="-|>", connectionstyle=f"arc3,rad={bend}", color="#33568c", alpha=0.7)
            axes.annotate("", *ends, arrowprops=style)
    axes.set(xlim=(-0.1, 5), ylim=(0.4, len(floors) + 0.6))
    axes.axis("off")
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return out.getvalue()


if __name__ == "__main__":
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    picture = draw(next(contract["layers"] for contract in contracts if contract["type"] == "layers"))
    if "--check" in sys.argv[1:]:
        sys.exit(
            PICTURE.read_text() != picture and f"{PICTURE} is not up to date: run python docs/draw_architecture.py"
        )
    PICTURE.write_text(picture)
