"""Result files and plans of a search's candidates."""

from pathlib import Path

import torch.distributed as dist

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.config.stages import SearchRun
from minitron_mcore.depth import study
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores
from minitron_mcore.parallel import process_groups
from minitron_mcore.pruning.plan import Plan, make_plan
from minitron_mcore.reading import damage_as_user_error, read_json
from minitron_mcore.reporting import tables
from minitron_mcore.search.space import Candidate

SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")


def _read_result(path: Path) -> dict:
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

    def read(self, candidate: Candidate, name: str) -> dict:
        """A result file, the same on all ranks (collective); {} if it does not exist.

        Raises:
            UserError: the file is damaged, or was made with other scores or another text.
        """
        box, path = [None], self.folder(candidate) / name
        with process_groups.raise_on_all_ranks():
            if process_groups.rank() == 0 and path.is_file():
                box = [_read_result(path)]
        dist.broadcast_object_list(box, src=0)
        inputs = self._inputs(candidate)
        if box[0] and {key: box[0].get(key) for key in inputs} != inputs:
            raise UserError(
                f"{path} was measured with other scores or another held-out text: give another out_dir, or remove that file."
            )
        return box[0] or {}

    def write(self, candidate: Candidate, name: str, result: dict) -> dict:
        """Write a result file; returns rank 0's result, since ranks may differ in the last bit (collective)."""
        if process_groups.rank() == 0:
            self.folder(candidate).mkdir(exist_ok=True)
            tables.write_json(self.folder(candidate) / name, self._inputs(candidate) | result)
        process_groups.barrier()
        return self.read(candidate, name)

    def _inputs(self, candidate: Candidate) -> dict:
        """What a result depends on besides the run's config."""
        if candidate not in self._digests:
            self._digests[candidate] = self.plan(candidate).digest()
        return {"plan": self._digests[candidate], "text": self.text_hash}
