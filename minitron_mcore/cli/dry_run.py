"""Dry run of a stage, on one process and without weights: sizes, memory of a rank, operations, days, and every problem at once.
Imports torch only to open an existing checkpoint, plan or cache."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import disk
from minitron_mcore.cli import resolve, stage_problems
from minitron_mcore.cli.compose import LAUNCH_FILES
from minitron_mcore.config.settings import DistillConfig, ParallelConfig
from minitron_mcore.config.stages import (
    BenchmarkRun,
    CacheKind,
    CorrectRun,
    DepthRun,
    DistillRun,
    EvaluateRun,
    GenerateRun,
    ImportanceRun,
    Run,
    SearchRun,
    SynthesizeRun,
    TeacherCacheRun,
)
from minitron_mcore.depth import study
from minitron_mcore.distill import checks
from minitron_mcore.errors import refuse
from minitron_mcore.estimate import checkpoints, memory, step_time
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.evaluation import prompts
from minitron_mcore.models import flops, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import layout
from minitron_mcore.parallel.rendezvous import is_rank_zero
from minitron_mcore.reporting import tables
from minitron_mcore.search import space

MISSING = ("blocks_without_attention", "blocks_without_mlp")
SHAPE = ("blocks", *MISSING, "hidden", "ffn", "heads", "groups", "head_dim", "experts", "vocab", "tied")


def run(*configs: Run) -> None:
    """Print the `plan` of each stage; with `dry.json`, also write the list of them.

    Raises:
        UserError: all problems, one sentence each.
    """
    if not is_rank_zero():
        return
    plans = [plan(config) for config in configs]
    for config, figures in zip(configs, plans, strict=True):
        _show(config, figures)
    if path := configs[0].dry.json:
        disk.write_json(Path(path), plans)
    refuse(dict.fromkeys(problem for figures in plans for problem in figures["problems"]))


def plan(config: Run) -> dict[str, Any]:
    """The figures of a stage, JSON-ready.

    Returns:
        stage: name; gpus: number of processes; models: sizes by role; ranks: bytes by kind, one row a pipeline stage; operations:
        floating-point operations of a step, steps, tokens and days; problems: one sentence each. Figures that a problem leaves
        undefined are empty. checkpoints (of a run that trains, see `estimate.checkpoints`); candidates (of a search, whose student
        is the largest); layouts (dry.advise); teacher_ranks: as ranks, for a teacher on its own ranks.
    """
    problems: list[str] = []
    models = resolve.models(config, problems)
    archs = {role: arch for role, (arch, _) in models.items()}
    training = _training_settings(config)
    name = next(each for each, schema in LAUNCH_FILES.items() if schema is type(config))
    settings = config if isinstance(config, TeacherCacheRun) else training or getattr(config, name, None)
    world = config.dry.gpus or int(os.environ.get("WORLD_SIZE", 0)) or _min_processes(config, training)
    teacher_ranks = training.teacher_ranks if training else 0
    setting = Setting(
        config.parallel,
        world - teacher_ranks,
        config.dtype,
        getattr(settings, "micro_batch", 1),
        getattr(settings, "sequence_length", 1),
        config.dry.device,
        config.performance,
        config.data.document_mask and (bool(training) or isinstance(config, TeacherCacheRun | EvaluateRun)),
    )
    sizes = [*layout.sizes(config.parallel).values(), setting.micro_batch, setting.sequence_length]
    sizes.append(config.performance.recompute_layers)
    if training and training.teacher_parallel:
        sizes += layout.sizes(training.teacher_parallel).values()
    countable = not problems and min(sizes) >= 1
    problems += stage_problems.problems(config, models, training, setting)
    figures = {"stage": name, "gpus": world, "models": {}, "ranks": [], "operations": {}, "problems": problems}
    figures["models"] = {role: _model_row(arch) | {"from": where} for role, (arch, where) in models.items()}
    if countable:
        figures["ranks"] = _ranks(config, archs, training, setting)
        figures["operations"] = _operations(config, archs, training, setting)
        if training and not isinstance(config, SearchRun):
            students = _trained_models(config, archs)
            figures["checkpoints"] = checkpoints.estimate(students, training, config.dtype, config.dry.disk_gbs)
        if teacher_ranks and "teacher" in archs:
            figures["teacher_ranks"] = memory.remote_teacher(archs["teacher"], training, setting)
    if isinstance(config, SearchRun) and "student" in archs:
        figures["candidates"] = space.rows(resolve.candidates(config), config.search.budget)
    if config.dry.advise:
        figures["layouts"] = []
        if countable and training and not teacher_ranks and "teacher 2" not in archs:
            figures["layouts"] = _layouts(config, archs, training, setting)
        if not figures["layouts"]:
            problems.append(
                "dry.advise found no layout: it is for stages that train, without distill.teacher_ranks or several teachers, on as "
                f"many dry.gpus as hold them in dry.memory {config.dry.memory:g} GiB each; give more GPUs, or another stage."
            )
        return figures
    named = [(f"pipeline stage {stage}", row) for stage, row in enumerate(figures["ranks"])]
    named += [
        (f"the teacher's pipeline stage {stage}", row) for stage, row in enumerate(figures.get("teacher_ranks", []))
    ]
    for name, row in named:
        if (needed := row.get("total", 0) / memory.GIB) > config.dry.memory:
            problems.append(
                f"a rank of {name} needs {needed:.1f} GiB, but dry.memory is {config.dry.memory:g}: "
                "share the model over more ranks (parallel.tensor, .pipeline, .sequence), recompute activations "
                "(performance.recompute=full) or take smaller micro-batches."
            )
    return figures


def _model_row(arch: Architecture) -> dict[str, Any]:
    """Sizes of a model."""
    counts = {
        "parameters": parameter_table.count(arch),
        "without_embeddings": parameter_table.count(arch, embeddings=False),
    }
    return counts | dict(zip(MISSING, (len(arch.no_attention), len(arch.no_mlp)), strict=True)) | arch.to_json()


def _min_processes(config: Run, training: DistillConfig | None) -> int:
    """The least number of processes for the layouts of the stage's models."""
    teacher_ranks = training.teacher_ranks if training else 0
    layouts = [config.parallel, *filter(None, [training and not teacher_ranks and training.teacher_parallel])]
    return math.lcm(*(p.pipeline * math.lcm(p.tensor * p.context, p.expert) for p in layouts)) + teacher_ranks


