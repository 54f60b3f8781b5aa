"""Draw docs/assets/architecture.svg: the package's folders and their imports, lazy ones included. An arrow A -> C is left out where
A -> B -> C. With --check nothing is written: status 1 where the picture is not up to date."""

import ast
import io
import sys
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "architecture", "svg.fonttype": "none"}  # the same file for the same code
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "assets" / "architecture.svg"


def imports(folder: Path) -> set[str]:
    """Names of the floors that the modules of a folder (or the one module of that name) import."""
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    lists = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minitron_mcore")
    ]
    return {part for node in lists for part in (node.module.split(".")[1:2] or [name.name for name in node.names])}


def draw(floors: list[str]) -> str:
    direct = {name: (imports(ROOT / "minitron_mcore" / name) & set(floors)) - {name} for name in floors}
    reached = {}
    for name in reversed(floors):
        reached[name] = direct[name].union(*(reached[target] for target in direct[name]))
    figure, axes = plt.subplots(figsize=(6, 8.5))
    height = {name: len(floors) - n for n, name in enumerate(floors)}
    for name, y in height.items():
        axes.add_patch(plt.Rectangle((0, y - 0.36), 2.2, 0.72, facecolor="#e8eef7", edgecolor="#33568c"))
        axes.text(1.1, y, name, ha="center", va="center", fontsize=11, family="monospace")
        for target in sorted(direct[name] - set().union(*(reached[between] for between in direct[name]))):
            next_door = y - height[target] == 1
            x, gap, bend = (1.1, 0.36, 0.0) if next_door else (2.2, 0.15, -0.45)
            style = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}", "color": "#33568c", "alpha": 0.7}
            axes.annotate("", (x, height[target] + gap), (x, y - gap), arrowprops=style)
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
