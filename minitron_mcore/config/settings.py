"""One dataclass for each section of a stage's config. No torch import, so `--help` is fast."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_mcore.config.fields import changeable, of_phase
from minitron_mcore.errors import UserError


class Dtype(StrEnum):
    """Precision of weights and activations."""

    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class ParallelConfig:
    """Parallel layout of a model. The data-parallel size is the number of processes over tensor x pipeline x context."""

    tensor: int = 1
    """Tensor-parallel ranks (TP), which shard each matrix."""
    pipeline: int = 1
    """Pipeline-parallel ranks (PP), which share the layers."""
    virtual: int = 1
    """Model chunks of each pipeline rank; above 1, the schedule is interleaved."""
    context: int = 1
    """Context-parallel ranks (CP), which shard each sequence."""
    expert: int = 1
    """Expert-parallel ranks (EP), which share the experts of a block; they are taken from the tensor- and data-parallel ranks."""
    sequence: bool = False
    """Sequence parallelism (SP): shard activations outside the matrix products over the tensor-parallel ranks."""


@dataclass
class DataConfig:
    """Text files: .jsonl, .jsonl.gz, .jsonl.zst or .parquet (documents under "text"), plain text, or the prefix of a Megatron
    .bin/.idx pair."""

    train: list[str] = changeable(default_factory=list)
    """Files, folders and patterns (*.jsonl) for calibration and training; "0.3 path" sets a weight in the blend, as do
    Megatron-LM's lists [0.3,path,0.7,path]."""
    heldout: list[str] = changeable(default_factory=list)
    """Files for evaluation, text or .bin/.idx pairs; empty takes the validation part of `split` or `splits_file`."""
    split: str | None = None
    """Shares of each file's documents for training, validation (see `heldout`) and test, as Megatron-LM's --split 98,2,0; null
    trains on all documents."""
    splits_file: str | None = changeable(None)
    """JSON file of Megatron-LM's --per-split-data-args-path, {"train": [0.3, a, 0.7, b], "valid": [c]}, instead of `train`."""
    tokenizer: str | None = changeable(None)
    """Hugging Face tokenizer folder or sentencepiece .model; null is the checkpoint's own tokenizer."""
    cache: str = changeable("runs/cache")
    """Folder of tokenised files and sample indices, which runs reuse."""
    seed: int = 1234
    """Seed of the order of the samples."""
    document_mask: bool = False
    """Samples hold several documents: each token attends to its own document only, at positions relative to its start (Megatron's
    reset_attention_mask and reset_position_ids). Also in held-out text."""
    line_mb: int = changeable(16)
    """Longest line of a .jsonl or .jsonl.gz file, in MiB; reading it takes some tens of times as much memory."""
    file_mb: int = changeable(1024)
    """Largest plain-text file, which is one document, in MiB; reading it takes some tens of times as much memory."""
    prefetch: int = changeable(1)
    """Optimizer steps whose samples a thread reads while the current step is computed; 0 reads them when they are needed."""


class Aggregation(StrEnum):
    """Reduction of activations along one axis."""

    mean = "mean"
    """Mean of absolute values."""
    l2 = "l2"
    """L2 norm."""
    variance = "variance"


class FfnSite(StrEnum):
    """Position at which the activations of ffn channels are read."""

    after_gate = "after_gate"
    """Input of the down projection."""
    before_gate = "before_gate"
    """Before the activation function (of SwiGLU: the gate projection), as the paper prints it."""


@dataclass
class Statistic:
    """How activations become scores. The default is the L2 norm over samples of the mean over tokens (arXiv 2407.14679, section
    2.2)."""

    sequence: Aggregation = Aggregation.mean
    """Reduction over the tokens of a sample."""
    batch: Aggregation = Aggregation.l2
    """Reduction over the samples."""
    ffn_site: FfnSite = FfnSite.after_gate
    """Activations that score ffn channels."""
    weighted: bool = False
    """Multiply a score by the norm of the weights that read the channel or head (Wanda, arXiv 2306.11695; for ffn as in
    Puzzle)."""


