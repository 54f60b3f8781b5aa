"""Valid ranges of single settings, and of sequence lengths for a model's positions. No torch import."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from minitron_mcore.config.settings import DataConfig, EvaluateConfig, OnPolicyConfig, TrainConfig
from minitron_mcore.config.stages import (
    EvaluateRun,
    ExportRun,
    GenerateRun,
    Run,
    SearchRun,
    SynthesizeRun,
    TokenizeTextRun,
)
from minitron_mcore.config.synthesis import SynthesizeConfig

LARGEST_SEED = 2**32 - 1
"""NumPy's."""


def at_least(low: int, values: Mapping[str, int | None]) -> Iterator[str]:
    """Settings below `low`; None passes."""
    yield from (f"{name} is {n}; it must be at least {low}." for name, n in values.items() if n is not None and n < low)


def problems(config: Run) -> Iterator[str]:
    """Settings of every stage, and of stages without a check of their own, that are out of range."""
    for name, seed in (("seed", config.seed), ("data.seed", config.data.seed)):
        if not 0 <= seed <= LARGEST_SEED:
            yield f"{name} is {seed}; it must be from 0 to {LARGEST_SEED}."
    yield from at_least(1, {f"data.{name}": getattr(config.data, name) for name in ("line_mb", "file_mb")})
    yield from not_negative({"data.prefetch": config.data.prefetch})
    yield from splits(config.data)
    if isinstance(config, EvaluateRun | SearchRun):
        yield from evaluation(config.evaluate)
    if isinstance(config, GenerateRun):
        yield from at_least(1, {"tokens": config.tokens})
    if isinstance(config, SynthesizeRun):
        yield from synthesis(config.synthesize)
    if isinstance(config, TokenizeTextRun):
        yield from at_least(1, {"processes": config.processes})
    if isinstance(config, ExportRun):
        yield from at_least(1, {"vocab_multiple": config.vocab_multiple})
    for name in ("wandb", "mlflow"):
        if (value := getattr(config.log, name)) and importlib.util.find_spec(name) is None:
            yield f"log.{name} is {value}, but {name} is not installed: pip install minitron_mcore[{name}], or set it to null."
    yield from hang(config)
    yield from dry(config)


def splits(data: DataConfig) -> Iterator[str]:
    """Splits that are no shares, and settings of the text that exclude each other."""
    share = r"(\d+\.?\d*|\.\d+)"
    split = data.split
    if split is not None and not (re.fullmatch(rf"{share}(,{share}){{0,2}}", split) and re.search("[1-9]", split)):
        yield f'data.split is "{split}"; it must be up to three numbers, not all 0: training, validation and test: "98,2,0".'
    for name, value in (("train", data.train), ("split", data.split)):
        if data.splits_file and value:
            yield f"data.splits_file and data.{name} are both set: give one of them."


def dry(config: Run) -> Iterator[str]:
    """Settings of a dry run that are out of range; none where the run is real."""
    if not config.dry_run:
        return
    settings = dataclasses.asdict(config.dry)
    yield from at_least(1, {f"dry.{name}": settings[name] for name in ("gpus", "gpus_per_node")})
    for name in ("memory", "peak_tflops", "nvlink_gbs", "network_gbs"):
        if not 0 < settings[name] < math.inf:
            yield f"dry.{name} is {settings[name]:g}; it must be above 0 and finite."
    if not 0 < config.dry.mfu <= 1:
        yield f"dry.mfu is {config.dry.mfu:g}; it is a share of the peak, above 0 and up to 1."


def hang(config: Run) -> Iterator[str]:
    """Limits of the hang watchdog that are out of range, or at least the timeout of collectives, which would then fail first."""
    limits, timeout = dataclasses.asdict(config.hang), config.performance.nccl_timeout_minutes
    for name, minutes in limits.items():
        if not 0 < minutes < math.inf:
            yield f"hang.{name} is {minutes:g}; it must be above 0 and finite."
        elif timeout is not None and not minutes < timeout < math.inf:
            yield (
                f"performance.nccl_timeout_minutes is {timeout:g}; it must be finite and above hang.{name} {minutes:g}, or "
                "collectives fail before a hang is reported."
            )


