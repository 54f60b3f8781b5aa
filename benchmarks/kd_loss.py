"""Distillation loss from hidden states to gradients: time, extra peak memory, collectives, beside torch and ModelOpt.

All get the same bf16 hidden states and heads and give the loss and its gradients to the student's hidden states
and head:

    minitron                 minitron_mcore.distill.losses.distillation_loss
    minitron, torch path     the same without its Triton kernels (GPU)
    torch                    both logits, gathered over the vocabulary, log_softmax and kl_div in fp32
    torch.compile            the same, compiled (GPU)
    modelopt                 both logits, LogitsKLLoss of modelopt.torch.distill.plugins.megatron
    liger                    LigerFusedLinearJSD with beta 0, which is the forward KL (GPU)

On a GPU rows follow for each other divergence, by the kernels and by torch, and for Liger's JSD.
A row whose package is missing, that runs out of memory or fails otherwise says so; the others go on.

On a CPU: 2,048 tokens of a small model, at TP 1 and 2. On a GPU: 8,192 tokens of a large one at TP 1, in this process, beside the
time that the matrix products take at 75 % of an H100's 989 TFLOP/s. Time is the median over interleaved repetitions, of the
slowest rank, with cores / TP threads a rank. Memory is the peak beyond the inputs (and beyond the two bf16 logits of all but
minitron and liger) over tokens x this rank's vocabulary, and in GB all beyond the inputs and their gradients; on a CPU the
resident memory, which holds what malloc keeps as well.
Collectives are those of one call, forward and backward, less the reduction of the hidden states' gradient, which all
need alike. On one rank others may disturb the time: threads wait for each other, so measure on an idle machine.
"""

import contextlib
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import Figure, device_peak_bytes, parser, peak_bytes, ranks, seconds, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from minitron_mcore.config.settings import Divergence, ParallelConfig
from minitron_mcore.parallel import process_groups

GPU = torch.cuda.is_available()
TOKENS, VOCAB, STUDENT_HIDDEN, TEACHER_HIDDEN = (8192, 128_256, 3072, 4096) if GPU else (2048, 49_152, 504, 576)
FLOOR = 2 * TOKENS * VOCAB * (3 * STUDENT_HIDDEN + TEACHER_HIDDEN) / (0.75 * 989e12)
"""Seconds of the products: the student's logits, its two gradients, the teacher's logits."""
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def labels_and_mask(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device), torch.ones(
        len(hidden), device=hidden.device
    )


def minitron(**options) -> Loss:
    from minitron_mcore.distill.losses import FactoredLogits, LossConfig, distillation_loss

    def loss(hidden, head, *teacher):
        shape, config = dict(vocab_size=VOCAB, tp_group=process_groups.tp_group()), LossConfig(**options)
        models = FactoredLogits(hidden, head), FactoredLogits(*teacher)
        return distillation_loss(*models, *labels_and_mask(hidden), **shape, config=config)[0]

    return loss


def minitron_torch(**options) -> Loss:
    from minitron_mcore.distill import tiling

    fused = minitron(**options)

    def loss(*states):
        with patch.object(tiling, "kernels_for", return_value=None):
            return fused(*states)

    return loss


def dense() -> Loss:
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region as gather

    def loss(hidden, head, teacher_hidden, teacher_head):
        student, teacher = gather(hidden @ head.t()), gather(teacher_hidden @ teacher_head.t())
        student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)

    return loss


def modelopt() -> Loss:
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    tp = process_groups.tp_group().size()
    criterion = LogitsKLLoss(
        TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=tp)
    )

    def loss(hidden, head, teacher_hidden, teacher_head):
        per_token, tp_reduce, _ = criterion((hidden @ head.t())[:, None], (teacher_hidden @ teacher_head.t())[:, None])
        total = per_token.sum()
        if tp_reduce and tp > 1:  # as Megatron-LM's loss function does: for the value, not for the gradient
            value = total.detach().clone()
            dist.all_reduce(value, group=process_groups.tp_group())
            total = total + (value - total.detach())
        return total

    return loss


