"""What a run is told: one dataclass a config group. No torch import, so `--help` answers at once."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_mcore.errors import UserError


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class ParallelConfig:
    """How the model is laid over processes; data parallelism takes what is left of the world."""

    tensor: int = 1
    """Ranks that share each matrix (TP)."""
    pipeline: int = 1
    """Stages that share the layers (PP)."""
    virtual: int = 1
    """Chunks of layers that a pipeline rank holds, every PP-th stretch of the model: the interleaved schedule where above 1."""
    context: int = 1
    """Ranks that share each sequence (CP)."""
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
    line_mb: int = 16
    """MiB of text that a line of a .jsonl or .jsonl.gz file may have; reading it takes some tens of times as much memory."""
    file_mb: int = 1024
    """MiB of a text file that is one document (all but .jsonl); the same."""


class Aggregation(StrEnum):
    mean = "mean"
    l2 = "l2"
    variance = "variance"


class FfnSite(StrEnum):
    after_gate = "after_gate"
    before_gate = "before_gate"


@dataclass
class Statistic:
    """What a channel's score is made of: batch L2 over sequence mean by default (arXiv 2407.14679, section 2.2)."""

    sequence: Aggregation = Aggregation.mean
    """Over a sample's tokens: mean of absolute values, L2 norm, or variance."""
    batch: Aggregation = Aggregation.l2
    """Over the samples' results."""
    ffn_site: FfnSite = FfnSite.after_gate
    """Where ffn channels are seen: at the input of the down projection, or before the activation (of SwiGLU the gate's rows), as
    the paper prints it."""
    weighted: bool = False
    """Times the norm of the weights that read the channel or head (as Wanda, arXiv 2306.11695; for ffn as Puzzle)."""


@dataclass
class ImportanceConfig(Statistic):
    """Calibration."""

    samples: int = 1024
    sequence_length: int = 8192
    micro_batch: int = 1
    whole_documents: bool = False
    """One document a sample, padded at its end, instead of unbroken runs of tokens."""


class DepthMetric(StrEnum):
    """What a set of blocks is missed by; but for accuracy, less is better."""

    loss = "loss"
    kl = "kl"
    mse = "mse"
    accuracy = "accuracy"
    cosine = "cosine"


class DepthKind(StrEnum):
    """How the blocks to drop are chosen."""

    contiguous = "contiguous"
    """The run of neighbours that is missed least (arXiv 2408.11796)."""
    scattered = "scattered"
    """Those that are missed least one by one."""
    iterative = "iterative"
    """The one that is missed least, then of the rest the one that is missed least, and so on (arXiv 2511.16664)."""
    best = "best"
    """Contiguous or scattered, for each number of blocks whichever is missed less as a whole."""


@dataclass
class DepthConfig:
    """A study of which blocks a model can spare, by forward passes without them over held-out text."""

    sizes: list[int | float] = field(default_factory=lambda: [1, 2, 4, 8, 0.5])
    """Numbers of blocks to drop: whole numbers, or shares of the model's (0.5). Runs of each are measured at every position."""
    metric: DepthMetric = DepthMetric.loss
    """What decides; loss, KL divergence and MSE of the logits are measured anyway, accuracy where there are `choices`."""
    kind: DepthKind = DepthKind.contiguous
    windows: int = 64
    """Of each held-out file, spread evenly over it."""
    sequence_length: int = 2048
    micro_batch: int = 1
    choices: str | None = None
    """Multiple-choice questions, .jsonl or .jsonl.gz, of WinoGrande's form or with "query", "choices" and "label"."""
    limit: int | None = None
    """Only the first so many questions; null takes all."""


