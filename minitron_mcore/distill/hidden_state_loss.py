"""A loss between intermediate hidden states of student and teacher (arXiv 2407.14679, section 3), on any pipeline stage:

    L = sum over pairs and tokens of mask * difference(P h_s, h_t),    difference = 1 - cos or mean_i (P h_s - h_t)_i^2

Its weight is constant, or the paper's alpha = L_logits / L of the previous step, without a gradient.

h_s and h_t are the outputs of a block of the student and of one of the teacher (the residual stream; the paper uses it after a
norm), or of their embedding tables. P [H_t, H_s] projects the student's width to the teacher's: one learned matrix for all pairs,
only if the widths differ. Products are in the run's dtype, everything else in fp32.

Each rank holds, for each pair, with S_r = S / CP or S / CP / TP under sequence parallelism:

    h_s [S_r, B, H_s]   on the pipeline stage of the student's block
    h_t [S_r, B, H_t]   computed on the stage of the teacher's block, transferred to the stage of the student's before the
                        student's schedule needs it (see `teacher_transfer`)
    P [H_t, H_s]        whole, the same on all ranks. Its gradient is a sum over the ranks with other tokens (data, context and,
                        under sequence parallelism, tensor-parallel ranks) and over the pipeline stages, which have other pairs

Forward hooks compute the loss where h_s is computed, and add its gradient to the one from the later blocks. megatron-core's
schedules are unchanged.
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

from megatron.core.distributed import (  # isort: skip
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

SEED = 1234
"""Of the projection's initial values: the same on all ranks in all layouts."""