def _training_settings(config: Run) -> DistillConfig | None:
    """The training settings of a stage; None if it does not train."""
    if isinstance(config, CorrectRun):
        return DistillConfig(**vars(config.correct), kd_weight=0.0, lm_weight=1.0)
    if isinstance(config, SearchRun):
        return dataclasses.replace(config.distill, steps=config.search.steps)
    return config.distill if isinstance(config, DistillRun) else None


def _trained_models(config: Run, archs: dict[str, Architecture]) -> list[Architecture]:
    """The models that a stage trains at the same time."""
    students = [arch for role, arch in archs.items() if resolve.kind(role) == "student"] or [next(iter(archs.values()))]
    return students * (min(config.search.students_per_pass, config.search.best) if isinstance(config, SearchRun) else 1)


def _layouts(
    config: Run, archs: dict[str, Architecture], training: DistillConfig, setting: Setting
) -> list[dict[str, Any]]:
    cached = resolve.cache_content(config) if "teacher" in archs else None
    own = dataclasses.replace(training, teacher_parallel=None)
    return step_time.layouts(_trained_models(config, archs), archs.get("teacher"), own, setting, config.dry, cached)


def _ranks(
    config: Run, archs: dict[str, Architecture], training: DistillConfig | None, setting: Setting
) -> list[dict[str, Any]]:
    """Bytes on a rank of each pipeline stage; empty for a stage on one process."""
    if stage_problems.is_one_process(config):
        return []
    students = [arch for role, arch in archs.items() if resolve.kind(role) == "student"]
    main = students[0] if students else next(iter(archs.values()))
    if training:
        teacher, students = archs.get("teacher"), _trained_models(config, archs)
        others = [arch for role, arch in archs.items() if resolve.kind(role) == "teacher" and role != "teacher"]
        if any(
            list(checks.state_problems(s, teacher, training.hidden_state_loss, training.kd_weight)) for s in students
        ):
            return []  # pairs name blocks that do not exist
        cached = teacher and resolve.cache_content(config)
        rows = memory.training(students, teacher, training, setting, cached, others)
    elif isinstance(config, DepthRun):
        rows = memory.depth_study(main, setting, config.depth.windows * max(1, len(config.data.heldout)))
    elif isinstance(config, SynthesizeRun):
        rows = memory.generation(main, setting)
    elif isinstance(config, BenchmarkRun | ImportanceRun | EvaluateRun | GenerateRun | TeacherCacheRun):
        rows = memory.forward_passes(main, setting)
    else:
        rows = [
            {f"{role}'s weights": memory.model_states(arch, setting, stage)["weights"] for role, arch in archs.items()}
            for stage in range(setting.parallel.pipeline)
        ]
    blocks = [sum(map(len, sharding.rank_chunks(main, setting.parallel, n))) for n in range(setting.parallel.pipeline)]
    return [
        {"stage": n, "blocks": blocks[n], "parameters": sum(memory.parameters(main, setting, n))}
        | {kind: round(size) for kind, size in row.items()}
        for n, row in enumerate(rows)
    ]


