"""Benchmarks of models: each task is measured once and kept in a file, from which a later run goes on."""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.checkpoint import claim, disk, run_folder, stage_record
from minitron_mcore.config.identity import differences, resolved
from minitron_mcore.config.stages import BenchmarkRun
from minitron_mcore.data.tokenizer import open_tokenizer
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.evaluation import perplexity
from minitron_mcore.evaluation.benchmarks import suite
from minitron_mcore.evaluation.benchmarks.sandbox import Sandbox
from minitron_mcore.evaluation.benchmarks.suite import SUITE, Unit
from minitron_mcore.export import transformers_check
from minitron_mcore.models import sharding
from minitron_mcore.models.build import DTYPES
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.reading import FORMAT_VERSION, damage_as_user_error, read_json
from minitron_mcore.reporting import tables

FILE = "benchmark.json"
SUMMARY = ("score", "stderr", "questions", "shots", "metric", "limit", "examples")


def run(config: BenchmarkRun) -> None:
    """Measure every model, and print and write the table (collective).

    Raises:
        UserError: before a model is loaded: `suite.problems`; a model that cannot be opened; results of other questions; see
            `suite.make_task`; programs cannot be confined.
    """
    refuse(suite.problems(config.benchmark))
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # datasets is imported later
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if any(SUITE[name].runs_code for name in config.benchmark.tasks):
        process_groups.on_rank_0(_sandbox(config).check)
    every = config.each()
    with process_groups.raise_on_all_ranks():
        for each in every.values():
            _check_source(each)
    process_groups.on_rank_0(lambda: _check_tasks(config))
    for each in every.values():
        with claim.claim_run_folder(each.out_dir, resolved(each)):
            pass  # refuses another run, or another model, in the folder
    rows = {name: measure(name, each) for name, each in every.items()}
    with process_groups.raise_on_all_ranks(), claim.writing(Path(config.out_dir)):
        if process_groups.rank() == 0:
            _write_table(config, rows)


def measure(name: str, config: BenchmarkRun) -> dict[str, Any]:
    """Measure the tasks of one model that its folder lacks (collective).

    Returns:
        {benchmark: its `SUMMARY`}, score and stderr as shares; the same on all ranks.

    Raises:
        UserError: another run in the folder, or a file of a task that is damaged or has the result of other questions.
    """
    with claim.claim_run_folder(config.out_dir, resolved(config)):
        units = _units(config)
        missing = process_groups.on_rank_0(lambda: [unit for unit in units if not _path(config, unit).is_file()])
        if missing:
            _measure_units(name, config, missing)
        return process_groups.on_rank_0(lambda: _summarize(config, units))


def _summarize(config: BenchmarkRun, units: Sequence[Unit]) -> dict[str, Any]:
    """Read the files of all tasks, write the scores of the benchmarks and mark the folder as finished (rank 0)."""
    found = _results(config, units)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in config.benchmark.tasks}
    for unit in units:
        results[unit.benchmark].append(found[unit.name])
    summary = {name: _pooled(each) for name, each in results.items()}
    source = stage_record.recorded_inputs(config.out_dir)["source"]
    content = {"format_version": FORMAT_VERSION, "source": source._asdict(), "benchmarks": summary}
    with claim.writing(Path(config.out_dir)):
        disk.write_json(Path(config.out_dir) / FILE, content)
        claim.finish(config.out_dir)
    return summary