@dataclass
class ImportanceConfig(Statistic):
    """Calibration: the forward passes that score channels, heads and blocks."""

    samples: int = 1024
    """Sequences of the calibration text."""
    sequence_length: int = 8192
    """Tokens of a sequence."""
    micro_batch: int = changeable(1)
    """Sequences of a forward pass."""
    whole_documents: bool = False
    """Make each document one sample, padded at its end, instead of cutting the text into runs of `sequence_length`."""


class DepthMetric(StrEnum):
    """Damage done by removing blocks. Lower is better, except for accuracy."""

    loss = "loss"
    """Cross-entropy on the held-out text."""
    kl = "kl"
    """KL divergence of the logits from the whole model's."""
    mse = "mse"
    """Mean squared difference of the logits from the whole model's."""
    accuracy = "accuracy"
    """Share of the multiple-choice questions answered correctly."""
    cosine = "cosine"
    """Cosine distance between a block's input and output, from the importance scores."""


class DepthKind(StrEnum):
    """Choice of the blocks to drop."""

    contiguous = "contiguous"
    """The run of adjacent blocks with the least damage (arXiv 2408.11796)."""
    scattered = "scattered"
    """The blocks with the least damage when removed one at a time."""
    iterative = "iterative"
    """Repeatedly the block with the least damage, each time from the remaining model (arXiv 2511.16664)."""
    best = "best"
    """Contiguous or scattered, for each number of blocks the one with less damage as a whole."""


@dataclass
class DepthConfig:
    """Depth study: forward passes over held-out text without certain blocks."""

    sizes: list[int | float] = field(default_factory=lambda: [1, 2, 4, 8, 0.5])
    """Numbers of adjacent blocks to remove, at every position: whole numbers, or shares of all blocks (0.5)."""
    metric: DepthMetric = DepthMetric.loss
    """Metric of the choice. Loss, KL and MSE are always measured; accuracy needs `choices`."""
    kind: DepthKind = DepthKind.contiguous
    """Rule of the choice."""
    windows: int = 64
    """Sequences of each held-out file, evenly spaced."""
    sequence_length: int = 2048
    """Tokens of a sequence."""
    micro_batch: int = changeable(1)
    """Sequences of a forward pass."""
    choices: str | None = changeable(None)
    """File of multiple-choice questions: .jsonl or .jsonl.gz in WinoGrande's form, or with "query", "choices" and "label"."""
    limit: int | None = None
    """Use only the first questions of `choices`; null uses all."""


@dataclass
class PruneConfig:
    """Target sizes. A whole number is a size (1 is one), a number with a point is a share of the source's (1.0 is all), null keeps
    the source's."""

    hidden: int | float | None = None
    """Channels of the residual stream."""
    ffn: int | float | None = None
    """Channels between the MLP projections of each block."""
    heads: int | float | None = None
    """Query heads, the same number in each kept key/value group."""
    groups: int | float | None = None
    """Key/value groups of each block, each dropped with its query heads. The papers keep all."""
    merge_heads: bool = False
    """Add the difference of a dropped query head to a kept one of its group (arXiv 2407.14679, section 2.3)."""
    experts: int | float | None = None
    """Experts of each block of a mixture of experts; `ffn` counts the channels of one expert."""
    blocks: int | float | None = None
    """Blocks. Those with the least cosine distance between input and output are dropped first, or those of a depth study."""
    drop_blocks: list[int] = field(default_factory=list)
    """Numbers of the blocks to drop, from 0, instead of by score (the papers count from 1)."""
    attention: int | float | None = None
    """Attention layers of the kept blocks. Those with the least cosine distance are dropped; their blocks stay."""
    mlp: int | float | None = None
    """MLP layers of the kept blocks (of a mixture of experts: all experts of a block), dropped in the same way."""
    drop_attention: list[int] = field(default_factory=list)
    """Source blocks, from 0, that lose their attention layer, instead of by score."""
    drop_mlp: list[int] = field(default_factory=list)
    """Source blocks, from 0, that lose their MLP layer, instead of by score."""
    exportable: bool = True
    """Refuse a target that the family's Hugging Face class cannot represent; false allows it for sharded checkpoints."""


