"""search.json, the table and the plots of a search."""

from pathlib import Path

from minitron_mcore.config.search import SearchConfig
from minitron_mcore.models import flops
from minitron_mcore.reading import FORMAT_VERSION
from minitron_mcore.reporting import search_plots, tables
from minitron_mcore.search.space import Candidate, Space
from minitron_mcore.search.store import SPEEDS, CandidateStore

FILE = "search.json"


def collect(store: CandidateStore, space: Space, candidates: list[Candidate]) -> dict:
    """The content of search.json (collective). Candidates are ordered by loss after training, then by zero-shot loss."""
    search, rows = space.search, []
    for candidate in candidates:
        measured, trained = (store.read(candidate, f"{name}.json") for name in ("measured", "trained"))
        losses = dict(zip(trained.get("steps", []), trained.get("losses", []), strict=True))
        row = {
            "name": candidate.name,
            "sizes": {a: getattr(candidate.target, a) for a in ("blocks", "hidden", "ffn", "heads", "groups")},
            **flops.figures(candidate.target, search.budget),
            "zero_shot_loss": measured["zero_shot_loss"],
            "steps": list(losses),
            "losses": list(losses.values()),
            "loss": losses.get(search.steps),
            "overrides": store.overrides(candidate),
        }
        rows.append(row | {key: measured.get(key) for key in (*SPEEDS, "measured_on")})
    rows.sort(key=lambda r: (r["loss"] is None, r["loss"] or r["zero_shot_loss"], r["name"]))
    return {
        "format_version": FORMAT_VERSION,
        "model": store.source.fingerprint,
        "scores": store.scores.digest(),
        "combinations": space.combinations,
        "left_out": dict(space.left_out),
        "candidates": rows,
    }


def write(out_dir: Path, results: dict, search: SearchConfig, total: int, complete: bool) -> None:
    """Write search.json and the plots, and print the table (rank 0).

    Args:
        results: of `collect`.
        total: number of candidates.
        complete: whether all were measured and the best trained.
    """
    tables.write_json(out_dir / FILE, results)
    rows = results["candidates"]
    if not rows:
        return
    by_zero_shot = sorted(row["zero_shot_loss"] for row in rows)
    speeds = {key.replace("_tokens_per_second", " tokens/s"): key for key in SPEEDS} if search.latency else {}
    shown = [
        {
            "candidate": row["name"],
            "parameters": row["parameters"],
            "without_embeddings": row["without_embeddings"],
            "zero-shot rank": by_zero_shot.index(row["zero_shot_loss"]) + 1,
            "zero-shot loss": row["zero_shot_loss"],
            f"loss after {search.steps} steps": row["loss"],
        }
        | {label: row[key] for label, key in speeds.items()}
        for row in rows
    ]
    reasons = "".join(f"; {reason}: {n}" for reason, n in results["left_out"].items())
    notes = [f"{len(rows)} of {total} candidates, from {results['combinations']:,} combinations{reasons}"]
    if machines := sorted({row["measured_on"] for row in rows if row["measured_on"]}):
        speed = search.speed
        settings = (
            f"batch {speed.batch}, prompt {speed.prompt}, {speed.generated} tokens, median of {speed.repetitions}"
        )
        notes.append(f"speed on {'; '.join(machines)}: random weights, {settings}")
    if not complete:
        notes.append("not finished: run the same command again (of every shard) to resume")
    notes.append(f"plan of the first: {rows[0]['overrides']}")
    plots = search_plots.plot_search(results, out_dir)
    tables.table("search", shown, [*notes, f"figures: {out_dir}/{FILE}", f"plots: {', '.join(plots)}"])
