"""Forward and backward passes through megatron-core's pipeline schedules.

A batch holds whole sequences [B, S], the same on all ranks of a model replica. This module, and no other, shards them: models,
losses and `on_output` see the context-parallel rank's shard (see `cp_shard`).

With "document_starts" [B, S] int64, the position in its sequence at which each token's document begins, attention stays within
documents (see `layer_spec.TorchAttention`).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.parallel import hang_watchdog, process_groups
from minitron_mcore.parallel.layout import Place
from minitron_mcore.parallel.megatron_patches.key_value_cache import KeyValueCache

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.utils import get_batch_on_this_cp_rank  # isort: skip

Batch = dict[str, Tensor]


def cp_shard(batch: Batch) -> Batch:
    """A batch whose [B, S] tensors are replaced by this context-parallel rank's shard [B, S / CP].

    Rank r of CP holds parts r and 2 CP - 1 - r of the sequence's 2 CP, as in megatron-core's rotary embedding and Transformer
    Engine's attention. Tensors that are not two-dimensional are sharded already.
    """
    whole = {key: value for key, value in batch.items() if value is not None and value.dim() == 2}
    return batch | get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=process_groups.cp_group())


def positions(length: int, parallel: ParallelConfig, place: Place) -> Tensor:
    """Position in the sequence of each row of a rank's hidden states: int64 [S_r], S_r = S / CP, or S / CP / TP under sequence
    parallelism; `length` is S."""
    own, parts = torch.arange(length), 2 * parallel.context
    if parallel.context > 1:
        halves = own.view(parts, -1)
        own = torch.cat([halves[place.context], halves[parts - 1 - place.context]])
    return own.view(parallel.tensor, -1)[place.tensor] if parallel.sequence else own


def forward(
    model: Any,
    batches: Sequence[Batch],
    on_output: Callable[[Tensor, Batch], None],
    caches: Sequence[KeyValueCache] | None = None,
) -> None:
    """Forward passes without gradients over micro-batches, in evaluation mode (collective over the model's replica).

    Consecutive micro-batches of one shape share a pipeline run. The interleaved schedule needs a multiple of the pipeline ranks,
    so padding batches complete a run; their outputs are discarded.

    Args:
        model: this rank's part, a `models.build.Model`.
        batches: each with "tokens" [B, S] int64 and optionally "mask" [B, S] bool, False on padding.
        on_output: called on last-stage ranks with each output and its batch (`cp_shard`). The output is the final norm's hidden
            states [S_r, B, H], S_r = S / CP, or S / CP / TP under sequence parallelism.
        caches: of the tokens before each batch's, without context parallelism; the batches' keys and values are appended, and
            `sequence_len_offset` stays as it is.
    """

    def step(iterator: Iterator[tuple[Batch, KeyValueCache | None]], chunk: nn.Module) -> Any:
        hang_watchdog.beat()
        whole, cache = next(iterator)
        batch = cp_shard(whole)
        output = chunk(
            batch["tokens"], None, batch.get("document_starts"), loss_mask=batch.get("mask"), inference_context=cache
        )

        def collect(output: Tensor, non_loss_data: bool) -> None:
            if whole is not padding:
                on_output(output, batch)

        return output, collect

    was_training = model.training
    model.eval()
    with torch.no_grad():
        own: Sequence[KeyValueCache | None] = caches or [None] * len(batches)
        pairs = zip(batches, own, strict=True)
        for _, group in itertools.groupby(pairs, key=lambda pair: pair[0]["tokens"].shape):
            run = list(group)
            first, cache = run[0]
            padding = {"tokens": first["tokens"], "mask": torch.zeros_like(first["tokens"], dtype=torch.bool)}
            if len(model.chunks) > 1:  # a cache gets the same keys and values again
                run += [(padding, cache)] * (-len(run) % process_groups.pp_group().size())
            _run(step, model.chunks, run, first, len(run), forward_only=True, collect_non_loss_data=True)
    model.train(was_training)


def forward_backward(
    chunks: Sequence[nn.Module],
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Batch], tuple[Tensor, Tensor, Tensor]],
    example: Batch,
    count: int,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> list[Tensor]:
    """One training step's forward and backward passes, and the reduction of gradients over all ranks (collective).

    Args:
        chunks: this rank's model chunks, each wrapped in megatron-core's DistributedDataParallel.
        batches: `count` micro-batches of this data-parallel rank, read one at a time by each chunk.
        loss: called on last-stage ranks with (hidden states [S_r, B, H], batch (`cp_shard`)); returns (summed loss, number of
            tokens int32, statistics).
        example: a batch of the micro-batches' shape.
        count: number of micro-batches; with several chunks a multiple of the pipeline ranks.
        on_batch: called with each batch (`cp_shard`) before a chunk's forward pass.

    Returns:
        The statistics of each micro-batch on last-stage ranks, an empty list elsewhere.
    """

    def step(iterator: Iterator[Batch], chunk: nn.Module) -> Any:
        hang_watchdog.beat()
        batch = cp_shard(next(iterator))
        on_batch(batch)
        return chunk(batch["tokens"], None, batch.get("document_starts")), lambda hidden: loss(hidden, batch)

    return _run(step, chunks, batches, example, count, forward_only=False)


def _run(
    step: Callable[..., Any],
    chunks: Sequence[nn.Module],
    batches: Iterable[Any],
    example: Batch,
    count: int,
    **options: bool,
) -> list[Tensor]:
    micro_batch, length = example["tokens"].shape
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(itertools.tee(batches, len(chunks))),
        model=list(chunks),
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=micro_batch,
        **options,
    )
    return results if process_groups.is_last_stage() else []
