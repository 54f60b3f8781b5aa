"""The depth stage, from a checkpoint to a finished folder:

out_dir/
  points.jsonl   measured points (see `depth.point_log`)
  depth.json     the full model, every contiguous run of blocks, the choices (see `depth.study`)
  depth.png      loss and accuracy against the last dropped block
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.checkpoint import claim, disk, run_folder
from minitron_mcore.config import ranges
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.settings import DepthMetric
from minitron_mcore.config.stages import DepthRun
from minitron_mcore.data.text_reader import Limits
from minitron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from minitron_mcore.depth import study
from minitron_mcore.depth.point_log import PointLog
from minitron_mcore.depth.removal import RemovalEvaluator
from minitron_mcore.errors import refuse
from minitron_mcore.evaluation.multiple_choice import MultipleChoice, Question, read
from minitron_mcore.evaluation.windows import Windows, heldout_windows, spread
from minitron_mcore.importance.scores import load_scores
from minitron_mcore.parallel import process_groups, stop_signal
from minitron_mcore.pruning.target import format_ranges
from minitron_mcore.reading import FORMAT_VERSION
from minitron_mcore.reporting import plots, tables


def run(config: DepthRun) -> None:
    """Run a study or resume an interrupted one (collective).

    Raises:
        UserError: see `study.problems`, `heldout_windows`, `multiple_choice.read`, `scores.load_scores` and
            `claim.claim_run_folder`.
    """
    settings = config.depth
    source = run_folder.open_checkpoint(config.source, wanted=config.model.architecture)
    arch, blocks = source.arch, source.arch.blocks
    length = ranges.positions("depth.sequence_length", settings.sequence_length, model=arch.max_positions)
    refuse([*study.problems(config, blocks), *length])
    with process_groups.raise_on_all_ranks():
        tokenizer = open_tokenizer(config.data, source.hf, arch.vocab)
        questions = read(settings.choices, settings.limit, Limits.of(config.data)) if settings.choices else []
        cosines = _cosines(config, source)
    windows = _windows(config, tokenizer)
    with claim.claim_run_folder(config.out_dir, resolved(config)), stop_signal.at_stop_points():
        model = run_folder.build_model(source, config.parallel, config.dtype.value)
        scorer = MultipleChoice(model, arch, questions, tokenizer, settings.micro_batch) if questions else None
        points = PointLog(
            config.out_dir,
            RemovalEvaluator(model, arch, windows, settings.micro_batch, scorer),
            study.max_points(settings, blocks),
            has_accuracy=bool(questions),
            model=source.fingerprint,
            data=_digest(windows, questions),
        )
        rank = study.make_ranking(settings.metric, cosines, len(questions))
        baseline = points([])
        sweep = [
            {"size": size, "first": dropped[0]} | points(dropped)
            for size in study.sweep_sizes(settings, blocks)
            for dropped in study.contiguous_runs(blocks, size)
        ]
        chosen = study.choose(settings, blocks, points, rank)
        chance = scorer.chance if scorer else None
        results = {
            "format_version": FORMAT_VERSION,
            "model": source.fingerprint,
            "metric": settings.metric.value,
            "kind": settings.kind.value,
            "baseline": {"loss": baseline["loss"], "accuracy": baseline["accuracy"]},
            "chance": chance,
            "tokens": int(windows.mask.sum()),
            "questions": len(questions),
            "sweep": sweep,
            "chosen": chosen,
            "drop": {str(row["size"]): row["dropped"] for row in chosen if row["taken"]},
        }
        with process_groups.raise_on_all_ranks(), claim.writing(Path(config.out_dir)):
            if process_groups.rank() == 0:
                warnings = study.warnings(chosen, settings.metric, rank, chance, len(questions))
                _write(Path(config.out_dir), results, list(warnings))
                claim.finish(config.out_dir)


def _windows(config: DepthRun, tokenizer: Tokenizer) -> Windows:
    """depth.windows windows of each held-out text, spread evenly over it (collective)."""
    settings = config.depth
    texts, _ = heldout_windows(config.data, tokenizer, settings.sequence_length, settings.windows)
    parts = [spread(windows, settings.windows) for windows in texts.values()]
    return Windows(torch.cat([p.tokens for p in parts]), torch.cat([p.mask for p in parts]), None)


def _cosines(config: DepthRun, source: run_folder.Checkpoint) -> list[float]:
    if config.depth.metric != DepthMetric.cosine:
        return []
    vectors = load_scores(config.scores or "", source.arch, source.fingerprint).vectors
    return [float(vectors[f"blocks.{block}.block"]) for block in range(source.arch.blocks)]


def _digest(windows: Windows, questions: Sequence[Question]) -> str:
    hasher = hashlib.sha256(windows.tokens.numpy().tobytes() + windows.mask.numpy().tobytes())
    hasher.update(repr([tuple(question) for question in questions]).encode())
    return hasher.hexdigest()[:16]


def _write(out_dir: Path, results: dict[str, Any], warnings: Sequence[str]) -> None:
    """Write depth.json and depth.png, and print the table."""
    disk.write_json(out_dir / study.FILE, results)
    plots.plot_depth(results, out_dir / "depth.png")
    full = {"drop": 0, "kind": "full model"} | results["baseline"]
    shown = [name for name in study.FIGURES if name != "accuracy" or results["questions"]]
    rows = [{key: value for key, value in full.items() if value is not None}]
    for row in results["chosen"]:
        mark, blocks = "*" if row["taken"] else "", format_ranges(row["dropped"])
        rows.append({"drop": row["size"], "kind": row["kind"], "chosen": mark, "blocks": blocks})
        rows[-1] |= {name: row[name] for name in shown}
    notes = [f"figures: {out_dir}/{study.FILE}", f"plot: {out_dir}/depth.png", *warnings]
    if count := results["questions"]:
        error = study.standard_error(0.5, count)
        notes.insert(0, f"accuracy on {count} questions: standard error {error:.3f}, chance {results['chance']:.3f}")
    tables.table(
        f"depth by {results['metric']}, {results['tokens']:,} tokens, {len(results['sweep'])} runs", rows, notes
    )
