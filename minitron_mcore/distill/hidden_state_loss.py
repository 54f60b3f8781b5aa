"""A loss between intermediate states of student and teacher (arXiv 2407.14679, section 3), on any pipeline stage:

    L = sum over pairs and tokens of mask * difference(P h_s, h_t),    difference = 1 - cos or mean_i (P h_s - h_t)_i^2

Its weight is fixed, or the paper's alpha, L_logits / L as a number without a gradient, of the step before.

h_s and h_t are what a block of the student and one of the teacher put out (the residual stream; the paper takes it after a
norm), or their embedding tables. P [H_t, H_s] lifts the student's width to the teacher's: one learned matrix for all pairs, there
only where the widths differ. Products in the run's dtype, all else fp32.

What a rank holds of each pair, of S_r = S / CP or S / CP / TP rows under sequence parallelism:

    h_s [S_r, B, H_s]   where the stage of the student's block is
    h_t [S_r, B, H_t]   left by the teacher's forward passes on the stage of the teacher's block, handed over to the stage of the
                        student's before the student's schedule needs it (see `handover`)
    P [H_t, H_s]        whole, the same on all ranks. Its gradient is a sum over ranks that see other tokens (data, context, and
                        under sequence parallelism tensor-parallel ones) and over pipeline stages, which see other pairs

The loss is computed where h_s is made, and its gradient joins the one that comes back through the later blocks: megatron-core's
schedules know nothing of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitron_mcore.checkpoint.sharded import Shard
from minitron_mcore.config.settings import DistillConfig, HiddenStateMetric, ParallelConfig
from minitron_mcore.distill import checks
from minitron_mcore.models import build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.distributed import (  # isort: skip
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

SEED = 1234
"""Of the projection's first values, the same on all ranks of all layouts."""


