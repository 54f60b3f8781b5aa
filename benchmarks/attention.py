"""Attention without Transformer Engine (models.spec.TorchAttention): time and memory of forward and backward.

Shapes are Llama-3.1-8B's on a GPU (S 8192, 32 query heads, 8 key/value heads of 128, bf16, batch 1), small ones on a CPU.

    causal            the whole sequence
    window            each token sees itself and the S / 2 - 1 tokens before it
    second half       the last S / 2 queries meet all keys, as on a context-parallel rank

"sdpa" is torch's scaled_dot_product_attention(is_causal=True) of the same tensors over the whole sequence, keys and values
expanded to all heads beforehand: a limit for `causal`. TFLOP/s count what the mask leaves, 4 D a pair forward and 10 D
backward. Memory is the peak beyond inputs, output and gradients.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import Figure, arguments, device_peak_bytes, seconds, write
from torch import Tensor

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.parallel import process_groups
from minitron_mcore.reporting import tables

GPU = torch.cuda.is_available()
LENGTH, HEADS, GROUPS, DIM = (8192, 32, 8, 128) if GPU else (256, 4, 2, 16)


def inputs(length: int) -> list[Tensor]:
    """Query [S, 1, N, D], key and value [S, 1, G, D], the output's gradient [S, 1, N D]."""
    g = torch.Generator(process_groups.device()).manual_seed(0)
    shapes = [(length, 1, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)] + [(length, 1, HEADS * DIM)]
    made = [torch.randn(shape, generator=g, device=process_groups.device(), dtype=torch.bfloat16) for shape in shapes]
    return [x.requires_grad_(n < 3) for n, x in enumerate(made)]


def ours(window: int | None, queries: int) -> Callable[..., Tensor]:
    from minitron_mcore.models.layer_spec import TorchAttention

    config = SimpleNamespace(window_size=(window - 1, 0) if window else None)
    attention = TorchAttention(config, SimpleNamespace(cp=process_groups.cp_group()))
    return lambda q, k, v: attention._attend(q[-queries:], k, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def pairs(queries: int, window: int | None) -> int:
    """Of a query and a key that it sees."""
    seen = (min(window or LENGTH, at + 1) for at in range(LENGTH - queries, LENGTH))
    return sum(seen)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    cases = {
        "causal": (None, LENGTH, {"minitron": ours(None, LENGTH), "sdpa": sdpa}),
        "window": (LENGTH // 2, LENGTH, {"minitron": ours(LENGTH // 2, LENGTH)}),
        "second half": (None, LENGTH // 2, {"minitron": ours(None, LENGTH // 2)}),
    }
    tensors, rows, figures = inputs(LENGTH), [], []
    *leaves, gradient = tensors
    for case, (window, queries, implementations) in cases.items():
        for name, attend in implementations.items():

            def step(attend=attend, queries=queries) -> None:
                attend(*leaves).backward(gradient[-queries:])

            step()
            times = sorted(seconds(step) for _ in range(5 if options.quick else 20))
            time, flops = times[len(times) // 2], 14 * DIM * HEADS * pairs(queries, window)
            row = {"case": case, "by": name, "ms": 1e3 * time, "TFLOP/s": flops / time / 1e12}
            shape = f"{case}, S {LENGTH}, {HEADS}/{GROUPS} heads of {DIM}"
            figures.append(Figure("attention", shape, name, "time", time, "s"))
            if GPU:
                for leaf in leaves:
                    leaf.grad = None
                there = gradient[-queries:].nbytes + sum(leaf.nbytes for leaf in leaves)
                row["extra peak [MiB]"] = (device_peak_bytes(step) - there) / 2**20
                figures.append(Figure("attention", shape, name, "extra_peak", row["extra peak [MiB]"] * 2**20, "B"))
            rows.append(row)
    tables.table("attention, forward and backward", rows)
    write(figures, options.json)


if __name__ == "__main__":
    with process_groups.distributed_context(ParallelConfig()):
        main()
