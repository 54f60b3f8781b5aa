"""Megatron-Core's pipeline schedules, called with batches in and a function on the last stage's output."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from minitron_mcore import runtime
from minitron_mcore.models.build import LanguageModel

from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

Batch = dict[str, Tensor]


def forward(
    model: LanguageModel, batches: Sequence[Batch], on_output: Callable[[Tensor, Batch], None], headless: bool = True
) -> None:
    """Forward passes over micro-batches of one shape, through whatever pipeline the model is laid out in (collective).

    Args:
        model: this rank's part; every stage takes part in every micro-batch.
        batches: each with "tokens" [B, S] int64, the same on all ranks of a model replica.
        on_output: called on last-stage ranks with each output: the final norm's hidden states [S, B, H] ([S_r, B, H] under
            sequence parallelism), or this rank's logits [B, S, V_r] where `headless` is false.
    """

    def step(iterator, model):
        batch = next(iterator)
        output = model(batch["tokens"], None, None, headless=headless, loss_mask=batch.get("mask"))

        def collect(output: Tensor, non_loss_data: bool) -> None:
            on_output(output, batch)

        return output, collect

    was_training = model.training
    model.eval()
    with torch.no_grad():
        _run(step, model, batches, batches[0], len(batches), forward_only=True, collect_non_loss_data=True)
    model.train(was_training)


def forward_backward(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Batch], tuple[Tensor, Tensor, Tensor]],
    like: Batch,
    count: int,
) -> list[Tensor]:
    """One training step's forward and backward passes, gradients finalized over all ranks (collective).

    Args:
        model: this rank's part under megatron-core's DDP.
        batches: `count` micro-batches of this data-parallel rank, taken one by one as the schedule asks for them.
        loss: on last-stage ranks, (hidden states, batch) -> (summed loss, number of tokens int32, statistics).
        like: a micro-batch of their shape.

    Returns:
        The statistics of every micro-batch on last-stage ranks, an empty list elsewhere.
    """

    def step(iterator, model):
        batch = next(iterator)
        return model(batch["tokens"], None, None, headless=True), lambda hidden: loss(hidden, batch)

    return _run(step, model, batches, like, count, forward_only=False)


def _run(step, model, batches, like: Batch, count: int, **kwargs) -> list:
    micro_batch, length = like["tokens"].shape
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=micro_batch,
        **kwargs,
    )
    return results if runtime.is_last_stage() else []
