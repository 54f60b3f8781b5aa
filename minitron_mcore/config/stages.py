"""One dataclass for the config of each stage, and the order of the stages. No torch import."""

import os
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING

from minitron_mcore.config.benchmark import BenchmarkConfig
from minitron_mcore.config.export import ExportFormat, GGUFType, GptNames
from minitron_mcore.config.fields import changeable
from minitron_mcore.config.hardware import DryConfig
from minitron_mcore.config.model import ModelConfig
from minitron_mcore.config.performance import HangConfig, PerformanceConfig
from minitron_mcore.config.search import SearchConfig
from minitron_mcore.config.settings import (
    DataConfig,
    DepthConfig,
    DistillConfig,
    Dtype,
    EvaluateConfig,
    ImportanceConfig,
    LogConfig,
    ParallelConfig,
    PruneConfig,
    TrainConfig,
)
from minitron_mcore.config.synthesis import SynthesizeConfig
from minitron_mcore.errors import UserError


@dataclass
class RecipeConfig:
    """Checkpoints and parameter counts that the stages of one model share."""

    source: str = changeable(MISSING)
    """Checkpoint to prune: the converted model or, in a chain, the previous recipe's student."""
    teacher: str = changeable(MISSING)
    """Checkpoint of the teacher: the source, the corrected source or, in a chain, the first recipe's teacher."""
    scores: str = changeable(MISSING)
    """Folder of the importance stage that plan and search read."""
    student: str = changeable(MISSING)
    """Checkpoint to train: the pruned source or, in a recipe that only fine-tunes, the source."""
    parameters: int | None = None
    """Number of parameters that the plan must reach exactly; null accepts any."""
    without_embeddings: int | None = None
    """The same without the embedding table and the output head."""
    study: str | None = changeable(None)
    """Folder of the depth study that chooses the blocks for prune.blocks; null uses the scores."""


