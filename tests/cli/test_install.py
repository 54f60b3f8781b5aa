"""The package as pip installs it: a failure means that a wheel lacks a file, or the package imports what it does not declare."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers import models

ROOT = Path(__file__).parents[2]
# Imported only where they are installed: torch's compiler, and the extras `gpu` and `eval`.
OPTIONAL = {
    "triton",
    "transformer_engine",
    "transformer_engine_torch",
    "lm_eval",
    "datasets",
    "rouge_score",
    "apex",
    "wandb",
    "mlflow",
}


def declared() -> set[str]:
    """The distributions of setup.py's install_requires, in lower case with hyphens."""
    call = ast.parse((ROOT / "setup.py").read_text()).body[-1].value
    requirements = next(
        ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "install_requires"
    )
    names = (requirement.replace(">", "=").replace("<", "=").partition("=")[0] for requirement in requirements)
    return {name.lower().replace("_", "-") for name in names}


def imported() -> dict[str, Path]:
    """The top-level modules that the package and the launch files import, each with one file that does."""
    modules = {}
    for folder in ("minitron_mcore", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                modules |= {name.partition(".")[0]: path for name in names}
    return modules


def test_everything_imported_is_declared():
    distributions, known = packages_distributions(), declared()
    assert "accelerate" in known  # by transformers, for the `device_map` of export/transformers_check.py
    for module, path in imported().items():
        if module not in sys.stdlib_module_names | OPTIONAL | {"minitron_mcore"}:
            names = {name.lower().replace("_", "-") for name in distributions[module]}
            assert names & known, f"{path} imports {module}, which setup.py does not declare"


@pytest.fixture(scope="module")
def minitron(tmp_path_factory) -> Path:
    """The console command of a virtual environment that holds the wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    shutil.copytree(ROOT / "minitron_mcore", source / "minitron_mcore", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conf", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "-w", folder, source], check=True, cwd=folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True
    )
    Path(found.stdout.decode().strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    wheel = next(folder.glob("*.whl"))
    subprocess.run([*pip, "--python", python, "install", *options, wheel], check=True, cwd=folder)
    return folder / "venv/bin/minitron"


def run(command, cwd, *arguments, **environment) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run([command, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_stage_runs_from_another_folder(tmp_path, minitron):
    """Files come from the wheel; --nproc runs ranks."""
    models.tiny_llama(tmp_path / "models/tiny")
    model = ["model.hf=models/tiny", "dtype=fp32"]
    assert "converted" in run(minitron, tmp_path, "convert", "--nproc", "2", *model, "parallel=tp2")
    run(minitron, tmp_path, "export", *model, "source=runs/tiny/convert")
    before, after = models.weights(tmp_path / "models/tiny"), models.weights(tmp_path / "runs/tiny/hf")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    where = run(minitron.parent / "python", tmp_path, "-c", "import minitron_mcore.cli.compose as c; print(c.LAUNCH)")
    assert where.strip().startswith(str(minitron.parents[1])) and Path(where.strip(), "slurm/distill.sbatch").is_file()


def test_the_command_lists_and_completes(tmp_path, minitron):
    stages = run(minitron, tmp_path)
    assert "  convert " in stages and "  distill " in stages and len(stages.splitlines()) <= 32
    assert max(map(len, stages.splitlines())) <= 120
    assert (
        run(minitron, tmp_path, "--shell-completion", "install=bash")
        .rstrip()
        .endswith("hydra_bash_completion minitron")
    )
    expected = {
        "minitron pl": "convert importance ",
        "minitron plan prune=llama": "prune=llama31_4b_depth prune=llama31_4b_width",
        "minitron distill --nproc 8 parallel=tp8": "parallel=tp8 parallel=tp8_sp",
    }
    for line, words in expected.items():
        assert run(minitron, tmp_path, "-sc", "query=bash", COMP_LINE=line).startswith(words)
    text = run(minitron, tmp_path, "distill", "distill=small", "--help")
    assert "  distill.steps=64\n" in text and "recipe: llama31_minitron_4b_depth" in text
