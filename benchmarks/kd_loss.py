"""Distillation loss from hidden states to gradients: time, extra peak memory, collectives, beside torch and ModelOpt.

All get the same bf16 hidden states and heads and give the loss and its gradients to the student's hidden states
and head:

    minitron                 minitron_mcore.distill.losses.distillation_loss
    minitron, torch path     the same without its Triton kernels (GPU)
    minitron, given logits   both logits, distillation_loss_of_logits of the same file
    torch                    both logits, gathered over the vocabulary, log_softmax and kl_div in fp32
    torch.compile            the same, compiled (GPU)
    modelopt                 both logits, LogitsKLLoss of modelopt.torch.distill.plugins.megatron
    liger                    LigerFusedLinearJSD with beta 0, which is the forward KL (GPU, where it is installed)

On a CPU: 2,048 tokens of a small model, at TP 1 and 2. On a GPU: 8,192 tokens of a large one at TP 1, beside the time that the
matrix products take at 75 % of an H100's 989 TFLOP/s. Time is the median over interleaved repetitions, of the slowest rank,
with cores / TP threads a rank. Memory is the peak beyond the inputs (and beyond the two bf16 logits of all but minitron and
liger) over tokens x this rank's vocabulary; on a CPU the resident memory, which holds what malloc keeps as well.
Collectives are those of one call, forward and backward, less the reduction of the hidden states' gradient, which all
need alike. On one rank others may disturb the time: threads wait for each other, so measure on an idle machine.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import Figure, device_peak_bytes, parser, peak_bytes, ranks, seconds, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from minitron_mcore import runtime
from minitron_mcore.config import ParallelConfig

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


def minitron() -> Loss:
    from minitron_mcore.distill.losses import distillation_loss

    def loss(*states):
        return distillation_loss(*states, *labels_and_mask(states[0]), vocab_size=VOCAB, tp_group=runtime.tp_group())[0]

    return loss


def minitron_torch() -> Loss:
    from minitron_mcore.distill import tiles

    fused = minitron()

    def loss(*states):
        with patch.object(tiles, "kernels_for", return_value=None):
            return fused(*states)

    return loss


def minitron_logits() -> Loss:
    from minitron_mcore.distill.losses import distillation_loss_of_logits

    def loss(hidden, head, teacher_hidden, teacher_head):
        both = hidden @ head.t(), teacher_hidden @ teacher_head.t()
        options = dict(vocab_size=VOCAB, tp_group=runtime.tp_group())
        return distillation_loss_of_logits(*both, *labels_and_mask(hidden), **options)[0]

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

    tp = runtime.tp_group().size()
    criterion = LogitsKLLoss(
        TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=tp)
    )

    def loss(hidden, head, teacher_hidden, teacher_head):
        per_token, tp_reduce, _ = criterion((hidden @ head.t())[:, None], (teacher_hidden @ teacher_head.t())[:, None])
        total = per_token.sum()
        if tp_reduce and tp > 1:  # as Megatron-LM's loss function does: for the value, not for the gradient
            value = total.detach().clone()
            dist.all_reduce(value, group=runtime.tp_group())
            total = total + (value - total.detach())
        return total

    return loss


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    criterion = LigerFusedLinearJSD(jsd_beta=0.0)

    def loss(hidden, *others):
        return len(hidden) * criterion(hidden, *others, None)  # a mean over tokens

    return loss


IMPLEMENTATIONS = {
    "minitron": minitron,
    **({"minitron, torch path": minitron_torch} if GPU else {}),
    "minitron, given logits": minitron_logits,
    "torch": dense,
    **({"torch.compile": lambda: torch.compile(dense())} if GPU else {}),
    **({"modelopt": modelopt} if find_spec("modelopt") else {}),
    **({"liger": liger} if GPU and find_spec("liger_kernel") else {}),
}
HOLDS_NO_LOGITS = "minitron", "minitron, torch path", "liger"


def inputs(tokens: int) -> Inputs:
    """The same hidden states on all ranks, this rank's rows of both heads; logits spread like a language model's."""
    group = runtime.tp_group()
    torch.set_num_threads(max(1, os.cpu_count() // group.size()))
    g = torch.Generator().manual_seed(0)

    def states(width: int) -> tuple[Tensor, Tensor]:
        hidden, head = torch.randn(tokens, width, generator=g), torch.randn(VOCAB, width, generator=g) * 3 / width**0.5
        rows = head.chunk(group.size())[group.rank()]
        return tuple(x.to(runtime.device(), torch.bfloat16) for x in (hidden, rows))

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
    step(loss, inputs(16))  # what libraries set up on first use is no part of the loss
    results = []
    with CommDebugMode() as counter:
        peak = (device_peak_bytes if GPU else peak_bytes)(
            lambda: results.append(step(loss, tensors, reduce_hidden=False))
        )
    results += [x.grad.float() for x in tensors[:2]]
    clear(tensors)
    return tuple(results), peak, counter.get_total_counts()


def clear(tensors: Inputs) -> None:
    for x in tensors:
        x.grad = None


def on_rank(tokens: int, repetitions: int) -> dict[str, dict[str, float | list[float]]]:
    """This rank's figures of every implementation; the timed repetitions take the implementations in turn."""
    tensors, losses = inputs(tokens), {name: make() for name, make in IMPLEMENTATIONS.items()}
    figures, first = {}, None
    for name, loss in list(losses.items()):
        try:
            results, peak, collectives = examine(loss, tensors)
        except Exception as error:  # a peer that doesn't run here is no reason to stop
            if name == "minitron":
                raise
            runtime.log(f"{name} is left out: {type(error).__name__}: {str(error)[:300]}")
            clear(tensors)
            del losses[name]
            continue
        first = first or results
        for ours, theirs in zip(first, results, strict=True):
            difference = ((ours - theirs).norm() / ours.norm()).item()
            assert difference < 0.02, f"minitron and {name} disagree by {difference:.3g}"
        logits = 0 if name in HOLDS_NO_LOGITS else 2 * 2
        peak = peak / (tokens * len(tensors[1])) - logits
        figures[name] = {"extra_peak_bytes_per_element": peak, "collectives": collectives, "time": []}
    for _ in range(repetitions):
        for name, loss in losses.items():
            dist.barrier()
            figures[name]["time"].append(seconds(step, loss, tensors))
            clear(tensors)
    return figures


