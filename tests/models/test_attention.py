"""Attention without Transformer Engine against the formula in fp64. A failure means that a model sees other positions than its
window, or that memory grows with the square of the sequence."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.models import layer_spec
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import cp_shard
from minitron_mcore.testing import on_ranks, saved_bytes

LENGTH, BATCH, HEADS, DIM = 600, 2, 4, 16
"""No multiple of a block, nor of what kernels want their rows to begin at."""
WINDOWS = [None, 1, 2, 40, 129, 599, 600, 5000]


def tensors(groups: int, length: int = LENGTH) -> list[Tensor]:
    """Query, key, value, gradient of the output."""
    g = torch.Generator().manual_seed(0)
    shapes = (HEADS, groups, groups, HEADS)
    query, key, value, gradient = (torch.randn(length, BATCH, n, DIM, generator=g) for n in shapes)
    return [2 * query, key, value, gradient.flatten(2)]


def oracle(tensors: list[Tensor], window: int | None) -> list[Tensor]:
    """Output and the gradients of query, key and value: the formula, dense, in fp64."""
    query, key, value = leaves = [x.double().requires_grad_() for x in tensors[:3]]
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / math.sqrt(DIM)
    distance = torch.arange(len(query))[:, None] - torch.arange(len(key))
    scores = scores.masked_fill((distance < 0) | (distance >= (window or len(key))), -torch.inf)
    out = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value).flatten(2)
    out.backward(tensors[3].double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def attention(window: int | None) -> layer_spec.TorchAttention:
    config = SimpleNamespace(window_size=window and (window - 1, 0))
    return layer_spec.TorchAttention(config, SimpleNamespace(cp=process_groups.cp_group()))


def run(tensors: list[Tensor], window: int | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attention(window)(*leaves)
    out.backward(tensors[3])
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def shared(x: Tensor) -> Tensor:
    """This context-parallel rank's rows of [S, ...]."""
    order = cp_shard({"x": torch.arange(len(x))[None]})["x"][0]
    return x[order]


def on_rank(groups: int) -> list[list[Tensor]]:
    whole = tensors(groups)
    return [[shared(torch.arange(LENGTH)), *run([shared(x) for x in whole], window)] for window in WINDOWS]


@pytest.mark.default_cases("1-1", "2-4", "3-2")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("context", [1, 2, 3])
def test_output_and_gradients_equal_the_formula(context, groups):
    ranks = on_ranks(on_rank, context, ParallelConfig(context=context), groups)
    for window, *found in zip(WINDOWS, *ranks, strict=True):
        order = torch.cat([rank[0] for rank in found])
        for part, expected in enumerate(oracle(tensors(groups), window), 1):
            ours = torch.cat([rank[part] for rank in found]).double()
            assert (ours - expected[order]).abs().max() <= 1e-5 * max(1, expected.abs().max()), (window, part)


def saved_on_rank(window: int | None, length: int) -> int:
    """Bytes that autograd holds for the backward pass, beside this rank's queries, keys and values."""
    leaves = [shared(x).requires_grad_() for x in tensors(2, length)[:3]]
    with saved_bytes(leaves) as saved:
        out = attention(window)(*leaves)
    return saved.now * out.requires_grad


@pytest.mark.parametrize(("context", "window"), [(1, 64), (2, 64), (2, None)])
def test_memory_grows_with_the_sequence_not_its_square(context, window):
    """Per token of the sequence: queries and outputs in the order of the kernels, gathered keys and values; a row of the mask of a
    block of 128 queries for each of the two heads of a group."""
    lengths, parallel = (2048, 4096), ParallelConfig(context=context)
    short, long = (max(on_ranks(saved_on_rank, context, parallel, window, length)) for length in lengths)
    limit = 4 * DIM * BATCH * (3 * HEADS) + (4 * 128 * 2 if window is None else 0)
    assert 0 < long - short <= 2048 * limit, (short, long)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [40, 600])
def test_bf16_on_cuda(window):
    found = [x.to("cuda", torch.bfloat16) for x in tensors(2)]
    expected = oracle([x.cpu() for x in found], window)
    leaves = [x.requires_grad_() for x in found[:3]]
    out = layer_spec.banded_attention(*leaves, window)
    out.backward(found[3])
    for ours, wanted in zip([out.detach(), *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert (ours.cpu() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_cuda_is_not_a_square():
    """8,192 positions, 32 heads on 8, window 1,024: a square in bf16 would be 4.3 GB."""
    shapes = ((8192, 1, n, 128) for n in (32, 8, 8))
    leaves = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer_spec.banded_attention(*leaves, 1024).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9
