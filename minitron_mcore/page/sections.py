"""The page's sections, each from the files of one kind of stage; a stage that was not run has none."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minitron_mcore.importance.scores import Scores, summary
from minitron_mcore.page import lineage
from minitron_mcore.page.read import KINDS, REMEDY, Picture, pictures, read_json, read_lines, readable
from minitron_mcore.plan import groups
from minitron_mcore.plan.plan import Plan, load_plan
from minitron_mcore.reading import open_tensors, read_yaml

CODE = ("hash", "weights", "from", "with", "folder", "command", "parameters pattern", "shape", "of modules")
"""Columns of what is copied rather than read."""
LOWER_IS_BETTER = ("loss", "kl", "mse")
SIZES = ("blocks", "hidden", "ffn", "heads", "groups")
TRAINED = (
    "step",
    "tokens",
    "kd_loss",
    "lm_loss",
    "states_loss",
    "teacher_entropy",
    "grad_norm",
    "lr",
    "tokens_per_second",
)


@dataclasses.dataclass
class Table:
    caption: str
    rows: list[dict]
    folded: bool = False
    """Long: shown on demand."""


@dataclasses.dataclass
class Part:
    """What one folder has to say."""

    name: str
    text: str = ""
    facts: dict = dataclasses.field(default_factory=dict)
    tables: list[Table] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Section:
    title: str
    text: str
    parts: list[Part]


def sections(found: dict[str, list[Path]]) -> list[Section]:
    """All that the folders (see `read.folders`) have to say.

    Raises:
        UserError: a file that cannot be read, by name.
    """
    scores = {folder: _scores(folder) for folder in found["importance"]}
    plans = _plans(found)
    built = [
        _evaluations(found),
        _section(
            "Importance", "What calibration text says of every channel, head and block.", scores.items(), _importance
        ),
        _section("Plan", "What is kept, and the bytes that it costs before and after.", plans.items(), _plan),
        _section("Depth", "What the model loses without some of its blocks.", _read(found, "depth"), _depth),
        _section(
            "Search", "Architectures that fit a budget, held against each other.", _read(found, "search"), _search
        ),
        _section("Training", "What each training run's loss did.", ((f, None) for f in found["training"]), _training),
        _lineage(found, scores, plans),
    ]
    return [section for section in built if section.parts]


def _section(title: str, text: str, sources: Iterable[tuple[Path, Any]], part: Callable[[Path, Any], Part]) -> Section:
    """A part for each folder with its content already read; `title` is one of `KINDS`."""
    parts = []
    for folder, content in sources:
        with readable(folder / KINDS[title.lower()]):
            parts.append(part(folder, content))
    return Section(title, text, parts)


def _read(found: dict[str, list[Path]], kind: str) -> list[tuple[Path, dict]]:
    return [(folder, read_json(folder / KINDS[kind])) for folder in found[kind]]


def _scores(folder: Path) -> Scores:
    path = folder / KINDS["importance"]
    with open_tensors(path, "pt", REMEDY) as file:
        return Scores({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _plans(found: dict[str, list[Path]]) -> dict[Path, Plan]:
    """Each plan once: the plan stage's, and those of pruned checkpoints whose plan stage was somewhere else."""
    plans = {}
    for folder in sorted(found["plan"], key=lambda folder: folder in found["checkpoint"]):
        plan = load_plan(folder)
        if plan.digest() not in [other.digest() for other in plans.values()]:
            plans[folder] = plan
    return plans


def _evaluations(found: dict[str, list[Path]]) -> Section:
    known = lineage.weights_of(found)
    rows = []
    for folder in found["evaluation"]:
        path = folder / KINDS["evaluation"]
        record = read_json(path)
        with readable(path):
            model = Path(record["source"]).resolve()
            inside = model.is_relative_to(folder.parent.resolve())
            name = str(model.relative_to(folder.parent.resolve())) if inside else record["source"]
            about = {"model": name, "weights": known.get(model), "parameters": record.get("parameters")}
            rows += [about | figures | {"file": Path(figures["file"]).name} for figures in record["files"]]
            rows.sort(key=lambda row: (row["file"], row["loss"]))
    table = Table("The best first on each file. Loss in nats a token; perplexity is its exponential.", rows)
    return Section("Evaluation", "How well each model predicts text.", [Part("", tables=[table])] if rows else [])


def _importance(folder: Path, scores: Scores) -> Part:
    hidden = scores.vectors.get("hidden")
    alt = "Four panels: hidden channels by score, ffn channels by block and quantile, heads by block, blocks by cosine distance. "
    if hidden is not None:
        alt += f"Hidden scores run from {hidden.min():.3g} to {hidden.max():.3g}; the table has their quantiles."
    caption = (
        "Scores of hidden channels from the most to the least important; of ffn channels, a row a block, as quantiles within it; "
        "of heads, a row a block; and of each block, how far its output turns away from its input. Bright is important."
    )
    return Part(
        folder.name,
        facts={"scores": scores.digest(), **dict(sorted(scores.metadata.items()))},
        tables=[
            Table(
                "Scores: quantiles over channels, and by block one minus the cosine of input and output.",
                summary(scores),
                True,
            )
        ],
        pictures=pictures(folder, {"importance.png": (caption, alt)}),
    )