def _operations(
    config: Run, archs: dict[str, Architecture], training: DistillConfig | None, setting: Setting
) -> dict[str, Any]:
    """Floating-point operations of a step, and the days of all steps."""
    gpus = setting.world + (training.teacher_ranks if training else 0)
    length, rate = setting.sequence_length, gpus * config.dry.peak_tflops * 1e12 * config.dry.mfu
    if training:
        steps, tokens = training.steps, training.global_batch * length
        steps *= config.search.best if isinstance(config, SearchRun) else 1
        times = {"teacher": 1, "student": 3, "model": 3}
        times |= {"teacher": 0} if resolve.cache_content(config) else {}
        operations = {
            role: times[resolve.kind(role)] * tokens * flops.forward_flops(arch, length) for role, arch in archs.items()
        }
        if (policy := training.on_policy).share:
            # Answers of full length. Without a cache each of their tokens takes a pass over all tokens.
            passes = policy.share * (1 if config.parallel.context == 1 else policy.tokens)
            operations["answers"] = round(passes * tokens * flops.forward_flops(archs["student"], length, head=False))
    elif isinstance(config, TeacherCacheRun):
        steps, tokens = config.steps, config.global_batch * length
        operations = {"model": tokens * flops.forward_flops(archs["model"], length, head=config.kind == CacheKind.topk)}
    elif isinstance(config, ImportanceRun):
        steps, tokens = 1, config.importance.samples * length
        operations = {"model": tokens * flops.forward_flops(archs["model"], length, head=False)}
    elif (
        isinstance(config, DepthRun) and config.data.heldout and not list(study.problems(config, archs["model"].blocks))
    ):
        steps = 1 + study.max_points(config.depth, archs["model"].blocks)
        tokens = len(config.data.heldout) * config.depth.windows * length
        operations = {"model": tokens * flops.forward_flops(archs["model"], length)}
    elif isinstance(config, SynthesizeRun) and not list(prompts.problems(config.prompts, config.data)):
        # A step is an answer of full length. Without a cache each of its tokens takes a pass over all tokens.
        steps, tokens = (
            config.synthesize.samples * len(prompts.read(config.prompts, config.data)),
            config.synthesize.tokens,
        )
        passes = 1 if config.parallel.context == 1 else tokens
        operations = {"model": passes * length * flops.forward_flops(archs["model"], length, head=False)}
    else:
        return {}
    total = sum(operations.values())
    days = steps * total / rate / 86400
    written = {}
    if isinstance(config, TeacherCacheRun):
        arch = archs["model"]
        each = checks.cache_bytes(config.kind, config.entries, arch.vocab, arch.hidden, setting.dtype_bytes)
        written = {"cache_bytes": steps * tokens * each}
    return {
        "steps": steps,
        "tokens": steps * tokens,
        "flop_a_step": operations | {"total": total},
        **written,
        "days": days,
    }


def _axes(p: ParallelConfig, world: int) -> str:
    """A layout as text."""
    replicas = world // max(1, p.tensor * p.pipeline * p.context)
    axes = f"TP {p.tensor} x PP {p.pipeline} x CP {p.context} x DP {replicas}, EP {p.expert}"
    axes += f", {p.virtual} chunks a pipeline rank" if p.virtual > 1 else ""
    return f"{axes}{', sequence parallel' if p.sequence else ''}"


