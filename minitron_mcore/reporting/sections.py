"""The sections of the page, each from the files of one kind of stage; stages that did not run have no section."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minitron_mcore.importance.scores import Scores, read_scores
from minitron_mcore.importance.scores import summary as score_summary
from minitron_mcore.pruning import summary
from minitron_mcore.pruning.plan import Plan, load_plan
from minitron_mcore.reading import read_yaml
from minitron_mcore.reporting import artefacts, overview
from minitron_mcore.reporting.artefacts import (
    KINDS,
    REMEDY,
    Model,
    Picture,
    damage_as_user_error,
    pictures,
    read_json,
    read_lines,
)
from minitron_mcore.reporting.overview import Tile
from minitron_mcore.reporting.tables import TRAINING_FIGURES, without_empty

CODE = ("hash", "weights", "from", "with", "folder", "command", "parameters pattern", "shape", "of modules")
"""Columns in a monospaced font: hashes, paths and commands."""
LOWER_IS_BETTER = ("loss", "kl", "mse")
SIZES = ("blocks", "hidden", "ffn", "heads", "groups")


@dataclasses.dataclass
class Table:
    caption: str
    rows: list[dict[str, Any]]
    folded: bool = False
    """Collapsed; for long tables."""


@dataclasses.dataclass
class Part:
    """The content of one folder."""

    name: str
    text: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    tables: list[Table] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Section:
    title: str
    text: str
    parts: list[Part]
    tiles: list[Tile] = dataclasses.field(default_factory=list)
    """Figures in large print, above the parts."""


def sections(folders: dict[str, list[Path]]) -> list[Section]:
    """The sections of the folders of a work_dir (see `artefacts.folders`).

    Raises:
        UserError: a file cannot be read.
    """
    scores = {folder: _scores(folder) for folder in folders["importance"]}
    plans = _plans(folders)
    depth, search = ([(f, read_json(f / KINDS[kind])) for f in folders[kind]] for kind in ("depth", "search"))
    training = ((folder, None) for folder in folders["training"])
    models = artefacts.models(folders)
    built = [
        _summary(folders, models),
        _evaluations(folders, models),
        _section(
            "Importance", "Scores of channels, heads and blocks on calibration text.", scores.items(), _importance
        ),
        _section("Plan", "What is kept, and its bytes before and after.", plans.items(), _plan),
        _section("Depth", "The model without some of its blocks.", depth, _depth),
        _section("Search", "Architectures within a budget.", search, _search),
        _section("Training", "Losses of each training run.", training, _training),
        comparisons(folders["comparison"]),
        _lineage(folders, scores, plans),
    ]
    return [section for section in built if section.parts]


def _summary(folders: dict[str, list[Path]], models: list[Model]) -> Section:
    commands = Table("Next steps, from the folder in which the stages ran.", list(overview.commands(models, folders)))
    parts = [Part("", tables=[Table("Models by role.", overview.rows(models)), commands])] if models else []
    return Section("Summary", overview.headline(models), parts, list(overview.tiles(models, folders)))


def _section(title: str, text: str, sources: Iterable[tuple[Path, Any]], part: Callable[[Path, Any], Part]) -> Section:
    """A section with a part for each (folder, parsed content); `title` is one of `KINDS`."""
    parts = []
    for folder, content in sources:
        with damage_as_user_error(folder / KINDS[title.lower()]):
            parts.append(part(folder, content))
    return Section(title, text, parts)


def _scores(folder: Path) -> Scores:
    path = folder / KINDS["importance"]
    with damage_as_user_error(path):
        return read_scores(path)


def _plans(folders: dict[str, list[Path]]) -> dict[Path, Plan]:
    """Each different plan: of plan stages, and of pruned checkpoints whose plan stage is not in the work_dir."""
    plans: dict[Path, Plan] = {}
    for folder in sorted(folders["plan"], key=lambda folder: folder in folders["checkpoint"]):
        plan = load_plan(folder)
        if plan.digest() not in [known.digest() for known in plans.values()]:
            plans[folder] = plan
    return plans


def _evaluations(folders: dict[str, list[Path]], models: list[Model]) -> Section:
    known, role_of = artefacts.weights_of(folders), {path: model.role for model in models for path in model.paths}
    rows = []
    for folder in folders["evaluation"]:
        path = folder / KINDS["evaluation"]
        record = read_json(path)
        with damage_as_user_error(path):
            model = Path(record["source"]).resolve()
            inside = model.is_relative_to(folder.parent.resolve())
            name = str(model.relative_to(folder.parent.resolve())) if inside else record["source"]
            about = {"model": role_of.get(model), "folder": name, "weights": known.get(model)}
            about["parameters"] = record.get("parameters")
            rows += [about | figures | {"file": Path(figures["file"]).name} for figures in record["files"]]
            rows.sort(key=lambda row: (row["file"], row["loss"]))
    table = Table("Best first for each file. Loss in nats per token; perplexity is its exponential.", rows)
    return Section("Evaluation", "Prediction of held-out text.", [Part("", tables=[table])] if rows else [])


def _importance(folder: Path, scores: Scores) -> Part:
    hidden = scores.vectors.get("hidden")
    alt = "Four panels: hidden channels by score, ffn channels by block and quantile, heads by block, blocks by cosine distance. "
    if hidden is not None:
        alt += f"Hidden scores run from {hidden.min():.3g} to {hidden.max():.3g}; the table has their quantiles."
    caption = (
        "Scores of hidden channels, most important first; of ffn channels as quantiles within each block; of heads per block; and "
        "of blocks, 1 - cosine of input and output. Bright is important."
    )
    return Part(
        folder.name,
        facts={"scores": scores.digest(), **dict(sorted(scores.metadata.items()))},
        tables=[
            Table(
                "Scores: quantiles over channels and, per block, 1 - cosine of input and output.",
                score_summary(scores),
                True,
            )
        ],
        pictures=pictures(folder, {"importance.png": (caption, alt)}),
    )


def _plan(folder: Path, plan: Plan) -> Part:
    config = folder / "config.yaml"
    dtype = (read_yaml(config, REMEDY) if config.is_file() else {}).get("dtype", "bf16")
    axes = summary.axes(plan, dtype)
    kept = "; ".join(f"{row['axis']} {row['kept']} of {row['of']}" for row in axes[:-1])
    caption = (
        "Kept share of each axis in each block of the source, and its share of the summed score. A score share far above the kept "
        "share means that unimportant units are dropped. Hatched blocks are dropped."
    )
    dropped = ", ".join(map(str, plan.dropped_blocks())) or "none"
    return Part(
        folder.name,
        f"{summary.counts(plan)[:1].upper()}{summary.counts(plan)[1:]}.",
        {
            "plan": plan.digest(),
            "cuts weights": plan.fingerprint,
            "from scores": plan.scores,
            "dropped blocks (from 0)": dropped,
        },
        [
            Table(
                f"Axes and the tensors along each; bytes in {dtype}. A tensor counts in the row of each of its axes.",
                axes,
            ),
            Table("Tensors by kind.", summary.tensors(plan, dtype), True),
        ],
        pictures(folder, {"plan.png": (caption, f"Kept: {kept}.")}),
    )


def _depth(folder: Path, study: dict[str, Any]) -> Part:
    metric, sweep = str(study.get("metric", "loss")), study.get("sweep", [])
    figures = ("loss", "kl", "mse", "accuracy")
    rows = []
    for point in sweep:
        last, shown = max(point.get("dropped") or [], default=None), {key: point.get(key) for key in figures}
        rows.append({"blocks dropped": point["size"], "first": point.get("first"), "last": last} | shown)
    rows = without_empty(rows)
    best: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row.get(metric) is not None:
            sign = 1 if metric in LOWER_IS_BETTER else -1
            best[row["blocks dropped"]] = min(best.get(row["blocks dropped"], row), row, key=lambda r: sign * r[metric])
    chosen = [
        {"drop": int(n), "blocks (from 0)": ", ".join(map(str, blocks))} for n, blocks in study.get("drop", {}).items()
    ]
    baseline = {
        f"{key} of the full model": value for key, value in study.get("baseline", {}).items() if value is not None
    }
    tables = [
        Table(
            f"The run of each length whose removal does the least damage, by {metric}.",
            [best[size] for size in sorted(best)],
        ),
        Table("Blocks that the study chooses to drop.", chosen),
        Table("Every point of the sweep.", rows, True),
    ]
    facts = {"model": study.get("model"), "metric": metric, "kind": study.get("kind"), **baseline}
    caption = "Loss and accuracy without a run of blocks, against its last block. A ring marks the choice."
    alt = "Curves of loss and accuracy by last dropped block; their figures are in the table of the sweep."
    return Part(folder.name, facts=facts, tables=tables, pictures=pictures(folder, {"depth.png": (caption, alt)}))


SEARCH_PLOTS = {
    "parameters.png": (
        "Held-out loss against parameters: hollow is just pruned, filled is after training.",
        "Loss by size.",
    ),
    "ranks.png": (
        "Held-out loss and rank of the trained candidates during training.",
        "Curves of loss and rank by step.",
    ),
    "speed.png": ("Held-out loss against measured speed; the line joins the best trade-offs.", "Loss by speed."),
}
"""File -> caption and alternative text."""


def _search(folder: Path, study: dict[str, Any]) -> Part:
    candidates = study.get("candidates", [])
    ranks = {key: _ranks([candidate.get(key) for candidate in candidates]) for key in ("zero_shot_loss", "loss")}
    rows = []
    for number, candidate in enumerate(candidates):
        sizes = candidate.get("sizes", {})
        row = {"candidate": candidate["name"]} | {key: sizes[key] for key in SIZES if key in sizes}
        row |= {key: candidate.get(key) for key in ("parameters", "without_embeddings", "zero_shot_loss")}
        row |= {
            "rank": ranks["zero_shot_loss"][number],
            "trained steps": max(candidate.get("steps") or [], default=None),
        }
        row |= {"loss after training": candidate.get("loss"), "rank then": ranks["loss"][number]}
        row |= {key: candidate.get(key) for key in ("prefill_tokens_per_second", "decode_tokens_per_second")}
        rows.append(row)
    table = Table("Candidates; zero-shot is just pruned. Loss in nats per token.", without_empty(rows))
    facts = {"model": study.get("model")}
    return Part(folder.name, facts=facts, tables=[table], pictures=pictures(folder, SEARCH_PLOTS))


def _ranks(values: list[float | None]) -> list[int | None]:
    """Ranks from 1, the lowest first; None stays None."""
    order = sorted(value for value in values if value is not None)
    return [None if value is None else order.index(value) + 1 for value in values]


def _training(folder: Path, _: None) -> Part:
    steps = read_lines(folder / KINDS["training"])
    described = folder / KINDS["checkpoint"]
    record = read_json(described).get("lineage", {}) if described.is_file() else {}
    if not steps:
        return Part(folder.name, "No step has finished yet.")
    first, last = steps[0], steps[-1]
    spread = sorted({round(i * (len(steps) - 1) / 9) for i in range(10)})
    shown = [key for key in (*TRAINING_FIGURES, "tokens_per_second") if any(key in step for step in steps)]
    rows = [{key: steps[i].get(key) for key in shown} for i in spread]
    names = {"kd_loss": "KD loss", "lm_loss": "LM loss"}
    changes = ", ".join(
        f"{name} from {first[key]:.3g} to {last[key]:.3g}" for key, name in names.items() if first.get(key)
    )
    caption = "Losses in nats per token and learning rate. Pale: single steps; solid: running mean over a twentieth of the run."
    return Part(
        folder.name,
        f"{last['tokens']:,} tokens in {last['step']:,} steps" + (f": {changes}." if changes else "."),
        {key: value for key, value in record.get("settings", {}).items() if value is not None},
        [Table("Steps, evenly spaced over the run.", rows)],
        pictures(folder, {"losses.png": (caption, f"Loss curves: {changes}.")}),
    )


def comparisons(folders: list[Path]) -> Section:
    """The section on the folders that `minitron compare` wrote."""
    sources = ((folder, read_json(folder / KINDS["comparison"])) for folder in folders)
    return _section("Comparison", "Training runs side by side.", sources, _comparison)


def _comparison(folder: Path, record: dict[str, Any]) -> Part:
    rows = record["runs"]
    text = "Settings, inputs and sizes in which the runs differ; last losses in nats per token."
    caption = "Losses in nats per token and learning rate of the runs against tokens."
    alt = "Loss curves of the runs; their last losses are in the table."
    return Part(folder.name, tables=[Table(text, rows)], pictures=pictures(folder, {"losses.png": (caption, alt)}))


def _lineage(folders: dict[str, list[Path]], scores: dict[Path, Scores], plans: dict[Path, Plan]) -> Section:
    lines, commands = artefacts.lineage_rows(folders, scores, plans)
    tables = [
        Table("What was made from what. A hash identifies weights, scores or a plan.", lines),
        Table("Commands.", commands, True),
    ]
    parts = [Part("", tables=tables)] if lines else []
    return Section("Lineage", "Ancestors of all artefacts, back to the converted model.", parts)