def _plan(folder: Path, plan: Plan) -> Part:
    config = folder / "config.yaml"
    dtype = (read_yaml(config, REMEDY) if config.is_file() else {}).get("dtype", "bf16")
    axes = groups.axes(plan, dtype)
    kept = "; ".join(f"{row['axis']} {row['kept']} of {row['of']}" for row in axes[:-1])
    caption = (
        "Kept share of each axis in each block of the source, and the share of the summed score that it holds: where the second "
        "is far above the first, the cut takes what matters little. Hatched blocks are dropped."
    )
    dropped = ", ".join(map(str, plan.dropped_blocks())) or "none"
    return Part(
        folder.name,
        f"{groups.counts(plan)[:1].upper()}{groups.counts(plan)[1:]}.",
        {
            "plan": plan.digest(),
            "cuts weights": plan.fingerprint,
            "from scores": plan.scores,
            "dropped blocks (from 0)": dropped,
        },
        [
            Table(
                f"Axes, and the tensors along each; bytes in {dtype}. A tensor is in the row of each of its axes.", axes
            ),
            Table("Tensors, each kind once.", groups.tensors(plan, dtype), True),
        ],
        pictures(folder, {"plan.png": (caption, f"Kept: {kept}.")}),
    )


def _depth(folder: Path, study: dict) -> Part:
    metric, sweep = str(study.get("metric", "loss")), study.get("sweep", [])
    figures = ("loss", "kl", "mse", "accuracy")
    rows = []
    for point in sweep:
        dropped = point.get("dropped") or []
        shown = {key: point.get(key) for key in figures if any(p.get(key) is not None for p in sweep)}
        last = max(dropped, default=None)
        rows.append({"blocks dropped": point["size"], "first": point.get("first"), "last": last} | shown)
    best = {}
    for row in rows:
        if row.get(metric) is not None:
            sign = 1 if metric in LOWER_IS_BETTER else -1
            best[row["blocks dropped"]] = min(best.get(row["blocks dropped"], row), row, key=lambda r: sign * r[metric])
    chosen = [
        {"drop": n, "blocks (from 0)": ", ".join(map(str, blocks))} for n, blocks in study.get("drop", {}).items()
    ]
    baseline = {
        f"{key} of the whole model": value for key, value in study.get("baseline", {}).items() if value is not None
    }
    tables = [
        Table(f"Where a run of so many blocks is missed least, by {metric}.", [best[size] for size in sorted(best)]),
        Table("The study's choice: what to drop.", chosen),
        Table("Every point of the sweep.", rows, True),
    ]
    facts = {"model": study.get("model"), "metric": metric, "kind": study.get("kind"), **baseline}
    return Part(folder.name, facts=facts, tables=tables, pictures=pictures(folder, {}))


def _search(folder: Path, study: dict) -> Part:
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
    shown = [key for key in (rows[0] if rows else []) if any(row.get(key) is not None for row in rows)]
    rows = [{key: row.get(key) for key in shown} for row in rows]
    table = Table("Candidates. Zero-shot: just pruned. Loss in nats a token.", rows)
    return Part(folder.name, facts={"model": study.get("model")}, tables=[table], pictures=pictures(folder, {}))


def _ranks(values: list[float | None]) -> list[int | None]:
    """1 for the lowest; None stays None."""
    order = sorted(value for value in values if value is not None)
    return [None if value is None else order.index(value) + 1 for value in values]


def _training(folder: Path, _: None) -> Part:
    steps = read_lines(folder / KINDS["training"])
    described = folder / KINDS["checkpoint"]
    record = read_json(described).get("lineage", {}) if described.is_file() else {}
    if not steps:
        return Part(folder.name, "No step is finished yet.")
    first, last = steps[0], steps[-1]
    spread = sorted({round(i * (len(steps) - 1) / 9) for i in range(10)})
    rows = [{key: steps[i].get(key) for key in TRAINED if key in first} for i in spread]
    said = " and ".join(
        f"{name} from {first[key]:.3g} to {last[key]:.3g}"
        for key, name in (("kd_loss", "the KD loss"), ("lm_loss", "the LM loss"))
        if first.get(key)
    )
    caption = "Losses in nats a token and learning rate. Pale: single steps; full: a running mean over a twentieth of the run."
    return Part(
        folder.name,
        f"{last['tokens']:,} tokens in {last['step']:,} steps" + (f" took {said}." if said else "."),
        {key: value for key, value in record.get("settings", {}).items() if value is not None},
        [Table("Steps, spread evenly over the run.", rows)],
        pictures(folder, {"losses.png": (caption, f"Loss curves: {said}.")}),
    )


def _lineage(found: dict[str, list[Path]], scores: dict[Path, Scores], plans: dict[Path, Plan]) -> Section:
    lines, commands = lineage.rows(found, scores, plans)
    tables = [
        Table("Who was made from whom. One hash is one set of weights, scores or kept indices.", lines),
        Table("Commands.", commands, True),
    ]
    parts = [Part("", tables=tables)] if lines else []
    return Section("Lineage", "Every hash leads back to the model at the top.", parts)