@dataclass
class PruneConfig:
    """Targets: a whole number is a size (1 is one), a number with a point a share of the source (1.0 is all), null keeps all."""

    hidden: int | float | None = None
    """Channels of the residual stream."""
    ffn: int | float | None = None
    """Channels between the two MLP projections, in each block."""
    heads: int | float | None = None
    """Query heads, an equal number in each kept key/value group."""
    groups: int | float | None = None
    """Key/value groups of each block, whole: a group goes with its query heads. The papers keep all."""
    merge_heads: bool = False
    """Add to a kept query head what sets it apart from a dropped one of its group (arXiv 2407.14679, section 2.3)."""
    experts: int | float | None = None
    """Experts of each block, in a mixture of experts; `ffn` are then the channels of one."""
    blocks: int | float | None = None
    """Blocks; those whose output is nearest their input (by cosine) go first."""
    drop_blocks: list[int] = field(default_factory=list)
    """Blocks to drop by number, counted from 0, instead of by score (the papers count from 1)."""
    attention: int | float | None = None
    """Attention layers of the kept blocks; those whose output is nearest their input go first, and the block stays without."""
    mlp: int | float | None = None
    """MLP layers (in a mixture of experts: the experts) of the kept blocks, chosen alike."""
    drop_attention: list[int] = field(default_factory=list)
    """Source blocks, counted from 0, that lose their attention layer, instead of by score."""
    drop_mlp: list[int] = field(default_factory=list)
    """Source blocks, counted from 0, that lose their MLP layer, instead of by score."""
    exportable: bool = True
    """Refuse a target that the model's Hugging Face class cannot hold; false is for a model that stays in sharded checkpoints."""


class BadLoss(StrEnum):
    """What a run does about a step whose loss or gradient is NaN or infinite; its micro-batches are kept in either case."""

    stop = "stop"
    skip = "skip"
    """The step's data counts as seen, weights and optimizer stay as they are."""


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
    on_bad_loss: BadLoss = BadLoss.stop
    bad_loss_limit: int = 10
    """With on_bad_loss=skip, at most so many steps in a row."""
    hang_minutes: float = 10.0
    """When a rank has stood still for so long, the run ends and names those that kept the others waiting."""
    save_minutes: float = 60.0
    """The same while a checkpoint is written, if that is longer."""
    async_save: bool | None = None
    """Copy what a checkpoint holds to host memory, and write it while training goes on; null does so on CUDA."""


class HiddenStateMetric(StrEnum):
    """How a token's intermediate states differ."""

    cosine = "cosine"
    mse = "mse"
    """Mean over the teacher's channels of the squared difference."""


@dataclass
class HiddenStateLossConfig:
    """Training what chosen blocks of the student put out on what blocks of the teacher do (see `distill.hidden_state_loss`)."""

    weight: float = 0.0
    """Of the sum over the pairs; 0 compares nothing."""
    loss: HiddenStateMetric = HiddenStateMetric.cosine
    pairs: list[list[int]] | None = None
    """[[student's block, teacher's block], ...], counted from 0; null pairs the last block but two of both (arXiv 2407.14679,
    table 17), [] none."""
    embeddings: bool = True
    """Compare what the embedding tables put out, too."""
    dynamic: bool = False
    """Times the step before's divergence over its loss of states, both over the global batch: the paper's alpha (section 3)."""


class Divergence(StrEnum):
    """How far the student's logits are from the teacher's (see `distill.divergences`)."""

    forward_kl = "forward_kl"
    """KL(teacher || student), the papers' choice."""
    reverse_kl = "reverse_kl"
    """KL(student || teacher)."""
    jsd = "jsd"
    mse = "mse"
    cosine = "cosine"


