"""Commands in README.md, docs/ and the launch files' docstrings: a failure means that a copied command would not start."""

import re
import shlex
from pathlib import Path

import pytest

from minitron_mcore.cli import compose, console
from minitron_mcore.errors import UserError
from tests.helpers.launching import conf

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "tests/README.md"]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "launch").glob("*.py"))]
START = re.compile(r"^(?:[A-Z_]+=\S+ )*(python|python3|torchrun|minitron|make|pytest|sbatch)\b .*")
OTHER_PROGRAMS = ("pip install ", "export ", "trl dpo ", "vllm serve ")  # trl: tests/benchmarks/test_alignment.py
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands() -> dict[str, str]:
    """Lines of code that are commands, continuation lines joined, by page and number."""
    found = {}
    for page in PAGES:
        text = page.read_text().replace("\\\\\n", "").replace("\\\n", "")
        lines = [line.strip() for line in text.splitlines() if page.suffix == ".py" or line.startswith("    ")]
        spans = re.findall(r"`([^`\n]+)`", text) if page.suffix == ".md" else []
        for line in [*lines, *spans]:
            if (
                START.match(line)
                and "..." not in line
                and not re.search(r"(?<!\$)\b[A-Z]{3,}[A-Z_]*\b(?!=)", line.split(" #")[0])
            ):
                found[f"{page.relative_to(ROOT)}: {line}"] = line.split(" #")[0]
    return found


COMMANDS = commands()


def test_pages_have_commands():
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_command(line):
    check(line)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/tutorials").glob("*.md")), ids=lambda page: page.stem)
def test_every_command_of_a_tutorial_is_checked(page):
    """Or it belongs to another program."""
    lines = [line.strip() for line in page.read_text().splitlines() if line.startswith("    ")]
    checked = {name.partition(": ")[2] for name in COMMANDS if name.startswith(f"docs/tutorials/{page.name}:")}
    others = [line for line in lines if line.startswith(OTHER_PROGRAMS) or "..." in line]
    assert checked and not set(lines) - {*checked, *others}


@pytest.mark.parametrize(
    "line",
    [
        "minitron distill --nproc 8 model=llama31_8b paralel=tp8",
        "minitron distill model=llama31_8b distill.step=3",
        "minitron pipeline recipe=llama31_minitron_4b_wide",
        "minitron compare runs/a runs/b --output runs/c",
        "minitron prun model=llama31_8b",
        "torchrun --nproc-per-node 8 launch/correct.py +model=llama31_8b performance=recompte",
        "python launch/imprtance.py +model=llama31_8b",
        "python benchmarks/throughput.py --rooflin",
        "make dmo",
    ],
)
def test_a_misspelt_command_fails(line):
    with pytest.raises((AssertionError, UserError)):
        check(line)


def check(line: str) -> None:
    """Compose the command, or compare its words with what its script takes."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    script = next((word for word in words if re.match(r"(launch|benchmarks|docs|tests)/.*\.(py|sbatch)$", word)), None)
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS
    elif words[0] == "minitron":
        rest = [word for at, word in enumerate(words[1:], 1) if word != "--nproc" and words[at - 1] != "--nproc"]
        if rest[1:] and rest[0] in compose.LAUNCH_FILES:
            composed(rest[0], rest[1:])
        elif rest and rest[0] in console.COMMANDS:
            has_options(Path(console.COMMANDS[rest[0]].__file__), rest[1:])
        else:  # minitron alone, its own options, a stage's name, the demo
            assert not rest or rest[0] in {"demo", *compose.LAUNCH_FILES} or rest[0].startswith("--")
    elif words[0] == "pytest":
        assert all((ROOT / word.split("::")[0]).exists() for word in words[1:] if word.startswith("tests"))
    elif script:
        assert (ROOT / script).exists()
        rest = words[words.index(script) + 1 :]
        if script.startswith("launch/") and script.endswith(".py") and not script.endswith("demo.py"):
            composed(Path(script).stem, rest)
        elif script.startswith("benchmarks/"):
            has_options(ROOT / script, rest)
    else:
        assert words[:2] in (["torchrun", "--nproc-per-node"], ["python", "-m"]), line


def has_options(script: Path, words: list[str]) -> None:
    """Each --option stands in the script or in what all benchmarks share."""
    code = script.read_text() + (ROOT / "benchmarks/common.py").read_text()
    assert all(f'"{word}"' in code for word in words if word.startswith("--")), words


def composed(stage: str, overrides: list[str]) -> None:
    sweep = "--multirun" in overrides
    overrides = [word for word in overrides if not word.startswith(("--", "hydra/", "hydra.launcher."))]
    if any(word.startswith("hydra.searchpath=") for word in overrides):  # a reader's own recipe in their own folder
        overrides = [word.replace("recipe=mine", "recipe=smollm2_115m") for word in overrides]
        overrides = [word for word in overrides if not word.startswith("hydra.searchpath=")]
    if sweep:  # the first job
        overrides = [re.sub(r"^([^=\[{]+=[^,\[{]+),.*", r"\1", word) for word in overrides]
    with conf():
        compose.compose(stage, overrides)
