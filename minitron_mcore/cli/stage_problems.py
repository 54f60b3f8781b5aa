"""Every rule that a stage's settings violate, for its dry run: on one process, without weights."""

import itertools
from collections.abc import Iterator, Mapping

from minitron_mcore.cli import resolve
from minitron_mcore.config import performance as options
from minitron_mcore.config import ranges
from minitron_mcore.config.export import ExportFormat
from minitron_mcore.config.settings import Device, DistillConfig
from minitron_mcore.config.stages import (
    BenchmarkRun,
    CutRun,
    DepthRun,
    DistillRun,
    EvaluateRun,
    ExportRun,
    ImportanceRun,
    PlanRun,
    Run,
    SearchRun,
    SynthesizeRun,
    TeacherCacheRun,
)
from minitron_mcore.data.blend import parse_blend
from minitron_mcore.depth import study
from minitron_mcore.distill import checks, vocabulary
from minitron_mcore.errors import UserError
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.evaluation import prompts
from minitron_mcore.evaluation.benchmarks import suite
from minitron_mcore.formats import gguf_layout
from minitron_mcore.importance import checks as importance
from minitron_mcore.models import architecture, performance_checks, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import layout
from minitron_mcore.pruning.target import check_counts

Models = Mapping[str, tuple[Architecture, str]]
"""Architecture and origin of a stage's models by role, of `resolve.models`."""


def is_one_process(config: Run) -> bool:
    """Whether a stage streams files on one process."""
    return isinstance(config, PlanRun | CutRun) or (isinstance(config, ExportRun) and config.format != ExportFormat.gpt)


def problems(config: Run, models: Models, training: DistillConfig | None, setting: Setting) -> Iterator[str]:
    """A sentence for each rule that the stage violates; `training`: its training settings, if it trains."""
    yield from ranges.problems(config)
    archs = {role: arch for role, (arch, _) in models.items()}
    yield from _layout_problems(config, archs, training, setting)
    kernels = options.EVERYTHING if setting.device == Device.cuda else options.Kernels()
    if training or isinstance(config, TeacherCacheRun):
        yield from checks.document_problems(config.data, kernels)
    if training:
        yield from dict.fromkeys(_training_problems(config, archs, training, setting, kernels))
    yield from _teacher_problems(config, models, training)
    yield from _export_problems(config, archs)
    yield from _measurement_problems(config, archs, setting)
    if isinstance(config, PlanRun) and "target" in archs:
        try:
            check_counts(archs["target"], config.parameters, config.without_embeddings)
        except UserError as error:
            yield str(error)


def _layout_problems(
    config: Run, archs: dict[str, Architecture], training: DistillConfig | None, setting: Setting
) -> Iterator[str]:
    if not is_one_process(config):
        # The stage synthesize pads its sequences itself.
        length = None if isinstance(config, SynthesizeRun) or setting.sequence_length == 1 else setting.sequence_length
        teacher_ranks = training.teacher_ranks if training else 0
        yield from layout.teacher_ranks_problems(teacher_ranks, setting.world + teacher_ranks)
        yield from layout.problems(config.parallel, setting.world, length)
    if min(layout.sizes(config.parallel).values()) >= 1:
        for role, arch in archs.items():
            # Checked by `checks.problems`.
            if not (resolve.kind(role) == "teacher" and training and training.teacher_parallel):
                yield from (f"{role}: {problem}" for problem in sharding.model_problems(arch, config.parallel))


def _training_problems(
    config: Run,
    archs: dict[str, Architecture],
    training: DistillConfig,
    setting: Setting,
    kernels: options.Kernels,
) -> Iterator[str]:
    """Of the models that a stage trains; the same sentence may come from several."""
    teachers: list[Architecture | None] = [arch for role, arch in archs.items() if resolve.kind(role) == "teacher"]
    teachers = teachers or [None]
    yield from checks.several_teachers(teachers, training)
    if isinstance(config, DistillRun):
        yield from checks.on_policy(training, config.performance, len(config.each()))
        if training.on_policy.share and training.on_policy.prompts:
            yield from prompts.problems(training.on_policy.prompts, config.data)
    trained = [arch for role, arch in archs.items() if resolve.kind(role) == "student"]
    trained = trained or [arch for role, arch in archs.items() if role == "model"]
    for student, teacher in itertools.product(trained, teachers):
        live = None if resolve.cache_content(config) else teacher
        prefix = checks.prefix_of(config)
        yield from checks.problems(student, teacher, training, config.parallel, setting.replicas, prefix)
        if not isinstance(config, SearchRun):  # which has its own
            yield from checks.heldout_problems(config, training, student, live)
        yield from performance_checks.problems(
            performance_checks.Run(config.performance, student, live, training, config.parallel, config.dtype, kernels)
        )
    if isinstance(config, SearchRun) and training.teacher_ranks:
        yield checks.NO_TEACHER_RANKS


def _teacher_problems(config: Run, models: Models, training: DistillConfig | None) -> Iterator[str]:
    """Of students with their teacher, and of a teacher's cache."""
    if isinstance(config, TeacherCacheRun) and "model" in models:
        yield from checks.cache_problems(config, models["model"][0])
    if isinstance(config, DistillRun) and config.teachers:
        yield from checks.teacher_folders(parse_blend(config.teachers, "teachers")[0])
    students = [role for role in models if resolve.kind(role) == "student"]
    teachers = [role for role in models if resolve.kind(role) == "teacher"]
    for role, teacher in itertools.product(students, teachers):
        folders = (resolve.tokenizer_folder(models[each][1]) for each in (role, teacher))
        yield from vocabulary.problems(models[role][0], models[teacher][0], *folders)
        if cache := resolve.existing_cache(config):
            yield from cache.problems(models[role][0], training)


def _export_problems(config: Run, archs: dict[str, Architecture]) -> Iterator[str]:
    for role, arch in archs.items():
        if isinstance(config, ExportRun) and config.format == ExportFormat.gpt:
            yield from architecture.missing_layer_problems(arch, "megatron-core's GPTModel")
        elif isinstance(config, ExportRun) and config.format == ExportFormat.gguf:
            yield from gguf_layout.problems(arch)
        elif isinstance(config, ExportRun | CutRun) or (
            resolve.kind(role) in ("target", "student") and config.prune.exportable
        ):
            yield from architecture.export_problems(arch)


def _measurement_problems(config: Run, archs: dict[str, Architecture], setting: Setting) -> Iterator[str]:
    """Of stages that score, evaluate or generate."""
    # Pruned models have as many positions as their source.
    positions = {role: arch.max_positions for role, arch in itertools.islice(archs.items(), 1)}
    if isinstance(config, ImportanceRun) and "model" in archs:
        yield from importance.problems(archs["model"], config.importance, setting.replicas)
    if isinstance(config, DepthRun) and "model" in archs:
        yield from study.problems(config, archs["model"].blocks)
        yield from ranges.positions("depth.sequence_length", config.depth.sequence_length, **positions)
    if isinstance(config, BenchmarkRun):
        yield from suite.problems(config.benchmark)
    if isinstance(config, EvaluateRun | SearchRun):
        yield from ranges.positions("evaluate.sequence_length", config.evaluate.sequence_length, **positions)
    if isinstance(config, SynthesizeRun):
        yield from prompts.problems(config.prompts, config.data)
        yield from ranges.positions("prompt_tokens + tokens", config.synthesize.sequence_length, **positions)