class HiddenStateLoss:
    """Hooks on the student's blocks of each pair, and the projection, in its own DistributedDataParallel."""

    def __init__(
        self,
        model: build.Model,
        arch: Architecture,
        teacher: Architecture,
        config: DistillConfig,
        parallel: ParallelConfig,
        ddp: DistributedDataParallelConfig,
    ):
        """`model`: the student, of architecture `arch` in layout `parallel`, before it is wrapped in DDP."""
        self.config, self.model = config.hidden_state_loss, model
        self.batch: Batch = {}
        self.sum = torch.zeros((), device=process_groups.device())
        self.ratio = 1.0  # the first step has no previous step
        # The groups that hold the other rows of this rank's sequences and the other pairs.
        self.groups = [process_groups.pp_group(), *([process_groups.tp_group()] if parallel.sequence else [])]
        pairs = checks.state_pairs(arch, teacher, config.hidden_state_loss)
        self.routes = sorted(set(checks.state_routes(arch, teacher, pairs, parallel, config.teacher_parallel)))
        for block, teacher_block in pairs:
            if module := _output_module(model, arch, block):
                module.register_forward_hook(partial(self._add_loss, teacher_block))
        self.projection: nn.Parameter | None = None
        self.ddp_modules: list[DistributedDataParallel] = []
        """The projection, for the optimizer."""
        if arch.hidden != teacher.hidden:
            initial = torch.randn(teacher.hidden, arch.hidden, generator=torch.Generator().manual_seed(SEED))
            linear = nn.Linear(arch.hidden, teacher.hidden, bias=False)
            linear.weight.data = (initial * arch.hidden**-0.5).to(process_groups.device(), model.config.params_dtype)
            linear.weight.shared = process_groups.pp_group().rank() > 0  # count it once in the gradient's norm
            self.projection, self.ddp_modules = linear.weight, [DistributedDataParallel(model.config, ddp, linear)]

    def set_batch(self, batch: Batch) -> None:
        """Set the micro-batch (this context-parallel rank's share) that a chunk of the student runs next."""
        self.batch = batch

    def _add_loss(
        self, teacher_block: int, module: nn.Module, args: tuple, output: Tensor | tuple
    ) -> Tensor | tuple | None:
        """A forward hook on a student's block: returns its output, to whose gradient the loss's is added."""
        if not torch.is_grad_enabled():
            return None  # not a training step
        hidden, mask = _hidden(output), self.batch["loss_mask"].t()
        if self.model.config.sequence_parallel:
            mask = mask.chunk(process_groups.tp_group().size())[process_groups.tp_group().rank()]
        # Recomputed in the backward pass: until then it keeps only its inputs, which are kept anyway.
        target = self.batch[batch_key(teacher_block)]
        loss = checkpoint(self._loss, hidden, target, mask, use_reentrant=False, preserve_rng_state=False)
        self.sum += loss.detach()
        hidden = _AddLoss.apply(hidden, self.model.config.grad_scale_func(self.weight * loss))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _loss(self, hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Sum over this rank's rows; rows with mask 0 may hold any values."""
        hidden, target = (x.masked_fill((mask == 0)[..., None], 0) for x in (hidden, target))
        if self.projection is not None:
            hidden = F.linear(hidden, self.projection)
        hidden, target = hidden.float(), target.float()
        if self.config.loss == HiddenStateMetric.cosine:
            difference = 1 - F.cosine_similarity(hidden, target, dim=-1)
        else:
            difference = (hidden - target).square().mean(-1)
        return (difference * mask).sum()

    @property
    def weight(self) -> float:
        """Of the loss in this step."""
        return self.config.weight * self.ratio

    def update_weight(self, kd_term: float, loss: float) -> None:
        """With `dynamic`, set the next step's weight from a step's losses, means over the global batch, the same on all ranks.

        A step's own ratio is known only after its backward passes; it changes little between steps.
        """
        if self.config.dynamic and kd_term > 0 and loss > 0:
            self.ratio = kd_term / loss

    def begin(self) -> None:
        """Clear gradient and loss before a step."""
        self.sum.zero_()
        for ddp in self.ddp_modules:
            ddp.zero_grad_buffer()
            for group in ddp.bucket_groups:
                # Only `finalize` may reduce the gradient: a rank may use the projection many times in a pass, or never.
                group.is_last_microbatch = False

    def finalize(self, chunks: Sequence[nn.Module], num_tokens: Tensor, **kwargs) -> None:
        """megatron-core's `finalize_model_grads`, and the same for the projection (collective)."""
        finalize_model_grads(chunks, num_tokens, **kwargs)  # sets num_tokens to the sum over all ranks
        for ddp in self.ddp_modules:
            ddp.finish_grad_sync()
            for group in self.groups:
                dist.all_reduce(self.projection.main_grad, group=group)
            ddp.scale_gradients(1 / num_tokens.clamp(min=1))

    def total(self) -> float:
        """The step's unweighted loss, summed over all pairs and tokens (collective)."""
        total = self.sum.clone()
        for group in (*self.groups, process_groups.dp_cp_group()):
            dist.all_reduce(total, group=group)
        return total.item()

    def shards(self) -> dict[nn.Parameter, Shard]:
        """The projection's shard in a checkpoint, under a key that no model has; every rank holds all of it."""
        if self.projection is None:
            return {}
        replica = tuple(
            group.rank()
            for group in (process_groups.pp_group(), process_groups.tp_group(), process_groups.dp_cp_group())
        )
        shape, start = tuple(self.projection.shape), (0, 0)
        return {self.projection: Shard("states.projection", shape, replica, [(start, start, shape)])}


@contextmanager
def record_outputs(
    teacher: build.Model, arch: Architecture, blocks: Iterable[int]
) -> Iterator[dict[int, list[Tensor]]]:
    """Record the outputs of the teacher's `blocks` in the forward passes inside the `with` block.

    Args:
        teacher: this rank's part of the model of architecture `arch`; its layout must be active.

    Yields:
        By block, this rank's shard [S_r, B, H_t] of each micro-batch, in order; an empty list if another rank holds the block.
    """
    outputs: dict[int, list[Tensor]] = {block: [] for block in blocks}
    handles = [
        module.register_forward_hook(lambda module, args, output, states=states: states.append(_hidden(output)))
        for block, states in outputs.items()
        if (module := _output_module(teacher, arch, block))
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class _AddLoss(torch.autograd.Function):
    """(hidden states, a loss of them) -> the hidden states. Backward adds the gradient of the loss."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
        return d_hidden, torch.ones_like(*ctx.saved_tensors)


def batch_key(block: int) -> str:
    """Key of a teacher block's output in a batch."""
    return f"teacher_block_{block}"


def _hidden(output: Tensor | tuple) -> Tensor:
    """megatron-core's attention and MLP layers return a tuple, its embedding a tensor."""
    return output[0] if isinstance(output, tuple) else output


def _output_module(model: build.Model, arch: Architecture, block: int) -> nn.Module | None:
    """The module whose output is the block's: its last layer, or the embedding; None if another rank holds it."""
    if block == checks.EMBEDDINGS:
        return model.chunks[0].embedding if process_groups.is_first_stage() else None
    last = max(n for n, (number, _) in enumerate(arch.layers) if number == block)
    return next((layer for layer in build.layers(model) if layer.layer_number - 1 == last), None)