@dataclass
class DistillConfig(TrainConfig):
    """Training the student on the teacher's distribution."""

    kd_weight: float = 1.0
    """Weight of the divergence."""
    lm_weight: float = 0.0
    """Weight of the next-token cross-entropy, which is logged either way."""
    divergence: Divergence = Divergence.forward_kl
    jsd_beta: float = 0.5
    """divergence=jsd: the teacher's part of the mixture, above 0 (towards forward KL) and below 1 (towards reverse KL)."""
    top_k: int | None = None
    """divergence=forward_kl: only the teacher's k largest logits one by one, all others as one entry; null takes every one."""
    temperature: float = 1.0
    """Of both softmaxes; the divergence is multiplied by its square, which keeps the gradient's size (Hinton et al. 2015)."""
    teacher_ahead: int = 1
    """Micro-batches the teacher runs ahead of the student; with pipeline parallelism always a whole step's."""
    teacher_parallel: Any = None
    """The teacher's own layout of the same ranks, a `ParallelConfig`, as {tensor: 2, pipeline: 2}; null is the student's. Its
    replicas share what the student's ask for at one time, `teacher_ahead` each: best a multiple of their number."""
    teacher_ranks: int = 0
    """The last so many processes hold the teacher and nothing else, in `teacher_parallel`, and run ahead while the student learns;
    the others hold the student. 0: all hold both."""
    hidden_state_loss: HiddenStateLossConfig = field(default_factory=HiddenStateLossConfig)

    def __post_init__(self):
        # As Any, for omegaconf cannot override a field of a dataclass or null.
        if isinstance(given := self.teacher_parallel, dict):
            try:
                typed = OmegaConf.merge(OmegaConf.structured(ParallelConfig), given)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"distill.teacher_parallel is {given}, which is no layout: {reason}.") from error
            self.teacher_parallel = OmegaConf.to_object(typed)

    @property
    def needs_teacher(self) -> bool:
        """The run has a teacher."""
        return bool(self.kd_weight or self.hidden_state_loss.weight)


@dataclass
class EvaluateConfig:
    sequence_length: int = 1024
    micro_batch: int = 4
    max_windows: int | None = None
    """Windows of each file; null takes all."""


class Storage(StrEnum):
    """How a number of a served model is kept."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    int4 = "int4"


@dataclass
class BudgetConfig:
    """What a candidate of a search may cost: one of the first three, within a share of it."""

    parameters: float | None = None
    """In all, tied ones once."""
    bytes: float | None = None
    """Of the weights, and of the keys and values that `batch` sequences of `context` tokens leave."""
    flops: float | None = None
    """Floating-point operations of a prefill: `batch` prompts of `context` tokens."""
    tolerance: float = 0.05
    """Share by which a candidate may miss it, above or below."""
    context: int = 8192
    batch: int = 1
    weights: Storage = Storage.bf16
    kv_cache: Storage = Storage.bf16


@dataclass
class SpeedConfig:
    """How a candidate's speed is measured: random weights, one process."""

    batch: int = 1
    prompt: int = 512
    """Tokens of a prompt: the prefill."""
    generated: int = 32
    """Tokens after it, one at a time: the decoding."""
    repetitions: int = 5
    """Of either; the median counts."""
    threads: int | None = None
    """Of a CPU; null takes torch's own number."""


@dataclass
class SearchConfig:
    """Architectures to try. An axis is a list of sizes (whole numbers) or of shares of the source (0.5, 1.0), or
    {start, stop, step} of either with `stop` among them; null keeps the source's size."""

    blocks: Any = None
    hidden: Any = None
    ffn: Any = None
    expansion: Any = None
    """ffn as a multiple of hidden, instead of `ffn`; rounded to a multiple of `multiple`."""
    heads: Any = None
    """Null keeps those of the kept groups."""
    groups: Any = None
    experts: Any = None
    multiple: int = 1
    """hidden and ffn must be multiples of this."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    trials: int = 100
    """Candidates that optuna tries, where the axes have more than 10,000 combinations."""
    best: int = 4
    """Candidates that are trained: those with the least zero-shot loss."""
    steps: int = 400
    """Of training each of them with the other settings of `distill` (arXiv 2407.14679, section 2.3)."""
    eval_every: int = 100
    """Steps between two looks at the held-out loss."""
    students_per_pass: int = 1
    """Candidates that one pass of the teacher trains at a time; a rank holds all their weights and optimizers."""
    latency: bool = False
    """Measure every candidate's speed."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    shards: int = 1
    """Runs that share out the candidates, as a sweep over `shard`."""
    shard: int = 0
    stop_after: int | None = None
    """Stop when so many more results are written; the same command without it goes on."""


class Device(StrEnum):
    cuda = "cuda"
    cpu = "cpu"