@dataclass
class Run:
    """Settings of every stage, so that all stages accept the same recipe and command line."""

    model: ModelConfig = changeable(default_factory=ModelConfig)
    parallel: ParallelConfig = changeable(default_factory=ParallelConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    hang: HangConfig = field(default_factory=HangConfig)
    data: DataConfig = field(default_factory=DataConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    correct: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    log: LogConfig = changeable(default_factory=LogConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    dry_run: bool = changeable(False)
    """Print sizes, memory of a rank, operations, days and every problem instead of running. Needs no weights."""
    dry: DryConfig = changeable(default_factory=DryConfig)
    runs: str = changeable("runs")
    """Folder of all work folders; the recipes of a chain read each other's."""
    work_dir: str = changeable(MISSING)
    """Folder of one model's stages; their default paths lie in it."""
    dtype: Dtype = Dtype.bf16
    """Precision of weights and activations."""
    seed: int = 1234
    """Seed of all random numbers except the order of samples (`data.seed`)."""


@dataclass
class StageRun(Run):
    """A stage that writes a folder. Its config.yaml holds the stage's settings and the sections in `reads`."""

    reads: ClassVar[tuple[str, ...]] = ()
    out_dir: str = changeable(MISSING)
    """Folder to write; it must not exist, or hold the same run, which is then resumed."""


@dataclass
class ConvertRun(StageRun):
    """Conversion of `model` to a sharded checkpoint."""


@dataclass
class ImportanceRun(StageRun):
    """Importance scores."""

    reads = ("data", "importance")
    source: str = changeable(MISSING)
    """Checkpoint to score."""


@dataclass
class DepthRun(StageRun):
    """Depth study."""

    reads = ("data", "depth")
    source: str = changeable(MISSING)
    """Checkpoint to study."""
    scores: str | None = changeable(None)
    """Folder of the importance stage, which depth.metric=cosine needs."""


@dataclass
class ScoredRun(StageRun):
    """A stage that chooses by importance scores."""

    source: str = changeable(MISSING)
    """Checkpoint to prune."""
    scores: str = changeable(MISSING)
    """Folder of the importance stage."""
    study: str | None = changeable(None)
    """Folder or file of a depth study that chooses the blocks to drop; null drops those of least cosine distance."""


@dataclass
class PlanRun(ScoredRun):
    """Pruning plan."""

    reads = ("prune",)
    parameters: int | None = None
    """Number of parameters that the plan must reach exactly; null accepts any."""
    without_embeddings: int | None = None
    """The same without the embedding table and the output head."""


@dataclass
class PruneRun(StageRun):
    """Pruning of a sharded checkpoint."""

    source: str = changeable(MISSING)
    """Checkpoint to prune."""
    plan: str = changeable(MISSING)
    """Folder or file of the plan."""


@dataclass
class CutRun(StageRun):
    """Pruning of a Hugging Face folder, `model.hf`."""

    plan: str = changeable(MISSING)
    """Folder or file of the plan."""


@dataclass
class CorrectRun(StageRun):
    """Teacher correction."""

    reads = ("data", "correct", "performance", "log")
    source: str = changeable(MISSING)
    """Checkpoint to train."""


class CacheKind(StrEnum):
    """Content of a teacher cache for each token (see `distill.cache`)."""

    topk = "topk"
    """The `top_k` largest log-probabilities with their token ids, and the probability of all other tokens."""
    hidden = "hidden"
    """The final hidden state in `dtype`."""
    hidden_int8 = "hidden_int8"
    """The final hidden state in 8 bits."""


@dataclass
class TeacherCacheRun(StageRun):
    """Teacher cache for the samples of a distillation, in its order."""

    reads = ("data", "performance")
    teacher: str = changeable(MISSING)
    """Checkpoint of the teacher."""
    kind: CacheKind = CacheKind.topk
    """Content of the cache."""
    top_k: int = 64
    """kind=topk: largest log-probabilities of a token."""
    tail_draws: int = 0
    """kind=topk: tokens drawn from the others with replacement instead of their sum: they make the student's gradient unbiased."""
    file_samples: int = 32
    """Samples of a file; a whole file is held in memory while it is computed."""
    steps: int = MISSING
    """Optimizer steps of the distillation."""
    global_batch: int = MISSING
    """Sequences of a step of the distillation."""
    micro_batch: int = changeable(MISSING)
    """Sequences of a forward pass."""
    sequence_length: int = MISSING
    """Tokens of a sequence."""

    @property
    def samples(self) -> int:
        """Sequences of the whole distillation."""
        return self.steps * self.global_batch

    @property
    def entries(self) -> int:
        """kind=topk: token ids that the cache holds of each token."""
        return self.top_k + self.tail_draws


def _check_folders(setting: str, folders: Any) -> None:
    """Refuse what is not null or {name: folder}: Hydra cannot add keys to a typed dictionary, so such fields are Any."""
    if folders is not None and not (isinstance(folders, dict) and folders and all(map(_is_name, folders))):
        raise UserError(f"{setting} is {folders}: name the folders, {setting}={{wide: runs/a, deep: runs/b}}.")


def _is_name(key: object) -> bool:
    """Whether a key can name a folder."""
    return isinstance(key, str) and key not in ("", ".", "..") and "/" not in key


@dataclass
class DistillRun(StageRun):
    """Distillation."""

    reads = ("data", "distill", "performance", "log")
    student: str = changeable(MISSING)
    """Checkpoint to train."""
    students: Any = changeable(None)
    """Several checkpoints instead of `student`, as {name: folder}. They share the teacher's passes; each writes out_dir/name."""
    teacher: str = changeable(MISSING)
    """Checkpoint of the teacher, or folder of its cache."""
    teachers: list[str] = changeable(default_factory=list)
    """Several checkpoints instead of `teacher`, with weights: [0.7,runs/a,0.3,runs/b] (docs/distillation.md)."""

    def __post_init__(self) -> None:
        _check_folders("students", self.students)

    def each(self) -> "list[DistillRun]":
        """The runs of `students`, each with out_dir/name; without them this run alone."""
        runs = [
            replace(self, student=student, students=None, out_dir=f"{self.out_dir}/{name}")
            for name, student in (self.students or {}).items()
        ]
        return runs or [self]


@dataclass
class ExportRun(StageRun):
    """Export of a checkpoint."""

    source: str = changeable(MISSING)
    """Checkpoint to export."""
    step: str = "newest"
    """Its step: newest, best (the lowest held-out loss, see `distill.eval_every`), or a number."""
    format: ExportFormat = ExportFormat.hf
    """Format to write."""
    names: GptNames = GptNames.te
    """format=gpt: layer spec whose parameter names the norms get."""
    vocab_multiple: int = 1
    """format=gpt: pad the vocabulary with zeros to a multiple of this number."""
    gguf_type: GGUFType = GGUFType.f16
    """format=gguf: number format of the matrices."""


@dataclass
class EvaluateRun(StageRun):
    """Evaluation on held-out text."""

    reads = ("data", "evaluate")
    source: str = changeable(MISSING)
    """Hugging Face folder, which transformers evaluates on one process, or sharded checkpoint."""
    step: str = "newest"
    """Step of a sharded checkpoint: newest, best (the lowest held-out loss, see `distill.eval_every`), or a number."""


@dataclass
class BenchmarkRun(StageRun):
    """Benchmarks of one model or several; each model has a folder below out_dir."""

    reads = ("data", "benchmark")
    source: str | None = changeable(None)
    """Hugging Face folder, which transformers runs on one process, or sharded checkpoint."""
    models: Any = changeable(None)
    """Several instead of `source`, as {name: folder}; without both, the recipe's teacher, pruned and distilled checkpoint."""
    step: str = "newest"
    """Step of sharded checkpoints: newest, best (the lowest held-out loss, see `distill.eval_every`), or a number."""

    def __post_init__(self) -> None:
        _check_folders("models", self.models)
        if self.source and self.models:
            raise UserError(f"source {self.source} and models {self.models} are both set: give one of them.")

    def each(self) -> "dict[str, BenchmarkRun]":
        """The run of each model by its name, with its `source` and out_dir/name."""
        if self.source:
            folders = {os.path.basename(os.path.abspath(self.source)): self.source}
        else:
            trained = {"pruned": f"{self.work_dir}/prune", "distilled": f"{self.work_dir}/distill"}
            folders = self.models or {"teacher": self.recipe.teacher} | trained
        return {
            name: replace(self, source=folder, models=None, out_dir=f"{self.out_dir}/{name}")
            for name, folder in folders.items()
        }


@dataclass
class SearchRun(ScoredRun):
    """Architecture search."""

    reads = ("data", "distill", "evaluate", "search", "performance", "log")
    teacher: str = changeable(MISSING)
    """Checkpoint of the teacher."""


@dataclass
class TokenizeTextRun(StageRun):
    """Tokenisation of text files into Megatron's .bin/.idx pairs."""

    reads = ("data",)
    files: list[str] = field(default_factory=list)
    """Text files, folders of them, and patterns (/data/*.jsonl.gz)."""
    column: str = "text"
    """Key of a .jsonl line, or column of a parquet file, that holds the text."""
    processes: int | None = changeable(None)
    """Processes that tokenise; null starts one for each core. The result does not depend on it."""


@dataclass
class PipelineRun(Run):
    """Several stages in order."""

    processes: int = 1
    """Processes of each sharded stage, a multiple of the parallel layout's."""
    stages: list[str] = field(default_factory=list)
    """Stages to run; empty runs export, with data.heldout also evaluate, and all stages that these depend on."""
    students: Any = None
    """Several checkpoints to distil instead of the pruned one, as in the stage distill; each is exported and evaluated."""
    teachers: list[str] = field(default_factory=list)
    """Several checkpoints with weights instead of the recipe's teacher, as in the stage distill."""
    submit: str | None = None
    """Command that queues each unfinished stage as a SLURM job ("sbatch --nodes 2 launch/slurm/distill.sbatch"); null runs here."""


@dataclass
class GenerateRun(Run):
    """Greedy generation."""

    reads = ("data",)
    source: str = MISSING
    """Checkpoint that generates."""
    prompt: str = "Once upon a time"
    """Text to continue."""
    tokens: int = 64
    """Most tokens to generate; the end of a document ends the text earlier."""
    text_file: str | None = None
    """File for the prompt and its continuation; null only prints them."""


@dataclass
class SynthesizeRun(StageRun):
    """Training text from a model's answers to prompts."""

    reads = ("data", "synthesize")
    source: str = changeable(MISSING)
    """Checkpoint that answers."""
    prompts: list[str] = changeable(default_factory=list)
    """.jsonl files of prompts: lines with "prompt", or with "messages" up to the answer. Answers in them are ignored."""


@dataclass
class ReportRun(Run):
    """Report on one work folder."""

    reads = ()
    html: str = MISSING
    """HTML page to write; an existing one is replaced."""
    figures: list[str] = field(default_factory=list)
    """Files of benchmarks/*.py --json to show, beside those in work_dir/figures."""


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
"""The stages that write a folder, in the order of the pipeline."""
