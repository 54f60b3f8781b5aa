"""What a run is told: one dataclass a config group and one a launch file. No torch import, so `--help` answers at once."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


class ExportFormat(StrEnum):
    hf = "hf"
    gpt = "gpt"


class GptNames(StrEnum):
    te = "te"
    local = "local"
    plain = "plain"


@dataclass
class ParallelConfig:
    """How the model is laid over processes; data parallelism takes what is left of the world."""

    tensor: int = 1
    """Ranks that share each matrix (TP)."""
    pipeline: int = 1
    """Stages that share the layers (PP)."""
    context: int = 1
    """Ranks that share each sequence in attention (CP)."""
    expert: int = 1
    """Ranks that share the experts of a block (EP), taken from the tensor- and data-parallel ranks."""
    sequence: bool = False
    """Shard activations between the matrices over the TP ranks (SP)."""


@dataclass
class ModelConfig:
    """The model that a run starts from."""

    name: str = MISSING
    """Names its folder below runs/."""
    hf: str = MISSING
    """Hugging Face folder: config.json, *.safetensors, tokenizer files; or a GGUF file."""
    weights: str | None = None
    """Where the weights are, if not there: a checkpoint of Megatron-Core's GPTModel, a GGUF file, another folder."""
    architecture: dict[str, Any] | None = None
    """Fields of `models.architecture.Architecture` that the folder must have; they also stand for it where there are no weights."""


@dataclass
class DataConfig:
    """Text. A file is .jsonl or .jsonl.gz (documents under "text"), plain text, or the prefix of a Megatron .bin/.idx pair;
    "0.3 path" gives a file its weight in the blend."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    """Hugging Face tokenizer folder or sentencepiece .model; null takes the one that came with the checkpoint."""
    cache: str = "runs/cache"
    """Tokenised files and sample indices, reused between runs."""
    seed: int = 1234


@dataclass
class ImportanceConfig:
    """Calibration: batch L2 over sequence mean (arXiv 2407.14679, section 2.2)."""

    samples: int = 1024
    sequence_length: int = 8192
    micro_batch: int = 1
    whole_documents: bool = False
    """One document a sample, padded at its end, instead of unbroken runs of tokens."""


@dataclass
class PruneConfig:
    """Targets: a whole number is a size, a fraction below 1 a share of the source, null keeps all."""

    hidden: float | None = None
    """Channels of the residual stream."""
    ffn: float | None = None
    """Channels between the two MLP projections, in each block."""
    heads: float | None = None
    """Query heads, an equal number in each key/value group."""
    experts: float | None = None
    """Experts of each block, in a mixture of experts; `ffn` are then the channels of one."""
    blocks: float | None = None
    """Blocks; those whose output is nearest their input (by cosine) go first."""
    drop_blocks: list[int] = field(default_factory=list)
    """Blocks to drop by number, counted from 0, instead of by score (the papers count from 1)."""


@dataclass
class TrainConfig:
    """A training run; defaults are Llama-3.1-Minitron-4B's distillation (arXiv 2408.11796, table 4)."""

    steps: int = 9960
    """94 B tokens at the default batch."""
    global_batch: int = 1152
    micro_batch: int = 1
    sequence_length: int = 8192
    peak_lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 40
    """Linear, then cosine down to min_lr at the last step."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    log_every: int = 1
    save_every: int = 500
    stop_after: int | None = None
    """Save and stop after this step; the same command without it goes on."""


@dataclass
class DistillConfig(TrainConfig):
    """Training the student on the teacher's distribution."""

    kd_weight: float = 1.0
    """Weight of the forward KL divergence; 0 trains without a teacher."""
    lm_weight: float = 0.0
    """Weight of the next-token cross-entropy, which is logged either way."""
    temperature: float = 1.0
    teacher_ahead: int = 1
    """Micro-batches the teacher runs ahead of the student; with pipeline parallelism always a whole step's."""


@dataclass
class EvaluateConfig:
    sequence_length: int = 1024
    micro_batch: int = 4
    max_windows: int | None = None
    """Windows of each file; null takes all."""


class Device(StrEnum):
    cuda = "cuda"
    cpu = "cpu"


@dataclass
class DryConfig:
    """What a dry run (`dry_run=true`) plans for."""

    gpus: int | None = None
    """Processes of the run, one a GPU; null takes torchrun's, or as few as the layout needs."""
    device: Device = Device.cuda
    memory: float = 75.0
    """GiB that a rank's tensors may take: an H100's 80 GB less CUDA's context and NCCL's buffers."""
    peak_tflops: float = 989.0
    """Of one GPU, dense: an H100's in bf16."""
    mfu: float = 0.4
    """Share of the peak that the run is expected to reach with the operations that the model needs."""
    json: str | None = None
    """File to write the figures to."""


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


@dataclass
class Run:
    """What every launch file accepts, so that one recipe and one command line serve them all."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    correct: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
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
class PlanRun(StageRun):
    reads = ("prune",)
    source: str = MISSING
    scores: str = MISSING
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
    reads = ("data", "correct")
    source: str = MISSING


@dataclass
class DistillRun(StageRun):
    reads = ("data", "distill")
    student: str = MISSING
    teacher: str = MISSING


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
    "plan": PlanRun,
    "prune": PruneRun,
    "correct": CorrectRun,
    "cut": CutRun,
    "distill": DistillRun,
    "export": ExportRun,
    "evaluate": EvaluateRun,
}
"""In the order in which a pipeline runs them."""
