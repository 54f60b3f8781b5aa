"""Results of a search: plan and measurements of each candidate in files of its own, all in search.json, a table and plots."""

from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import claim, disk
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.search import SearchConfig
from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.config.stages import SearchRun
from minitron_mcore.depth import study
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import flops
from minitron_mcore.parallel import process_groups
from minitron_mcore.pruning.plan import Plan, make_plan
from minitron_mcore.reading import FORMAT_VERSION, damage_as_user_error, read_json
from minitron_mcore.reporting import plots, tables
from minitron_mcore.search.space import Candidate, Space

FILE = "search.json"
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")


def _read_result(path: Path) -> dict[str, Any]:
    """The content of a result file, checked to have numbers as its figures."""
    remedy = "remove the file, and run the search again"
    result = read_json(path, remedy)
    with damage_as_user_error(path, remedy):
        losses = dict(zip(result.get("steps", []), result.get("losses", []), strict=True))
        figures = [result["zero_shot_loss"]] if path.name == "measured.json" else []
        figures += [result[key] for key in SPEEDS] if any(key in result for key in SPEEDS) else []
        if not all(
            type(figure) in (int, float) and abs(figure) < 1e18 for figure in (*losses, *losses.values(), *figures)
        ):
            raise TypeError("a figure that is no number below 1e18")
    return result


class CandidateStore:
    """Results in out_dir/candidates/NAME/, valid for one set of scores and one held-out text. Rank 0 reads and writes the files.

    Args:
        text_hash: of the held-out text.
    """

    def __init__(self, config: SearchRun, source: Checkpoint, scores: Scores, text_hash: str):
        self.root, self.study = Path(config.out_dir) / "candidates", config.study
        self.source, self.scores, self.text_hash = source, scores, text_hash
        self._digests: dict[Candidate, str] = {}

    def folder(self, candidate: Candidate) -> Path:
        """The candidate's folder."""
        return self.root / candidate.name

    def plan(self, candidate: Candidate) -> Plan:
        """The candidate's plan."""
        prune, record = self.apply_study(candidate.prune)
        plan = make_plan(self.source.arch, self.source.fingerprint, self.scores, prune)
        plan.statistic.update(record)
        return plan

    def apply_study(self, prune: PruneConfig) -> tuple[PruneConfig, dict[str, str]]:
        """`study.apply_study`; no change if all blocks are kept."""
        path = None if prune.blocks is None else self.study
        return study.apply_study(path, self.source.arch.blocks, self.source.fingerprint, prune)

    def overrides(self, candidate: Candidate) -> str:
        """Command-line overrides with which launch/plan.py makes the candidate's plan."""
        path = [f"study={self.study}"] if self.study and candidate.prune.blocks is not None else []
        return " ".join([candidate.overrides, *path])

    def read(self, candidate: Candidate, name: str) -> dict[str, Any]:
        """A result file, the same on all ranks (collective); {} if it does not exist.

        Raises:
            UserError: the file is damaged, or was made with other scores or another text.
        """
        path, inputs = self.folder(candidate) / name, self._inputs(candidate)
        with process_groups.raise_on_all_ranks():
            result = _read_result(path) if process_groups.rank() == 0 and path.is_file() else {}
        result = process_groups.from_rank_0(result)
        if result and {key: result.get(key) for key in inputs} != inputs:
            raise UserError(
                f"{path} was measured with other scores or another held-out text: give another out_dir, or remove that file."
            )
        return result

    def write(self, candidate: Candidate, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write a result file; returns rank 0's result, since ranks may differ in the last bit (collective)."""
        folder = self.folder(candidate)
        with process_groups.raise_on_all_ranks(), claim.writing(folder):
            if process_groups.rank() == 0:
                folder.mkdir(exist_ok=True)
                disk.write_json(folder / name, self._inputs(candidate) | result)
        return self.read(candidate, name)

    def _inputs(self, candidate: Candidate) -> dict[str, Any]:
        """What a result depends on besides the run's config."""
        if candidate not in self._digests:
            self._digests[candidate] = self.plan(candidate).digest()
        return {"plan": self._digests[candidate], "text": self.text_hash}


def collect(store: CandidateStore, space: Space, candidates: list[Candidate]) -> dict[str, Any]:
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


def write(out_dir: Path, results: dict[str, Any], search: SearchConfig, total: int, complete: bool) -> None:
    """Write search.json and the plots, and print the table (rank 0).

    Args:
        results: of `collect`.
        total: number of candidates.
        complete: whether all were measured and the best trained.
    """
    disk.write_json(out_dir / FILE, results)
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
    pictures = plots.plot_search(results, out_dir)
    tables.table("search", shown, [*notes, f"figures: {out_dir}/{FILE}", f"plots: {', '.join(pictures)}"])
