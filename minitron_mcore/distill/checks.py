"""What a training run must keep. No torch import."""

from collections.abc import Iterator

from minitron_mcore.config import DistillConfig, Divergence, ParallelConfig
from minitron_mcore.models.architecture import Architecture


def problems(
    student: Architecture, teacher: Architecture | None, config: DistillConfig, parallel: ParallelConfig, dp_size: int
) -> Iterator[str]:
    """A size below 1, vocabularies that differ, a batch that the data-parallel ranks or the interleaved pipeline don't divide, a
    warm-up as long as the run, no loss, and what `divergence` finds."""
    sizes = {name: getattr(config, name) for name in ("steps", "global_batch", "micro_batch", "sequence_length")}
    small = {name: size for name, size in sizes.items() if size < 1}
    yield from (f"{name} is {size}; it must be at least 1." for name, size in small.items())
    if teacher and teacher.vocab != student.vocab:
        yield (
            f"the teacher's vocabulary has {teacher.vocab} tokens, the student's {student.vocab}: "
            "distillation on logits needs the same tokenizer."
        )
    # The interleaved schedule takes micro-batches in groups of as many as there are pipeline ranks.
    group = parallel.pipeline if parallel.virtual > 1 else 1
    unit = config.micro_batch * dp_size * group
    if not small and config.global_batch % unit:
        interleaved = f" x parallel.pipeline {group}, interleaved," if group > 1 else ""
        yield (
            f"global_batch {config.global_batch} is not a multiple of micro_batch {config.micro_batch} x {dp_size} "
            f"data-parallel ranks{interleaved} = {unit}: give {max(1, config.global_batch // unit) * unit}."
        )
    if not 0 <= config.warmup_steps < config.steps:
        yield f"warmup_steps is {config.warmup_steps}; it must be below steps {config.steps}."
    if config.kd_weight == 0 and config.lm_weight == 0:
        yield "kd_weight and lm_weight are both 0: there is nothing to train on."
    yield from divergence(config.divergence, config.jsd_beta, config.top_k, config.temperature, student.vocab)


def divergence(kind: Divergence, jsd_beta: float, top_k: int | None, temperature: float, vocab: int) -> Iterator[str]:
    """A temperature that is not above 0 or that would do nothing, a mixture of one alone, a top-k of nothing, of everything or of
    another divergence."""
    if temperature <= 0:
        yield f"temperature is {temperature}; it must be above 0 (1 leaves the logits as they are)."
    elif temperature != 1 and kind in (Divergence.mse, Divergence.cosine):
        yield f"temperature is {temperature}, but divergence {kind} is of the logits as they are: give temperature 1."
    if kind == Divergence.jsd and not 0 < jsd_beta < 1:
        yield (
            f"jsd_beta is {jsd_beta}; it must be above 0 and below 1 (the limits are divergence forward_kl and reverse_kl)."
        )
    if top_k is not None and kind != Divergence.forward_kl:
        yield f"top_k is {top_k}, but divergence {kind} takes the whole vocabulary: give forward_kl, or top_k null."
    elif top_k is not None and not 1 <= top_k < vocab:
        yield f"top_k is {top_k}; it must be at least 1 and below the vocabulary of {vocab}, which is top_k null."