class BadLoss(StrEnum):
    """Reaction to a step whose loss or gradient is NaN or infinite. Its micro-batches are saved in either case."""

    stop = "stop"
    """End the run."""
    skip = "skip"
    """Count the step's data as used, and leave weights and optimizer unchanged."""


@dataclass
class TrainConfig:
    """Training. The defaults are those of Llama-3.1-Minitron-4B's distillation (arXiv 2408.11796, table 4)."""

    phase: int = of_phase(0)
    """A resume with the next number may change steps, global_batch, sequence_length, peak_lr and min_lr (docs/checkpoints.md)."""
    steps: int = of_phase(9960)
    """Optimizer steps; the default is 94 B tokens at the default batch."""
    global_batch: int = of_phase(1152)
    """Sequences of an optimizer step, over all ranks."""
    micro_batch: int = changeable(1)
    """Sequences of a forward and backward pass of one rank. It changes losses by rounding only."""
    sequence_length: int = of_phase(8192)
    """Tokens of a sequence."""
    peak_lr: float = of_phase(1e-4)
    """Learning rate after the warm-up."""
    min_lr: float = of_phase(1e-5)
    """Learning rate of the last step, after a cosine decay."""
    warmup_steps: int = 40
    """Steps of linear warm-up from 0."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    log_every: int = changeable(1)
    """Steps between two lines of the log."""
    save_every: int = changeable(500)
    """Steps between two checkpoints."""
    keep_last: int = changeable(2)
    """Number of the newest checkpoints that are kept. An older one is removed after a newer one is complete on disk."""
    keep_every: int | None = changeable(None)
    """Also keep the checkpoints of the steps that this number divides; null keeps none of them."""
    eval_every: int | None = changeable(None)
    """Steps between two measurements of the loss on the held-out text (`data.heldout`; windows as in `evaluate`), also after the
    last step; null measures none. The checkpoint with the lowest loss is kept."""
    stop_after: int | None = changeable(None)
    """Save and stop after this step; the same command without this setting resumes."""
    on_bad_loss: BadLoss = changeable(BadLoss.stop)
    """Reaction to a loss or gradient that is not finite."""
    bad_loss_limit: int = changeable(10)
    """Most consecutive steps that on_bad_loss=skip skips."""
    async_save: bool | None = changeable(None)
    """Copy a checkpoint to host memory and write it while training continues; null does so on CUDA."""


@dataclass
class LogConfig:
    """Programs that receive the figures of training steps besides metrics.jsonl (see `distill.metrics`)."""

    tensorboard: bool = changeable(True)
    """Write tensorboard events to out_dir/tensorboard."""
    wandb: str | None = changeable(None)
    """Project of Weights & Biases (pip install minitron_mcore[wandb]). With WANDB_MODE=offline the run is written to
    out_dir/wandb, for `wandb sync`."""
    mlflow: str | None = changeable(None)
    """Experiment of MLflow (pip install minitron_mcore[mlflow]), on the server in MLFLOW_TRACKING_URI, or without that variable in
    the file store out_dir/mlruns."""


class HiddenStateMetric(StrEnum):
    """Distance between two intermediate states of a token."""

    cosine = "cosine"
    """One minus the cosine similarity."""
    mse = "mse"
    """Squared difference, averaged over the teacher's channels."""


@dataclass
class HiddenStateLossConfig:
    """Loss between intermediate states of student and teacher (see `distill.hidden_state_loss`)."""

    weight: float = 0.0
    """Weight of the sum over all pairs; 0 disables the loss."""
    loss: HiddenStateMetric = HiddenStateMetric.cosine
    """Distance between the states."""
    pairs: list[list[int]] | None = None
    """[[student's block, teacher's block], ...], from 0; null pairs the last block but two of both (arXiv 2407.14679, table 17),
    [] pairs none."""
    embeddings: bool = True
    """Compare the outputs of the embedding tables too."""
    dynamic: bool = False
    """Multiply by the previous step's ratio of divergence to this loss, over the global batch (the paper's alpha, section 3)."""