def _assumptions(config: Run, models: dict[str, dict[str, Any]]) -> list[str]:
    """What the figures leave open."""
    found = []
    reads_text = _training_settings(config) or isinstance(config, ImportanceRun | TeacherCacheRun)
    if reads_text and not (config.data.train or config.data.splits_file):
        found.append("data.train is not given: no text was checked")
    counts = {role: row["parameters"] for role, row in models.items()}
    if models.get("student", {}).get("from", "").endswith("prune.*") and counts["student"] == counts.get("teacher"):
        found.append("there is no plan, and prune= cuts nothing: the student has the teacher's size")
    return found


def _show(config: Run, figures: dict[str, Any]) -> None:
    dry, world, training = config.dry, figures["gpus"], _training_settings(config)
    teacher_ranks = training.teacher_ranks if training else 0
    notes = [f"processes: {world}; {_axes(config.parallel, world - teacher_ranks)}; {config.dtype} on {dry.device}"]
    if training and (teacher_layout := training.teacher_parallel or (teacher_ranks and config.parallel)):
        notes.append(
            f"teacher: {_axes(teacher_layout, teacher_ranks or world)}{', on its own ranks' if teacher_ranks else ''}"
        )
    notes += _assumptions(config, figures["models"])
    shown = [key for key in SHAPE if any(model[key] for model in figures["models"].values())]
    models = [
        {"model": role} | {key: model[key] for key in ("parameters", "without_embeddings", *shown, "from")}
        for role, model in figures["models"].items()
    ]
    tables.table(f"dry run of {figures['stage']}, {config.model.name}", models, notes)
    if candidates := figures.get("candidates"):
        at = f"keys and values of {config.search.budget.batch} x {config.search.budget.context} tokens; prefill of as many"
        tables.table(f"{len(candidates)} candidates", candidates, [at])
    if ranks := figures["ranks"]:
        counts = ("stage", "blocks", "parameters")
        kinds = [key for key in ranks[0] if key not in counts and any(row[key] for row in ranks)]
        rows = [{key: row[key] for key in counts} | {key: row[key] / memory.GIB for key in kinds} for row in ranks]
        recomputed = f"recomputed: {config.performance.recompute}"
        worst = f"peak of the tensors, {recomputed}; without CUDA's context, NCCL's buffers and fragmentation"
        passing = "shards, which are streamed"
        tables.table("GiB on a rank of each pipeline stage", rows, [worst if "total" in kinds else passing])
    if saved := figures.get("checkpoints"):
        at = f"written at dry.disk_gbs {dry.disk_gbs:g}; one more than is kept while it is written"
        tables.table("checkpoints", [checkpoints.table_row(saved)], [at])
    if layouts := figures.get("layouts"):
        chosen = f"{len(layouts)} layouts fit {dry.memory:g} GiB a rank"
        rates = f"products at dry.mfu {dry.mfu:.0%}, {dry.nvlink_gbs:g} GB/s within a node, {dry.network_gbs:g} beyond"
        tables.table("layouts by estimated time", step_time.table_rows(layouts), [f"{chosen}; {rates}; no overlap"])
    if teacher_rows := figures.get("teacher_ranks"):
        rows = [
            {"stage": n} | {kind: size / memory.GIB for kind, size in row.items()} for n, row in enumerate(teacher_rows)
        ]
        tables.table("GiB on a rank of each pipeline stage of the teacher", rows)
    if operations := figures["operations"]:
        row = {"steps": operations["steps"], "tokens": operations["tokens"]}
        row |= {f"{role} PFLOP a step": flop / 1e15 for role, flop in operations["flop_a_step"].items()}
        share = f"days at dry.mfu {dry.mfu:.0%} of {world} x dry.peak_tflops {dry.peak_tflops:g}"
        counted = "two operations a token for each weight of its matrix products, plus causal attention; trained models times three"
        written = {"cache GB": operations["cache_bytes"] / 1e9} if "cache_bytes" in operations else {}
        tables.table("operations", [row | written | {"days": operations["days"]}], [f"{share}; {counted}"])
