"""Megatron-Core's pipeline schedules, called with batches in and a function on the last stage's output.

A batch holds whole sequences, [B, S] a tensor, the same on all ranks of a model replica. Here, and only here, each
context-parallel rank r of CP takes its share of them, [B, S / CP]: parts r and 2 CP - 1 - r of 2 CP, as megatron-core's rotary
embedding and Transformer Engine's attention have it. Models, losses and `on_output` see shares.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.parallel import hang_watchdog, process_groups
from minitron_mcore.parallel.layout import Place

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.utils import get_batch_on_this_cp_rank  # isort: skip

Batch = dict[str, Tensor]


def share(batch: Batch) -> Batch:
    """This context-parallel rank's part of a batch's [B, S] tensors; others are shares already."""
    whole = {key: value for key, value in batch.items() if value is not None and value.dim() == 2}
    return batch | get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=process_groups.cp_group())


def positions(length: int, parallel: ParallelConfig, place: Place) -> Tensor:
    """Of each of the rows [S_r] of a rank's hidden states, its token's position in the sequence of `length`: S_r = S / CP or
    S / CP / TP under sequence parallelism."""
    own, parts = torch.arange(length), 2 * parallel.context
    if parallel.context > 1:
        halves = own.view(parts, -1)
        own = torch.cat([halves[place.context], halves[parts - 1 - place.context]])
    return own.view(parallel.tensor, -1)[place.tensor] if parallel.sequence else own


def forward(model: nn.Module, batches: Sequence[Batch], on_output: Callable[[Tensor, Batch], None]) -> None:
    """Forward passes over micro-batches, through whatever pipeline the model is laid out in (collective).

    Micro-batches of one shape that follow each other fill the pipeline together. The interleaved schedule takes them in groups
    of as many as there are pipeline ranks: what is missing to the last is filled up with padding, of which no output is given.

    Args:
        model: this rank's part; every stage takes part in every micro-batch.
        batches: each with "tokens" [B, S] int64, and maybe "mask" [B, S] bool, False on padding.
        on_output: called on last-stage ranks with each output and its share of the batch: the final norm's hidden states
            [S_r, B, H], S_r = S / CP or S / CP / TP under sequence parallelism.
    """

    def step(iterator, chunk):
        hang_watchdog.beat()
        whole = next(iterator)
        batch = share(whole)
        output = chunk(batch["tokens"], None, None, loss_mask=batch.get("mask"))

        def collect(output: Tensor, non_loss_data: bool) -> None:
            if whole is not idle:
                on_output(output, batch)

        return output, collect

    was_training = model.training
    model.eval()
    with torch.no_grad():
        for _, run in itertools.groupby(batches, key=lambda batch: batch["tokens"].shape):
            run = list(run)
            idle = {"tokens": run[0]["tokens"], "mask": torch.zeros_like(run[0]["tokens"], dtype=torch.bool)}
            if len(model.chunks) > 1:
                run += [idle] * (-len(run) % process_groups.pp_group().size())
            _run(step, model.chunks, run, run[0], len(run), forward_only=True, collect_non_loss_data=True)
    model.train(was_training)


def forward_backward(
    chunks: Sequence[nn.Module],
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Batch], tuple[Tensor, Tensor, Tensor]],
    like: Batch,
    count: int,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> list[Tensor]:
    """One training step's forward and backward passes, gradients finalized over all ranks (collective).

    Args:
        chunks: of this rank's part, each under megatron-core's DDP.
        batches: `count` micro-batches of this data-parallel rank, taken one by one as the schedule asks for them; of several
            chunks each asks for all, and `count` is a multiple of the pipeline ranks.
        loss: on last-stage ranks, (hidden states, share of the batch) -> (summed loss, number of tokens int32, statistics).
        like: a micro-batch of their shape.
        on_batch: called with the share of the batch that a chunk takes next.

    Returns:
        The statistics of every micro-batch on last-stage ranks, an empty list elsewhere.
    """

    def step(iterator, chunk):
        hang_watchdog.beat()
        batch = share(next(iterator))
        on_batch(batch)
        return chunk(batch["tokens"], None, None), lambda hidden: loss(hidden, batch)

    return _run(step, chunks, batches, like, count, forward_only=False)


def _run(step, chunks, batches, like: Batch, count: int, **kwargs) -> list:
    micro_batch, length = like["tokens"].shape
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(itertools.tee(batches, len(chunks))),
        model=list(chunks),
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=micro_batch,
        **kwargs,
    )
    return results if process_groups.is_last_stage() else []