class Divergence(StrEnum):
    """Distance between the student's logits and the teacher's (see `distill.divergences`)."""

    forward_kl = "forward_kl"
    """KL(teacher || student), the papers' choice."""
    reverse_kl = "reverse_kl"
    """KL(student || teacher)."""
    jsd = "jsd"
    """Generalised Jensen-Shannon divergence."""
    mse = "mse"
    """Mean squared difference of the logits."""
    cosine = "cosine"
    """Cosine distance of the logits."""


@dataclass
class OnPolicyConfig:
    """On-policy distillation (arXiv 2306.13649): the student answers prompts, and the teacher's distribution on its answers is what
    it learns. The paper's loss is divergence=reverse_kl, or jsd."""

    share: float = 0.0
    """Share of the samples that are the student's answers (the paper's lambda); the others are `data.train`'s. 0 disables it."""
    prompts: list[str] = changeable(default_factory=list)
    """.jsonl files of prompts, as those of the stage synthesize; drawn at random, with replacement."""
    tokens: int = 128
    """Most tokens of an answer, each of which costs forward passes of the student."""
    temperature: float = 1.0
    """Divides the logits before sampling; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities sum to this share."""
    micro_batch: int = changeable(8)
    """Prompts of a forward pass of one rank."""


@dataclass
class DistillConfig(TrainConfig):
    """Knowledge distillation: training the student on the teacher's logits."""

    kd_weight: float = 1.0
    """Weight of the divergence."""
    lm_weight: float = 0.0
    """Weight of the next-token cross-entropy, which is logged in any case."""
    divergence: Divergence = Divergence.forward_kl
    """Distance between the logits."""
    jsd_beta: float = 0.5
    """divergence=jsd: the teacher's share of the mixture, above 0 (towards forward KL) and below 1 (towards reverse KL)."""
    top_k: int | None = None
    """divergence=forward_kl: keep the teacher's k largest logits and merge all others into one entry; null keeps all."""
    temperature: float = 1.0
    """Temperature of both softmaxes; the divergence is multiplied by its square (Hinton et al. 2015)."""
    teacher_ahead: int = changeable(1)
    """Micro-batches that the teacher computes ahead of the student; with pipeline parallelism, a whole step's in any case."""
    teacher_parallel: Any = changeable(None)
    """A layout for the teacher on the same ranks, as {tensor: 2, pipeline: 2} (see `parallel`); null is the student's. Best with
    `teacher_ahead` a multiple of its number of replicas."""
    teacher_ranks: int = changeable(0)
    """Number of processes, the last ones, that hold only the teacher, in `teacher_parallel`, and compute while the student trains;
    0 keeps both models on all ranks."""
    hidden_state_loss: HiddenStateLossConfig = field(default_factory=HiddenStateLossConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

    def __post_init__(self) -> None:
        # The field is Any because OmegaConf cannot override an optional dataclass that is null.
        if isinstance(layout := self.teacher_parallel, dict):
            try:
                typed = OmegaConf.merge(OmegaConf.structured(ParallelConfig), layout)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"distill.teacher_parallel is {layout}, which is no layout: {reason}.") from error
            self.teacher_parallel = OmegaConf.to_object(typed)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with a teacher."""
        return bool(self.kd_weight or self.hidden_state_loss.weight)


@dataclass
class EvaluateConfig:
    """Perplexity on held-out text."""

    sequence_length: int = 1024
    """Tokens of a window."""
    micro_batch: int = changeable(4)
    """Windows of a forward pass."""
    max_windows: int | None = None
    """Windows of each file, evenly spaced; null evaluates all."""


class Device(StrEnum):
    """Kind of processor."""

    cuda = "cuda"
    cpu = "cpu"