def liger(beta: float = 0.0) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    criterion = LigerFusedLinearJSD(jsd_beta=beta)

    def loss(hidden, *others):
        return len(hidden) * criterion(hidden, *others, None)  # a mean over tokens

    return loss


@dataclass(frozen=True)
class Implementation:
    make: Callable[[], Loss]
    package: str = "torch"
    holds_logits: bool = True
    kind: str = "forward_kl"
    """Losses and gradients of one kind are compared."""


KINDS = {name: {"divergence": Divergence(name)} for name in ("reverse_kl", "jsd", "mse", "cosine")} | {
    "top 20": {"top_k": 20}
}
IMPLEMENTATIONS = {
    "minitron": Implementation(minitron, holds_logits=False),
    "minitron, torch path": Implementation(minitron_torch, holds_logits=False),
    "torch": Implementation(dense),
    "torch.compile": Implementation(lambda: torch.compile(dense())),
    "modelopt": Implementation(modelopt, "modelopt"),
    "liger": Implementation(liger, "liger_kernel", holds_logits=False),
}
for kind, options in KINDS.items():
    IMPLEMENTATIONS |= {
        f"minitron, {kind}": Implementation(partial(minitron, **options), "torch", False, kind),
        f"minitron, {kind}, torch path": Implementation(partial(minitron_torch, **options), "torch", False, kind),
    }
IMPLEMENTATIONS["liger, jsd"] = Implementation(partial(liger, 0.5), "liger_kernel", False, "jsd")
if not GPU:
    IMPLEMENTATIONS = {name: IMPLEMENTATIONS[name] for name in ("minitron", "torch", "modelopt")}


