"""The models that a stage will deal with, found without weights: in its folders or, where these aren't there yet, from what the
stages before will leave there. Imports torch only to open what an earlier stage has left."""

from functools import partial
from pathlib import Path

from minitron_mcore.cli.compose import compose, options
from minitron_mcore.config.stages import (
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
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import target_architecture
from minitron_mcore.search import space


def models(config: Run, problems: list[str]) -> dict[str, tuple[Architecture, str]]:
    """Architecture of each model that a stage deals with, by role, and where it was found."""
    makers = {"model": lambda: _at(config.source, config)}
    if isinstance(config, ConvertRun):
        makers = {"model": lambda: _source(config)}
    elif isinstance(config, PlanRun | PruneRun | CutRun):
        makers = {"source": lambda: _start(config), "target": lambda: _target(config)}
    elif isinstance(config, TeacherCacheRun):
        makers = {"model": lambda: _at(config.teacher, config)}
    elif isinstance(config, DistillRun):
        makers = {"teacher": lambda: _at(config.teacher, config)} if config.distill.needs_teacher else {}
        several = {f"student {name}": partial(_at, path, config) for name, path in (config.students or {}).items()}
        makers |= several or {"student": lambda: _at(config.student, config)}
    elif isinstance(config, SearchRun):
        makers = {"teacher": lambda: _at(config.teacher, config), "student": lambda: _largest(config)}
    found = {}
    for role, make in makers.items():
        try:
            found[role] = make()
        except UserError as mistake:
            problems += str(mistake).splitlines()
    return found


def kind(role: str) -> str:
    """ "student" of every "student NAME"."""
    return role.split()[0]


def _source(config: Run) -> tuple[Architecture, str]:
    """What `model` says: its folder, or where that isn't there its architecture."""
    if not config.model.hf:
        raise UserError("model.hf is not given: say model.hf=/path/to/folder, or name a model (+model=NAME).")
    folder, wanted = Path(config.model.hf), architecture.from_config(config.model.architecture)
    if wanted and not (folder / "config.json").is_file():
        return wanted, "model.architecture"
    found, _ = architecture.read_hf(folder)
    architecture.check_matches(found, wanted, folder)
    return found, str(folder)


def _start(config: PlanRun | PruneRun | CutRun) -> tuple[Architecture, str]:
    """What is pruned: a checkpoint, but a cut goes from folder to folder."""
    return _source(config) if isinstance(config, CutRun) else _at(config.source, config)


def _target(config: PlanRun | PruneRun | CutRun) -> tuple[Architecture, str]:
    """What the plan says, or where that isn't there yet, what it will be asked for."""
    if not isinstance(config, PlanRun) and Path(config.plan).exists():
        from minitron_mcore.pruning.plan import load_plan  # imports torch

        return load_plan(config.plan).target, config.plan
    return target_architecture(_start(config)[0], config.prune), "prune.*"


def candidates(config: SearchRun) -> list[space.Candidate]:
    found = space.Space.of(_at(config.source, config)[0], config)
    if found.combinations > space.MAX_GRID:
        raise UserError(f"{found.combinations:,} combinations are too many to look at each: plan with fewer sizes.")
    return found.candidates


def _largest(config: SearchRun) -> tuple[Architecture, str]:
    """Of a search's candidates the one with the most parameters."""
    largest = candidates(config)[-1]
    return largest.target, f"search.*, {largest.name}"


def _at(folder: str, config: Run) -> tuple[Architecture, str]:
    """The architecture in a folder or, where that isn't there yet, the one that the stages before will leave there.

    Raises:
        UserError: neither a model there nor a name that says which recipe or model makes it.
    """
    path = Path(folder)
    if (path / "model.json").is_file():
        from minitron_mcore.checkpoint import run_folder  # imports torch

        return run_folder.open_checkpoint(path).arch, folder
    if (path / "index.json").is_file():
        return cache(folder).arch, folder
    if (path / "config.json").is_file():
        return architecture.read_hf(path)[0], folder
    if path.parent != Path(config.work_dir):
        config = _maker(path, config)
    if path.name == "convert":
        return _source(config)
    if path.name == "teacher_cache":
        return _at(config.recipe.teacher, config)
    if path.name not in ("correct", "prune", "cut", "distill", *ExportFormat):
        raise UserError(f"no model at {folder}: give the folder of a checkpoint or of a Hugging Face model.")
    arch, where = _at(config.recipe.source, config)
    return (arch, where) if path.name == "correct" else (target_architecture(arch, config.prune), f"{where}, prune.*")


def cache(folder: str):
    """The `cache.Cache` in a folder.

    Raises:
        UserError: see `cache.open_teacher`.
    """
    from minitron_mcore.distill import cache  # imports torch

    return cache.open_teacher(folder)


def cached(config: Run) -> tuple[CacheKind, int | None] | None:
    """Kind and top_k of the cache that teaches, the defaults' where it is not written yet; None: the teacher is live."""
    path = Path(getattr(config, "teacher", ""))
    if (path / "index.json").is_file():
        found = cache(path)
        return found.kind, found.index["top_k"]
    return (TeacherCacheRun.kind, TeacherCacheRun.top_k) if path.name == "teacher_cache" else None


def _maker(path: Path, config: Run) -> Run:
    """The config of the recipe, or of the model without one, that works in the folder above `path`."""
    name = path.parent.name
    for group in ("recipe", "model"):
        if name in options(group):
            return compose("distill", [f"+{group}={name}", f"runs={config.runs}"])
    raise UserError(f"no model at {path}, and {name} is no recipe or model that would make one: give another folder.")


def hf(where: str) -> Path | None:
    """The tokenizer's folder of a model that was found there; None where it is not made yet."""
    folder = Path(where)
    return next((path for path in (folder / "hf", folder) if (path / "config.json").is_file()), None)
