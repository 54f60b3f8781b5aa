"""What each launch file is told: one dataclass a stage, and their order. No torch import."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING

from minitron_mcore.config.hardware import DryConfig
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import (
    DataConfig,
    DepthConfig,
    DistillConfig,
    Dtype,
    EvaluateConfig,
    ImportanceConfig,
    ModelConfig,
    ParallelConfig,
    PruneConfig,
    SearchConfig,
    TrainConfig,
)
from minitron_mcore.errors import UserError


@dataclass
class RecipeConfig:
    """What the stages of one model share: where they start, and what must come out."""

    source: str = MISSING
    """The checkpoint that is pruned: the converted model, or in a chain the student of the recipe before."""
    teacher: str = MISSING
    """The checkpoint that teaches: the source, its corrected self, or in a chain the first recipe's teacher."""
    parameters: int | None = None
    """The plan must make exactly so many; null asks nothing."""
    without_embeddings: int | None = None
    """The same, less the embedding table and the output head."""
    study: str | None = None
    """Folder of the depth study that chooses the blocks of prune.blocks; null leaves it to the scores."""


@dataclass
class Run:
    """What every launch file accepts, so that one recipe and one command line serve them all."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    correct: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    dry_run: bool = False
    """Plan instead of running: shapes, bytes of a rank, operations, days, and everything that doesn't fit. Needs no weights."""
    dry: DryConfig = field(default_factory=DryConfig)
    runs: str = "runs"
    """Folder that the recipes of a chain share."""
    work_dir: str = MISSING
    """Folder that the stages' default paths share, below `runs`."""
    dtype: Dtype = Dtype.bf16
    seed: int = 1234


@dataclass
class StageRun(Run):
    """One stage; it writes `out_dir`, whose config.yaml keeps of the sections above those that it `reads`."""

    reads: ClassVar[tuple[str, ...]] = ()
    out_dir: str = MISSING
    """What this run writes; it must be new, or hold the same run to go on with."""


@dataclass
class ConvertRun(StageRun):
    pass


@dataclass
class ImportanceRun(StageRun):
    reads = ("data", "importance")
    source: str = MISSING


@dataclass
class DepthRun(StageRun):
    reads = ("data", "depth")
    source: str = MISSING
    scores: str | None = None
    """Of an importance run, which has the cosines: needed for depth.metric=cosine."""


@dataclass
class ScoredRun(StageRun):
    """What chooses by scores."""

    source: str = MISSING
    scores: str = MISSING
    study: str | None = None
    """A depth study (folder or file) that says which blocks go; null: those of the least cosine distance."""


@dataclass
class PlanRun(ScoredRun):
    reads = ("prune",)
    parameters: int | None = None
    without_embeddings: int | None = None


@dataclass
class PruneRun(StageRun):
    source: str = MISSING
    plan: str = MISSING


@dataclass
class CutRun(StageRun):
    plan: str = MISSING


@dataclass
class CorrectRun(StageRun):
    reads = ("data", "correct", "performance")
    source: str = MISSING


class CacheKind(StrEnum):
    """What a teacher's cache keeps of each token (see `distill.cache`)."""

    topk = "topk"
    """The `top_k` largest log-probabilities and their ids, and the mass of all others."""
    hidden = "hidden"
    """The final hidden state, in the run's dtype."""
    hidden_int8 = "hidden_int8"
    """The same in 8 bits."""


@dataclass
class TeacherCacheRun(StageRun):
    """The samples are those of a distillation with these steps, batch and length, in its order; conf takes them from `distill`."""

    reads = ("data", "performance")
    teacher: str = MISSING
    kind: CacheKind = CacheKind.topk
    top_k: int = 64
    """kind=topk: entries of each token."""
    file_samples: int = 32
    """Samples of a file, which is held in memory while it is made."""
    steps: int = MISSING
    global_batch: int = MISSING
    micro_batch: int = MISSING
    sequence_length: int = MISSING

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch


def _is_name(key: object) -> bool:
    """One part of a path."""
    return isinstance(key, str) and key not in ("", ".", "..") and "/" not in key


@dataclass
class DistillRun(StageRun):
    reads = ("data", "distill", "performance")
    student: str = MISSING
    students: Any = None
    """{name: folder} of several, instead of `student`: one pass of the teacher trains them all, each into its own folder of
    out_dir."""
    teacher: str = MISSING
    """A checkpoint, or the cache of one."""

    def __post_init__(self) -> None:
        # As Any, for Hydra cannot put keys of its own into a typed dictionary.
        given = self.students
        if given is not None and not (isinstance(given, dict) and given and all(map(_is_name, given))):
            raise UserError(
                f"students is {given}: name the folders, students={{wide: runs/a/prune, deep: runs/b/prune}}."
            )


class ExportFormat(StrEnum):
    hf = "hf"
    gpt = "gpt"


class GptNames(StrEnum):
    te = "te"
    local = "local"
    plain = "plain"


@dataclass
class ExportRun(StageRun):
    source: str = MISSING
    format: ExportFormat = ExportFormat.hf
    names: GptNames = GptNames.te
    """format=gpt: the layer spec whose names the norms take."""
    vocab_multiple: int = 1
    """format=gpt: the vocabulary is padded with zeros to a multiple of this."""


@dataclass
class EvaluateRun(StageRun):
    reads = ("data", "evaluate")
    source: str = MISSING
    """A Hugging Face folder (plain transformers) or a checkpoint of ours (sharded)."""


@dataclass
class SearchRun(ScoredRun):
    reads = ("data", "distill", "evaluate", "search", "performance")
    teacher: str = MISSING


@dataclass
class PipelineRun(Run):
    processes: int = 1
    """Processes of each sharded stage: a multiple of the layout's."""
    stages: list[str] = field(default_factory=list)
    """Only these; empty takes all that the last ones build on."""


@dataclass
class GenerateRun(Run):
    source: str = MISSING
    prompt: str = "Once upon a time"
    tokens: int = 64
    """At most so many; the end of a document ends the text."""


@dataclass
class ReportRun(Run):
    html: str = MISSING
    """The page; an older report there is replaced."""


STAGES = {
    "convert": ConvertRun,
    "importance": ImportanceRun,
    "depth": DepthRun,
    "plan": PlanRun,
    "prune": PruneRun,
    "correct": CorrectRun,
    "cut": CutRun,
    "teacher_cache": TeacherCacheRun,
    "distill": DistillRun,
    "export": ExportRun,
    "evaluate": EvaluateRun,
}
"""In the order in which a pipeline runs them."""