def inputs(tokens: int) -> Inputs:
    """The same hidden states on all ranks, this rank's rows of both heads; logits spread like a language model's."""
    group = process_groups.tp_group()
    torch.set_num_threads(max(1, os.cpu_count() // group.size()))
    g = torch.Generator(device=process_groups.device()).manual_seed(0)

    def states(width: int) -> tuple[Tensor, Tensor]:
        hidden, head = (torch.randn(n, width, generator=g, device=g.device) for n in (tokens, VOCAB))
        head *= 3 / width**0.5
        rows = head.chunk(group.size())[group.rank()]
        return tuple(x.to(process_groups.device(), torch.bfloat16) for x in (hidden, rows))

    (hidden, head), teacher = states(STUDENT_HIDDEN), states(TEACHER_HIDDEN)
    return hidden.requires_grad_(), head.requires_grad_(), *teacher


def step(loss: Loss, tensors: Inputs, reduce_hidden: bool = True) -> Tensor:
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    hidden, head, *teacher = tensors
    value = loss(copy_to_tensor_model_parallel_region(hidden) if reduce_hidden else hidden, head, *teacher)
    value.backward()
    return value.detach()


def examine(loss: Loss, tensors: Inputs) -> tuple[tuple[Tensor, ...], int, int]:
    """(loss, both gradients), extra peak in bytes, collectives of one call."""
    hidden, head, teacher_hidden, teacher_head = tensors
    few = hidden.detach()[:16].requires_grad_(), head, teacher_hidden[:16], teacher_head
    step(loss, few)  # what libraries set up on first use is no part of the loss
    clear(tensors)
    results, alone = [], process_groups.tp_group().size() == 1
    with contextlib.nullcontext() if alone else CommDebugMode() as counter:
        peak = (device_peak_bytes if GPU else peak_bytes)(
            lambda: results.append(step(loss, tensors, reduce_hidden=False))
        )
    results += [x.grad.float() for x in tensors[:2]]
    clear(tensors)
    return tuple(results), peak, 0 if alone else counter.get_total_counts()


def clear(tensors: Inputs) -> None:
    for x in tensors:
        x.grad = None


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def on_rank(tokens: int, repetitions: int) -> dict[str, dict]:
    """This rank's figures of each implementation, or why it has none. The timed repetitions take the implementations in turn."""
    tensors, losses, figures, first = inputs(tokens), {}, {}, {}
    for name, implementation in IMPLEMENTATIONS.items():
        try:
            if not find_spec(implementation.package):
                raise ImportError(f"{implementation.package} is not installed")
            loss = implementation.make()
            results, peak, collectives = examine(loss, tensors)
            expected = first.setdefault(implementation.kind, results)
            for ours, theirs in zip(expected, results, strict=True):
                difference = ((ours - theirs).norm() / ours.norm()).item()
                assert difference < 0.02, f"differs from {implementation.kind}'s first by {difference:.3g}"
        except Exception as error:
            figures[name] = {"failure": failure(error)}
        if name in figures:
            clear(tensors)
            gc.collect()  # the exception's frames hold what the call had allocated
            continue
        losses[name] = loss
        an_element = peak / (tokens * len(tensors[1])) - 2 * 2 * implementation.holds_logits
        above_inputs = peak - sum(x.numel() * x.element_size() for x in tensors[:2])
        peaks = {"extra_peak_bytes_per_element": an_element, "peak_bytes_beyond_gradients": above_inputs}
        figures[name] = peaks | {"collectives": collectives, "time": []}
    first.clear()
    for _ in range(repetitions):
        for name, loss in losses.items():
            dist.barrier()
            figures[name]["time"].append(seconds(step, loss, tensors))
            clear(tensors)
    return figures


def measure(tp: int, tokens: int, repetitions: int) -> tuple[list[Figure], dict[str, list[str]]]:
    """The figures at one tensor-parallel size, and the cells of each implementation's row."""
    figures, rows, case = [], {}, f"tp{tp}, {tokens} tokens x {VOCAB}, bf16"
    found = ranks(on_rank, tp, ParallelConfig(tensor=tp), tokens, repetitions, timeout=900)
    times = {
        name: torch.tensor([rank[name]["time"] for rank in found]).amax(0)
        for name in IMPLEMENTATIONS
        if not any("failure" in rank[name] for rank in found)
    }
    for name in IMPLEMENTATIONS:
        if name not in times:
            rows[name] = [next(rank[name]["failure"] for rank in found if "failure" in rank[name])]
            continue
        units = {"extra_peak_bytes_per_element": "B", "peak_bytes_beyond_gradients": "B", "collectives": "calls"}
        peak, above_inputs, calls = (max(rank[name][metric] for rank in found) for metric in units)
        time = times[name].median().item()
        values = zip(("time", *units), (time, peak, above_inputs, calls), ("s", *units.values()), strict=True)
        figures += [Figure("kd_loss", case, name, metric, value, unit) for metric, value, unit in values]
        ratio = f"{(times[name] / times['modelopt']).median():.2f}" if "modelopt" in times else ""
        rows[name] = [f"{time * 1e3:.4g}", ratio, f"{peak:.1f}", f"{above_inputs / 1e9:.2f}", f"{calls:g}"]
    return figures, rows


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=TOKENS)
    options = options.parse_args()
    repetitions = (5 if GPU else 1) if options.quick else 9
    columns = "time [ms]", "of ModelOpt's", "extra peak [B/element]", "beyond gradients [GB]", "collectives"
    table = Table("", "implementation", *columns)
    figures = []
    for tp in (1,) if GPU else (1, 2):
        found, rows = measure(tp, options.tokens, repetitions)
        figures += found
        for name, cells in rows.items():
            table.add_row(f"TP {tp}", name, *cells)
    console = Console()
    console.print(
        f"{options.tokens} tokens, vocabulary {VOCAB}, hidden {STUDENT_HIDDEN} / {TEACHER_HIDDEN}, bf16", table
    )
    if GPU:
        console.print(f"The products at 75 % of an H100's peak: {FLOOR * 1e3:.1f} ms.")
    write(figures, options.json)


if __name__ == "__main__":
    main()
