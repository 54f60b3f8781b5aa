"""The sections of the page, each from the files of one kind of stage; stages that did not run have no section."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores, read_scores
from minitron_mcore.importance.scores import summary as score_summary
from minitron_mcore.pruning import summary
from minitron_mcore.pruning.plan import Plan, load_plan
from minitron_mcore.reporting import artefacts, costs, measurements, overview
from minitron_mcore.reporting.artefacts import (
    KINDS,
    Model,
    damage_as_user_error,
    pictures,
    read_json,
    read_lines,
)
from minitron_mcore.reporting.content import Part, Section, Table
from minitron_mcore.reporting.measurements import Benchmarks
from minitron_mcore.reporting.tables import TRAINING_FIGURES, short_flops, turned, without_empty

CODE = ("hash", "weights", "from", "with", "folder", "command", "parameters pattern", "shape", "of modules")
"""Columns in a monospaced font: hashes, paths and commands."""
LOWER_IS_BETTER = ("loss", "kl", "mse")
_LONG = 30
"""Rows above which a table of figures is folded."""
SIZES = ("blocks", "hidden", "ffn", "heads", "groups")


def sections(folders: dict[str, list[Path]]) -> list[Section]:
    """The sections of the folders of a work_dir (see `artefacts.folders`).

    A folder that cannot be read is left out and named in a section of its own.

    Raises:
        UserError: no folder can be read.
    """
    sound, problems = readable(folders)
    with damage_as_user_error("the work_dir"):
        built = _build(sound)
    if problems and not built:
        raise UserError(next(iter(problems.values())))
    if problems:
        rows = [{"left out": path.name, "problem": sentence} for path, sentence in problems.items()]
        table = Table("Everything else on this page is made without them.", rows)
        section = Section("Problems", "Folders and files that cannot be read.", [Part("", tables=[table])])
        built.insert(built[0].title == "Summary", section)
    return built


def readable(folders: dict[str, list[Path]]) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """The folders without those that cannot be read, and a sentence for each of these."""
    problems = {}
    for folder in dict.fromkeys(folder for of_kind in folders.values() for folder in of_kind):
        try:
            with damage_as_user_error(folder):
                _build({kind: [folder] if folder in of_kind else [] for kind, of_kind in folders.items()})
        except UserError as error:
            problems[folder] = str(error)
    return {kind: [f for f in of_kind if f not in problems] for kind, of_kind in folders.items()}, problems


def _build(folders: dict[str, list[Path]]) -> list[Section]:
    scores = {folder: _scores(folder) for folder in folders["importance"]}
    plans = _plans(folders)
    depth, search = ([(f, read_json(f / KINDS[kind])) for f in folders[kind]] for kind in ("depth", "search"))
    training = ((folder, None) for folder in folders["training"])
    models, locate = artefacts.models(folders), artefacts.locator(folders)
    benchmarks = {f: measurements.read_benchmarks(f, models, locate) for f in folders["benchmark"]}
    figures = {path: measurements.read_figures(path) for path in folders[artefacts.FIGURES]}
    speeds = {folder: _search_speeds(folder, study, models) for folder, study in search}
    built = [
        _summary(folders, models, costs.rows(folders, scores), _kept(benchmarks, figures, speeds)),
        _evaluations(folders, models, locate),
        _section("Benchmark", "Scores of the models, in per cent.", benchmarks.items(), _benchmark),
        _throughput(figures, speeds),
        _section(
            "Importance", "Scores of channels, heads and blocks on calibration text.", scores.items(), _importance
        ),
        _section("Plan", "What is kept, and its bytes before and after.", plans.items(), _plan),
        _section("Depth", "The model without some of its blocks.", depth, _depth),
        _section("Search", "Architectures within a budget.", search, _search),
        _section("Training", "Losses of each training run.", training, _training),
        comparisons(folders["comparison"]),
        Section("Findings", "Figures of benchmarks.", _figure_parts(figures, throughput=False)),
        _lineage(folders, scores, plans),
    ]
    return [section for section in built if section.parts]


def _summary(
    folders: dict[str, list[Path]], models: list[Model], costs: list[dict[str, Any]], kept: overview.Kept
) -> Section:
    tables = [
        Table("Models by role. Loss in nats per token.", overview.rows(models)),
        Table("Time, tokens and floating-point operations of the stages.", overview.cost_rows(costs)),
        Table(
            "Next steps, from the folder in which the stages ran.",
            list(overview.commands(models, folders)),
            bool(costs),
        ),
    ]
    tables = [table for table in tables if table.rows]
    tiles = overview.tiles(models, costs, kept)
    return Section("Summary", overview.headline(models), [Part("", tables=tables)] if tables else [], tiles)


def _kept(
    benchmarks: dict[Path, Benchmarks],
    figures: dict[Path, list[dict[str, Any]]],
    speeds: dict[Path, list[dict[str, Any]]],
) -> overview.Kept:
    """The last results with teacher and student."""
    shares = [share for results in benchmarks.values() if (share := results.kept())]
    ratios = measurements.speedups([figure for lines in figures.values() for figure in lines])
    for rows in filter(None, speeds.values()):
        ratios["generated tokens per second"] = [rows[-1]["decode_tokens_per_second"]]
    return overview.Kept(shares[-1] if shares else None, ratios)


def _benchmark(folder: Path, results: Benchmarks) -> Part:
    limits = {result.get("limit") for scores in results.models.values() for result in scores.values()}
    asked = ", ".join(
        "all questions" if n is None else f"the first {n} questions of each" for n in sorted(limits, key=str)
    )
    caption = (
        f"Per cent ± standard error, {asked}. Kept: the student's score over the teacher's; the score of guessing is not "
        "subtracted."
    )
    return Part(folder.name, tables=[Table(caption, measurements.benchmark_rows(results))])


def _search_speeds(folder: Path, study: dict[str, Any], models: list[Model]) -> list[dict[str, Any]]:
    with damage_as_user_error(folder / KINDS["search"]):
        return measurements.search_speeds(study, models)


def _throughput(figures: dict[Path, list[dict[str, Any]]], speeds: dict[Path, list[dict[str, Any]]]) -> Section:
    caption = (
        "Teacher's and student's sizes with random weights, as the search measured them; the ratio is the student's."
    )
    parts = [Part(folder.name, tables=[Table(caption, rows)]) for folder, rows in speeds.items() if rows]
    parts += _figure_parts(figures, throughput=True)
    return Section("Throughput", "Speed of the models. A roofline is an estimate.", parts)


def _figure_parts(figures: dict[Path, list[dict[str, Any]]], throughput: bool) -> list[Part]:
    """A part for each benchmark of a file: those in `measurements.THROUGHPUT`, or the others."""
    parts = []
    for path, lines in figures.items():
        for name in dict.fromkeys(line["benchmark"] for line in lines):
            if (name in measurements.THROUGHPUT) == throughput:
                rows = measurements.figure_rows([line for line in lines if line["benchmark"] == name])
                parts.append(Part(name, tables=[Table(f"From {path.name}.", rows, len(rows) > _LONG)]))
    return parts


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


def _evaluations(folders: dict[str, list[Path]], models: list[Model], locate: Callable[[str], Path]) -> Section:
    known, role_of = artefacts.weights_of(folders), {path: model.role for model in models for path in model.paths}
    rows = []
    for folder in folders["evaluation"]:
        path = folder / KINDS["evaluation"]
        record = read_json(path)
        with damage_as_user_error(path):
            model = locate(record["source"])
            inside = model.is_relative_to(folder.parent.resolve())
            name = str(model.relative_to(folder.parent.resolve())) if inside else record["source"]
            role = "outdated" if artefacts.is_outdated(folder, model) else role_of.get(model)
            about = {"model": role, "folder": name, "weights": known.get(model)}
            about["parameters"] = record.get("parameters")
            rows += [about | figures | {"file": Path(figures["file"]).name} for figures in record["files"]]
            rows.sort(key=lambda row: (row["file"], row["loss"]))
    table = Table(
        "Best first for each file. Loss in nats per token; perplexity is its exponential.", without_empty(rows)
    )
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
    dtype = artefacts.stage_config(folder).get("dtype", "bf16")
    axes = summary.axes(plan, dtype)
    kept = "; ".join(f"{row['axis']} {row['kept']} of {row['of']}" for row in axes[:-1])
    caption = (
        "Kept share of each axis in each block of the source, and its share of the summed score. A score share far above the kept "
        "share means that unimportant units are dropped. Hatched blocks are dropped."
    )
    dropped = ", ".join(map(str, plan.dropped_blocks())) or "none"
    return Part(
        folder.name,
        f"{summary.counts(plan)[:1].upper()}{summary.counts(plan)[1:]}.".replace("->", "→"),
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
        artefacts.shown_settings(record.get("settings", {})),
        [Table("Steps, evenly spaced over the run.", without_empty(rows))],
        pictures(folder, {"losses.png": (caption, f"Loss curves: {changes}.")}),
    )


def comparisons(folders: list[Path]) -> Section:
    """The section on the folders that `minitron compare` wrote."""
    sources = ((folder, read_json(folder / KINDS["comparison"])) for folder in folders)
    return _section("Comparison", "Training runs side by side.", sources, _comparison)


def comparison_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a table of the runs in compare.json; the runs are its columns where there is much to compare."""
    shown = [row | {"FLOPs": short_flops(row["FLOPs"])} if row.get("FLOPs") else row for row in runs]
    return turned(without_empty(shown))


def _comparison(folder: Path, record: dict[str, Any]) -> Part:
    rows = record["runs"]
    text = "What the runs reached, last losses in nats per token; then settings, inputs and sizes in which they differ."
    caption = "Losses in nats per token and learning rate of the runs against tokens."
    alt = "Loss curves of the runs; their last losses are in the table."
    return Part(
        folder.name,
        tables=[Table(text, comparison_rows(rows))],
        pictures=pictures(folder, {"losses.png": (caption, alt)}),
    )


def _lineage(folders: dict[str, list[Path]], scores: dict[Path, Scores], plans: dict[Path, Plan]) -> Section:
    lines, commands = artefacts.lineage_rows(folders, scores, plans)
    tables = [
        Table("What was made from what. A hash identifies weights, scores or a plan.", lines),
        Table("Commands.", commands, True),
    ]
    parts = [Part("", tables=tables)] if lines else []
    return Section("Lineage", "Ancestors of all artefacts, back to the converted model.", parts)
