"""The config section `search`. No torch import."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from minitron_mcore.config.fields import changeable

Axis = Any
"""A list of numbers, {start, stop, step} or null: OmegaConf has no union of containers. `search.space` checks the values."""


class Storage(StrEnum):
    """Number format of a served model."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    int4 = "int4"


@dataclass
class BudgetConfig:
    """Budget of a candidate: exactly one of the first three, with a tolerance."""

    parameters: float | None = None
    """Number of parameters, tied ones counted once."""
    bytes: float | None = None
    """Bytes of the weights, and of the keys and values of `batch` sequences of `context` tokens."""
    flops: float | None = None
    """Floating-point operations of a prefill: `batch` prompts of `context` tokens."""
    tolerance: float = 0.05
    """Relative deviation from the budget that a candidate may have, in both directions."""
    context: int = 8192
    """Tokens of a sequence, for `bytes` and `flops`."""
    batch: int = 1
    """Sequences, for `bytes` and `flops`."""
    weights: Storage = Storage.bf16
    """Format of the weights, for `bytes`."""
    kv_cache: Storage = Storage.bf16
    """Format of keys and values, for `bytes`."""


@dataclass
class SpeedConfig:
    """Measurement of a candidate's speed, with random weights on one process."""

    batch: int = 1
    """Sequences."""
    prompt: int = 512
    """Tokens of a prompt: the prefill."""
    generated: int = 32
    """Tokens generated after the prompt, one at a time: the decoding."""
    repetitions: int = 5
    """Repetitions of prefill and decoding; the median counts."""
    threads: int | None = None
    """CPU threads; null is torch's default."""


@dataclass
class SearchConfig:
    """Architectures to try. An axis is a list of sizes (whole numbers) or of shares of the source's (0.5, 1.0), or {start, stop,
    step} of either, with `stop` included; null keeps the source's size."""

    blocks: Axis = None
    """Axis of the number of blocks."""
    hidden: Axis = None
    """Axis of the residual stream's channels."""
    ffn: Axis = None
    """Axis of the MLP's channels."""
    expansion: Axis = None
    """Axis of ffn as a multiple of hidden, instead of `ffn`; rounded to a multiple of `multiple`."""
    heads: Axis = None
    """Axis of the query heads; null keeps those of the kept groups."""
    groups: Axis = None
    """Axis of the key/value groups."""
    experts: Axis = None
    """Axis of the experts of a block."""
    multiple: int = 1
    """Number that hidden and ffn must be multiples of."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    trials: int = 100
    """Candidates that optuna tries, if the axes have more than 10,000 combinations."""
    best: int = 4
    """Candidates to train: those with the least loss before training."""
    steps: int = 400
    """Training steps of each, with the other settings of `distill` (arXiv 2407.14679, section 2.3)."""
    eval_every: int = 100
    """Steps between two evaluations on the held-out text."""
    students_per_pass: int = changeable(1)
    """Candidates trained with one forward pass of the teacher; a rank holds the weights and optimizer states of all of them."""
    latency: bool = False
    """Measure the speed of every candidate."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    shards: int = changeable(1)
    """Number of runs that share the candidates, one for each value of `shard`."""
    shard: int = changeable(0)
    """Number of this run, from 0."""
    stop_after: int | None = changeable(None)
    """Stop after this many new results; the same command without this setting resumes."""