class HiddenStateLoss:
    """The pairs of a run, hooked into the student, and their projection, which lies under a DDP of its own."""

    def __init__(
        self,
        model: build.Model,
        arch: Architecture,
        teacher: Architecture,
        config: DistillConfig,
        parallel: ParallelConfig,
        ddp: DistributedDataParallelConfig,
    ):
        """`model`: the student, of architecture `arch`, not yet under DDP, in layout `parallel`."""
        self.config, self.model = config.hidden_state_loss, model
        self.batch: Batch = {}
        self.sum = torch.zeros((), device=process_groups.device())
        self.ratio = 1.0  # of the first step, which knows no step before it
        # The groups over which a sum over this rank's rows and pairs becomes one over a sequence's and all.
        self.groups = [process_groups.pp_group(), *([process_groups.tp_group()] if parallel.sequence else [])]
        pairs = checks.state_pairs(arch, teacher, config.hidden_state_loss)
        self.routes = sorted(set(checks.state_routes(arch, teacher, pairs, parallel, config.teacher_parallel)))
        for own, theirs in pairs:
            if module := _maker(model, arch, own):
                module.register_forward_hook(partial(self._attach, theirs))
        self.projection: nn.Parameter | None = None
        self.trained: list[DistributedDataParallel] = []
        """For the optimizer, beside the student's chunks."""
        if arch.hidden != teacher.hidden:
            first = torch.randn(teacher.hidden, arch.hidden, generator=torch.Generator().manual_seed(SEED))
            linear = nn.Linear(arch.hidden, teacher.hidden, bias=False)
            linear.weight.data = (first * arch.hidden**-0.5).to(process_groups.device(), model.config.params_dtype)
            linear.weight.shared = process_groups.pp_group().rank() > 0  # the gradient's norm counts it once
            self.projection, self.trained = linear.weight, [DistributedDataParallel(model.config, ddp, linear)]

    def take(self, batch: Batch) -> None:
        """The micro-batch (this context-parallel rank's share) that a chunk of the student is about to run."""
        self.batch = batch

    def _attach(self, theirs: int, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        """A hook on what makes the student's states: the same output, through which the loss's gradient will flow."""
        if not torch.is_grad_enabled():
            return None  # no training step
        hidden, mask = _hidden(output), self.batch["loss_mask"].t()
        if self.model.config.sequence_parallel:
            mask = mask.chunk(process_groups.tp_group().size())[process_groups.tp_group().rank()]
        # Computed again in the backward pass: until then nothing is kept but what others keep anyway.
        wanted = self.batch[key(theirs)]
        loss = checkpoint(self._loss, hidden, wanted, mask, use_reentrant=False, preserve_rng_state=False)
        self.sum += loss.detach()
        hidden = _Joined.apply(hidden, self.model.config.grad_scale_func(self.weight * loss))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _loss(self, hidden: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        """Sum over this rank's rows; those of mask 0 may hold anything."""
        hidden, wanted = (x.masked_fill((mask == 0)[..., None], 0) for x in (hidden, wanted))
        if self.projection is not None:
            hidden = F.linear(hidden, self.projection)
        hidden, wanted = hidden.float(), wanted.float()
        if self.config.loss == HiddenStateMetric.cosine:
            each = 1 - F.cosine_similarity(hidden, wanted, dim=-1)
        else:
            each = (hidden - wanted).square().mean(-1)
        return (each * mask).sum()

    @property
    def weight(self) -> float:
        """Of this step's loss of states."""
        return self.config.weight * self.ratio

    def took(self, kd: float, states: float) -> None:
        """A step was taken with these losses, means over the global batch, the same on all ranks; the former with its weight.

        With `dynamic` the next step's weight follows: the ratio of a step cannot be known before its own backward passes, and
        from one step to the next it moves little.
        """
        if self.config.dynamic and kd > 0 and states > 0:
            self.ratio = kd / states

    def begin(self) -> None:
        """Before a step: no gradient, no loss."""
        self.sum.zero_()
        for ddp in self.trained:
            ddp.zero_grad_buffer()
            for group in ddp.bucket_groups:
                group.is_last_microbatch = (
                    False  # `finalize` reduces it: a rank may use it many times in a pass, or never
                )

    def finalize(self, chunks: Sequence[nn.Module], num_tokens: Tensor, **kwargs) -> None:
        """megatron-core's `finalize_model_grads`, and the same for the projection (collective)."""
        finalize_model_grads(chunks, num_tokens, **kwargs)  # leaves the number over all ranks in num_tokens
        for ddp in self.trained:
            ddp.finish_grad_sync()
            for group in self.groups:
                dist.all_reduce(self.projection.main_grad, group=group)
            ddp.scale_gradients(1 / num_tokens.clamp(min=1))

    def total(self) -> float:
        """The step's loss, before its weight, over all pairs and tokens (collective)."""
        total = self.sum.clone()
        for group in (*self.groups, process_groups.dp_cp_group()):
            dist.all_reduce(total, group=group)
        return total.item()

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """The projection for a checkpoint, where no reader of models asks for it."""
        return {
            shard.key: ShardedTensor.from_rank_offsets(shard.key, parameter, replica_id=shard.replica)
            for parameter, shard in self.shards().items()
        }

    def shards(self) -> dict[nn.Parameter, Shard]:
        """The projection's place in a checkpoint; every rank holds all of it."""
        if self.projection is None:
            return {}
        copy = tuple(
            group.rank()
            for group in (process_groups.pp_group(), process_groups.tp_group(), process_groups.dp_cp_group())
        )
        shape, start = tuple(self.projection.shape), (0, 0)
        return {self.projection: Shard("states.projection", shape, copy, [(start, start, shape)])}


@contextmanager
def recorded(teacher: build.Model, arch: Architecture, blocks: Iterable[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Record what the teacher's forward passes inside the block leave: by block of `blocks`, of every micro-batch what this rank
    has, in their order; nothing of blocks that another rank holds.

    Args:
        teacher: this rank's part of the model, of architecture `arch`, in whose layout the block is.
    """
    found: dict[int, list[Tensor]] = {block: [] for block in blocks}
    handles = [
        module.register_forward_hook(lambda module, args, output, kept=kept: kept.append(_hidden(output)))
        for block, kept in found.items()
        if (module := _maker(teacher, arch, block))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Joined(torch.autograd.Function):
    """(hidden states, a loss of them) -> the hidden states; the loss's gradient joins theirs."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
        return d_hidden, torch.ones_like(*ctx.saved_tensors)


def key(block: int) -> str:
    """Of what a teacher's block put out, in a batch."""
    return f"teacher_block_{block}"


def _hidden(output: Tensor | tuple) -> Tensor:
    """megatron-core's attention and MLP layers return a tuple, its embedding a tensor."""
    return output[0] if isinstance(output, tuple) else output


def _maker(model: build.Model, arch: Architecture, block: int) -> nn.Module | None:
    """The module whose output is the block's: its last layer, or the embedding; None where another rank holds it."""
    if block == checks.EMBEDDINGS:
        return model.chunks[0].embedding if process_groups.is_first_stage() else None
    last = max(n for n, (found, _) in enumerate(arch.layers) if found == block)
    return next((layer for layer in build.layers(model) if layer.layer_number - 1 == last), None)