def _results(config: BenchmarkRun, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    """`SUMMARY` of each task that has a file, by its name (rank 0).

    Raises:
        UserError: a damaged file, or results that `suite.inputs` of now would not give.
    """
    results, changed = {}, []
    for unit in units:
        path, remedy = _path(config, unit), "remove it and run again"
        if not path.is_file():
            continue
        with damage_as_user_error(path, remedy):
            content = read_json(path, remedy)
            _percent(content)
            results[unit.name] = {key: content[key] for key in SUMMARY}
            changes = differences(content.get("inputs", {}), suite.inputs(unit))
        if changes:
            changed.append((unit, path, "; ".join(changes)))
    if changed:
        unit, path, changes = changed[0]
        more = f", and so were {len(changed) - 1} other tasks" if len(changed) > 1 else ""
        examples = f" and {unit.examples}" if unit.examples else ""
        raise UserError(
            f"{unit.name} was measured with other inputs than {suite.questions_file(unit)}{examples} ({changes}){more}: restore "
            f"them, or remove {path} to measure it again."
        )
    return results


def _check_source(config: BenchmarkRun) -> None:
    """Refuse a model that cannot run here, before weights are read."""
    if os.path.isfile(os.path.join(config.source, "model.json")):
        checkpoint = run_folder.open_checkpoint(config.source, step=config.step)
        sharding.check_shardable(checkpoint.arch, config.parallel)
        open_tokenizer(config.data, checkpoint.hf, checkpoint.arch.vocab)
        return
    perplexity.check_folder(config.source)
    if torch.distributed.get_world_size() > 1:
        raise UserError(
            f"{config.source} is a Hugging Face folder, which runs on one process: convert it, or start one process."
        )


def _check_tasks(config: BenchmarkRun) -> None:
    """Make each task that a model lacks: what is wrong with its files is said before a model is loaded (rank 0)."""
    for each in config.each().values():
        _results(each, _units(config))
    for unit in _units(config):
        if not all(_path(each, unit).is_file() for each in config.each().values()):
            hang_watchdog.beat()
            suite.make_task(unit, config.seed, _sandbox(config).pass_at_1)


def _units(config: BenchmarkRun) -> list[Unit]:
    return [unit for benchmark in config.benchmark.tasks for unit in suite.units(benchmark, config.benchmark)]


def _path(config: BenchmarkRun, unit: Unit) -> Path:
    return Path(config.out_dir) / "tasks" / f"{unit.name}.json"


def _sandbox(config: BenchmarkRun) -> Sandbox:
    return Sandbox(config.benchmark.code_seconds, config.benchmark.code_memory_mb)


def _measure_units(name: str, config: BenchmarkRun, units: Sequence[Unit]) -> None:
    """Measure tasks and write a file for each (collective)."""
    if not os.path.isfile(os.path.join(config.source, "model.json")):
        model = _open_folder(config)
        return _lead(name, model, config, units)
    from minitron_mcore.evaluation.benchmarks.sharded_lm import ShardedLM

    checkpoint = run_folder.open_checkpoint(config.source, step=config.step)
    with process_groups.raise_on_all_ranks():
        tokenizer = open_tokenizer(config.data, checkpoint.hf, checkpoint.arch.vocab)
    sharded = run_folder.build_model(checkpoint, config.parallel, config.dtype.value)
    model = ShardedLM(sharded, checkpoint.arch, tokenizer, config.benchmark.micro_batch, config.seed)
    with stop_signal.at_stop_points():
        if process_groups.rank() == 0:
            with model.leading():
                _lead(name, model, config, units)
        else:
            model.serve()


def _open_folder(config: BenchmarkRun) -> Any:
    """lm-eval's own model of a Hugging Face folder, on one process."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    model = transformers_check.load(config.source, dtype=DTYPES[config.dtype.value])
    tokenizer = open_tokenizer(config.data, config.source, model.get_input_embeddings().num_embeddings)
    if not isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerFast):
        raise UserError(
            f"{config.source} has a sentencepiece tokenizer, with which lm-eval does not run transformers: convert it."
        )
    return HFLM(
        pretrained=model.to(process_groups.device()).eval(),
        tokenizer=tokenizer.tokenizer,
        batch_size=config.benchmark.micro_batch,
    )


def _lead(name: str, model: Any, config: BenchmarkRun, units: Sequence[Unit]) -> None:
    """Measure tasks one after another (rank 0)."""
    for unit in units:
        start, benchmark = time.monotonic(), SUITE[unit.benchmark]
        inputs = suite.inputs(unit)
        task = suite.make_task(unit, config.seed, _sandbox(config).pass_at_1)
        found = evaluate(model, task, unit.limit, config.seed, config.benchmark.run_code)
        result = {
            "format_version": FORMAT_VERSION,
            "task": unit.name,
            "score": found[benchmark.metric],
            "stderr": found[benchmark.metric.replace(",", "_stderr,")],
            "questions": found["sample_len"],
            "limit": config.benchmark.limit,
            "shots": benchmark.shots,
            "examples": str(unit.examples) if unit.examples else "the other questions" if benchmark.shots else None,
            "metric": benchmark.metric.strip("_"),
            "metrics": {key: value for key, value in found.items() if isinstance(value, int | float)},
            "seed": config.seed,
            "dtype": config.dtype.value,
            "inputs": inputs,
            "seconds": round(time.monotonic() - start, 1),
        }
        result["stderr"] = result["stderr"] if isinstance(result["stderr"], float) else None  # of one question
        with claim.writing(_path(config, unit).parent):
            _path(config, unit).parent.mkdir(exist_ok=True)
            disk.write_json(_path(config, unit), result)
        process_groups.log(
            f"{name}: {unit.name} {_percent(result)} ({result['questions']} questions, {result['seconds']:g} s)"
        )


def evaluate(model: Any, task: Any, limit: int | None, seed: int, run_code: bool = False) -> dict[str, Any]:
    """lm-eval's results of one task: scores and standard errors by its keys, and sample_len (rank 0).

    Args:
        model: of lm-eval.
        task: of `suite.build_task`.
        seed: of the tokens that transformers samples.
    """
    import lm_eval

    torch.manual_seed(seed)
    name = task.config.task
    found = lm_eval.evaluate(
        lm=model, task_dict={name: task}, limit=limit, log_samples=False, confirm_run_unsafe_code=run_code
    )
    return found["results"][name] | {"sample_len": found["n-samples"][name]["effective"]}


def _pooled(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The score of a benchmark over the questions of its tasks; several tasks are a share of right answers."""
    first, count = results[0], sum(result["questions"] for result in results)
    score = sum(result["score"] * result["questions"] for result in results) / count
    stderr = first["stderr"] if len(results) == 1 else math.sqrt(score * (1 - score) / max(1, count - 1))
    return {**first, "score": score, "stderr": stderr, "questions": count}


def _percent(result: Mapping[str, Any]) -> str:
    error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    return f"{100 * result['score']:.1f}{error}"


def _rows(config: BenchmarkRun, measured: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    labels = {name: f"{SUITE[name].title} ({SUITE[name].shots})" for name in config.benchmark.tasks}
    for name, summary in measured.items():
        yield {"model": name} | {label: _percent(summary[key]) for key, label in labels.items()}
    for name, row in (config.benchmark.published or {}).items():
        yield {"model": f"published: {name}"} | {
            label: f"{row[key]:.1f}" if key in row else "" for key, label in labels.items()
        }


def _write_table(config: BenchmarkRun, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table and write it as Markdown and JSON (rank 0)."""
    rows, folder = list(_rows(config, measured)), Path(config.out_dir)
    limit = config.benchmark.limit
    asked = "all questions" if limit is None else f"the first {limit} questions of each benchmark"
    notes = [f"per cent ± standard error (shots); {asked}; seed {config.seed}, {config.dtype.value}"]
    figures = {"format_version": FORMAT_VERSION, "models": measured, "published": config.benchmark.published}
    disk.write_json(folder / FILE, figures)
    (folder / "benchmark.md").write_text(f"{tables.markdown(rows)}\n\n{notes[0]}\n", encoding="utf-8")
    tables.table("benchmarks", rows, [*notes, f"figures: {folder}/{FILE}, {folder}/benchmark.md"])
