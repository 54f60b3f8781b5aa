"""Results of `minitron benchmark`, figures of benchmarks/*.py --json and speeds of a search, as rows of tables."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reporting.artefacts import KINDS, Model, damage_as_user_error, read_json, read_lines
from minitron_mcore.reporting.tables import percent, without_empty

THROUGHPUT = ("throughput", "serving")
"""Benchmarks whose figures are speeds of models; the others are findings."""
_FIGURE = ("benchmark", "case", "implementation", "metric", "unit")
_ESTIMATE = "roofline"


class Benchmarks(NamedTuple):
    """The content of a folder of `minitron benchmark`."""

    models: dict[str, dict[str, Any]]
    """Role, or a name where the model has none -> benchmark -> {score, stderr, questions, ...}, scores as shares."""
    published: dict[str, dict[str, float]]
    """Name -> benchmark -> per cent."""
    student: str
    """Role of the model that is compared with the teacher."""

    def kept(self) -> tuple[float, float, int] | None:
        """Mean scores of the teacher and of the student over the benchmarks that both have, and their number; None without both."""
        student = self.models.get(self.student, {})
        common = [name for name in self.models.get("teacher", {}) if name in student]
        if not common:
            return None
        teacher = statistics.mean(self.models["teacher"][name]["score"] for name in common)
        return teacher, statistics.mean(student[name]["score"] for name in common), len(common)


def read_benchmarks(folder: Path, models: Sequence[Model], locate: Callable[[str], Path]) -> Benchmarks:
    """The results in a folder, by role of the model.

    Args:
        models: see `artefacts.models`; a result belongs to the one whose folder was measured. The last is the student.
        locate: see `artefacts.locator`.

    Raises:
        UserError: a damaged file.
    """
    path, role_of = folder / KINDS["benchmark"], {path: model.role for model in models for path in model.paths}
    roles = {model.role for model in models if model.paths}
    content = read_json(path)
    with damage_as_user_error(path):
        measured = {}
        for name, results in content.get("models", {}).items():
            own = folder / name / KINDS["benchmark"]
            source = read_json(own)["source"]["path"] if own.is_file() else ""
            role = role_of.get(locate(source), f"{name} ({Path(source).name})" if name in roles and source else name)
            measured[name if role in measured else role] = {
                benchmark: {**result, "score": float(result["score"])} for benchmark, result in results.items()
            }
        published = {
            name: {benchmark: float(value) for benchmark, value in row.items()}
            for name, row in (content.get("published") or {}).items()
        }
        named = next((name for name in ("distilled", "pruned") if name in measured), "")
        return Benchmarks(measured, published, models[-1].role if models else named)


def benchmark_rows(results: Benchmarks) -> list[dict[str, Any]]:
    """A row for each benchmark, and one of the means over those that all measured models have.

    Scores in per cent ± standard error; "kept" is the student's score over the teacher's.
    """
    names = list(dict.fromkeys(name for scores in results.models.values() for name in scores))
    rows = []
    for name in names:
        first = next(scores[name] for scores in results.models.values() if name in scores)
        row = {"benchmark": name} | {key: first.get(key) for key in ("shots", "questions")}
        row |= {model: _score(scores.get(name)) for model, scores in results.models.items()}
        row["kept"] = _kept(results, [name])
        rows.append(row | {f"published: {model}": of.get(name) for model, of in results.published.items()})
    common = [name for name in names if all(name in scores for scores in results.models.values())]
    if len(common) > 1:
        row = {"benchmark": f"mean of {len(common)}"}
        row |= {
            model: f"{100 * statistics.mean(scores[name]['score'] for name in common):.1f}"
            for model, scores in results.models.items()
        }
        row["kept"] = _kept(results, common)
        complete = {model: of for model, of in results.published.items() if set(common) <= set(of)}
        rows.append(
            row | {f"published: {m}": statistics.mean(of[name] for name in common) for m, of in complete.items()}
        )
    return [
        {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in row.items()}
        for row in without_empty(rows)
    ]


def _score(result: Mapping[str, Any] | None) -> str | None:
    if result is None:
        return None
    error = result.get("stderr")
    return f"{100 * result['score']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _kept(results: Benchmarks, names: Sequence[str]) -> str | None:
    models = {model: {n: scores[n] for n in names if n in scores} for model, scores in results.models.items()}
    kept = results._replace(models=models).kept()
    return percent(kept[1] / kept[0]) if kept and kept[0] else None


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of figures.

    Raises:
        UserError: a line is no figure.
    """
    lines = read_lines(path)
    with damage_as_user_error(path):
        return [{key: str(line[key]) for key in _FIGURE} | {"value": float(line["value"])} for line in lines]


def figure_rows(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case and implementation, with a column for each metric and its unit."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for figure in figures:
        case, implementation = figure["case"], figure["implementation"]
        row = rows.setdefault((case, implementation), {"case": case, "implementation": implementation})
        row[f"{figure['metric']} ({figure['unit']})" if figure["unit"] else figure["metric"]] = figure["value"]
    return without_empty(list(rows.values()))


def speedups(figures: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Implementation -> measured ratios of its speed to the teacher's, without estimates."""
    ratios: dict[str, list[float]] = {}
    for figure in figures:
        if (
            figure["benchmark"] in THROUGHPUT
            and figure["metric"] == "ratio"
            and _ESTIMATE not in figure["implementation"]
        ):
            ratios.setdefault(figure["implementation"], []).append(figure["value"])
    return ratios


def search_speeds(study: Mapping[str, Any], models: Sequence[Model]) -> list[dict[str, Any]]:
    """Speeds that a search measured of the teacher's and the student's sizes; [] unless it measured both.

    The last row has the student's over the teacher's.
    """
    ends = [models[0], models[-1]] if len(models) > 1 else []
    found = [_candidate(study, model.arch) for model in ends if model.arch]
    if len(found) < 2 or not all(found):
        return []
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second")
    rows = [{"model": model.role} | {key: row[key] for key in keys} for model, row in zip(ends, found, strict=True)]
    rows = [row | {"measured on": each.get("measured_on")} for row, each in zip(rows, found, strict=True)]
    return [*rows, {"model": "ratio"} | {key: found[1][key] / found[0][key] for key in keys}]


def _candidate(study: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The measured candidate of these sizes; {} if there is none."""
    for candidate in study.get("candidates", []):
        sizes = candidate.get("sizes", {})
        same = sizes and all(getattr(arch, name, None) == size for name, size in sizes.items())
        if same and candidate.get("decode_tokens_per_second") and candidate.get("prefill_tokens_per_second"):
            return dict(candidate)
    return {}