def measure(tp: int, tokens: int, repetitions: int) -> tuple[list[Figure], dict[str, float]]:
    """The figures at one tensor-parallel size; each time over ModelOpt's (the median of the repetitions' ratios)."""
    figures, case = [], f"tp{tp}, {tokens} tokens x {VOCAB}, bf16"
    found = ranks(on_rank, tp, ParallelConfig(tensor=tp), tokens, repetitions, timeout=900)
    times = {name: torch.tensor([rank[name]["time"] for rank in found]).amax(0) for name in found[0]}
    for name in times:
        peak, calls = (max(rank[name][m] for rank in found) for m in ("extra_peak_bytes_per_element", "collectives"))
        figures += [
            Figure("kd_loss", case, name, "time", times[name].median().item(), "s"),
            Figure("kd_loss", case, name, "extra_peak_bytes_per_element", peak, "B"),
            Figure("kd_loss", case, name, "collectives", calls, "calls"),
        ]
    peer = times["modelopt" if "modelopt" in times else "torch"]
    return figures, {name: (times[name] / peer).median().item() for name in times}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=TOKENS)
    options = options.parse_args()
    repetitions = 9 if GPU or not options.quick else 1
    table = Table("", "implementation", "time [ms]", "of ModelOpt's", "extra peak [B/element]", "collectives")
    figures = []
    for tp in (1,) if GPU else (1, 2):
        found, ratios = measure(tp, options.tokens, repetitions)
        figures += found
        for name, ratio in ratios.items():
            duration, peak, calls = (figure.value for figure in found if figure.implementation == name)
            table.add_row(f"TP {tp}", name, f"{duration * 1e3:.4g}", f"{ratio:.2f}", f"{peak:.1f}", f"{calls:g}")
    console = Console()
    console.print(
        f"{options.tokens} tokens, vocabulary {VOCAB}, hidden {STUDENT_HIDDEN} / {TEACHER_HIDDEN}, bf16", table
    )
    if GPU:
        console.print(f"The products at 75 % of an H100's peak: {FLOOR * 1e3:.1f} ms.")
        if "liger" not in IMPLEMENTATIONS:
            console.print("liger is left out: `pip install liger-kernel`.")
    write(figures, options.json)


if __name__ == "__main__":
    main()