def evaluation(config: EvaluateConfig) -> Iterator[str]:
    """Windows without a token to predict, or no windows."""
    if config.sequence_length < 2:
        yield f"evaluate.sequence_length is {config.sequence_length}; it must be at least 2: a token and one that it predicts."
    yield from at_least(1, {f"evaluate.{name}": getattr(config, name) for name in ("micro_batch", "max_windows")})


def synthesis(config: SynthesizeConfig) -> Iterator[str]:
    """Sampling and filters of a synthesis that are out of range."""
    counts = ("samples", "prompt_tokens", "tokens", "micro_batch", "min_tokens")
    yield from at_least(1, {f"synthesize.{name}": getattr(config, name) for name in counts})
    yield from sampling(config, "synthesize.")
    if config.min_tokens > config.tokens:
        yield f"synthesize.min_tokens is {config.min_tokens}; it must be at most synthesize.tokens {config.tokens}."
    if config.min_log_likelihood is not None and not config.min_log_likelihood <= 0:
        yield f"synthesize.min_log_likelihood is {config.min_log_likelihood:g}; it must be at most 0."


def sampling(config: SynthesizeConfig | OnPolicyConfig, prefix: str) -> Iterator[str]:
    """Temperature and top_p that are out of range."""
    yield from not_negative({f"{prefix}temperature": config.temperature})
    if not 0 < config.top_p <= 1:
        yield f"{prefix}top_p is {config.top_p:g}; it must be above 0 and at most 1."


def training(config: TrainConfig, prefix: str) -> Iterator[str]:
    """Rates, factors and intervals of training that are out of range; megatron-core would fail on some with an assertion.

    `prefix`: of the settings' names, "distill." or "correct.".
    """
    if not 0 < config.peak_lr < math.inf:
        yield f"{prefix}peak_lr is {config.peak_lr:g}; it must be above 0 and finite."
    elif not 0 <= config.min_lr <= config.peak_lr:
        limit = f"{prefix}peak_lr {config.peak_lr:g}"
        yield f"{prefix}min_lr is {config.min_lr:g}; it must be at least 0 and at most {limit}."
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= (beta := getattr(config, name)) < 1:
            yield f"{prefix}{name} is {beta:g}; it must be at least 0 and below 1."
    yield from not_negative({f"{prefix}{name}": getattr(config, name) for name in ("weight_decay", "clip_grad")})
    yield from at_least(0, {f"{prefix}phase": config.phase})
    counts = ("log_every", "save_every", "keep_last", "keep_every", "stop_after", "bad_loss_limit")
    yield from at_least(1, {f"{prefix}{name}": getattr(config, name) for name in counts})


def text_files(name: str, files: Sequence[str]) -> Iterator[str]:
    """An empty list of text files; `name` is its setting."""
    if not files:
        yield f"{name} is empty: give text files, {name}=[a.jsonl,b.txt]."


def heldout_text(data: DataConfig) -> Iterator[str]:
    """No held-out text: neither files nor a valid part of the training text."""
    if data.heldout or data.splits_file:
        return
    if data.split is None:
        yield "data.heldout is empty: give text files, data.heldout=[a.jsonl,b.txt], or a valid part, data.split='98,2,0'."
    elif not re.search("[1-9]", [*data.split.split(","), ""][1]):
        yield f'data.split is "{data.split}", which leaves no documents to valid, and data.heldout is empty: give one of them.'


def not_negative(values: Mapping[str, float]) -> Iterator[str]:
    """Settings that are negative, infinite or NaN."""
    wrong = {name: value for name, value in values.items() if not 0 <= value < math.inf}
    yield from (f"{name} is {value:g}; it must be finite and at least 0." for name, value in wrong.items())


def positions(setting: str, length: int, **limits: int | None) -> Iterator[str]:
    """Sequences longer than a model's positions, for which its rotary embedding was not trained; `limits` are positions by role."""
    for role, limit in limits.items():
        if limit and length > limit:
            yield (
                f"{setting} is {length}, but the {role} has {limit} positions (max_position_embeddings): give at most {limit}."
            )
