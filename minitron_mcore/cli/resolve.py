"""Architectures of a stage's models, without weights: from its folders or, where these do not exist yet, from the config of the
stages that will write them. Imports torch only to open an existing checkpoint, plan or cache."""

from functools import partial
from pathlib import Path

from minitron_mcore.cli.compose import compose, group_options
from minitron_mcore.config.stages import (
    BenchmarkRun,
    CacheKind,
    ConvertRun,
    CutRun,
    DistillRun,
    ExportFormat,
    PlanRun,
    PruneRun,
    Run,
    SearchRun,
    TeacherCacheRun,
)
from minitron_mcore.data.blend import parse_blend
from minitron_mcore.distill import checks
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import target_architecture
from minitron_mcore.search import space


def models(config: Run, problems: list[str]) -> dict[str, tuple[Architecture, str]]:
    """Architecture of each model of a stage, by role, and its origin: a folder, or settings.

    Args:
        problems: receives a message for each model that cannot be resolved.
    """
    makers = {"model": lambda: _architecture_at(config.source, config)}
    if isinstance(config, ConvertRun):
        makers = {"model": lambda: _source(config)}
    elif isinstance(config, PlanRun | PruneRun | CutRun):
        makers = {"source": lambda: _start(config), "target": lambda: _target(config)}
    elif isinstance(config, TeacherCacheRun):
        makers = {"model": lambda: _architecture_at(config.teacher, config)}
    elif isinstance(config, DistillRun):
        folders = parse_blend(config.teachers, "teachers")[0] if config.teachers else [config.teacher]
        roles = {f"teacher {n}" if n > 1 else "teacher": folder for n, folder in enumerate(folders, 1)}
        makers = {role: partial(_architecture_at, folder, config) for role, folder in roles.items()}
        makers = makers if config.distill.needs_teacher else {}
        several = {
            f"student {name}": partial(_architecture_at, path, config) for name, path in (config.students or {}).items()
        }
        makers |= several or {"student": lambda: _architecture_at(config.student, config)}
    elif isinstance(config, BenchmarkRun):
        makers = {f"model {name}": partial(_architecture_at, run.source, config) for name, run in config.each().items()}
    elif isinstance(config, SearchRun):
        makers = {
            "teacher": lambda: _architecture_at(config.teacher, config),
            "student": lambda: _largest_candidate(config),
        }
    resolved = {}
    for role, make in makers.items():
        try:
            resolved[role] = make()
        except UserError as error:
            problems += str(error).splitlines()
    return resolved


def kind(role: str) -> str:
    """The role without the name of one of several students or the number of a further teacher."""
    return role.split()[0]


def _source(config: Run) -> tuple[Architecture, str]:
    """The architecture of `model.hf` or, if that folder does not exist, `model.architecture`."""
    if not config.model.hf:
        raise UserError("model.hf is not set: give model.hf=/path/to/folder, or a model (model=NAME).")
    folder, wanted = Path(config.model.hf), architecture.from_config(config.model.architecture)
    if wanted and not (folder / "config.json").is_file():
        return wanted, "model.architecture"
    arch, _ = architecture.read_hf(folder)
    architecture.check_matches(arch, wanted, folder)
    return arch, str(folder)


def _start(config: PlanRun | PruneRun | CutRun) -> tuple[Architecture, str]:
    """The architecture to prune: of a checkpoint, or of the Hugging Face folder for `cut`."""
    return _source(config) if isinstance(config, CutRun) else _architecture_at(config.source, config)


def _target(config: PlanRun | PruneRun | CutRun) -> tuple[Architecture, str]:
    """The pruned architecture: of the plan or, if that does not exist yet, of the `prune` settings."""
    if not isinstance(config, PlanRun) and Path(config.plan).exists():
        from minitron_mcore.pruning.plan import load_plan  # imports torch

        return load_plan(config.plan).target, config.plan
    return target_architecture(_start(config)[0], config.prune), "prune.*"


def candidates(config: SearchRun) -> list[space.Candidate]:
    """All candidates of a search, from the one with the fewest parameters.

    Raises:
        UserError: more combinations than a search enumerates.
    """
    candidate_space = space.Space.of(_architecture_at(config.source, config)[0], config)
    if candidate_space.combinations > space.MAX_GRID:
        raise UserError(
            f"{candidate_space.combinations:,} combinations are more than the {space.MAX_GRID:,} that it lists: give fewer sizes."
        )
    return candidate_space.candidates


def _largest_candidate(config: SearchRun) -> tuple[Architecture, str]:
    """The candidate with the most parameters."""
    largest = candidates(config)[-1]
    return largest.target, f"search.*, {largest.name}"


def _architecture_at(folder: str, config: Run) -> tuple[Architecture, str]:
    """The architecture in a folder or, if that does not exist yet, the one that a stage will write there.

    Raises:
        UserError: the folder does not exist, and its path names no stage of a recipe or model.
    """
    path = Path(folder)
    if (path / "model.json").is_file():
        from minitron_mcore.checkpoint import run_folder  # imports torch

        return run_folder.open_checkpoint(path).arch, folder
    if (path / checks.CACHE_INDEX).is_file():
        return open_cache(folder).arch, folder
    if (path / "config.json").is_file():
        return architecture.read_hf(path)[0], folder
    if path.parent != Path(config.work_dir):
        config = _maker(path, config)
    if path.name == "convert":
        return _source(config)
    if path.name == "teacher_cache":
        return _architecture_at(config.recipe.teacher, config)
    if path.name not in ("correct", "prune", "cut", "distill", *ExportFormat):
        raise UserError(f"no model at {folder}: give the folder of a checkpoint or of a Hugging Face model.")
    arch, where = _architecture_at(config.recipe.source, config)
    return (arch, where) if path.name == "correct" else (target_architecture(arch, config.prune), f"{where}, prune.*")


def open_cache(folder: str):
    """The `cache.Cache` in a folder.

    Raises:
        UserError: see `cache.open_teacher`.
    """
    from minitron_mcore.distill import cache  # imports torch

    return cache.open_teacher(folder)


def cache_content(config: Run) -> tuple[CacheKind, int | None] | None:
    """Kind and top_k of the teacher's cache, the default ones if it does not exist yet; None for a teacher without cache."""
    if opened := existing_cache(config):
        return opened.kind, opened.index["top_k"]
    return (TeacherCacheRun.kind, TeacherCacheRun.top_k) if _one_teacher(config).name == "teacher_cache" else None


def existing_cache(config: Run):
    """The `cache.Cache` that is the teacher of a stage; None if that is none, or does not exist yet."""
    folder = _one_teacher(config)
    return open_cache(str(folder)) if (folder / checks.CACHE_INDEX).is_file() else None


def _one_teacher(config: Run) -> Path:
    return Path("" if getattr(config, "teachers", None) else getattr(config, "teacher", ""))


def _maker(path: Path, config: Run) -> Run:
    """The config of the recipe or model whose work folder contains `path`."""
    name = path.parent.name
    for group in ("recipe", "model"):
        if name in group_options(group):
            return compose("distill", [f"+{group}={name}", f"runs={config.runs}"])
    raise UserError(f"no model at {path}, and {name} is no recipe or model that would write it: give another folder.")


def tokenizer_folder(where: str) -> Path | None:
    """The folder of a model's tokenizer, for an origin of `models`; None if it does not exist yet."""
    folder = Path(where)
    return next((path for path in (folder / "hf", folder) if (path / "config.json").is_file()), None)
